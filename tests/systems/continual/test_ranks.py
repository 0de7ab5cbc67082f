"""Two processes give what one gives, whatever a loss compares."""

import pytest
import torch

from tests.ranks import on_two_ranks
from tests.systems.continual import steps
from tests.systems.selfsup.steps import share, train

pytestmark = pytest.mark.xdist_group("ranks")

KINDS = {
    "prd": ("prd", {}), "prd, code": ("prd", {"axis": "prototypes"}), "prd, features": ("prd", {"distill": "features"}),
    "lwf": ("lwf", {}), "replay": ("replay", {}),
}  # fmt: skip


def run(rank=0, world=1):
    found = {}
    for kind, (name, arguments) in KINDS.items():
        for n in (8, 9):  # the second rank has one sample less
            system = steps.build(name, **arguments).double()
            losses = train(
                system, n=n, rank=rank, world=world, make=lambda step, n=n: steps.batch("prd", None, step, n)
            )
            found[f"{kind}, {n}"] = {"losses": losses, **system.state_dict()}
    return found


def test_two_processes_take_the_steps_of_one(tmp_path):
    alone = run()
    for rank in on_two_ranks(run, tmp_path):
        for kind, state in alone.items():
            for key, value in state.items():
                torch.testing.assert_close(rank[kind][key], value, rtol=1e-9, atol=1e-11, msg=f"{kind}: {key}")


def test_the_ranks_had_different_samples():
    whole = steps.batch("prd", None, 0, 9)
    parts = [share(whole, rank, 2)["index"].tolist() for rank in range(2)]
    assert sorted(parts[0] + parts[1]) == sorted(whole["index"].tolist())
