"""GroCo as a system: its head, its views, its rate."""

import pytest
import torch
from torch import nn

from contralto.errors import UsageError
from contralto.losses.sorting import groco
from contralto.systems.selfsup.groco import GroCo, learning_rate


def tiny(**options):
    return GroCo(nn.Linear(6, 8), num_features=8, **({"hidden": 7, "dim": 5, "hardest": 3} | options))


def batch(n=8, views=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    return {"views": [torch.randn(n, 6, generator=g) for _ in range(views)], "index": torch.arange(n)}


@pytest.mark.parametrize(
    ("views", "options"), [(2, {}), (4, {"full_views": 4}), (5, {"full_views": 2, "small_crops": 3})]
)
def test_a_step_is_the_loss_of_whitened_projections(views, options):
    system, data = tiny(steepness=2.0, **options), batch(views=views)
    out = system.step(data)
    z = torch.cat([system.encoder(v) for v in data["views"]])
    for block in (system.projector[:3], system.projector[3:6]):
        z = block(z)
    z = system.projector[6](z)
    z = (z - z.mean(0)) / (z.var(0, unbiased=False) + 1e-5).sqrt()
    full = options.get("full_views", 2)
    expected = groco(z.unflatten(0, (views, -1)), hardest=3, positive_views=full, steepness=2.0)
    torch.testing.assert_close(out["loss"], expected)
    out["loss"].backward()
    assert all(torch.isfinite(p.grad).all() for p in system.parameters())


def test_the_head_is_two_hidden_layers_without_bias_and_a_plain_norm():
    head = tiny().projector
    assert [type(m).__name__ for m in head] == ["Linear", "BatchNorm1d", "ReLU"] * 2 + ["Linear", "BatchNorm1d"]
    assert all(m.bias is None for m in head if isinstance(m, nn.Linear))
    assert not head[-1].affine
    assert tiny(hidden=None).projector[0].weight.shape == (8, 8)


def test_it_learns_to_order():
    system = tiny(optimizer="adam", lr=0.01, warmup_epochs=0, epochs=100)
    [optimizer], _ = system.optimizers_and_schedules()
    losses = []
    for _ in range(60):
        loss = system.step(batch())["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.02


def test_rates_are_the_papers():
    assert learning_rate(0.75, 1024) == learning_rate(0.75, 1024, "sqrt") == 24
    assert learning_rate(0.1875, 256) == 1.5
    assert learning_rate(0.75, 256, "sqrt") == 12
    with pytest.raises(UsageError, match="rule must be"):
        learning_rate(0.75, 256, "square")


def test_what_cannot_be_is_said():
    with pytest.raises(UsageError, match="a batch of 4 has 3, got hardest=3"):
        tiny().step(batch(n=4))
    with pytest.raises(UsageError, match="a batch needs at least two"):
        tiny().step(batch(n=1))
    with pytest.raises(UsageError, match="positives come from 2 to 2 views"):
        tiny(full_views=3).step(batch())
    for options in ({"full_views": 1}, {"small_crops": -1}):
        with pytest.raises(UsageError, match="full_views must be at least 2"):
            tiny(**options)
