"""Contrast for regression: values of the released code, slow loops over anchors and mixtures, and what is easily got wrong."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from contralto.errors import UsageError
from contralto.losses.pairs import sup_con
from contralto.losses.regression import (
    distance_weights,
    mixing_shares,
    rank_n_contrast,
    sup_con_numbers,
    sup_re_mix,
)

REFERENCE = Path(__file__).parents[1] / "reference" / "supremix.npz"
TIGHT = {"rtol": 1e-9, "atol": 1e-11}


def reference(prefix):
    with np.load(REFERENCE, allow_pickle=False) as z:
        return {k.removeprefix(prefix): torch.from_numpy(np.asarray(z[k])) for k in z.files if k.startswith(prefix)}


@pytest.mark.parametrize(
    ("shift", "loss", "grad"), [("joint", "loss_joint", "grad_joint"), ("blocks", "loss", "grad_v")]
)
def test_supremix_is_that_of_the_released_code(shift, loss, grad):
    r = reference("s0_")
    v = r["v"].clone().requires_grad_()
    found = sup_re_mix(
        v, r["y"], r["alpha_neg"], shift=shift, normalize=False
    )  # shares are NaN where numbers are equal
    found.backward()
    torch.testing.assert_close(found, r[loss], **TIGHT)
    torch.testing.assert_close(v.grad, r[grad], **TIGHT)


def test_weighted_contrast_is_that_of_the_released_code():
    r = reference("w1_")
    v = r["v"].clone().requires_grad_()
    found = sup_con_numbers(v, r["y"], temperature=0.3)
    found.backward()
    torch.testing.assert_close(found, r["loss"], **TIGHT)
    across = r["grad_v"] - r["v"] * (r["grad_v"] * r["v"]).sum(1, keepdim=True)  # the code takes rows as they are
    torch.testing.assert_close(v.grad, across, **TIGHT)


def test_rank_n_contrast_is_that_of_the_released_code():
    r = reference("rnc0_")
    f = r["f"].clone().requires_grad_()
    found = rank_n_contrast(torch.cat([f[:, 0], f[:, 1]]), r["y"].flatten().repeat(2), temperature=2.0)
    found.backward()
    torch.testing.assert_close(found, r["loss"], **TIGHT)
    torch.testing.assert_close(f.grad, r["grad_f"], **TIGHT)


def by_loop(z, y, shares, window, temperature, weight, keep=None):
    """The equation, with every mixture built; `keep` says which pairs of a positive mixture are taken."""
    v = F.normalize(z, dim=1)
    fixed = v.detach()
    total, anchors = 0.0, 0
    for i in range(len(z)):
        positives, terms = [], []
        for k in range(len(z)):
            if k != i:
                logit = v[i] @ v[k] / temperature
                terms.append(logit + weight(y[i] - y[k]).log())
                if y[k] == y[i]:
                    positives.append(logit)
                elif shares is not None:
                    a = shares[i, k]
                    mixture, number = a * fixed[i] + (1 - a) * fixed[k], a * y[i] + (1 - a) * y[k]
                    terms.append(v[i] @ mixture / temperature + weight(y[i] - number).log())
        for j, k in itertools.product(range(len(z)), repeat=2) if window is not None else ():
            if 0 < y[i] - y[j] < window and 0 < y[k] - y[i] < window and (keep is None or keep(i, j, k)):
                a = (y[k] - y[i]) / (y[k] - y[j])
                logit = v[i] @ (a * fixed[j] + (1 - a) * fixed[k]) / temperature
                positives.append(logit)
                terms.append(logit)
        if positives:
            anchors += 1
            total = total + torch.stack(terms).logsumexp(0) - torch.stack(positives).mean()
    return total / anchors


def rows(r=10, seed=0, numbers=(1, 2, 3, 5, 8)):
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(r, 4, generator=g, dtype=torch.float64, requires_grad=True)
    y = torch.tensor(numbers, dtype=torch.float64)[torch.randint(len(numbers), (r,), generator=g)]
    return z, y, mixing_shares(r, generator=g, dtype=torch.float64)


@pytest.mark.parametrize("weight", ["l1", "squared", "none"])
@pytest.mark.parametrize(("negative", "window"), [(True, 5.0), (True, None), (False, 5.0), (False, 3.0), (False, None)])
def test_supremix_is_a_loop_over_anchors_and_mixtures(weight, negative, window):
    z, y, shares = rows()
    shares = shares if negative else None
    found = sup_re_mix(z, y, shares, window=window, temperature=0.4, weight=weight)
    expected = by_loop(z, y, shares, window, 0.4, lambda d: distance_weights(d, weight))
    torch.testing.assert_close(found, expected, **TIGHT)
    torch.testing.assert_close(*(torch.autograd.grad(x, z)[0] for x in (found, expected)), rtol=1e-8, atol=1e-10)


def test_numbers_that_are_no_integers_are_mixed_to_the_anchor():
    z, _, shares = rows()
    y = torch.randn(10, generator=torch.Generator().manual_seed(4), dtype=torch.float64) * 3
    expected = by_loop(z, y, shares, 2.5, 0.3, lambda d: d.abs() + 1)
    torch.testing.assert_close(sup_re_mix(z, y, shares, window=2.5), expected, **TIGHT)


def test_the_window_is_strict():
    z, shares = rows()[0][:3], None
    y = torch.tensor([0.0, 5.0, 10.0])  # neighbours are at the window, not within it
    v = F.normalize(z, dim=1)
    assert sup_re_mix(z, y, shares, window=5.0) == 0  # nobody has a positive
    found = sup_re_mix(z, y, shares, window=5.1, temperature=1.0, weight="none")
    mixture = (v[0] + v[2]).detach() / 2
    logits = torch.stack([v[1] @ v[0], v[1] @ v[2], v[1] @ mixture])
    torch.testing.assert_close(found, logits.logsumexp(0) - logits[2])


def test_the_other_view_of_an_anchor_is_no_part_of_a_hard_negative():
    z, _, shares = rows(4)
    y = torch.tensor([1.0, 2.0, 1.0, 2.0])  # two samples, two views
    changed = shares.clone()
    changed[[0, 2, 1, 3], [2, 0, 3, 1]] = 0.99
    changed.fill_diagonal_(torch.nan)
    torch.testing.assert_close(sup_re_mix(z, y, shares), sup_re_mix(z, y, changed), rtol=0, atol=0)


def test_mixtures_carry_no_gradient_and_anchors_do():
    z, y, shares = rows()
    v = F.normalize(z.detach(), dim=1)
    moved = v.clone().requires_grad_()
    grad = torch.autograd.grad(sup_re_mix(moved, y, shares, normalize=False), moved)[0]
    # The same loss with every mixture a number of its own: finite differences of one anchor, all mixtures held.
    i, step = 4, 1e-6

    def held(delta):
        a = v.clone()
        a[i] = v[i] + delta
        return by_hand(a, v, y, shares)

    basis = torch.eye(4, dtype=torch.float64)
    numeric = torch.stack([(held(step * e) - held(-step * e)) / (2 * step) for e in basis])
    torch.testing.assert_close(grad[i], numeric, rtol=1e-6, atol=1e-8)


def by_hand(v, fixed, y, shares, window=5.0, t=0.3):
    """As `by_loop` on unit rows, with mixtures of `fixed`."""
    total, r = 0.0, len(v)
    for i in range(r):
        terms = [v[i] @ v[k] / t + (abs(y[i] - y[k]) + 1).log() for k in range(r) if k != i]
        positives = [v[i] @ v[k] / t for k in range(r) if k != i and y[k] == y[i]]
        for k in range(r):
            if y[k] != y[i]:
                a = shares[i, k]
                terms.append(v[i] @ (a * fixed[i] + (1 - a) * fixed[k]) / t + ((1 - a) * abs(y[i] - y[k]) + 1).log())
        for j, k in itertools.product(range(r), repeat=2):
            if 0 < y[i] - y[j] < window and 0 < y[k] - y[i] < window:
                a = (y[k] - y[i]) / (y[k] - y[j])
                positives.append(v[i] @ (a * fixed[j] + (1 - a) * fixed[k]) / t)
                terms.append(positives[-1])
        total = total + torch.stack(terms).logsumexp(0) - torch.stack(positives).mean()
    return total / r  # every row has a positive here


def test_with_few_neighbours_the_nearest_are_taken():
    z = rows(7)[0]
    y = torch.arange(7.0, dtype=torch.float64)

    def keep(i, j, k):
        return i - j <= 2 and k - i <= 2

    expected = by_loop(z, y, None, 5.0, 0.3, lambda d: d.abs() + 1, keep)
    torch.testing.assert_close(sup_re_mix(z, y, None, nearest=2), expected, **TIGHT)
    torch.testing.assert_close(sup_re_mix(z, y, None, nearest=6), sup_re_mix(z, y, None), **TIGHT)


def test_large_batches_take_no_memory_of_all_triples():
    g = torch.Generator().manual_seed(0)
    z, y = torch.randn(1024, 8, generator=g), torch.randint(30, (1024,), generator=g)
    seen = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: seen.append(x.numel()) or x, lambda x: x):
        sup_re_mix(z.requires_grad_(), y, mixing_shares(1024, generator=g)).backward()
    assert max(seen) <= 1024 * (64 * 64 + 2 * 1024)  # 1024^3 would be a thousand million


def test_the_plain_form_is_supervised_contrast():
    z, y, _ = rows(12, numbers=(1, 2, 3))
    plain = sup_con(z, y, temperature=0.3)
    torch.testing.assert_close(sup_con_numbers(z, y, temperature=0.3, weight="none"), plain, **TIGHT)
    torch.testing.assert_close(sup_re_mix(z, y, None, window=None, weight="none"), plain, **TIGHT)
    weighted = sup_con_numbers(z, y, temperature=0.3)
    torch.testing.assert_close(sup_re_mix(z, y, None, window=None), weighted, **TIGHT)


def test_rank_n_contrast_is_a_loop_over_ordered_pairs_with_ties():
    g = torch.Generator().manual_seed(3)
    z = torch.randn(9, 3, generator=g, dtype=torch.float64, requires_grad=True)
    y = torch.tensor([0, 1, 2, 2, 4, 0, 3, 1, 2], dtype=torch.float64)
    total = 0.0
    for i, j in itertools.permutations(range(9), 2):
        s = [-(z[i] - z[k]).norm() / 2 for k in range(9) if k != i and abs(y[i] - y[k]) >= abs(y[i] - y[j])]
        total = total + torch.stack(s).logsumexp(0) + (z[i] - z[j]).norm() / 2
    found, expected = rank_n_contrast(z, y), total / 72
    torch.testing.assert_close(found, expected, **TIGHT)
    torch.testing.assert_close(*(torch.autograd.grad(x, z)[0] for x in (found, expected)), rtol=1e-8, atol=1e-10)


def test_equal_and_far_rows_give_numbers():
    z = torch.zeros(6, 3).requires_grad_()
    y = torch.tensor([1.0, 1.0, 2.0, 3.0, 4.0, 4.0])
    for loss in (
        rank_n_contrast(z, y),
        rank_n_contrast(z + 1e6 * torch.eye(6, 3), y),
        sup_re_mix(z + torch.eye(6, 3), y, None),
    ):
        assert torch.isfinite(loss)
        assert torch.isfinite(torch.autograd.grad(loss, z)[0]).all()


def test_nobody_with_a_positive_gives_zero_with_gradient():
    z = torch.randn(2, 3, requires_grad=True)
    for loss in (sup_re_mix(z, torch.tensor([1.0, 2.0]), None), sup_con_numbers(z, torch.tensor([1.0, 2.0]))):
        assert loss == 0
        assert (torch.autograd.grad(loss, z)[0] == 0).all()


def test_what_does_not_fit_is_said():
    z, y = torch.eye(3), torch.arange(3.0)
    with pytest.raises(UsageError, match="a number for each"):
        sup_re_mix(z, y[:2], None)
    with pytest.raises(UsageError, match=r"shares must be of shape \(3, 3\)"):
        sup_re_mix(z, y, torch.zeros(2, 2))
    with pytest.raises(UsageError, match="window"):
        sup_re_mix(z, y, None, window=0)
    with pytest.raises(UsageError, match="shift"):
        sup_re_mix(z, y, None, shift="none")
    with pytest.raises(UsageError, match="weight"):
        sup_con_numbers(z, y, weight="l3")
    with pytest.raises(UsageError, match="temperature"):
        rank_n_contrast(z, y, temperature=0)
    with pytest.raises(UsageError, match="at least two"):
        rank_n_contrast(z[:1], y[:1])
