"""Losses of unit rows at one temperature against cross-entropies of the whole matrix, in one tile and in several."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from contralto.errors import UsageError
from contralto.losses import tiled
from contralto.losses.bounded import LARGEST_SCALE, clip_mean, info_nce_mean, nt_xent_mean
from contralto.losses.units import unit_rows


def slow_info_nce(a, b, scale):
    return F.cross_entropy(scale * a @ b.T, torch.arange(len(a)))


def slow_clip(a, b, scale):
    return (slow_info_nce(a, b, scale) + slow_info_nce(b, a, scale)) / 2


def slow_nt_xent(z, scale):
    logits = (scale * z @ z.T).masked_fill(torch.eye(len(z), dtype=torch.bool), -torch.inf)
    return F.cross_entropy(logits, torch.arange(len(z)).roll(len(z) // 2))


def units(n, seed, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(n, 4, generator=g, dtype=torch.float64), dim=1).to(dtype)


def compare(fast, slow, rows, scale, **tolerance):
    """Values and gradients, those of the scale too."""
    found = []
    for function in (fast, slow):
        inputs = [r.clone().requires_grad_() for r in (*rows, torch.tensor(scale, dtype=rows[0].dtype))]
        loss = function(*inputs)
        (1.7 * loss).backward()
        found.append([loss.detach(), *(x.grad for x in inputs)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, **tolerance)


@settings(max_examples=100, deadline=None)
@given(
    st.integers(0, 10_000), st.integers(1, 9), st.integers(0, 5), st.floats(0.1, LARGEST_SCALE), st.sampled_from([1, 150, 2**20])
)  # fmt: skip
def test_they_are_cross_entropies(seed, n, more, scale, tile):
    a, b, others = units(n, seed), units(n, seed + 1), units(more, seed + 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiled, "TILE_BYTES", tile)
        close = {"rtol": 1e-9, "atol": 1e-11}
        compare(info_nce_mean, slow_info_nce, [a, torch.cat([b, others])], scale, **close)
        compare(clip_mean, slow_clip, [a, b], scale, **close)
        compare(nt_xent_mean, slow_nt_xent, [torch.cat([a, b])], scale, **close)


@pytest.mark.parametrize("tile", [100, 2**20])
def test_gradients_by_finite_differences(monkeypatch, tile):
    monkeypatch.setattr(tiled, "TILE_BYTES", tile)
    a, b = (units(5, seed).requires_grad_() for seed in (0, 1))
    scale = torch.tensor(7.0, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(info_nce_mean, (a, b, scale))
    assert torch.autograd.gradcheck(clip_mean, (a, b, scale))
    assert torch.autograd.gradcheck(lambda z, s: nt_xent_mean(torch.cat([z, b]), s), (a, scale))


@pytest.mark.parametrize("scale", [1.0, 20.0, LARGEST_SCALE])
def test_single_precision_at_the_bound(scale):
    """Rows as near and as far as they can be: logits of -scale and of scale."""
    a = torch.cat([units(20, 0), -units(20, 0)])
    for fast, slow, rows in (
        (info_nce_mean, slow_info_nce, [a, a.roll(20, 0)]), (clip_mean, slow_clip, [a, a.roll(20, 0)]),
        (nt_xent_mean, slow_nt_xent, [a]),
    ):  # fmt: skip
        exact, single = [r.clone().requires_grad_() for r in rows], [r.float().requires_grad_() for r in rows]
        expected = slow(*exact, torch.tensor(scale, dtype=torch.float64))
        found = fast(*single, torch.tensor(scale))
        expected.backward()
        found.backward()
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
        for x, y in zip(single, exact, strict=True):
            torch.testing.assert_close(x.grad.double(), y.grad, rtol=1e-4, atol=1e-5)


def test_what_wants_no_gradient_costs_none():
    a, b = units(6, 0).requires_grad_(), units(6, 1)
    info_nce_mean(a, b, torch.tensor(3.0, dtype=torch.float64)).backward()
    expected = torch.autograd.grad(slow_info_nce(a, b, 3.0), a)[0]
    torch.testing.assert_close(a.grad, expected)
    c = units(6, 1).requires_grad_()
    info_nce_mean(a.detach(), c, torch.tensor(3.0, dtype=torch.float64)).backward()
    torch.testing.assert_close(c.grad, torch.autograd.grad(slow_info_nce(a.detach(), c, 3.0), c)[0])


def test_gradients_can_be_asked_for_twice():
    a, b = units(6, 0).requires_grad_(), units(6, 1).requires_grad_()
    for loss in (
        clip_mean(a, b, torch.tensor(5.0).double()),
        nt_xent_mean(torch.cat([a, b]), torch.tensor(5.0).double()),
    ):
        first, again = (torch.autograd.grad(loss, a, retain_graph=True)[0] for _ in range(2))
        assert torch.equal(first, again)


def test_beyond_the_bound_and_second_derivatives_are_refused():
    z = units(4, 0).requires_grad_()
    for loss in (lambda s: info_nce_mean(z, z, s), lambda s: nt_xent_mean(z, s)):
        with pytest.raises(UsageError, match="contrast_tiled"):
            loss(torch.tensor(61.0))
        with pytest.raises(UsageError, match="dense"):
            torch.autograd.grad(loss(torch.tensor(5.0).double()), z, create_graph=True)


def test_unit_rows_are_torchs():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(5, 3, generator=g, dtype=torch.float64)
    x[2] = 0
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    weight = torch.randn(5, 3, generator=g, dtype=torch.float64)
    (unit,) = unit_rows(ours)
    expected = F.normalize(theirs, dim=1)
    torch.testing.assert_close(unit, expected)
    (unit * weight).sum().backward()
    (expected * weight).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)
    half, single = unit_rows(x.bfloat16(), x.float())
    assert half.dtype == single.dtype == torch.float32
