"""What contrasts a batch: two processes give what one gives, and saved runs go on bit by bit."""

import pytest
import torch

from contralto.systems.selfsup.byol import BYOL
from contralto.systems.selfsup.cacr import CACR
from contralto.systems.selfsup.contrastive_behaviour import ContrastiveBehaviour
from contralto.systems.selfsup.dcl import DecoupledContrast
from contralto.systems.selfsup.isogclr import ISogCLR
from contralto.systems.selfsup.moco import MoCo
from contralto.systems.selfsup.simclr import SimCLR

from tests.ranks import on_two_ranks
from tests.systems.selfsup import steps

pytestmark = pytest.mark.xdist_group("ranks")  # two processes are started once

QUEUE = {"queue_size": 24, "decay": 0.9}
BUILDERS = {  # system, arguments, number of views
    "simclr": (SimCLR, {"hidden": 7}, 2),
    "moco": (MoCo, {"hidden": 7, **QUEUE}, 2),
    "moco, symmetric": (MoCo, {"hidden": 7, "symmetric": True, **QUEUE}, 2),
    "byol": (BYOL, {"hidden": 7}, 2),
    "dcl": (DecoupledContrast, {"hidden": 7}, 2),
    "dclw": (DecoupledContrast, {"hidden": 7, "sigma": 0.5}, 2),
    "dcl, queue": (DecoupledContrast, {"hidden": 7, "sigma": 0.5, **QUEUE}, 2),
    "isogclr": (ISogCLR, {"hidden": 7}, 2),
    "isogclr, official": (ISogCLR, {"hidden": 7, "official": True}, 2),
    "sogclr": (ISogCLR, {"hidden": 7, "learn_temperature": False}, 2),
    "isogclr, queue": (ISogCLR, {"hidden": 7, **QUEUE}, 2),
    "cacr": (CACR, {"num_views": 3}, 3),
    "cacr, queue": (CACR, {"form": "queue", "num_views": 3, **QUEUE}, 3),
    "cacr, momentum": (CACR, {"form": "momentum", "num_views": 2, "hidden": 7, "cost": "rbf", "decay": 0.9}, 2),
    "cacr, momentum, distance": (CACR, {"form": "momentum", "num_views": 3, "hidden": 7, "decay": 0.9}, 3),
    "bank": (ContrastiveBehaviour, {"num_negatives": 9}, 1),
    "bank, hard": (ContrastiveBehaviour, {"loss": "hard", "alpha": 0.2}, 2),
    "behaviour, queue": (ContrastiveBehaviour, {"negatives": "queue", "loss": "hard_simple", "alpha": 0.2, **QUEUE}, 2),
    "behaviour, batch": (ContrastiveBehaviour, {"negatives": "batch", "loss": "simple"}, 2),
}


def build(name):
    system, arguments, _ = BUILDERS[name]
    facts = {"num_features": 10, "num_samples": steps.SAMPLES, "steps_per_epoch": 3, "epochs": 4, "dim": 5, "seed": 1}
    return steps.without_batch_norm(system(steps.encoder(), **facts, **arguments))


def run(rank=0, world=1):
    found = {}
    for name, (_, _, views) in BUILDERS.items():
        for n in (8, 9):  # the second rank has one sample less
            system = build(name)
            losses = steps.train(system, n=n, views=views, rank=rank, world=world)
            found[f"{name}, {n}"] = {"losses": losses, **system.state_dict()}
    return found


@pytest.fixture(scope="module")
def alone():
    return run()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return on_two_ranks(run, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("n", [8, 9])
@pytest.mark.parametrize("name", BUILDERS)
def test_two_processes_equal_one(alone, ranks, name, n):
    expected = alone[f"{name}, {n}"]
    assert torch.isfinite(expected["losses"]).all()
    assert expected["losses"].diff().abs().min() > 0
    for rank in ranks:
        for key, value in expected.items():
            torch.testing.assert_close(
                rank[f"{name}, {n}"][key], value, rtol=1e-8, atol=1e-10, msg=lambda m, k=key: f"{k}: {m}"
            )


@pytest.mark.parametrize("name", BUILDERS)
def test_a_saved_run_goes_on_bit_by_bit(name):
    steps.goes_on(lambda: build(name), views=BUILDERS[name][2])
