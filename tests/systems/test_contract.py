"""What every system of the registry must do, whatever it is."""

import copy

import pytest
import torch
from torch import nn

from contralto.errors import UsageError
from contralto.systems.registry import SYSTEMS, get_job, get_system

CLASSES, WIDTH = 4, 6
WEBLY = [name for name, entry in SYSTEMS.items() if ".webly." in entry.path]


def build(name, **arguments):
    torch.manual_seed(0)
    system = get_system(name)(
        nn.Linear(8, WIDTH), num_classes=CLASSES, num_features=WIDTH, queue_size=16, hidden=8, dim=5, **arguments
    )
    return system.train()


def batch(seed=0, n=8, soft=False):
    g = torch.Generator().manual_seed(seed)
    extra = {}
    if soft:
        posterior = torch.rand(n, CLASSES, generator=g).softmax(1)
        extra = {"posterior": 0.9 * posterior, "target": posterior}
    return extra | {
        "views": [torch.randn(n, 8, generator=g) for _ in range(2)],
        "label": torch.randint(CLASSES, (n,), generator=g),
        "anchor": torch.rand(n, generator=g) < 0.2,
        "weight": torch.ones(n),
        "index": torch.arange(n),
        "text_scores": torch.full((n, CLASSES), 1 / CLASSES),
    }


def batch_for(name, seed=0, soft=False):
    out = batch(seed, soft=soft)
    if get_job(name).multilabel:
        labels = (torch.rand(8, CLASSES, generator=torch.Generator().manual_seed(seed)) < 0.4).long()
        out |= {"label": labels, "anchor": labels * out["anchor"].long().unsqueeze(1)}
    return out


def steps(name, system, optimizer, first, count):
    losses = []
    for i in range(first, first + count):
        loss = system.step(batch_for(name, i), epoch=60, batch_idx=i)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


NETWORK = {"encoder", "classifier", "projector", "auxiliary"}
TRAINS = {  # what has gradients, by system and stage
    "capro": {"plain": {"encoder", "classifier"}, "vanilla": NETWORK, "capro": NETWORK, "finetune": NETWORK},
    "fopro": {
        "plain": {"encoder", "classifier"}, "prototypes": NETWORK, "relation": {"relation"}, "fopro": NETWORK | {"relation"},
        "finetune": {"encoder", "classifier"},
    },
    "capro-multilabel": {"plain": {"encoder", "classifier"}, "vanilla": NETWORK, "capro": NETWORK, "finetune": NETWORK},
}  # fmt: skip


@pytest.mark.parametrize(("name", "stage"), [(n, s) for n in WEBLY for s in get_system(n).stages])
class TestContract:
    @pytest.mark.parametrize("soft", [False, True])
    def test_one_step_has_finite_gradients_where_they_belong_and_none_elsewhere(self, name, stage, soft):
        system = build(name, stage=stage, threshold=0.55, temperature=0.01)
        system.prototypes.copy_(nn.functional.normalize(torch.randn(system.prototypes.shape), dim=-1))
        system.step(batch_for(name, soft=soft), epoch=60)["loss"].backward()
        for part, module in system.named_children():
            grads = [p.grad for p in module.parameters()]
            if part in TRAINS[name][stage]:
                assert all(g is not None and torch.isfinite(g).all() for g in grads), part
            if part == "momentum_encoder":
                assert all(g is None for g in grads)

    def test_saved_and_loaded_it_takes_the_same_next_steps(self, name, stage):
        system = build(name, stage=stage)
        optimizer = system.configure_optimizers()
        steps(name, system, optimizer, 0, 2)
        other = build(name, stage=stage)
        other.load_state_dict(copy.deepcopy(system.state_dict()))
        again = other.configure_optimizers()
        again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        assert steps(name, system, optimizer, 2, 3) == steps(name, other, again, 2, 3)
        assert all(
            torch.equal(a, b) for a, b in zip(system.state_dict().values(), other.state_dict().values(), strict=True)
        )

    def test_two_identical_runs_agree(self, name, stage):
        runs = [build(name, stage=stage) for _ in range(2)]
        assert steps(name, runs[0], runs[0].configure_optimizers(), 0, 3) == steps(
            name, runs[1], runs[1].configure_optimizers(), 0, 3
        )

    def test_probabilities_are_probabilities(self, name, stage):
        system = build(name, stage=stage).eval()
        found = system(batch()["views"][0])
        assert ((found >= 0) & (found <= 1)).all()
        if not get_job(name).multilabel:
            torch.testing.assert_close(found.sum(1), torch.ones(8))


@pytest.mark.parametrize("name", WEBLY)
def test_construction_leaves_the_global_random_state_alone_and_bad_input_is_named(name):
    torch.manual_seed(1)
    expected = torch.rand(1)
    system = get_system(name)
    torch.manual_seed(1)
    system(nn.Identity(), num_classes=CLASSES, num_features=WIDTH, queue_size=16, hidden=8, dim=5)
    assert torch.equal(torch.rand(1), expected)
    with pytest.raises(UsageError, match="num_classes"):
        system(nn.Identity(), num_classes=1, num_features=WIDTH)
    with pytest.raises(UsageError, match="no system is called"):
        get_system("nothing")


@pytest.mark.parametrize("name", SYSTEMS)
def test_the_registry_says_what_it_is(name):
    entry = SYSTEMS[name]
    assert entry.name == name
    assert all(len(x) > 5 for x in (entry.problem, entry.data, entry.paper, entry.path, entry.job))
    assert get_system(name).__doc__
