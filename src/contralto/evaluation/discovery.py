"""Discovered classes against right ones: clustering accuracy on old and new classes, by both protocols in use."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from contralto.errors import UsageError
from contralto.evaluation.classification import Interval, accuracy_interval

__all__ = ["ClusterAccuracy", "Protocol", "cluster_accuracy", "match_clusters", "right_clusters"]

Labels = npt.NDArray[np.int64]
Protocol = Literal["together", "apart"]


@dataclass(frozen=True)
class ClusterAccuracy:
    """How many samples lie in the cluster that stands for their class.

    Attributes
    ----------
    all, old, new : Interval
        Of all samples, those of old and those of new classes; NaN where there are none.
    clusters : int
        How many have a sample.
    protocol : {"together", "apart"}
    """

    all: Interval
    old: Interval
    new: Interval
    clusters: int
    protocol: Protocol

    def scores(self) -> dict[str, dict[str, float | bool]]:
        """As jobs write them into `metrics.json`; without what there is none of.

        Examples
        --------
        >>> list(cluster_accuracy([0, 1], [1, 0], [0]).scores())
        ['accuracy', 'accuracy of old classes', 'accuracy of new classes']
        """
        named = {"accuracy": self.all, "accuracy of old classes": self.old, "accuracy of new classes": self.new}
        return {name: x.score() for name, x in named.items() if not np.isnan(x.value)}


def match_clusters(truth: npt.ArrayLike, found: npt.ArrayLike) -> Labels:
    """The class that every cluster stands for, one to one, so that most samples are right (Hungarian algorithm).

    Parameters
    ----------
    truth, found : array (N,)
        Classes and clusters, numbers from 0.

    Returns
    -------
    array (K,) int64
        Class of cluster 0 .. K - 1; -1 for one that stands for none, because there are more clusters than classes.

    Examples
    --------
    >>> match_clusters([0, 0, 1, 1, 1], [2, 2, 0, 0, 1]).tolist()
    [1, -1, 0]
    """
    from scipy.optimize import linear_sum_assignment

    y, c = _pair(truth, found)
    counts = np.zeros((int(c.max()) + 1, int(y.max()) + 1), np.int64)
    np.add.at(counts, (c, y), 1)
    rows, columns = linear_sum_assignment(counts, maximize=True)
    match = np.full(len(counts), -1, np.int64)
    match[rows] = columns
    return match


def right_clusters(
    truth: npt.ArrayLike, found: npt.ArrayLike, old: Collection[int], *, protocol: Protocol = "together"
) -> npt.NDArray[np.float64]:
    """Which samples lie in the cluster that stands for their class.

    Parameters
    ----------
    truth, found : array (N,)
        Classes and clusters, numbers from 0.
    old : collection of int
        The old classes.
    protocol : {"together", "apart"}
        One matching of all clusters to all classes; or one for the samples of old and another one for those of new classes. Then
        a cluster may stand for an old and a new class at once: never lower, and blind to old and new being mixed up.

    Returns
    -------
    array (N,)
        1 where right, else 0.

    Examples
    --------
    >>> right_clusters([0, 0, 1, 1], [0, 0, 0, 1], old=[0]).tolist()
    [1.0, 1.0, 0.0, 1.0]
    """
    y, c = _pair(truth, found)
    if protocol == "together":
        return np.asarray(match_clusters(y, c)[c] == y, np.float64)
    if protocol != "apart":
        raise UsageError(f'protocol must be "together" or "apart", got {protocol!r}')
    right, known = np.zeros(len(y)), np.isin(y, list(old))
    for part in (known, ~known):
        if part.any():
            right[part] = match_clusters(y[part], c[part])[c[part]] == y[part]
    return right


def cluster_accuracy(
    truth: npt.ArrayLike,
    found: npt.ArrayLike,
    old_classes: Collection[int],
    *,
    protocol: Protocol = "together",
    groups: npt.NDArray[Any] | None = None,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> ClusterAccuracy:
    """Accuracy of clusters on all samples, on those of old classes and on those of new classes.

    Give it the unlabelled samples only; labelled ones would make the old classes look better than they are. In the intervals,
    clusters keep the classes that they stand for: they are named once, then the samples are redrawn.

    Parameters
    ----------
    truth, found : array (N,)
        Classes and clusters, numbers from 0.
    old_classes : collection of int
    protocol : {"together", "apart"}
        See `right_clusters`.
    groups : array (N,), optional
        Samples of one group are redrawn together.
    level, resamples, seed
        Of the intervals, see `accuracy_interval`.

    Returns
    -------
    ClusterAccuracy

    Raises
    ------
    UsageError
        If the numbers do not fit.

    Examples
    --------
    >>> found = cluster_accuracy([0, 0, 1, 1, 2, 2], [2, 2, 0, 0, 1, 0], old_classes=[0])
    >>> found.old.value, found.new.value, round(found.all.value, 3)
    (1.0, 0.75, 0.833)
    """
    y, c = _pair(truth, found)
    right, known = right_clusters(y, c, old_classes, protocol=protocol), np.isin(y, list(old_classes))

    def interval(part: npt.NDArray[np.bool_]) -> Interval:
        if not part.any():
            return Interval(np.nan, np.nan, np.nan)
        own = None if groups is None else np.asarray(groups)[part]
        return accuracy_interval(right[part], y[part], groups=own, level=level, resamples=resamples, seed=seed)

    everything = np.ones(len(y), bool)
    return ClusterAccuracy(interval(everything), interval(known), interval(~known), len(np.unique(c)), protocol)


def _pair(truth: npt.ArrayLike, found: npt.ArrayLike) -> tuple[Labels, Labels]:
    y, c = np.asarray(truth), np.asarray(found)
    if y.ndim != 1 or y.shape != c.shape or not len(y):
        raise UsageError(f"classes (N,) and clusters (N,) do not fit: {y.shape} and {c.shape}")
    if int(y.min()) < 0 or int(c.min()) < 0:
        raise UsageError("classes and clusters are numbers from 0; leave samples without a right class out")
    return y.astype(np.int64), c.astype(np.int64)
