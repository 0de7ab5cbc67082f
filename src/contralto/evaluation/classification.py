"""Accuracy in its kinds, and how uncertain it is."""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from contralto.errors import UsageError

__all__ = ["Interval", "accuracy_interval", "calibration_error", "group_numbers", "per_class_accuracy"]

Labels = npt.NDArray[np.integer[Any]]


class Interval(NamedTuple):
    """An estimate with its confidence interval."""

    value: float
    low: float
    high: float


def per_class_accuracy(labels: Labels, predictions: Labels, num_classes: int) -> npt.NDArray[np.float64]:
    """Share of each class that is recognised (C,); NaN for a class without samples.

    Examples
    --------
    >>> per_class_accuracy(np.array([0, 0, 1]), np.array([0, 1, 1]), 2).tolist()
    [0.5, 1.0]
    """
    count = np.bincount(labels, minlength=num_classes)
    right = np.bincount(labels[labels == predictions], minlength=num_classes)
    return np.where(count > 0, right / np.maximum(count, 1), np.nan)


def accuracy_interval(
    correct: npt.ArrayLike,
    labels: Labels,
    *,
    groups: npt.NDArray[Any] | None = None,
    macro: bool = False,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Accuracy, or a difference of accuracies, with a bootstrap interval over seeds and groups of test samples.

    Parameters
    ----------
    correct : array (N,) or (S, N)
        1 where right, 0 where wrong, one row per seed. For a paired comparison: correct of one minus correct of the other.
    labels : array (N,)
        Right classes in [0, C), for `macro`.
    groups : array (N,), optional
        Samples of one group (pictures of one object) are drawn together; "" and None stand alone.
    macro : bool
        Mean over classes instead of over samples.
    level : float
        Of the interval.
    resamples, seed : int
        Of the bootstrap.

    Returns
    -------
    Interval
        Percentile interval.

    Examples
    --------
    >>> accuracy_interval([1, 1, 0, 1] * 25, np.zeros(100, int)).value
    0.75
    """
    matrix = np.atleast_2d(np.asarray(correct, dtype=np.float64))  # (S, N)
    seeds, n = matrix.shape
    if n == 0 or len(labels) != n:
        raise UsageError(f"correct and labels must have the same length above 0, got {n} and {len(labels)}")
    group = group_numbers(n, groups)
    group_count = int(group.max()) + 1
    classes = np.asarray(labels) if macro else np.zeros(n, int)
    num_classes = int(classes.max()) + 1
    # Sums of right and of all per (group, class): a resample weighs groups, so it is two matrix products.
    cell = group * num_classes + classes
    total = np.bincount(cell, minlength=group_count * num_classes).reshape(group_count, num_classes)
    right = np.stack(
        [
            np.bincount(cell, row, minlength=group_count * num_classes).reshape(group_count, num_classes)
            for row in matrix
        ]
    )
    rng = np.random.default_rng(seed)
    values = []
    for _ in range(0, resamples, 200):
        weight = rng.multinomial(group_count, np.full(group_count, 1 / group_count), size=200)  # (200, G)
        seed_weight = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=200) / seeds  # (200, S)
        per_seed = np.einsum("rg,sgc->rsc", weight, right)
        right_sum = np.einsum("rs,rsc->rc", seed_weight, per_seed)
        values.append(_mean_over_classes(right_sum, weight @ total))
    point = float(_mean_over_classes(right.mean(0).sum(0)[None], total.sum(0)[None])[0])
    low, high = np.quantile(np.concatenate(values), [(1 - level) / 2, (1 + level) / 2])
    return Interval(point, float(low), float(high))


def _mean_over_classes(right: npt.NDArray[np.float64], total: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    share = np.where(total > 0, right / np.maximum(total, 1e-12), 0.0)
    return np.asarray(share.sum(1) / np.maximum((total > 0).sum(1), 1))


def group_numbers(n: int, groups: npt.NDArray[Any] | None = None) -> npt.NDArray[np.int64]:
    """The number (n,) of the group of every sample; "" and None stand alone.

    Examples
    --------
    >>> group_numbers(4, np.array(["a", "", "a", ""])).tolist()
    [2, 0, 2, 1]
    """
    if groups is None:
        return np.arange(n)
    names = np.asarray(groups).astype(str)
    names = np.where(np.isin(names, ["", "None"]), np.char.add("\x00", np.arange(n).astype(str)), names)
    return np.asarray(np.unique(names, return_inverse=True)[1], np.int64)


def calibration_error(happened: npt.ArrayLike, probability: npt.ArrayLike, *, bins: int = 15) -> float:
    """Expected calibration error: mean gap between stated probability and observed share, over equal-width bins.

    Examples
    --------
    >>> calibration_error([1, 0, 1, 0], [0.5, 0.5, 0.5, 0.5])
    0.0
    """
    y, p = np.asarray(happened, dtype=np.float64), np.asarray(probability, dtype=np.float64)
    bin_of = np.minimum((p * bins).astype(int), bins - 1)
    count = np.bincount(bin_of, minlength=bins)
    gap = np.abs(np.bincount(bin_of, p - y, minlength=bins))
    return float(gap.sum() / max(count.sum(), 1))
