"""Multi-label metrics against the official code and against counting one by one."""

from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from contralto.errors import UsageError
from contralto.evaluation.multilabel import (
    _weighted_map,
    average_precisions,
    entry_metrics,
    map_interval,
    multilabel_metrics,
)

REFERENCE = np.load(Path(__file__).parents[1] / "reference" / "capro_multilabel.npz", allow_pickle=False)


def test_they_equal_the_official_code():
    probabilities, labels, expected = (REFERENCE[f"multilabel_metrics__{k}"] for k in ("prob", "target", "out"))
    found = multilabel_metrics(probabilities, labels)
    names = [f"{a}_{b}" for a in ("class", "overall") for b in ("precision", "recall", "f1")] + ["map_micro"]
    np.testing.assert_allclose([100 * found[n] for n in names], expected, atol=1e-3)


def test_they_equal_counting_one_by_one():
    rng = np.random.default_rng(0)
    p, y = rng.random((30, 6)), rng.random((30, 6)) < 0.3
    y[:, 5] = False  # a class that is nowhere
    found = multilabel_metrics(p, y, top=2)
    said = [set(sorted(range(6), key=lambda c, i=i: -p[i, c])[:2]) for i in range(30)]
    precision = [sum(y[i, c] for i in range(30) if c in said[i]) / (sum(c in s for s in said) + 1e-4) for c in range(6)]
    recall = [sum(y[i, c] for i in range(30) if c in said[i]) / (y[:, c].sum() + 1e-4) for c in range(6)]
    assert found["class_precision"] == pytest.approx(np.mean(precision))
    assert found["class_recall"] == pytest.approx(np.mean(recall))
    assert found["overall_precision"] == pytest.approx(
        np.mean([sum(y[i, c] for c in said[i]) / 2.0001 for i in range(30)])
    )
    assert found["map_macro"] == pytest.approx(np.mean([average_precision_score(y[:, c], p[:, c]) for c in range(5)]))
    assert np.isnan(average_precisions(p, y)[5])


def test_shapes_that_do_not_fit_are_named():
    with pytest.raises(UsageError, match="one shape"):
        multilabel_metrics(np.zeros((2, 3)), np.zeros((2, 2)))


def test_resampled_precision_equals_that_of_weighted_pictures_with_ties():
    rng = np.random.default_rng(1)
    scores, truth = rng.integers(0, 6, (40, 4)) / 5, rng.random((40, 4)) < 0.3  # many equal scores
    truth[:, 3] = False
    weight = rng.multinomial(40, np.full(40, 1 / 40), size=20)
    weight[0, truth[:, 0]] = 0  # a resample without the first class
    expected = [
        np.mean(
            [
                average_precision_score(truth[:, c], scores[:, c], sample_weight=w)
                for c in range(3)
                if w[truth[:, c]].any()
            ]
        )
        for w in weight
    ]
    np.testing.assert_allclose(_weighted_map(scores, truth, weight), expected)


def test_the_interval_is_of_seeds_and_groups_of_pictures():
    rng = np.random.default_rng(2)
    truth = rng.random((300, 5)) < 0.2
    noise = rng.normal(size=(3, 300, 5))
    better, worse = truth + 0.5 * noise, truth + 1.0 * noise
    found = map_interval(better, truth, against=worse, resamples=400)
    maps = [[np.nanmean(average_precisions(s, truth)) for s in side] for side in (better, worse)]
    assert found.value == pytest.approx(np.mean(maps[0]) - np.mean(maps[1]))
    assert 0 < found.low < found.value < found.high
    assert map_interval(worse, truth, against=better, resamples=400).high == pytest.approx(-found.low)
    same = map_interval(better, truth, against=better)
    assert (same.value, same.low, same.high) == (0, 0, 0)
    # Pictures that come in tens are ten times fewer: the interval is about three times as wide.
    tens = np.repeat(np.arange(30), 10).astype(str)
    truth, noise = np.repeat(truth[:30], 10, 0), np.repeat(rng.normal(size=(30, 5)), 10, 0)
    apart, together = (map_interval(truth + noise, truth, groups=g, resamples=400) for g in (None, tens))
    assert 2 < (together.high - together.low) / (apart.high - apart.low) < 5
    # Seeds that differ widen it.
    alike, unlike = (map_interval(truth + np.stack([noise, x * noise]), truth, resamples=400) for x in (1.0, 3.0))
    assert unlike.high - unlike.low > 1.5 * (alike.high - alike.low)
    with pytest.raises(UsageError, match="at least one 1"):
        map_interval(np.zeros((4, 2)), np.zeros((4, 2)))
    with pytest.raises(UsageError, match="are needed"):
        map_interval(np.zeros((4, 2)), np.ones((4, 3)))


def test_wrong_and_missing_labels_are_two_lists():
    given, clean = np.array([[1, 1, 0], [1, 0, 0]]), np.array([[1, 0, 1], [1, 0, 0]])
    found = entry_metrics(given, clean, [[0.9, 0.5, 0.2], [0.1, 0.3, 0.1]])
    assert found == {
        "wrong_share": 1 / 3, "wrong_average_precision": 0.5, "missing_share": 1 / 3, "missing_average_precision": 0.5,
    }  # fmt: skip
    nothing = entry_metrics(clean, clean, np.zeros((2, 3)))
    assert nothing["wrong_share"] == nothing["missing_share"] == 0
    assert np.isnan(nothing["wrong_average_precision"])
