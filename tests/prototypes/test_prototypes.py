"""Prototype rules against loops over samples; the order of the correction rules."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from contralto.errors import UsageError
from contralto.prototypes.bank import class_means, ema_update, prototype_logits
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
