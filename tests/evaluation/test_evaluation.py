"""Metrics against scikit-learn and obvious counts; intervals against simulation."""

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score

from contralto.errors import UsageError
from contralto.evaluation.classification import accuracy_interval, calibration_error, per_class_accuracy
from contralto.evaluation.noise import noise_metrics, risk_coverage


def test_accuracies_are_scikit_learns():
    rng = np.random.default_rng(0)
    y, p = rng.integers(0, 4, 200), rng.integers(0, 4, 200)
    assert accuracy_interval(y == p, y).value == pytest.approx((y == p).mean())
    assert accuracy_interval(y == p, y, macro=True).value == pytest.approx(balanced_accuracy_score(y, p))
    assert per_class_accuracy(y, p, 5)[:4].mean() == pytest.approx(balanced_accuracy_score(y, p))
    assert np.isnan(per_class_accuracy(y, p, 5)[4])


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = 0
    for i in range(200):
        right = rng.random(150) < 0.7
        low, high = accuracy_interval(right, np.zeros(150, int), resamples=400, seed=i)[1:]
        hits += low <= 0.7 <= high
    assert 0.89 <= hits / 200 <= 0.99


def test_groups_that_agree_widen_the_interval_and_empty_groups_stand_alone():
    rng = np.random.default_rng(0)
    right = np.repeat(rng.random(50) < 0.5, 10)
    groups = np.repeat(np.arange(50), 10).astype(str)
    y = np.zeros(500, int)
    alone = accuracy_interval(right, y)
    grouped = accuracy_interval(right, y, groups=groups)
    assert grouped.high - grouped.low > 2 * (alone.high - alone.low)
    nameless = accuracy_interval(right, y, groups=np.array([""] * 500))
    assert nameless.high - nameless.low == pytest.approx(alone.high - alone.low, rel=0.25)


def test_seeds_are_resampled_too_and_a_paired_difference_may_be_negative():
    y = np.zeros(100, int)
    spread = np.stack([np.full(100, v) for v in (-1.0, 0.0, 0.0)])
    interval = accuracy_interval(spread, y)
    assert interval.value == pytest.approx(-1 / 3)
    assert interval.low < -0.9 < interval.high
    with pytest.raises(UsageError, match="same length"):
        accuracy_interval([], np.zeros(0, int))


def test_calibration_error_of_honest_and_of_boastful_probabilities():
    rng = np.random.default_rng(0)
    p = rng.random(20_000)
    assert calibration_error(rng.random(20_000) < p, p) < 0.02
    assert calibration_error(np.zeros(100), np.full(100, 0.9)) == pytest.approx(0.9)


def test_noise_metrics_by_hand_and_unknown_labels_left_out():
    given, clean = np.array([0, 0, 0, 1, 1, 1]), np.array([0, 1, -1, 1, 0, -2])
    new = np.array([0, 1, -1, 1, 1, 0])
    flagged = np.array([False, True, True, False, False, True])
    m = noise_metrics(given, clean, new, flagged, np.array([0.1, 0.9, 0.8, 0.2, 0.3, 0.5]))
    assert m["n"] == 5
    assert m["precision"] == 1.0
    assert m["recall"] == pytest.approx(2 / 3)
    assert m["average_precision"] == pytest.approx(1.0)
    assert m["rate_given"] == pytest.approx(3 / 5)
    assert m["rate_cleaned"] == pytest.approx(1 / 4)
    assert m["corrected_accuracy"] == 1.0
    assert (m["off_topic_precision"], m["off_topic_recall"]) == (1.0, 1.0)


def test_risk_coverage_rises_to_all_right():
    rng = np.random.default_rng(0)
    p = rng.random(100)
    wrong = rng.random(100) < p
    x, y = risk_coverage(p, wrong)
    assert (x[0], x[-1]) == (0, 1)
    assert y[0] == pytest.approx(1 - wrong.mean())
    assert y[-1] == 1
    assert (np.diff(y) >= 0).all()
    assert y[30] > y[0] + 0.15  # the most suspicious first: better than chance
