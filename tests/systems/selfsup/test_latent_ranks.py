"""cMIM and SepCLR: two processes give what one gives; saved runs go on bit by bit."""

import pytest
import torch

from contralto.systems.selfsup.cmim import CMIM
from contralto.systems.selfsup.sepclr import SepCLR

from tests.ranks import on_two_ranks
from tests.systems.selfsup import steps

pytestmark = pytest.mark.xdist_group("ranks")  # two processes are started once


class Labelled(SepCLR):
    """With a label and an attribute for every sample."""

    def step(self, batch):
        more = {"label": batch["index"] % 3 % 2, "attributes": batch["index"].unsqueeze(1).double() / steps.SAMPLES}
        return super().step(batch | more)


VALUES = {"vector": 6, "likelihood": "gaussian", "hidden": 7, "dim": 5}
CODES = {"hidden": 7, "common_dim": 5, "beta_salient": 3.0, "beta_reg": 2.0}
BUILDERS = {  # system, arguments, number of views
    **{mode: (CMIM, {"mode": mode, **VALUES}, 1) for mode in ("cmim", "amim", "smim", "vae")},
    "infonce_aug": (CMIM, {"mode": "infonce_aug", **VALUES}, 2),
    "sepclr": (Labelled, {"salient_dim": 3, **CODES}, 2),
    "sepclr, attribute": (Labelled, {"salient_dim": 1, "attributes": ("continuous",), **CODES}, 2),
}


def build(name):
    system, arguments, _ = BUILDERS[name]
    facts = {"num_features": 10, "num_samples": steps.SAMPLES, "steps_per_epoch": 3, "epochs": 4, "seed": 1}
    return steps.without_batch_norm(system(steps.encoder(), **facts, **arguments))


def train(name, system, **how):
    optimizer = torch.optim.SGD(system.parameters(), 0.01)
    return steps.train(system, views=BUILDERS[name][2], optimizer=optimizer, **how)


def run(rank=0, world=1):
    found = {}
    for name in BUILDERS:
        for n in (8, 9):  # the second rank has one sample less
            system = build(name)
            losses = train(name, system, n=n, rank=rank, world=world)
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
