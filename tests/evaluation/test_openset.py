"""The open-set curve against counting one by one."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from contralto.errors import UsageError
from contralto.evaluation.openset import open_set_curve


def slow(p, y, threshold):
    classes = p.shape[1]
    tp, fp, fn = np.zeros(classes + 1), np.full(classes + 1, 1e-4), np.full(classes + 1, 1e-4)
    for i in range(len(y)):
        truth = classes if y[i] < 0 else y[i]
        answer = int(p[i].argmax()) if p[i].max() > threshold else classes
        if answer == truth:
            tp[truth] += 1
        else:
            fp[answer] += 1
            fn[truth] += 1
    precision, recall = (tp / (tp + fp)).mean(), (tp / (tp + fn)).mean()
    return precision, recall, 2 * precision * recall / max(precision + recall, 1e-12)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 25), st.integers(2, 5))
def test_it_equals_counting_one_by_one(seed, n, classes):
    rng = np.random.default_rng(seed)
    p = rng.dirichlet(np.ones(classes), n).round(2)  # ties, also with thresholds
    y = rng.integers(-1, classes, n)
    thresholds = np.array([0.0, 0.3, 0.5, 0.51, 0.9, 1.0])
    curve = open_set_curve(p, y, thresholds=thresholds)
    expected = np.array([slow(p, y, t) for t in thresholds])
    np.testing.assert_allclose(np.stack([curve.precision, curve.recall, curve.f1], 1), expected, atol=1e-9)
    for row, t in enumerate(thresholds):
        accepted = p.max(1) > t
        right = (p.argmax(1) == y)[accepted].mean() if accepted.any() else np.nan
        np.testing.assert_allclose(curve.accepted_right[row], right)
    if (y >= 0).any():
        np.testing.assert_allclose(curve.rejected_known, [(p[y >= 0].max(1) <= t).mean() for t in thresholds])
    else:
        assert np.isnan(curve.rejected_known).all()


def test_without_unknown_pictures_rejecting_nothing_is_best_and_a_perfect_model_has_the_whole_area():
    p = np.eye(3)[[0, 1, 2, 0]] * 0.8 + 0.2 / 3
    curve = open_set_curve(p, [0, 1, 2, 0])
    assert curve.best < 0.86
    assert np.isnan(curve.rejected_unknown).all()
    assert len(curve.thresholds) == 100
    with pytest.raises(UsageError, match="do not fit"):
        open_set_curve(p, [0])
