"""Multi-label metrics against the official code and against counting one by one."""

from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from contralto.errors import UsageError
from contralto.evaluation.multilabel import average_precisions, multilabel_metrics

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
