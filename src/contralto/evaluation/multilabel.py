"""Metrics for pictures with several labels, with the conventions of NUS-WIDE papers and the usual ones beside them."""

import numpy as np
import numpy.typing as npt

from contralto.errors import UsageError

__all__ = ["average_precisions", "multilabel_metrics"]

_TINY = 1e-4
"""Where counts of false and missed answers start, so that a class without any has a precision and a recall (CAPro's code)."""


def multilabel_metrics(probabilities: npt.ArrayLike, labels: npt.ArrayLike, *, top: int = 3) -> dict[str, float]:
    """Precision, recall and F1 of the `top` classes of every picture, and average precision of the scores.

    Parameters
    ----------
    probabilities : array (N, C)
        Scores; only their order matters.
    labels : array (N, C)
        1 where the class is there, else 0.
    top : int
        How many classes are said to be there.

    Returns
    -------
    dict
        `class_precision`, `class_recall`, `class_f1`: means over classes, and their harmonic mean (C-P, C-R, C-F1);
        `overall_precision`, `overall_recall`, `overall_f1`: means over pictures (O-P, O-R, O-F1); `map_micro`: average precision
        over all pairs of picture and class, which CAPro reports as mAP; `map_macro`: the mean over classes that have a picture,
        which is what most others call mAP.

    Raises
    ------
    UsageError
        If the shapes do not fit.

    Examples
    --------
    >>> m = multilabel_metrics([[0.9, 0.1], [0.2, 0.8]], [[1, 0], [0, 1]], top=1)
    >>> round(m["class_f1"], 3), round(m["overall_f1"], 3), m["map_macro"]
    (1.0, 1.0, 1.0)
    """
    scores, truth = np.asarray(probabilities, dtype=np.float64), np.asarray(labels) > 0
    if scores.shape != truth.shape or scores.ndim != 2 or len(scores) == 0:
        raise UsageError(f"probabilities and labels must be of one shape (N, C): {scores.shape}, {truth.shape}")
    said = np.zeros_like(truth)
    np.put_along_axis(said, np.argsort(-scores, axis=1, kind="stable")[:, :top], True, axis=1)
    right = (said & truth).astype(np.float64)
    out: dict[str, float] = {}
    for name, axis in (("class", 0), ("overall", 1)):
        hit, answered, there = (x.sum(axis).astype(np.float64) for x in (right, said, truth))
        precision, recall = (hit / (answered + _TINY)).mean(), (hit / (there + _TINY)).mean()
        out |= {f"{name}_precision": float(precision), f"{name}_recall": float(recall)}
        out[f"{name}_f1"] = float(2 * precision * recall / max(precision + recall, 1e-12))
    by_class = average_precisions(scores, truth)
    out["map_micro"] = float(average_precisions(scores.reshape(-1, 1), truth.reshape(-1, 1))[0])
    out["map_macro"] = float(np.nanmean(by_class)) if not np.isnan(by_class).all() else float("nan")
    return out


def average_precisions(scores: npt.ArrayLike, labels: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Average precision of every column (C,): NaN where nothing is there; equal scores count as one step, as in scikit-learn.

    Examples
    --------
    >>> average_precisions([[0.9, 0.1], [0.8, 0.3]], [[0, 0], [1, 0]]).tolist()
    [0.5, nan]
    """
    from sklearn.metrics import average_precision_score

    x, y = np.asarray(scores, dtype=np.float64), np.asarray(labels) > 0
    return np.array([average_precision_score(y[:, c], x[:, c]) if y[:, c].any() else np.nan for c in range(x.shape[1])])
