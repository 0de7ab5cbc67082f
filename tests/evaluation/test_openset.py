"""The open-set curve against counting one by one."""

from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from contralto.errors import UsageError
from contralto.evaluation.openset import Score, open_set_curve, outlier_detection, outlier_scores


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


@pytest.mark.parametrize("score", get_args(Score))
def test_scores_of_outliers_are_their_formulas(score):
    logits = np.random.default_rng(0).normal(size=(20, 5))
    found = outlier_scores(logits, score, temperature=0.4)
    for row, value in zip(logits, found, strict=True):
        scaled = row / 0.4
        p = np.exp(scaled) / np.exp(scaled).sum()
        second, first = np.sort(p)[-2:]
        formula = {
            "probability": -first, "logit": -row.max(), "energy": -0.4 * np.log(np.exp(scaled).sum()),
            "cross_entropy": scaled.mean() - np.log(np.exp(scaled).sum()), "ratio": -first / (second + 1e-6),
            "margin": -(first - second),
        }  # fmt: skip
        assert value == pytest.approx(formula[score], rel=1e-10)
    sure = outlier_scores([[5.0, 0.0, 0.0], [0.1, 0.0, 0.0]], score, temperature=0.4)
    assert sure[1] > sure[0]  # the unsure one looks more like an outlier


def test_detection_is_counted_over_all_pairs_and_thresholds():
    rng = np.random.default_rng(0)
    inside, outside = rng.normal(size=60).round(1), (1 + rng.normal(size=40)).round(1)  # with ties
    found = outlier_detection(inside, outside, share=None)
    pairs = outside[:, None] - inside
    assert found.auroc == pytest.approx(((pairs > 0) + 0.5 * (pairs == 0)).mean())
    thresholds = np.unique(np.concatenate([inside, outside]))
    enough = max(t for t in thresholds if (outside >= t).mean() >= 0.95)
    assert found.fpr95 == pytest.approx((inside >= enough).mean())
    hits = [((outside >= t).sum(), (inside >= t).sum()) for t in thresholds[::-1]]
    recall = np.array([0, *(h / 40 for h, _ in hits)])
    assert found.aupr == pytest.approx(sum(np.diff(recall) * [h / (h + f) for h, f in hits]))


def test_draws_of_outliers_keep_the_ratio_and_depend_on_the_seed_alone():
    rng = np.random.default_rng(0)
    inside, outside = rng.normal(size=100), 1 + rng.normal(size=500)
    first, again, other = (outlier_detection(inside, outside, seed=s) for s in (0, 0, 1))
    assert first == again != other
    assert first.auroc == pytest.approx(outlier_detection(inside, outside, share=None).auroc, abs=0.05)
    perfect = outlier_detection([0.0, 0.1], [1.0, 2.0])
    assert perfect == (0.0, 1.0, 1.0)
    for wrong in (([], [1.0]), ([1.0], [])):
        with pytest.raises(UsageError, match="inside and outside"):
            outlier_detection(*wrong)
    with pytest.raises(UsageError, match="score must be one of probability, logit"):
        outlier_scores([[1.0, 0.0]], "msp")
    with pytest.raises(UsageError, match="two classes at least"):
        outlier_scores([[1.0]])
