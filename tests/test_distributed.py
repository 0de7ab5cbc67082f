"""Two processes give what one process gives on the same global batch."""

import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn import functional as F

from contralto.distributed import gather_rows, mean_weight
from contralto.systems.webly.capro import CAPro

N, CLASSES = 12, 4


def build(stage):
    torch.manual_seed(0)
    system = CAPro(
        nn.Linear(6, 8), CLASSES, 8, stage=stage, hidden=7, dim=5, queue_size=30, init_proto_epoch=0, start_clean_epoch=0,
        momentum_prototype=0.9, mixup=0.0, threshold=0.4, keep_threshold=0.26,
    ).double()  # fmt: skip
    system.prototypes.copy_(F.normalize(torch.randn(CLASSES, 5, dtype=torch.float64), dim=1))
    return system


def batch(step, rows):
    g = torch.Generator().manual_seed(step)
    views = [torch.randn(N, 6, generator=g, dtype=torch.float64) for _ in range(2)]
    label, anchor = torch.randint(CLASSES, (N,), generator=g), torch.rand(N, generator=g) < 0.1
    weight = torch.rand(N, generator=g, dtype=torch.float64)
    return {"views": [v[rows] for v in views], "label": label[rows], "anchor": anchor[rows], "weight": weight[rows]}


def train(stage, rows, average=lambda x: x):
    """Three steps; losses, final gradients and all buffers."""
    system = build(stage)
    optimizer = torch.optim.SGD([p for n, p in system.named_parameters() if not n.startswith("momentum")], 0.1)
    losses = []
    for step in range(3):
        out = system.step(batch(step, rows), epoch=1)
        optimizer.zero_grad()
        out["loss"].backward()
        for p in system.parameters():
            if p.grad is not None:
                p.grad = average(p.grad)
        optimizer.step()
        losses.append(average(out["loss"].detach()))
    return torch.stack(losses), {k: v.clone() for k, v in system.state_dict().items()}


def mean_over_ranks(x):
    x = x.clone()
    dist.all_reduce(x)
    return x / dist.get_world_size()


def worker(rank, world, port, stage, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    torch.save(train(stage, torch.arange(N)[rank::world], mean_over_ranks), f"{folder}/{rank}.pt")
    uneven = gather_rows(torch.arange(5)[rank::world])
    empty = mean_weight(torch.tensor(3 if rank == 0 else 0))
    torch.save((uneven, empty), f"{folder}/uneven{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("stage", ["plain", "vanilla", "capro", "finetune"])
def test_two_processes_equal_one(tmp_path, stage):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(worker, (2, port, stage, str(tmp_path)), nprocs=2)
    losses, state = train(stage, torch.arange(N))
    for rank in range(2):
        their_losses, their_state = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        torch.testing.assert_close(their_losses, losses, rtol=1e-9, atol=1e-9)
        for key, value in state.items():
            torch.testing.assert_close(their_state[key], value, rtol=1e-8, atol=1e-9, msg=lambda m, k=key: f"{k}: {m}")
        uneven, share = torch.load(tmp_path / f"uneven{rank}.pt", weights_only=True)
        assert uneven.tolist() == [0, 1, 2, 3, 4]
        assert share == (2.0 if rank == 0 else 0.0)
