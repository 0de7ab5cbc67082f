"""Two processes give what one gives on the same batch: SwAV, DeepCluster-v2, GroCo, the projection head, Sinkhorn."""

import pytest
import torch
from torch import nn

from contralto.distributed import gather_rows
from contralto.encoders.heads import mlp
from contralto.losses.sinkhorn import sinkhorn
from contralto.systems.selfsup.deepcluster import DeepClusterV2
from contralto.systems.selfsup.groco import GroCo
from contralto.systems.selfsup.projection_head import ProjectionHead
from contralto.systems.selfsup.swav import SwAV

from tests.ranks import average, on_two_ranks

pytestmark = [
    pytest.mark.xdist_group("ranks"),  # two processes are started once
    pytest.mark.filterwarnings("ignore:SwAV has collapsed"),  # a few steps on noise
]

SWAV = {"num_prototypes": [6, 4], "freeze_steps": 1, "batch_size": 12, "check_every": 2, "hidden": 7, "dim": 5}
SYSTEMS = {
    "swav": (SwAV, SWAV),
    "swav with a queue": (SwAV, SWAV | {"queue_size": 24, "queue_epoch": 0}),
    "deepcluster": (DeepClusterV2, {"num_samples": 40, "num_prototypes": [5, 3], "hidden": 7, "dim": 5}),
    "groco": (GroCo, {"hardest": 3, "hidden": 7, "dim": 5}),
    "groco without stopped gradient": (GroCo, {"hardest": 3, "hidden": 7, "dim": 5, "stop_grad": False}),
    "nt_xent": (ProjectionHead, {"head": "fixed"}),
    "sup_con": (ProjectionHead, {"head": "mlp", "hidden": 7, "objective": "sup_con"}),
    "cross_entropy": (ProjectionHead, {"head": "mlp", "hidden": 7, "objective": "cross_entropy", "num_classes": 3}),
}
CASES = {
    f"{name}, {n} rows": (name, n) for name in SYSTEMS for n in ((12, 13) if name != "swav with a queue" else (12,))
}


def build(name):
    torch.manual_seed(0)
    kind, options = SYSTEMS[name]
    system = kind(nn.Linear(6, 8), num_features=8, steps_per_epoch=1, **options)
    if hasattr(system, "projector"):  # batch norm sees the rows of one process only
        torch.manual_seed(1)
        system.projector = mlp([8, 7, 5])
    return system.double()


def batch(step, n, rows):
    g = torch.Generator().manual_seed(step)
    views = [torch.randn(n, 6, generator=g, dtype=torch.float64) for _ in range(2)]
    label = torch.randint(3, (n,), generator=g)
    return {"views": [v[rows] for v in views], "index": ((torch.arange(n) + 3 * step) % 40)[rows], "label": label[rows]}


def train(name, n, rank=0, world=1):
    system = build(name)
    optimizer = torch.optim.SGD([p for p in system.parameters() if p.requires_grad], 0.02, momentum=0.9)
    losses = []
    for step in range(4):
        out = system.step(batch(step, n, torch.arange(n)[rank::world]))
        optimizer.zero_grad()
        out["loss"].backward()
        for p in system.parameters():
            if p.requires_grad:
                p.grad = average(torch.zeros_like(p) if p.grad is None else p.grad)
        system.on_before_optimizer_step(optimizer)
        optimizer.step()
        system.at_step_end()
        losses.append(average(out["loss"].detach()))
    return {"losses": torch.stack(losses), "state": system.state_dict()}


def scores(n):
    return torch.randn(n, 5, generator=torch.Generator().manual_seed(n), dtype=torch.float64).clamp(-1, 1)


def both(rank, world):
    found = {case: train(*words, rank, world) for case, words in CASES.items()}
    codes = {n: gather_rows(sinkhorn(scores(n)[rank::world])) for n in (12, 13)}
    return {"cases": found, "codes": codes}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What two processes found."""
    return on_two_ranks(both, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("case", CASES)
def test_two_processes_equal_one(ranks, case):
    alone = train(*CASES[case])
    assert alone["losses"][-1] > 0
    close = 1e-4 if case.startswith("deepcluster") else 1e-7  # k-means is in single precision
    for rank in ranks:
        found = rank["cases"][case]
        torch.testing.assert_close(found["losses"], alone["losses"], rtol=close, atol=1e-9)
        for key, value in alone["state"].items():
            torch.testing.assert_close(found["state"][key], value, rtol=close, atol=close / 100, msg=f"{case}: {key}")


@pytest.mark.parametrize("n", [12, 13])
def test_codes_of_two_processes_are_those_of_one(ranks, n):
    for rank in ranks:
        torch.testing.assert_close(rank["codes"][n], sinkhorn(scores(n)), rtol=1e-10, atol=1e-12)
