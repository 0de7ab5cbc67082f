"""The contrast engine against loops over pairs, and against the losses of which it is the general form."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from contralto.errors import UsageError
from contralto.losses.contrast import contrast, soft_cross_entropy


def rows(n, d, seed):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_loops(q, k, P, W, t, coupled=False, log_outside=False):
    """The equation of the module, pair by pair."""
    losses = []
    for i in range(len(q)):
        s = [float(q[i] @ k[j]) / float(t[i, j]) for j in range(len(k))]
        D = sum(float(W[i, j]) * np.exp(s[j]) for j in range(len(k)))
        if log_outside:
            losses.append(np.log(D) - np.log(sum(float(P[i, p]) * np.exp(s[p]) for p in range(len(k)))))
        else:
            losses.append(
                sum(float(P[i, p]) * (np.log(D + (np.exp(s[p]) if coupled else 0)) - s[p]) for p in range(len(k)))
            )
    return torch.tensor(losses, dtype=torch.float64)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 5), st.integers(1, 6), st.booleans(), st.booleans())
def test_equals_the_equation_pair_by_pair(seed, n, m, coupled, log_outside):
    g = torch.Generator().manual_seed(seed)
    q, k = F.normalize(rows(n, 3, seed), dim=1), F.normalize(rows(m, 3, seed + 1), dim=1)
    P = torch.rand(n, m, generator=g, dtype=torch.float64)
    W = torch.rand(n, m, generator=g, dtype=torch.float64) + 0.01
    t = torch.rand(n, m, generator=g, dtype=torch.float64) + 0.1
    coupled = coupled and not log_outside
    ours = contrast(
        q, k, positives=P, weights=W, temperature=t, coupled=coupled, log_outside=log_outside, normalize=False,
        reduction="none",
    )  # fmt: skip
    torch.testing.assert_close(ours, by_loops(q, k, P, W, t, coupled, log_outside), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("form", ["dense", "tiled"])
def test_columns_may_be_numbers_of_either_width(form):
    q, k = rows(4, 3, 0), rows(5, 3, 1)
    own, out = torch.tensor([0, 4, -1, 2]), torch.tensor([[1, 2], [-1, 0], [3, 3], [4, -1]])
    wide, narrow = (
        contrast(q, k, positives=own.to(kind), weights=out.to(kind), form=form) for kind in (torch.int64, torch.int32)
    )
    mask = torch.ones(4, 5, dtype=torch.bool)
    for row, columns in enumerate(out.tolist()):
        mask[row, [c for c in columns if c >= 0]] = False
    assert wide == narrow
    torch.testing.assert_close(wide, contrast(q, k, positives=own, weights=mask, form="dense"))


def test_infonce_of_paired_views_is_a_cross_entropy():
    a, b = rows(6, 4, 0), rows(6, 4, 1)
    ours = contrast(a, b, positives=torch.arange(6), temperature=0.2)
    theirs = F.cross_entropy(F.normalize(a, dim=1) @ F.normalize(b, dim=1).T / 0.2, torch.arange(6))
    torch.testing.assert_close(ours, theirs)


def test_own_key_against_a_queue_is_mocos_loss():
    q, k, queue = (F.normalize(rows(n, 4, s), dim=1) for n, s in ((5, 0), (5, 1), (9, 2)))
    weights = torch.cat([torch.zeros(5), torch.ones(9)])
    ours = contrast(
        q, torch.cat([k, queue]), positives=torch.arange(5), weights=weights, temperature=0.1, coupled=True,
        normalize=False,
    )  # fmt: skip
    logits = torch.cat([(q * k).sum(1, keepdim=True), q @ queue.T], 1) / 0.1
    torch.testing.assert_close(ours, F.cross_entropy(logits, torch.zeros(5, dtype=torch.int64)))


def test_supervised_contrast_without_self():
    z, y = F.normalize(rows(7, 4, 3), dim=1), torch.tensor([0, 0, 1, 1, 1, 2, 0])
    others = ~torch.eye(7, dtype=torch.bool)
    same = (y[:, None] == y) & others
    P = same / same.sum(1, keepdim=True).clamp_min(1)
    ours = contrast(z, z, positives=P, weights=others, temperature=0.5, reduction="none")
    for i in range(7):
        A, pos = [j for j in range(7) if j != i], [j for j in range(7) if j != i and y[j] == y[i]]
        log_prob = [z[i] @ z[p] / 0.5 - torch.logsumexp(torch.stack([z[i] @ z[a] / 0.5 for a in A]), 0) for p in pos]
        expected = -torch.stack(log_prob).mean() if pos else torch.tensor(0.0, dtype=torch.float64)
        torch.testing.assert_close(ours[i], expected)


def test_gradients_in_float64():
    q, k = rows(4, 3, 0).requires_grad_(), rows(5, 3, 1).requires_grad_()
    t = torch.full((4, 1), 0.3, dtype=torch.float64, requires_grad=True)
    P = torch.rand(4, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for form in ({}, {"coupled": True}, {"log_outside": True}):
        assert torch.autograd.gradcheck(
            lambda a, b, c, f=form: contrast(a, b, positives=P, temperature=c, **f), (q, k, t)
        )


def test_positives_carry_no_gradient_and_functions_serve_as_tiles():
    q, k = rows(4, 3, 0), rows(4, 3, 1)
    P = torch.eye(4, dtype=torch.float64, requires_grad=True)
    loss = contrast(q.requires_grad_(), k, positives=P)
    loss.backward()
    assert P.grad is None
    tiles = contrast(q, k, positives=lambda i, j: i == j, weights=lambda i, j: i != j)
    dense = contrast(q, k, positives=torch.arange(4), weights=~torch.eye(4, dtype=torch.bool))
    torch.testing.assert_close(tiles, dense)


@pytest.mark.parametrize("scale", [1e4, 1e-4])
@pytest.mark.parametrize("form", [{}, {"coupled": True}, {"log_outside": True}])
def test_extreme_logits_stay_finite(scale, form):
    q = (scale * rows(4, 3, 0)).float().requires_grad_()
    loss = contrast(q, scale * rows(4, 3, 1).float(), positives=torch.arange(4), normalize=False, **form)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(q.grad).all()


def test_rows_without_positives_or_columns_count_as_nothing():
    q, k = rows(3, 3, 0).requires_grad_(), rows(3, 3, 1)
    alone = contrast(q[:1], k, positives=torch.tensor([2]))
    torch.testing.assert_close(contrast(q, k, positives=torch.tensor([2, -1, -1])), alone)
    torch.testing.assert_close(contrast(q, k, positives=torch.tensor([2, -1, -1]), reduction="mean_all"), alone / 3)
    nothing = contrast(q, k, positives=torch.full((3,), -1))
    nothing.backward()
    assert nothing == 0
    assert torch.isfinite(q.grad).all()
    assert contrast(q, k, positives=torch.arange(3), weights=torch.zeros(3)) == 0


def test_bfloat16_is_computed_in_float32():
    q, k = rows(8, 16, 0), rows(8, 16, 1)
    exact = contrast(q.bfloat16().double(), k.bfloat16().double(), positives=torch.arange(8))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = contrast(q.bfloat16(), k.bfloat16(), positives=torch.arange(8))
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-6)


def test_leading_dimensions_are_batches_of_problems():
    q, k = rows(8, 3, 0).view(2, 4, 3), rows(10, 3, 1).view(2, 5, 3)
    both = contrast(q, k, positives=torch.zeros(2, 4, dtype=torch.int64), reduction="none")
    for b in range(2):
        torch.testing.assert_close(
            both[b], contrast(q[b], k[b], positives=torch.zeros(4, dtype=torch.int64), reduction="none")
        )


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": 0.0},
        {"reduction": "max"},
        {"coupled": True, "log_outside": True},
        {"positives": torch.arange(3)},
        {"positives": None, "coupled": True},
    ],
)
def test_wrong_arguments_are_named(wrong):
    with pytest.raises(UsageError, match=r"temperature|reduction|coupled|positives"):
        contrast(rows(4, 3, 0), rows(4, 3, 1), **{"positives": torch.arange(4), **wrong})
    with pytest.raises(UsageError, match="width"):
        contrast(rows(4, 3, 0), rows(4, 2, 1), positives=torch.arange(4))


def test_soft_cross_entropy_is_torchs():
    logits, target = rows(5, 4, 0), rows(5, 4, 1).softmax(1)
    torch.testing.assert_close(soft_cross_entropy(logits, target), F.cross_entropy(logits, target, reduction="none"))
