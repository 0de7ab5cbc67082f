"""Losses of category discovery: the reference values, slow loops in float64, and what must hold of them."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from contralto.errors import UsageError
from contralto.losses.discovery import (
    adaptive_labels,
    entropy_gap,
    linear_ramp,
    prototype_separation,
    swapped_labels,
)
from contralto.losses.pairs import nt_xent

REFERENCE = np.load(Path(__file__).parents[1] / "reference" / "protogcd.npz", allow_pickle=False)
TIGHT = {"rtol": 1e-9, "atol": 1e-11}


def ref(name):
    return torch.from_numpy(REFERENCE[name].copy())


def scores(n=8, k=6, views=2, seed=0):
    """Cosines (V, N, K)."""
    g = torch.Generator().manual_seed(seed)
    u, mu = torch.randn(views, n, 5, generator=g, dtype=torch.float64), torch.randn(k, 5, generator=g).double()
    return F.normalize(u, dim=-1) @ F.normalize(mu, dim=-1).T


@pytest.mark.parametrize(("case", "epoch", "start", "teacher"), [("dapl_0", 0, 0.0, 0.05), ("dapl_3", 30, 0.2, 0.07)])
def test_pseudo_labels_give_the_loss_and_gradient_of_the_released_code(case, epoch, start, teacher):
    logits = ref(f"{case}__logits").requires_grad_()
    by_view = logits.unflatten(0, (2, -1))
    ratio = linear_ramp(epoch, start, 1.0, length=100)
    targets = adaptive_labels(by_view, ratio=ratio, temperature=teacher).targets
    loss = swapped_labels(by_view, targets, temperature=0.1)
    loss.backward()
    torch.testing.assert_close(loss.detach(), ref(f"{case}__loss"), **TIGHT)
    torch.testing.assert_close(logits.grad, ref(f"{case}__grad"), **TIGHT)


def test_balance_equals_the_released_code():
    logits = ref("ent_0__logits").requires_grad_()
    loss = entropy_gap(logits, temperature=0.1)
    loss.backward()
    torch.testing.assert_close(loss.detach(), ref("ent_0__loss"), **TIGHT)
    torch.testing.assert_close(logits.grad, ref("ent_0__grad"), **TIGHT)


def test_separation_equals_the_released_code():
    raw = ref("sep_1__raw_prototypes").requires_grad_()
    loss = prototype_separation(raw, temperature=0.2, base_temperature=0.1)
    loss.backward()
    torch.testing.assert_close(loss.detach(), ref("sep_1__loss"), **TIGHT)
    torch.testing.assert_close(raw.grad, ref("sep_1__grad"), **TIGHT)


def test_contrast_of_instances_equals_the_released_code():
    features = ref("nce__features").requires_grad_()
    loss = nt_xent(*features.chunk(2), temperature=1.0)
    loss.backward()
    torch.testing.assert_close(loss.detach(), ref("nce__loss"), **TIGHT)
    torch.testing.assert_close(features.grad, ref("nce__grad"), **TIGHT)


@pytest.mark.parametrize("ratio", [0.0, 0.2, 0.5, 0.99, 1.0])
def test_pseudo_labels_are_the_method_written_out(ratio):
    s = scores()
    found = adaptive_labels(s, ratio=ratio, temperature=0.05)
    total = 0.0
    for view in range(2):
        t = [(s[view, i] / 0.05).softmax(0) for i in range(8)]
        ranks = []
        for row in t:
            first, second = sorted(row.tolist(), reverse=True)[:2]
            ranks.append(first / (second + 1e-6))
        surest = sorted(range(8), key=lambda i: -ranks[i])[: math.floor(8 * ratio)]
        for i in range(8):
            q = F.one_hot(t[i].argmax(), 6).double() if i in surest else t[i]
            torch.testing.assert_close(found.targets[view, i], q, **TIGHT)
            assert bool(found.hard[view, i]) == (i in surest)
            p = (s[1 - view, i] / 0.1).softmax(0)
            total -= float((q * p.log()).sum()) / 16
    assert swapped_labels(s, found.targets).item() == pytest.approx(total, rel=1e-12)


def test_exactly_the_asked_share_is_one_hot_and_rows_sum_to_one():
    s = scores(n=13)
    for ratio in (0.0, 0.3, 0.77, 1.0):
        targets, hard = adaptive_labels(s, ratio=ratio)
        torch.testing.assert_close(targets.sum(-1), torch.ones(2, 13).double())
        assert hard.sum(1).tolist() == [math.floor(13 * ratio)] * 2
        assert torch.equal((targets == 1).any(-1), hard)  # nobody is one-hot by chance here
    assert torch.equal(targets.argmax(-1), s.argmax(-1))


def test_rows_of_equal_confidence_are_taken_by_their_place_and_no_more_than_asked():
    s = torch.tensor([[0.5, 0.1, 0.0]]).repeat(6, 1)
    assert adaptive_labels(s, ratio=0.5).hard.tolist() == [True] * 3 + [False] * 3
    saturated = torch.tensor([[1.0, -1.0], [0.9, -1.0], [0.2, 0.1]])  # all but the last are as sure as numbers can be
    assert adaptive_labels(saturated, ratio=0.67, temperature=1e-3).hard.tolist() == [True, True, False]


def test_no_gradient_comes_through_targets():
    s = scores().requires_grad_()
    found = adaptive_labels(s, ratio=0.4).targets
    assert not found.requires_grad
    swapped_labels(s, found).backward()
    again = s.detach().clone().requires_grad_()
    swapped_labels(again, found.clone().requires_grad_()).backward()  # even of targets that would take some
    assert torch.equal(s.grad, again.grad)


def test_the_balance_is_zero_where_even_ln_k_where_one_class_takes_all_and_never_below():
    assert entropy_gap(torch.eye(4).double()).item() == pytest.approx(0, abs=1e-12)
    assert entropy_gap(torch.zeros(3, 5).double()).item() == pytest.approx(0, abs=1e-12)
    one = torch.tensor([[1.0, -1.0, -1.0]]).repeat(4, 1).double()
    assert entropy_gap(one, temperature=0.01).item() == pytest.approx(math.log(3), abs=1e-9)
    for seed in range(5):
        s = scores(seed=seed)[0]
        p = sum((row / 0.1).softmax(0) for row in s) / len(s)
        expected = sum(float(x * x.log()) for x in p) + math.log(6)
        assert entropy_gap(s).item() == pytest.approx(expected, rel=1e-10)
        assert expected > 0


def test_classes_whose_probability_underflows_leave_gradients_finite():
    s = torch.tensor([[1.0, -1.0, 0.0]]).repeat(4, 1).requires_grad_()
    loss = entropy_gap(s, temperature=0.005)  # exp(-400) is 0 in single precision
    loss.backward()
    assert loss.item() == pytest.approx(math.log(3))
    assert torch.isfinite(s.grad).all()


def test_separation_is_symmetric_blind_to_lengths_and_falls_as_prototypes_part():
    g = torch.Generator().manual_seed(0)
    mu = torch.randn(5, 4, generator=g, dtype=torch.float64)
    loss = prototype_separation(mu)
    torch.testing.assert_close(prototype_separation(mu[torch.randperm(5, generator=g)]), loss)
    torch.testing.assert_close(prototype_separation(mu * torch.rand(5, 1, generator=g) + 0 * mu), loss)
    unit, total = F.normalize(mu, dim=1), 0.0
    for k in range(5):
        total += math.log(sum(math.exp(float(unit[k] @ unit[j]) / 0.1) for j in range(5) if j != k) / 4) / 5
    assert loss.item() == pytest.approx(total, rel=1e-12)
    at = [
        prototype_separation(torch.tensor([[1.0, 0.0, 0.0], [math.cos(a), math.sin(a), 0.0], [0.0, 0.0, 1.0]]))
        for a in (0.1, 0.5, 1.0, 2.0)
    ]
    assert at == sorted(at, reverse=True)
    assert prototype_separation(torch.eye(6)).item() == pytest.approx(0, abs=1e-6)
    assert prototype_separation(torch.eye(2), temperature=1e-4).isfinite()  # logits of 10,000


def test_the_ramp_is_that_of_the_released_code():
    ramp = [linear_ramp(e, 0.2, 1.0, length=100, wait=5) for e in range(200)]
    expected = np.concatenate([np.zeros(5), np.linspace(0.2, 1.0, 100), np.ones(95)])
    np.testing.assert_allclose(ramp, expected, atol=1e-12)
    assert [linear_ramp(0, 0.07, 0.05, length=n) for n in (0, 1)] == [0.05, 0.05]


def test_what_cannot_be_is_said():
    with pytest.raises(UsageError, match=r"ratio must be in \[0, 1\], got 1.5"):
        adaptive_labels(scores(), ratio=1.5)
    with pytest.raises(UsageError, match="two classes at least"):
        adaptive_labels(torch.zeros(4, 1), ratio=0.5)
    with pytest.raises(UsageError, match=r"\(2, B, K\)"):
        swapped_labels(scores(), scores()[:1])
    with pytest.raises(UsageError, match="two at least, got 1"):
        prototype_separation(torch.ones(1, 3))
