"""Modules keep their settings, and temperatures learn within their bounds."""

import pytest
import torch

from contralto.errors import UsageError
from contralto.losses import modules, pairs


def views(n):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(n, 4, generator=g) for _ in range(2)]


def test_modules_keep_their_settings_and_learn_theirs():
    z0, z1 = views(6)
    for module, function in (
        (modules.InfoNCE(temperature=0.3), pairs.info_nce), (modules.NTXent(temperature=0.3), pairs.nt_xent),
        (modules.DCL(temperature=0.3), pairs.dcl),
    ):  # fmt: skip
        assert torch.equal(module(z0, z1), function(z0, z1, temperature=0.3))
        assert "temperature=0.3" in repr(module)
    labels = torch.arange(6) % 2
    assert torch.equal(modules.SupCon(temperature=0.3)(z0, labels), pairs.sup_con(z0, labels, temperature=0.3))
    learns = modules.CLIP()
    learns(z0, z1).backward()
    assert learns.temperature.parameter.grad != 0
    learns.temperature.parameter.data.fill_(10.0)
    torch.testing.assert_close(learns(z0, z1), pairs.clip(z0, z1, temperature=0.01))
    asks = modules.SigLIP()
    asks(z0, z1).backward()
    assert asks.log_scale.grad != 0
    assert asks.bias.grad != 0


@pytest.mark.parametrize("by", ["log_scale", "value"])
def test_temperatures_of_both_kinds_learn(by):
    z0, z1 = views(6)
    temperature = modules.Temperature(0.2, by=by)
    assert temperature().item() == pytest.approx(0.2)
    pairs.nt_xent(z0, z1, temperature=temperature()).backward()
    t = torch.tensor(0.2, requires_grad=True)
    pairs.nt_xent(z0, z1, temperature=t).backward()
    factor = 1.0 if by == "value" else -0.2  # d exp(-x) / dx
    torch.testing.assert_close(temperature.parameter.grad, factor * t.grad)


@pytest.mark.parametrize("by", ["log_scale", "value"])
@pytest.mark.parametrize(("start", "goal", "ends"), [(0.02, -1.0, 0.01), (5.0, 100.0, 10.0)])
def test_a_temperature_stays_within_its_bounds_and_comes_back(by, start, goal, ends):
    temperature = modules.Temperature(start, by=by)
    optimizer = torch.optim.SGD(temperature.parameters(), 0.05)

    def step(goal):
        optimizer.zero_grad()
        (temperature() - goal).abs().backward()
        optimizer.step()

    for _ in range(2000):
        step(goal)
    assert temperature().item() == pytest.approx(ends)
    for _ in range(3000):
        step(1.0)
    assert temperature().item() == pytest.approx(1.0, abs=0.1)


def test_wrong_temperatures_are_refused():
    with pytest.raises(UsageError, match="between"):
        modules.Temperature(0.001)
    with pytest.raises(UsageError, match="by must"):
        modules.Temperature(by="exp")
