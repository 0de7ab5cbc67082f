"""Metrics for pictures with several labels, with the conventions of NUS-WIDE papers and the usual ones beside them."""

from typing import Any

import numpy as np
import numpy.typing as npt

from contralto.errors import UsageError
from contralto.evaluation.classification import Interval, group_numbers

__all__ = ["average_precisions", "entry_metrics", "map_interval", "multilabel_metrics"]

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


def entry_metrics(given: npt.ArrayLike, clean: npt.ArrayLike, p_wrong: npt.ArrayLike) -> dict[str, float]:
    """How well the labels that are wrong are found among those given, and the missing ones among those not given.

    Parameters
    ----------
    given, clean : array (N, C)
        Web labels and right ones, 0 or 1.
    p_wrong : array (N, C)
        Score that an entry is the other way round.

    Returns
    -------
    dict
        `wrong_share` of the given labels and `missing_share` of the others, `wrong_average_precision` and
        `missing_average_precision` of the list by `p_wrong`. NaN where there is nothing to find.

    Examples
    --------
    >>> m = entry_metrics([[1, 1], [0, 0]], [[1, 0], [1, 0]], [[0.1, 0.9], [0.6, 0.2]])
    >>> m["wrong_share"], m["wrong_average_precision"], m["missing_average_precision"]
    (0.5, 1.0, 1.0)
    """
    on, truth, score = np.asarray(given) > 0, np.asarray(clean) > 0, np.asarray(p_wrong, dtype=np.float64)
    out: dict[str, float] = {}
    for name, side in (("wrong", on), ("missing", ~on)):
        false = (truth != on)[side]
        out[f"{name}_share"] = float(false.mean()) if len(false) else float("nan")
        out[f"{name}_average_precision"] = float(average_precisions(score[side][:, None], false[:, None])[0])
    return out


def map_interval(
    scores: npt.ArrayLike,
    labels: npt.ArrayLike,
    *,
    against: npt.ArrayLike | None = None,
    groups: npt.NDArray[Any] | None = None,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> Interval:
    """Mean average precision over classes, or a difference of two, with a bootstrap interval over seeds and groups of pictures.

    Parameters
    ----------
    scores : array (N, C) or (S, N, C)
        Of every seed; only their order within a class matters.
    labels : array (N, C)
        1 where the class is there, else 0.
    against : array like `scores`, optional
        Scores of the other side of a paired comparison.
    groups : array (N,), optional
        Pictures of one group are drawn together; "" and None stand alone.
    level : float
        Of the interval.
    resamples, seed : int
        Of the bootstrap.

    Returns
    -------
    Interval
        Percentile interval; a class that a resample has no picture of does not count in it.

    Raises
    ------
    UsageError
        If the shapes do not fit, or no class has a picture.

    Examples
    --------
    >>> truth = np.array([[1, 0], [0, 1]] * 50)
    >>> map_interval(truth * 1.0, truth)
    Interval(value=1.0, low=1.0, high=1.0)
    >>> map_interval(truth * 1.0, truth, against=1.0 - truth).value > 0.4
    True
    """
    truth = np.asarray(labels) > 0
    sides = [np.asarray(x, dtype=np.float64) for x in (scores, *(() if against is None else (against,)))]
    sides = [x[None] if x.ndim == 2 else x for x in sides]
    if any(x.shape != (len(sides[0]), *truth.shape) for x in sides) or not truth.any():
        told = ", ".join(str(x.shape) for x in sides)
        raise UsageError(f"scores (S, N, C) and labels (N, C) with at least one 1 are needed: {told}, {truth.shape}")

    def difference(weight: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
        ours, *theirs = (np.stack([_weighted_map(x, truth, weight) for x in side]) for side in sides)
        return np.asarray(ours - theirs[0] if theirs else ours)  # (S, R)

    group, rng = group_numbers(len(truth), groups), np.random.default_rng(seed)
    count, seeds, values = int(group.max()) + 1, len(sides[0]), []
    for start in range(0, resamples, 100):
        size = min(100, resamples - start)
        weight = rng.multinomial(count, np.full(count, 1 / count), size=size)[:, group]
        share = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=size) / seeds
        values.append((share.T * difference(weight)).sum(0))
    low, high = np.nanquantile(np.concatenate(values), [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(difference(np.ones((1, len(truth)), int)).mean()), float(low), float(high))


def _weighted_map(
    scores: npt.NDArray[np.float64], truth: npt.NDArray[np.bool_], weight: npt.NDArray[Any]
) -> npt.NDArray[np.float64]:
    """Mean average precision (R,) of scores (N, C) where picture i counts `weight[r, i]` times, all resamples at once."""
    total, classes = np.zeros(len(weight)), np.zeros(len(weight))
    for c in np.flatnonzero(truth.any(0)):
        order = np.argsort(-scores[:, c], kind="stable")
        falling, there = -scores[order, c], np.flatnonzero(truth[order, c])
        end = np.searchsorted(falling, falling[there], side="right")  # equal scores are one step
        answered = weight[:, order].cumsum(1)[:, end - 1]
        hits = weight[:, order[there]]
        right = hits.cumsum(1)[:, np.searchsorted(there, end) - 1]
        found = hits.sum(1)
        total += (hits * right / np.maximum(answered, 1)).sum(1) / np.maximum(found, 1)
        classes += found > 0
    return np.asarray(np.where(classes > 0, total / np.maximum(classes, 1), np.nan))
