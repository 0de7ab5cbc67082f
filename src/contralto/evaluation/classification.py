"""Accuracy in its kinds, and how uncertain it is."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from contralto.errors import UsageError

__all__ = [
    "Interval",
    "accuracy_interval",
    "calibration_error",
    "group_numbers",
    "group_numbers_of_seeds",
    "paired_interval",
    "per_class_accuracy",
]

Labels = npt.NDArray[np.integer[Any]]


class Interval(NamedTuple):
    """An estimate with its confidence interval."""

    value: float
    low: float
    high: float

    def score(self) -> dict[str, float | bool]:
        """A share with its interval, as jobs write it into `metrics.json`.

        Examples
        --------
        >>> Interval(0.5, 0.4, 0.6).score()
        {'value': 0.5, 'low': 0.4, 'high': 0.6, 'percent': True}
        """
        return {"value": self.value, "low": self.low, "high": self.high, "percent": True}


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
    return paired_interval(
        list(matrix), labels=[labels] * seeds if macro else None, groups=None if groups is None else [groups] * seeds,
        level=level, resamples=resamples, seed=seed,
    )  # fmt: skip


def paired_interval(
    values: Sequence[npt.NDArray[np.float64]],
    *,
    labels: Sequence[Labels] | None = None,
    groups: Sequence[npt.NDArray[Any]] | None = None,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Mean over seeds of the mean over test samples, with a bootstrap interval over both; every seed may have other samples.

    A resample draws seeds, and groups for all seeds alike. A group is known by its name, a sample that stands alone by its place:
    where seeds have other samples at the same place, drawing them together changes nothing, as they are independent.

    Parameters
    ----------
    values : sequence of array (N_s,)
        Per seed, a score of every test sample, or a difference of scores.
    labels : sequence of array (N_s,), optional
        Classes in [0, C): the mean is then over classes.
    groups : sequence of array (N_s,), optional
        Samples of one group are drawn together; "" and None stand alone.
    level, resamples, seed
        As in `accuracy_interval`.

    Returns
    -------
    Interval
        Percentile interval.

    Examples
    --------
    >>> paired_interval([np.array([1.0, 0.0]), np.array([1.0, 1.0, 1.0])]).value
    0.75
    """
    seeds, sizes = len(values), [len(v) for v in values]
    group = group_numbers_of_seeds(sizes, groups)
    group_count = 1 + max(int(g.max()) for g in group)
    classes = [np.asarray(v) for v in labels] if labels is not None else [np.zeros(n, int) for n in sizes]
    num_classes = 1 + max(int(c.max()) for c in classes)
    # Sums of scores and counts per (group, seed, class): a resample weighs groups, so it is two matrix products.
    right = np.zeros((group_count, seeds, num_classes))
    total = np.zeros_like(right)
    for s in range(seeds):
        cell = group[s] * num_classes + classes[s]
        size = group_count * num_classes
        right[:, s] = np.bincount(cell, values[s], minlength=size).reshape(group_count, num_classes)
        total[:, s] = np.bincount(cell, minlength=size).reshape(group_count, num_classes)
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(0, resamples, 200):
        weight = rng.multinomial(group_count, np.full(group_count, 1 / group_count), size=200).astype(float)  # (200, G)
        seed_weight = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=200) / seeds  # (200, S)
        drawn = [(weight @ sums.reshape(group_count, -1)).reshape(200, seeds, -1) for sums in (right, total)]
        per_seed = _mean_over_classes(*drawn)  # (200, S)
        found.append((seed_weight * per_seed).sum(1))
    of_seeds = _mean_over_classes(right.sum(0), total.sum(0))
    low, high = np.quantile(np.concatenate(found), [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(of_seeds.mean()), float(low), float(high))


def _mean_over_classes(right: npt.NDArray[np.float64], total: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    share = np.where(total > 0, right / np.maximum(total, 1e-12), 0.0)
    return np.asarray(share.sum(-1) / np.maximum((total > 0).sum(-1), 1))


def group_numbers(n: int, groups: npt.NDArray[Any] | None = None) -> npt.NDArray[np.int64]:
    """The number (n,) of the group of every sample; "" and None stand alone.

    Examples
    --------
    >>> group_numbers(4, np.array(["a", "", "a", ""])).tolist()
    [2, 0, 2, 1]
    """
    if groups is None:
        return np.arange(n)
    return np.asarray(np.unique(_names_of_groups(n, groups), return_inverse=True)[1], np.int64)


def _names_of_groups(n: int, groups: npt.NDArray[Any]) -> npt.NDArray[np.str_]:
    names = np.asarray(groups).astype(str)
    return np.where(np.isin(names, ["", "None"]), np.char.add("\x00", np.arange(n).astype(str)), names)


def group_numbers_of_seeds(
    sizes: Sequence[int], groups: Sequence[npt.NDArray[Any]] | None = None
) -> list[npt.NDArray[np.int64]]:
    """Per seed, the number of the group of every sample: the same name, or place of one that stands alone, is the same number.

    Examples
    --------
    >>> [g.tolist() for g in group_numbers_of_seeds([2, 3], [np.array(["a", ""]), np.array(["", "", "a"])])]
    [[2, 1], [0, 1, 2]]
    """
    if groups is None:
        return [np.arange(n) for n in sizes]
    named = [_names_of_groups(n, g) for n, g in zip(sizes, groups, strict=True)]
    numbers = np.unique(np.concatenate(named), return_inverse=True)[1].astype(np.int64)
    return np.split(numbers, np.cumsum(sizes)[:-1])


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
