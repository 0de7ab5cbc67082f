"""Losses of pairs against their equations, row by row, in both their forms; and the modules."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from contralto.errors import UsageError
from contralto.losses import pairs
from contralto.losses.contrast import contrast


def views(n, seed=0, d=4, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(n, d, generator=g, dtype=dtype) for _ in range(2)]


def slow_rows(z0, z1, t, out=()):
    """For every row of both views: its cosine to the positive, and those to all others but itself; over t."""
    z = F.normalize(torch.cat([z0, z1]), dim=1)
    n = len(z0)
    for i in range(2 * n):
        p = (i + n) % (2 * n)
        others = [j for j in range(2 * n) if j != i and not ("positive" in out and j == p)]
        yield z[i] @ z[p] / t, torch.stack([z[i] @ z[j] / t for j in others]) if others else None


def slow_nt_xent(z0, z1, t):
    return torch.stack([others.logsumexp(0) - own for own, others in slow_rows(z0, z1, t)])


def slow_dcl(z0, z1, t, sigma=None):
    n, losses = len(z0), []
    s = torch.stack([own * t for own, _ in slow_rows(z0, z1, t, ("positive",))])[:n]
    w = torch.ones(n, dtype=s.dtype) if sigma is None else 2 - (s / sigma).exp() / (s / sigma).exp().mean()
    for i, (own, negatives) in enumerate(slow_rows(z0, z1, t, ("positive",))):
        losses.append(negatives.logsumexp(0) - w.detach()[i % n] * own)
    return torch.stack(losses)


def slow_hard(z0, z1, t, beta, tau):
    losses = []
    for own, negatives in slow_rows(z0, z1, t, ("positive",)):
        weight = (beta * negatives.detach()).exp()
        mean = (weight / weight.mean() * negatives.exp()).mean()
        each = torch.clamp((mean - tau * own.exp()) / (1 - tau), min=math.exp(-1 / t))
        losses.append(-(own.exp() / (own.exp() + len(negatives) * each)).log())
    return torch.stack(losses)


def slow_sup_con(z, labels, t):
    z, losses = F.normalize(z, dim=1), []
    for i in range(len(z)):
        others = [j for j in range(len(z)) if j != i]
        same = [j for j in others if labels[j] == labels[i]]
        if same:
            denominator = torch.stack([z[i] @ z[j] / t for j in others]).logsumexp(0)
            losses.append(torch.stack([denominator - z[i] @ z[p] / t for p in same]).mean())
    return torch.stack(losses)


def both(fast, slow, inputs):
    """Values and gradients of two functions are the same."""
    found = []
    for function in (fast, slow):
        copies = [x.clone().requires_grad_() for x in inputs]
        loss = function(*copies)
        loss.backward()
        found.append([loss.detach(), *(x.grad for x in copies)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)


@pytest.fixture(params=["one tile", "several tiles"])
def form(request, monkeypatch):
    """Small batches in one tile, and in several as large ones are."""
    if request.param == "several tiles":
        monkeypatch.setattr("contralto.losses.tiled.TILE_BYTES", 300)


@pytest.mark.parametrize("n", [1, 2, 9])
@pytest.mark.parametrize("t", [0.5, 0.05, 0.01])
def test_nt_xent_and_clip(form, n, t):
    z0, z1 = views(n)
    both(lambda a, b: pairs.nt_xent(a, b, temperature=t), lambda a, b: slow_nt_xent(a, b, t).mean(), [z0, z1])
    target = torch.arange(n)

    def slow_clip(a, b):
        logits = F.normalize(a, dim=1) @ F.normalize(b, dim=1).T / t
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

    both(lambda a, b: pairs.clip(a, b, temperature=t), slow_clip, [z0, z1])
    both(lambda a, b: pairs.info_nce(a, b, temperature=t), lambda a, b: F.cross_entropy(
        F.normalize(a, dim=1) @ F.normalize(b, dim=1).T / t, target), [z0, z1])  # fmt: skip


@pytest.mark.parametrize("sigma", [None, 0.5])
def test_dcl_and_its_weights(form, sigma):
    z0, z1 = views(6, 1)
    both(
        lambda a, b: pairs.dcl(a, b, temperature=0.2, sigma=sigma),
        lambda a, b: slow_dcl(a, b, 0.2, sigma).mean(),
        [z0, z1],
    )
    with pytest.raises(UsageError, match="batch of 1"):
        pairs.dcl(*views(1))


def test_the_gradient_of_nt_xent_is_that_of_dcl_times_what_coupling_leaves_of_it():
    """grad L(NT-Xent) = q grad L(DCL) with q = 1 - exp(-L(NT-Xent)), anchor by anchor."""
    z0, z1 = views(5, 2)
    for i in range(10):
        grads = []
        for loss in (pairs.nt_xent, pairs.dcl):
            a = z0.clone().requires_grad_()
            value = loss(a, z1, temperature=0.3, reduction="none")[i]
            value.backward()
            grads.append((value.detach(), a.grad))
        q = 1 - (-grads[0][0]).exp()
        torch.testing.assert_close(grads[0][1], q * grads[1][1])
        torch.testing.assert_close(grads[1][0], grads[0][0] + q.log())


@pytest.mark.parametrize(("beta", "tau"), [(0.0, 0.0), (1.0, 0.1), (2.0, 0.0), (0.5, 0.9)])
def test_hard_negatives(beta, tau):
    z0, z1 = views(5, 3)
    both(
        lambda a, b: pairs.hard_negative(a, b, temperature=0.5, beta=beta, tau_plus=tau),
        lambda a, b: slow_hard(a, b, 0.5, beta, tau).mean(),
        [z0, z1],
    )


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=2, max_size=12), st.sampled_from([0.1, 1.0]))
def test_sup_con_over_any_labels(labels, t):
    labels = torch.tensor(labels)
    z = views(len(labels), 4)[0]
    if (labels.bincount() > 1).any():
        both(lambda x: pairs.sup_con(x, labels, temperature=t), lambda x: slow_sup_con(x, labels, t).mean(), [z])
    else:
        assert pairs.sup_con(z, labels, temperature=t) == 0


def test_sup_con_in_tiles(form):
    labels = torch.tensor([0, 1, 0, 2, 1, 1, 0, 3])
    both(
        lambda x: pairs.sup_con(x, labels, temperature=0.2, base_temperature=0.07),
        lambda x: slow_sup_con(x, labels, 0.2).mean() * 0.2 / 0.07,
        [views(8, 5)[0]],
    )


def test_siglip(monkeypatch):
    monkeypatch.setattr("contralto.losses.tiled.TILE_BYTES", 150)
    z0, z1 = views(7, 6)
    scale, bias = torch.tensor(3.0, dtype=torch.float64), torch.tensor(-1.0, dtype=torch.float64)

    def slow(a, b, s, c):
        logits = s * F.normalize(a, dim=1) @ F.normalize(b, dim=1).T + c
        sign = 2 * torch.eye(7, dtype=torch.float64) - 1
        return -F.logsigmoid(sign * logits).sum() / 7

    both(lambda a, b, s, c: pairs.siglip(a, b, scale=s, bias=c), slow, [z0, z1, scale, bias])


def test_negatives_of_a_queue_are_further_keys():
    z0, z1 = views(4, 7)
    queue = views(9, 8)[0]
    loss = pairs.info_nce(z0, z1, negatives=queue, temperature=0.2)
    logits = F.normalize(z0, dim=1) @ F.normalize(torch.cat([z1, queue]), dim=1).T / 0.2
    torch.testing.assert_close(loss, F.cross_entropy(logits, torch.arange(4)))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("loss", [pairs.nt_xent, pairs.clip, pairs.dcl, pairs.info_nce])
def test_reductions_agree(form, loss, reduction):
    each = loss(*views(6, 9), temperature=0.2, reduction="none")
    expected = {"mean": each.mean(), "sum": each.sum(), "none": each}[reduction]
    torch.testing.assert_close(loss(*views(6, 9), temperature=0.2, reduction=reduction), expected)


def test_temperatures_learn(form):
    z0, z1 = views(6, 10)
    for loss in (pairs.nt_xent, pairs.clip, pairs.info_nce):
        t = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda x, f=loss: f(z0, z1, temperature=x), (t,))


def test_half_precision_is_computed_in_single(form):
    z0, z1 = (z.bfloat16() for z in views(8, 12))
    for loss in (pairs.nt_xent, pairs.clip, pairs.info_nce, pairs.dcl):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            ours = loss(z0, z1, temperature=0.2)
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), loss(z0.double(), z1.double(), temperature=0.2), rtol=1e-5, atol=1e-6)


def test_shapes_are_checked():
    for loss in (pairs.nt_xent, pairs.clip, pairs.dcl, pairs.siglip, pairs.info_nce):
        with pytest.raises(UsageError, match="one shape"):
            loss(torch.randn(4, 3), torch.randn(5, 3))
    with pytest.raises(UsageError, match="labels"):
        pairs.sup_con(torch.randn(4, 3), torch.arange(5))


def test_soft_targets_are_a_cross_entropy_and_carry_no_gradient(form):
    z0, z1 = views(6, 13)
    targets = views(6, 14, d=6)[0].abs().requires_grad_()
    share = targets.detach() / targets.detach().sum(1, keepdim=True)
    both(
        lambda a, b: pairs.soft_info_nce(a, b, targets, temperature=0.2),
        lambda a, b: F.cross_entropy(F.normalize(a, dim=1) @ F.normalize(b, dim=1).T / 0.2, share),
        [z0, z1],
    )
    assert targets.grad is None
    alone = pairs.soft_info_nce(
        z0, z1, torch.eye(6, dtype=z0.dtype) * (torch.arange(6) < 4).unsqueeze(1), reduction="none"
    )
    assert (alone[4:] == 0).all()
    torch.testing.assert_close(alone[:4], pairs.info_nce(z0, z1, reduction="none")[:4])


def test_the_hardest_negatives_alone(form):
    z0, z1 = views(7, 15)
    own = torch.arange(7)
    columns = pairs.hardest(z0, z1, 3, out=own.unsqueeze(1))
    cosine = F.normalize(z0, dim=1) @ F.normalize(z1, dim=1).T
    for i in range(7):
        negatives = sorted((j for j in range(7) if j != i), key=lambda j, i=i: -cosine[i, j].item())
        assert columns[i].tolist() == negatives[:3]
    keys = torch.cat([own.unsqueeze(1), columns], 1)
    loss = contrast(
        z0.unsqueeze(1), z1[keys], positives=torch.zeros(7, 1, dtype=torch.int64), temperature=0.2, reduction="mean"
    )
    torch.testing.assert_close(loss, F.cross_entropy(cosine.gather(1, keys) / 0.2, torch.zeros(7, dtype=torch.int64)))
    assert torch.equal(pairs.hardest(z0, z1, 2, out=torch.full((7, 1), -1)), pairs.hardest(z0, z1, 2))
    with pytest.raises(UsageError, match="between 1 and 6"):
        pairs.hardest(z0, z1, 7, out=own.unsqueeze(1))


def test_focal_weights():
    losses = pairs.info_nce(*views(6, 16), reduction="none")
    p = (-losses).exp()
    torch.testing.assert_close(pairs.focal(losses, 1.5), (1 - p) ** 1.5 * losses)
    assert torch.equal(pairs.focal(losses, 0.0), losses)


def test_pairs_at_any_temperature_are_the_dense_form(form):
    """Above and below what one exponential takes."""
    z0, z1 = views(6, 17)
    own, z = torch.arange(6), torch.cat([z0, z1])
    for t in (1.0, 0.02, 0.015, 0.001):
        there, back = (contrast(a, b, positives=own, temperature=t, form="dense") for a, b in ((z0, z1), (z1, z0)))
        torch.testing.assert_close(pairs.info_nce(z0, z1, temperature=t), there)
        torch.testing.assert_close(pairs.clip(z0, z1, temperature=t), (there + back) / 2)
        both_views = contrast(
            z, z, positives=torch.arange(12).roll(6), weights=torch.arange(12).unsqueeze(1), temperature=t, form="dense"
        )
        torch.testing.assert_close(pairs.nt_xent(z0, z1, temperature=t), both_views)
