"""What tests of self-supervised systems share: a tiny network, batches of vectors, a loop, and two processes that run it."""

import copy
import socket

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

SAMPLES = 30


def encoder():
    """Without batch norm, which would see other batches on two ranks."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 10), nn.Tanh())


def without_batch_norm(system):
    """The system in double precision, its batch norms replaced by fixed scalings."""
    for name, module in list(system.named_modules()):
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            parent = system.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], nn.Identity())
    return system.double()


def batch(step, n=8, views=2):
    """Views of samples that are the same in all of them but for noise."""
    g = torch.Generator().manual_seed(step)
    x = torch.randn(n, 6, generator=g, dtype=torch.float64)
    index = torch.randperm(SAMPLES, generator=g)[:n]
    pixels = [x + 0.3 * torch.randn(n, 6, generator=g, dtype=torch.float64) for _ in range(views)]
    return {"views": pixels, "index": index}


def share(whole, rank, world):
    """The rows of a batch that a rank has, views in double precision."""
    rows = torch.arange(len(whole["index"]))[rank::world]
    return {k: [v[rows].double() for v in x] if isinstance(x, list) else x[rows] for k, x in whole.items()}


def train(system, *, first=0, steps=3, n=8, views=2, rank=0, world=1, optimizer=None, make=None):
    """Losses of some steps, means over ranks; gradients are averaged over them as DDP does. `make` gives batches by step."""
    make = make or (lambda step: batch(step, n, views))
    optimizer = optimizer or torch.optim.SGD([p for p in system.parameters() if p.requires_grad], 0.1)
    losses = []
    for step in range(first, first + steps):
        loss = system.step(share(make(step), rank, world))["loss"]
        optimizer.zero_grad()
        loss.backward()
        for p in system.parameters():
            if p.grad is not None:
                p.grad = average(p.grad)
        optimizer.step()
        system.at_step_end()
        losses.append(average(loss.detach()))
    return torch.stack(losses)


def average(x):
    if not dist.is_initialized():
        return x
    x = x.clone()
    dist.all_reduce(x)
    return x / dist.get_world_size()


def goes_on(build, *, views=2):
    """A system that was saved and loaded takes the same next steps, bit by bit."""
    one, other = build(), build()
    train(one, views=views)
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    assert torch.equal(train(one, first=3, views=views), train(other, first=3, views=views))
    for (name, a), b in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def on_two_ranks(run, folder):
    """What `run(rank, world)` gives on each of two processes; a dict of tensors or of dicts of tensors."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_worker, (2, port, run, str(folder)), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def _worker(rank, world, port, run, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    torch.save(run(rank, world), f"{folder}/{rank}.pt")
    dist.destroy_process_group()
