"""AdaInf: NT-Xent of the official code, LARS as there, views whose strength is one number."""

import copy
import inspect
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from contralto.errors import UsageError
from contralto.losses.pairs import nt_xent
from contralto.pipelines.job import load_preset, presets_of
from contralto.systems.optim import LARS
from contralto.systems.selfsup.adainf import AdaInf, knob_grid
from contralto.systems.selfsup.byol import BYOL
from contralto.systems.selfsup.moco import MoCo
from contralto.systems.selfsup.simclr import SimCLR
from contralto.training.probes import OnlineProbe
from contralto.views.presets import adainf_pair

from tests.systems.selfsup import steps

REFERENCE = Path(__file__).parents[2] / "reference" / "adainf.npz"
FACTS = {
    "num_features": 10,
    "num_samples": steps.SAMPLES,
    "steps_per_epoch": 3,
    "epochs": 4,
    "dim": 5,
    "hidden": 7,
    "seed": 1,
}


@pytest.mark.parametrize(("case", "temperature"), [("c0", 0.2), ("c2", 0.5)])
def test_the_loss_is_that_of_the_official_code(case, temperature):
    with np.load(REFERENCE, allow_pickle=False) as z:
        rows, loss, grad = (torch.tensor(z[f"{case}_{k}"]) for k in ("z", "loss", "grad_z"))
    rows.requires_grad_()
    found = nt_xent(*rows.chunk(2), temperature=temperature)
    found.backward()
    torch.testing.assert_close(found, loss, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(rows.grad, grad, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("base", "system", "more"),
    [
        ("simclr", SimCLR, {"temperature": 0.2}),
        ("moco", MoCo, {"queue_size": 24, "decay": 0.9}),
        ("byol", BYOL, {"decay": 0.9}),
    ],
)
def test_the_step_is_that_of_the_base(base, system, more):
    plain = steps.without_batch_norm(system(steps.encoder(), **FACTS, **more))
    found = steps.without_batch_norm(AdaInf(steps.encoder(), base=base, **FACTS, **more))
    assert torch.equal(steps.train(found), steps.train(plain))
    assert found.embed(torch.zeros(2, 6, dtype=torch.float64)).shape == (2, 10)


def test_the_temperature_of_the_paper_is_the_default():
    system, batch = steps.without_batch_norm(AdaInf(steps.encoder(), **FACTS)), steps.batch(0)
    z0, z1 = (system.learner.projector(system.encoder(v)) for v in batch["views"])
    torch.testing.assert_close(system.step(batch)["loss"], nt_xent(z0, z1, temperature=0.2))


@pytest.mark.parametrize("base", ["simclr", "moco", "byol"])
@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_its_views_have_the_wanted_strength(base, strength):
    system = AdaInf(steps.encoder(), base=base, strength=strength, **FACTS, queue_size=24)
    expected = adainf_pair(32, {0.5: "weak", 1.0: "strong"}[strength], learner=base, mean=(0.5,) * 3, std=(0.2,) * 3)
    assert system.views(32, (0.5,) * 3, (0.2,) * 3) == expected


def test_strengths_between_lie_on_a_line():
    for learner in ("simclr", "moco", "byol"):
        ends = [adainf_pair(32, s, learner=learner)[1] for s in (0.5, 1.0)]
        middle = adainf_pair(32, 0.75, learner=learner)[1]
        for name in ("jitter_p", "solarize_p", "blur_p", "grey"):
            assert getattr(middle, name) == pytest.approx(np.mean([getattr(e, name) for e in ends]))
        assert middle.scale == pytest.approx(np.mean([e.scale for e in ends], 0))
        assert middle.jitter == pytest.approx(np.mean([e.jitter for e in ends], 0))
    assert adainf_pair(32, 0.0)[0].jitter_p == 0
    with pytest.raises(UsageError, match="from 0 to 1"):
        adainf_pair(32, 1.5)
    with pytest.raises(UsageError, match="'medium'"):
        adainf_pair(32, "medium")


def lars_by_loop(weights, gradients, moments, *, lr, decay, trust, momentum, eps=1e-8):
    """One step of solo-learn's LARS with `clip_lr` and `exclude_bias_n_norm`, tensor by tensor."""
    for w, g, m in zip(weights, gradients, moments, strict=True):
        d = g.clone()
        if w.ndim != 1:
            w_norm, g_norm = w.norm(), g.norm()
            if w_norm != 0 and g_norm != 0:
                ratio = trust * w_norm / (g_norm + w_norm * decay + eps)
                ratio = min(ratio / lr, 1)
                d = (d + decay * w) * ratio
        m.mul_(momentum).add_(d)
        w.sub_(lr * m)


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_lars_is_that_of_the_official_code(scale):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)).double()
    system = AdaInf(steps.encoder(), **FACTS, lr=0.4, warmup_epochs=0)
    groups = system.optimizers_and_schedules()[0][0].param_groups
    settings = [{k: v for k, v in g.items() if k not in ("params", "initial_lr")} for g in groups]
    optimizer = LARS(
        [
            {"params": [p for p in net.parameters() if p.ndim > 1], **settings[0]},
            {"params": [p for p in net.parameters() if p.ndim == 1], **settings[1]},
        ],
        lr=0.4,
    )
    weights = [p.detach().clone() for p in net.parameters()]
    moments = [torch.zeros_like(w) for w in weights]
    for step in range(3):
        g = torch.Generator().manual_seed(step)
        gradients = [scale * torch.randn(p.shape, generator=g, dtype=torch.float64) for p in net.parameters()]
        for p, gradient in zip(net.parameters(), gradients, strict=True):
            p.grad = gradient.clone()
        optimizer.step()
        lars_by_loop(weights, gradients, moments, lr=0.4, decay=1e-4, trust=0.02, momentum=0.9)
    for p, w in zip(net.parameters(), weights, strict=True):
        torch.testing.assert_close(p.detach(), w, rtol=1e-10, atol=1e-12)


