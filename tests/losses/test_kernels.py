"""Losses of Gaussian kernels against loops over pairs, and against values of SepCLR's code."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from contralto.errors import UsageError
from contralto.losses import tiled
from contralto.losses.kernels import alignment, attribute_alignment, joint_entropy, uniformity

ARRAYS = np.load(Path(__file__).parents[1] / "reference" / "sepclr.npz", allow_pickle=False)
REF = {k: torch.from_numpy(ARRAYS[k]) for k in ARRAYS.files}


def rows(n, d, seed, scale=1.0, dtype=torch.float64):
    return scale * torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def kernel(a, b, tau):
    return (-(a - b).square().sum() / (2 * tau)).exp()


def slow_uniformity(z, tau):
    n = len(z)
    return torch.stack([kernel(z[i], z[j], tau) for i in range(n) for j in range(i + 1, n)]).mean().log()


def slow_joint(c, s, tau):
    n = len(c)
    inner = [
        torch.stack([kernel(c[i], c[j], tau) * kernel(s[i], s[j], tau) for j in range(n)]).mean() for i in range(n)
    ]
    return -torch.stack(inner).log().mean()


def both(fast, slow, *inputs):
    """Values and gradients of two functions are the same."""
    found = []
    for function in (fast, slow):
        copies = [x.clone().requires_grad_() for x in inputs]
        value = function(*copies)
        value.backward()
        found.append([value.detach(), *(x.grad for x in copies)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


@pytest.fixture(params=["whole", "in tiles"])
def form(request, monkeypatch):
    """The engine's matrix at once, and row by row."""
    if request.param == "in tiles":
        monkeypatch.setattr(tiled, "TILE_BYTES", 1)


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("tau", [0.5, 0.025, 3.0])
@pytest.mark.parametrize("n", [2, 3, 9])
def test_equal_loops_over_pairs(n, tau):
    c, s = rows(n, 4, 0, 0.7), rows(n, 3, 1, 0.7)
    both(lambda z: uniformity(z, tau=tau, normalize=False), lambda z: slow_uniformity(z, tau), c)
    both(lambda z: uniformity(z, tau=tau), lambda z: slow_uniformity(F.normalize(z, dim=1), tau), c)
    both(lambda a, b: joint_entropy(a, b, tau=tau), lambda a, b: slow_joint(a, b, tau), c, s)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 7), st.floats(0.05, 5.0), st.integers(0, 4))
def test_rows_at_the_origin_count_like_all_others(seed, n, tau, zeros):
    s = rows(n, 3, seed)
    s[:zeros] = 0
    both(lambda z: uniformity(z, tau=tau, normalize=False), lambda z: slow_uniformity(z, tau), s)
    both(lambda z: joint_entropy(z, z, tau=tau), lambda z: slow_joint(z, z, tau), s)


def test_uniformity_leaves_the_diagonal_out_and_joint_entropy_takes_it_in():
    z = 100 * torch.eye(3, dtype=torch.float64)
    assert joint_entropy(z).item() == pytest.approx(math.log(3))
    assert uniformity(z, normalize=False).item() == pytest.approx(-20_000)
    assert joint_entropy(torch.ones(5, 2)).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.usefixtures("form")
def test_kernels_that_underflow_still_have_a_gradient():
    z = rows(6, 3, 0, 300.0, torch.float32).requires_grad_()
    value = uniformity(z, normalize=False)
    value.backward()
    exact = uniformity(z.detach().double(), normalize=False)
    assert torch.isfinite(value)
    assert value.item() == pytest.approx(exact.item(), rel=1e-4)
    assert z.grad.abs().max() > 1  # the nearest two repel each other still


def test_an_offset_of_all_rows_costs_no_digits():
    z = rows(8, 4, 0, 0.3, torch.float32)
    expected = uniformity(z.double(), normalize=False).float()
    torch.testing.assert_close(uniformity(z + 512, normalize=False), expected, rtol=1e-3, atol=1e-3)


