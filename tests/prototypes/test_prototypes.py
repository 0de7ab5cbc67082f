"""Prototype rules against loops over samples; the order of the correction rules."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from contralto.errors import UsageError
from contralto.prototypes.bank import (
    assign,
    class_means,
    densities,
    ema_update,
    means,
    merge,
    prototype_logits,
    reduce_scores,
    split,
)
from contralto.prototypes.correction import Verdict, correct_labels, probability_wrong


def unit(n, d, g):
    return F.normalize(torch.randn(n, d, generator=g, dtype=torch.float64), dim=1)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 12), st.floats(0, 1))
def test_the_closed_form_equals_one_sample_after_the_other(seed, n, momentum):
    g = torch.Generator().manual_seed(seed)
    prototypes, z, y = unit(3, 4, g), unit(n, 4, g), torch.randint(3, (n,), generator=g)
    slow = prototypes.clone()
    for i in range(n):
        slow[y[i]] = momentum * slow[y[i]] + (1 - momentum) * z[i]
    before = prototypes.clone()
    torch.testing.assert_close(ema_update(prototypes, z, y, momentum), F.normalize(slow, dim=1), atol=1e-9, rtol=1e-9)
    assert torch.equal(prototypes, before)


def test_momentum_one_changes_nothing_and_zero_leaves_the_last_sample():
    g = torch.Generator().manual_seed(0)
    prototypes, z = unit(2, 4, g), unit(5, 4, g)
    y = torch.tensor([0, 0, 1, 0, 1])
    torch.testing.assert_close(ema_update(prototypes, z, y, 1.0), prototypes)
    torch.testing.assert_close(ema_update(prototypes, z, y, 0.0), z[[3, 4]])


def test_class_means_leave_out_unlabelled_rows_and_empty_classes_are_zero():
    g = torch.Generator().manual_seed(0)
    z = unit(5, 4, g)
    means = class_means(z, torch.tensor([0, 0, -1, 2, 7]), 3)
    torch.testing.assert_close(means[0], F.normalize(z[:2].mean(0), dim=0))
    torch.testing.assert_close(means[2], z[3])
    assert torch.equal(means[1], torch.zeros(4, dtype=torch.float64))
    torch.testing.assert_close(prototype_logits(z, means, 0.1)[:, 2], (z @ z[3]) / 0.1)


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_assignment_is_the_nearest_prototype_and_known_rows_keep_theirs(metric, dtype):
    g = torch.Generator().manual_seed(1)
    x, p = 3 * torch.randn(50, 6, generator=g, dtype=dtype), torch.randn(7, 6, generator=g, dtype=dtype)
    fixed = torch.randint(-5, 7, (50,), generator=g).clamp_min(-1)
    labels, value = assign(x, p, metric=metric)
    held, held_value = assign(x, p, metric=metric, fixed=fixed)
    for i in range(50):
        if metric == "cosine":
            all_of_them = [float(x[i] @ c / x[i].norm() / c.norm()) for c in p]
            best = max(all_of_them)
        else:
            all_of_them = [float(((x[i] - c) ** 2).sum()) for c in p]
            best = min(all_of_them)
        assert labels[i] == all_of_them.index(best)
        assert float(value[i]) == pytest.approx(best, rel=1e-4, abs=1e-5)
        want = int(fixed[i]) if fixed[i] >= 0 else int(labels[i])
        assert held[i] == want
        assert float(held_value[i]) == pytest.approx(all_of_them[want], rel=1e-4, abs=1e-5)


def test_assignment_in_blocks_is_the_same_and_odd_input_is_named(monkeypatch):
    g = torch.Generator().manual_seed(2)
    x, p = torch.randn(40, 3, generator=g, dtype=torch.float64), torch.randn(5, 3, generator=g, dtype=torch.float64)
    whole = assign(x, p, metric="euclidean")
    monkeypatch.setattr("contralto.prototypes.bank.TILE", 11)
    blocks = assign(x, p, metric="euclidean")
    assert torch.equal(whole[0], blocks[0])
    torch.testing.assert_close(whole[1], blocks[1])
    assert [len(t) for t in assign(x[:0], p)] == [0, 0]
    for wrong in (lambda: assign(x, p[:, :2]), lambda: assign(x, p[:0]), lambda: assign(x, p, metric="hamming")):
        with pytest.raises(UsageError):
            wrong()


def test_means_have_the_gradient_of_a_mean_and_empty_prototypes_stay():
    g = torch.Generator().manual_seed(0)
    x, y, before = unit(6, 3, g), torch.tensor([0, 2, 2, -1, 0, 3]), unit(3, 3, g)
    for normalize in (False, True):
        found = means(x, y, 3, before=before, normalize=normalize)
        for k, rows in ((0, [0, 4]), (2, [1, 2])):
            mean = sum(x[r] for r in rows) / 2
            torch.testing.assert_close(found[k], mean / mean.norm() if normalize else mean)
        assert torch.equal(found[1], before[1])
    x = x[:3].clone().requires_grad_(True)
    assert torch.autograd.gradcheck(lambda z: means(z, torch.tensor([1, 0, 1]), 2), x)
    assert torch.autograd.gradcheck(lambda z: means(z, torch.tensor([1, 0, 1]), 2, normalize=True), x)


def test_splitting_and_merging_keep_count_of_who_is_who():
    p = torch.arange(8.0).reshape(4, 2)
    halves = torch.stack([torch.full((2, 2), 10.0), torch.full((2, 2), 20.0)], 1)
    found, parent = split(p, torch.tensor([3, 1]), halves)
    assert found.shape == (6, 2)
    assert parent.tolist() == [0, 1, 2, 3, 3, 1]
    assert torch.equal(found[[0, 2]], p[[0, 2]])
    assert found[[1, 3, 4, 5], 0].tolist() == [10, 10, 20, 20]
    merged, place = merge(p, torch.tensor([[2, 0]]), count=torch.tensor([1, 5, 3, 5]))
    assert place.tolist() == [1, 0, 1, 2]
    torch.testing.assert_close(merged, torch.stack([p[1], (3 * p[2] + p[0]) / 4, p[3]]))
    with pytest.raises(UsageError, match="two pairs"):
        merge(p, torch.tensor([[0, 1], [1, 2]]))


@pytest.mark.parametrize("how", ["max", "mean", "logmeanexp"])
def test_scores_of_several_prototypes_reduce_to_one_per_class(how):
    g = torch.Generator().manual_seed(3)
    scores, class_of = 50 * torch.randn(4, 6, generator=g, dtype=torch.float64), torch.tensor([2, 0, 0, 2, 2, 3])
    found = reduce_scores(scores, class_of, 4, how=how)
    for i in range(4):
        for c in (0, 2, 3):
            own = scores[i, class_of == c]
            want = {"max": own.max(), "mean": own.mean(), "logmeanexp": own.logsumexp(0) - np.log(len(own))}[how]
            torch.testing.assert_close(found[i, c], want)
        assert found[i, 1] == -torch.inf
    scores = scores.requires_grad_(True)
    assert torch.autograd.gradcheck(lambda s: reduce_scores(s, class_of, 4, how=how)[:, [0, 2, 3]], scores)
    with pytest.raises(UsageError, match="how must be"):
        reduce_scores(scores, class_of, 4, how="median")


def test_densities_follow_their_formula_and_have_the_wanted_mean():
    g = torch.Generator().manual_seed(4)
    count = torch.tensor([12, 1, 40, 3, 0, 7])
    distance = torch.rand(6, generator=g, dtype=torch.float64) * count
    phi = [float(distance[k] / count[k] / np.log(int(count[k]) + 10)) for k in (0, 2, 3, 5)]
    phi = np.array([phi[0], max(phi), phi[1], phi[2], max(phi), phi[3]])
    clipped = np.clip(phi, *np.quantile(phi, [0.1, 0.9]))
    found = densities(distance, count, target=0.2)
    np.testing.assert_allclose(found.numpy(), 0.2 * clipped / clipped.mean())
    assert densities(torch.zeros(3), torch.tensor([1, 0, 1]), target=0.5).tolist() == [0.5] * 3
    assert densities(torch.zeros(2), torch.tensor([4, 4]), target=0.5).tolist() == [0.5] * 2


def by_rules(r, given_label, anchor, threshold, keep):
    """CAPro 5.6 for one sample."""
    if anchor:
        return given_label, Verdict.ANCHOR
    best = int(r.argmax())
    if r[best] >= threshold:
        return best, Verdict.KEPT if best == given_label else Verdict.CORRECTED
    if r[given_label] >= keep:
        return given_label, Verdict.KEPT
    return given_label, Verdict.OFF_TOPIC


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.1, 1.1), st.none() | st.floats(0, 1))
def test_correction_follows_its_rules_in_order(seed, threshold, keep):
    g = torch.Generator().manual_seed(seed)
    r = (3 * torch.randn(9, 4, generator=g, dtype=torch.float64)).softmax(1)
    y, anchors = torch.randint(4, (9,), generator=g), torch.rand(9, generator=g) < 0.3
    result = correct_labels(r, y, anchors, threshold=threshold, keep_threshold=keep)
    for i in range(9):
        label, verdict = by_rules(r[i], int(y[i]), bool(anchors[i]), threshold, 0.25 if keep is None else keep)
        assert (int(result.labels[i]), int(result.verdict[i])) == (label, verdict)
    assert torch.equal(result.kept, result.verdict != Verdict.OFF_TOPIC)


def test_a_threshold_above_one_corrects_nothing_and_wrong_shapes_are_named():
    r = torch.eye(3)
    result = correct_labels(r, torch.tensor([1, 1, 1]), torch.zeros(3, dtype=torch.bool), threshold=1.01)
    assert result.labels.tolist() == [1, 1, 1]
    with pytest.raises(UsageError, match="do not fit"):
        correct_labels(r, torch.tensor([1]), torch.zeros(3, dtype=torch.bool), threshold=0.5)
    with pytest.raises(UsageError, match="momentum"):
        ema_update(r, r, torch.arange(3), 1.5)


def test_probability_of_being_wrong_is_monotone_in_the_score_and_finds_two_groups():
    rng = np.random.default_rng(0)
    wrong = rng.random(500) < 0.3
    given = np.where(wrong, rng.beta(2, 8, 500), rng.beta(8, 2, 500))
    p = probability_wrong(given)
    assert (np.diff(p[np.argsort(given)]) < 0).all()  # a list sorted by it has no ties that the score has not
    assert p[wrong].mean() > 0.75
    assert p[~wrong].mean() < 0.25
    assert probability_wrong([0.5] * 4).tolist() == [0.5] * 4