def test_a_clipped_step_is_never_longer_than_that_of_sgd_not_even_without_a_rate():
    w = nn.Parameter(torch.full((2, 2), 100.0))
    w.grad = torch.full((2, 2), 1e-3)
    for lr in (0.0, 0.1):
        before = w.detach().clone()
        LARS([w], lr=lr, momentum=0.0, trust=0.02, larc=True, clip=True).step()
        torch.testing.assert_close(before - w.detach(), lr * w.grad, rtol=0.01, atol=1e-6)


def test_the_trust_survives_a_checkpoint():
    system = AdaInf(steps.encoder(), **FACTS)
    [optimizer], _ = system.optimizers_and_schedules()
    other = AdaInf(steps.encoder(), **FACTS).optimizers_and_schedules()[0][0]
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert all(g["trust"] == 0.02 and g["larc"] and g["clip"] for g in other.param_groups)
    assert [g["adapt"] for g in other.param_groups] == [True, False]


@pytest.mark.parametrize("name", [None, *presets_of("adainf")])
def test_presets_are_systems(name):
    names = inspect.signature(AdaInf).parameters
    given = {} if name is None else {k: v for k, v in load_preset(name, "adainf").items() if k in names}
    system = AdaInf(steps.encoder(), **(FACTS | given))
    assert torch.isfinite(
        system.step({k: [x.float() for x in v] if k == "views" else v for k, v in steps.batch(0).items()})["loss"]
    )
    if name == "vanilla":
        assert (system.dup, system.strength) == (1, 1.0)
    else:
        assert (system.dup, system.strength) == (10, 0.5)


def test_the_probe_beside_leaves_generated_pictures_out():
    one, other = OnlineProbe(4, 2), OnlineProbe(4, 2)
    x, y = torch.randn(8, 4), torch.tensor([0, 1, 0, 1, 1, 0, 1, 0])
    one.learn(x, y)
    other.learn(torch.cat([x, torch.randn(5, 4)]), torch.cat([y, torch.full((5,), -1)]))
    assert torch.equal(one.probe[1].weight, other.probe[1].weight)


def test_the_grid_has_every_setting_and_its_share():
    grid = knob_grid(50, 1000, dups=(1, 10), strengths=(0.5, 1.0))
    assert [(s["dup"], s["strength"]) for s in grid] == [(0, 0.5), (1, 0.5), (10, 0.5), (0, 1.0), (1, 1.0), (10, 1.0)]
    assert [round(s["real_share"], 4) for s in grid[:3]] == [1.0, round(50 / 1050, 4), round(500 / 1500, 4)]
    assert [s["dup"] for s in knob_grid(50, 0)] == [0] * 4  # without generated pictures, repeating changes nothing
    with pytest.raises(UsageError, match="dups from 1"):
        knob_grid(50, 10, dups=(0,))


def test_what_cannot_be_is_said():
    with pytest.raises(UsageError, match="dup must be at least 1"):
        AdaInf(steps.encoder(), **FACTS, dup=0)
    with pytest.raises(UsageError, match="strength must be from 0 to 1"):
        AdaInf(steps.encoder(), **FACTS, strength=1.2)