def test_half_precision_is_computed_in_float32():
    z = rows(8, 4, 0, 1.0, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = uniformity(z)
    torch.testing.assert_close(inside, uniformity(z))


def test_alignment_is_the_squared_distance_over_two_tau():
    a, b = rows(5, 3, 0), rows(5, 3, 1)
    where = torch.tensor([True, False, True, False, False])
    slow = sum((a[i] - b[i]).square().sum() for i in (0, 2)) / 2 / (2 * 0.3)
    torch.testing.assert_close(alignment(a, b, tau=0.3, where=where, normalize=False), slow)
    unit = [F.normalize(x, dim=1) for x in (a, b)]
    torch.testing.assert_close(alignment(a, b), alignment(*unit, normalize=False))
    torch.testing.assert_close(alignment(a, normalize=False), alignment(a, torch.zeros_like(a), normalize=False))


def test_no_row_that_counts_is_no_loss_and_no_gradient():
    a = rows(3, 2, 0).requires_grad_()
    none = torch.zeros(3, dtype=torch.bool)
    loss = alignment(a, where=none, normalize=False) + attribute_alignment(a, torch.arange(3), tau=1.0, where=none)
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(a.grad, torch.zeros_like(a))


@pytest.mark.parametrize(("kind", "tau"), [("cont", 0.025), ("disc", 1e-5 / 2)])
def test_attribute_alignment_equals_the_official_code(kind, tau):
    x = REF["attr_x"].clone().requires_grad_()
    loss = attribute_alignment(x, REF[f"attr_y_{kind}"], tau=tau)
    loss.backward()
    torch.testing.assert_close(loss, REF[f"attr_loss_{kind}"], rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(x.grad, REF[f"attr_grad_{kind}"], rtol=1e-9, atol=1e-11)


def test_attribute_alignment_over_some_rows_is_that_of_these_rows():
    x, y = rows(7, 2, 0), rows(7, 1, 1).squeeze(1)
    where = torch.tensor([True, False, True, True, False, False, True])
    torch.testing.assert_close(
        attribute_alignment(x, y, tau=0.5, where=where), attribute_alignment(x[where], y[where], tau=0.5)
    )


def test_the_parts_equal_the_official_code():
    y = REF["c1_y"] == 1
    for view in "12":
        REF[f"t{view}"] = REF[f"c1_s{view}"] * y.unsqueeze(1)
    c1, c2, s1, s2 = (REF[f"c1_{k}"] for k in ("c1", "c2", "s1", "s2"))
    t1, t2 = REF["t1"], REF["t2"]
    unit = [F.normalize(c, dim=1) for c in (c1, c2)]
    found = {
        "common_align": alignment(c1, c2),
        "common_uniform": (uniformity(c1) + uniformity(c2)) / 2,
        "salient_align": alignment(s1, s2, where=y, normalize=False),
        "salient_uniform": (uniformity(t1, normalize=False) + uniformity(t2, normalize=False)) / 2,
        "salient_reg": (alignment(s1, where=~y, normalize=False) + alignment(s2, where=~y, normalize=False)) / 2,
        "jem": -(joint_entropy(unit[0], t1) + joint_entropy(unit[1], t2)) / 2,
    }
    for name, value in found.items():
        torch.testing.assert_close(value, REF[f"c1_{name}"], rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda z: uniformity(z[:1]), "at least two"),
        (lambda z: uniformity(z, tau=0.0), "tau must be above 0"),
        (lambda z: joint_entropy(z, tau=-1.0), "tau must be above 0"),
        (lambda z: joint_entropy(z, z[:2]), "the same samples"),
        (lambda z: alignment(z, z[:2]), "rows in pairs"),
        (lambda z: attribute_alignment(z, torch.zeros(2), tau=1.0), r"shape \(3,\)"),
    ],
)
def test_bad_input_is_named(call, told):
    with pytest.raises(UsageError, match=told):
        call(rows(3, 2, 0))
