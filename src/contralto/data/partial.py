"""Data of which some samples of some classes have labels: the split of experiments, and batches that are half labelled."""

from collections.abc import Collection

import numpy as np
import numpy.typing as npt

from contralto.data.dataset import EpochSampler
from contralto.errors import UsageError

__all__ = ["HalfLabelledSampler", "partial_labels"]

Labels = npt.NDArray[np.int64]


def partial_labels(labels: npt.ArrayLike, old: Collection[int], share: float, generator: np.random.Generator) -> Labels:
    """Hide labels: all of new classes, and all but a share of every old class.

    Parameters
    ----------
    labels : array (N,)
        Right classes.
    old : collection of int
        Classes of which some samples stay labelled; they become 0, 1, ... in rising order.
    share : float
        Of the samples of every old class that stay labelled, rounded, at least one; half in most papers.
    generator : numpy.random.Generator
        Which ones.

    Returns
    -------
    array (N,) int64
        Number of the old class, or -1 where the label is hidden.

    Raises
    ------
    UsageError
        If there is no such class, or the share is no share.

    Examples
    --------
    >>> partial_labels([7, 3, 3, 7, 5, 3, 3], old=[3, 7], share=0.5, generator=np.random.default_rng(0)).tolist()
    [-1, -1, 0, 1, -1, -1, 0]
    """
    y = np.asarray(labels)
    if not 0 <= share <= 1:
        raise UsageError(f"share must be in [0, 1], got {share}")
    kept = np.unique(np.asarray(sorted(old)))
    missing = kept[~np.isin(kept, y)]
    if len(missing):
        raise UsageError(f"there is no sample of class {missing[0]}, which is to be an old one")
    order = generator.permutation(len(y))
    number = np.searchsorted(kept, y[order])
    number = np.where(np.isin(y[order], kept), number, len(kept))  # new classes last
    by_class = np.argsort(number, kind="stable")
    sorted_numbers = number[by_class]
    place = np.arange(len(y)) - np.searchsorted(sorted_numbers, sorted_numbers)
    size = np.bincount(sorted_numbers, minlength=len(kept) + 1)
    take = np.maximum(np.round(share * size), np.minimum(1, size)).astype(np.int64) if share else 0 * size
    take[len(kept)] = 0
    shown = place < take[sorted_numbers]
    found = np.full(len(y), -1, np.int64)
    found[order[by_class[shown]]] = sorted_numbers[shown]
    return found


class HalfLabelledSampler(EpochSampler):
    """Draws with replacement so that half of a batch is labelled on average, as a function of (seed, epoch) alone.

    A labelled sample weighs 1, an unlabelled one ``labelled / unlabelled`` (Vaze et al. 2022). An epoch is as many draws as there
    are samples. Where all or none are labelled, all weigh the same.

    Parameters
    ----------
    labels : array (N,)
        -1 = unlabelled.
    seed : int

    Examples
    --------
    >>> sampler = HalfLabelledSampler([0, 1] + 98 * [-1], seed=0)
    >>> drawn = [row for epoch, row in sampler]
    >>> len(drawn), sum(row < 2 for row in drawn)
    (100, 44)
    """

    def __init__(self, labels: npt.ArrayLike, *, seed: int) -> None:
        labelled = np.asarray(labels) >= 0
        known, unknown = int(labelled.sum()), int((~labelled).sum())
        weight = np.where(labelled, 1.0, known / unknown if known and unknown else 1.0)
        super().__init__(len(labelled), seed=seed, share=weight / weight.sum() if len(weight) else None)
