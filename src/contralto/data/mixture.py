"""Several sources as one training set, some of them repeated: real pictures ten times, generated ones once (AdaInf).

Rows are numbered through: those of the first source, then those of the second, and so on. Nothing is copied: a source that is
repeated is only drawn more often.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from contralto.data.dataset import EpochSampler
from contralto.errors import UsageError

__all__ = ["MixtureSampler", "inflated_rows", "source_shares"]


def inflated_rows(sizes: Sequence[int], copies: Sequence[int]) -> npt.NDArray[np.int64]:
    """Rows of the training set in which every source is repeated, in order (AdaInf 2).

    Parameters
    ----------
    sizes : sequence of int
        Rows of every source.
    copies : sequence of int
        How often each source is there; 0 leaves it out.

    Returns
    -------
    (sum of sizes * copies,) integers
        All rows of the first source, again and again, then those of the second.

    Examples
    --------
    >>> inflated_rows([2, 3], [3, 1]).tolist()
    [0, 1, 0, 1, 0, 1, 2, 3, 4]
    """
    _check(sizes, copies)
    starts = np.cumsum([0, *sizes[:-1]])
    parts = [np.tile(np.arange(s, s + n), c) for s, n, c in zip(starts, sizes, copies, strict=True)]
    return np.concatenate(parts).astype(np.int64)


def source_shares(sizes: Sequence[int], copies: Sequence[int]) -> npt.NDArray[np.float64]:
    """Share of every source among what is drawn; of real pictures it is beta of AdaInf (1, 2).

    Parameters
    ----------
    sizes, copies : sequence of int
        As in `inflated_rows`.

    Returns
    -------
    (S,) float
        Sums to 1.

    Examples
    --------
    >>> source_shares([50_000, 1_000_000], [10, 1]).round(4).tolist()
    [0.3333, 0.6667]
    """
    _check(sizes, copies)
    rows: npt.NDArray[np.float64] = np.asarray(sizes, np.float64) * np.asarray(copies, np.float64)
    return np.asarray(rows / rows.sum())


class MixtureSampler(EpochSampler):
    """Yields (epoch, row) from several sources, each as often as it has copies, as a function of (seed, epoch) alone.

    The draws go through one permutation of all copies after the other, without replacement, and an epoch is a piece of them of
    a given length: so arms with and without further data have epochs of as many steps (AdaInf 4).

    Parameters
    ----------
    sizes, copies : sequence of int
        As in `inflated_rows`.
    seed : int
    length : int, optional
        Draws of an epoch; default: all copies.

    Examples
    --------
    >>> sampler = MixtureSampler([2, 3], [3, 1], seed=0, length=3)
    >>> drawn = []
    >>> for epoch in range(3):
    ...     sampler.set_epoch(epoch)
    ...     drawn += [row for _, row in sampler]
    >>> sorted(drawn)
    [0, 0, 0, 1, 1, 1, 2, 3, 4]
    """

    def __init__(self, sizes: Sequence[int], copies: Sequence[int], *, seed: int, length: int | None = None) -> None:
        self.rows = inflated_rows(sizes, copies)
        if length is not None and length < 1:
            raise UsageError(f"length must be at least 1, got {length}")
        super().__init__(len(self.rows) if length is None else length, seed=seed)

    def order(self) -> npt.NDArray[np.int64]:
        """Rows of this epoch in their order, over all ranks."""
        first, total = self.epoch * self.size, len(self.rows)
        passes = range(first // total, (first + self.size - 1) // total + 1)
        drawn = [np.random.default_rng([self.seed, number]).permutation(self.rows) for number in passes]
        start = first - passes[0] * total
        return np.concatenate(drawn)[start : start + self.size]


def _check(sizes: Sequence[int], copies: Sequence[int]) -> None:
    if len(sizes) != len(copies) or not len(sizes) or min(sizes) < 0 or min(copies) < 0:
        raise UsageError(f"sizes and copies must be as many, at least one, and none below 0; got {sizes} and {copies}")
    if not any(n * c for n, c in zip(sizes, copies, strict=True)):
        raise UsageError("there is nothing to draw: every source is empty or has no copies")
