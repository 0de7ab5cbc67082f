"""Few-shot episodes: W classes, S labelled pictures of each (support) and Q more that are to be recognised (queries).

The rows of an episode come in a fixed order, so that nothing has to be sorted afterwards::

    class a: S support rows, class b: S support rows, ..., then  class a: Q query rows, class b: Q query rows, ...

All episodes of an epoch are drawn at once, whatever the sizes of the classes, in memory of their own size.
"""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
from torch.utils.data import Sampler

from contralto import distributed
from contralto.data.dataset import Key
from contralto.errors import DataError, UsageError

__all__ = ["EpisodeSampler", "draw_episodes"]

Integers = npt.NDArray[np.int64]


class EpisodeSampler(Sampler[list[Key]]):
    """Yields the (epoch, row) of one or more episodes at a time, as a function of (seed, epoch) alone.

    With R ranks, episode number i of an epoch goes to rank i mod R.

    Parameters
    ----------
    labels : (N,) integers
        Class of every row; rows below 0 are never drawn, nor are classes with fewer than `shot` + `queries` rows.
    way, shot, queries : int
        Classes of an episode; support and query rows of each of them.
    seed : int
        The same on all ranks.
    episodes : int
        Of an epoch, over all ranks.
    per_batch : int
        Episodes of a batch on one rank. What does not fill a batch of every rank is left out.

    Raises
    ------
    DataError
        If too few classes have enough rows.
    UsageError
        If an argument does not fit; if there is not one batch for every rank, which is known at `len` or the first batch.

    Examples
    --------
    As `batch_sampler` of a `DataLoader`:

    >>> labels = [0, 0, 0, 1, 1, 1, 2, 2, 2]
    >>> sampler = EpisodeSampler(labels, way=2, shot=1, queries=2, seed=0, episodes=3)
    >>> [[labels[row] for _, row in batch] for batch in sampler]
    [[1, 0, 1, 1, 0, 0], [0, 1, 0, 0, 1, 1], [1, 0, 1, 1, 0, 0]]
    """

    def __init__(
        self,
        labels: npt.ArrayLike,
        *,
        way: int,
        shot: int,
        queries: int,
        seed: int,
        episodes: int = 100,
        per_batch: int = 1,
    ) -> None:
        if episodes < 1 or per_batch < 1:
            raise UsageError(f"episodes and per_batch must be at least 1, got {episodes} and {per_batch}")
        self.labels, self.way, self.shot, self.queries = np.asarray(labels), way, shot, queries
        self.seed, self.episodes, self.per_batch, self.epoch = seed, episodes, per_batch, 0
        self._done = (0, 0)
        self._draw(1)  # says what is wrong now, not in the first epoch

    @property
    def sampler(self) -> "EpisodeSampler":
        """Itself: trainers tell the epoch to the sampler of a batch sampler."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch; the trainer calls it."""
        self.epoch = epoch

    def start_at(self, epoch: int, batches: int) -> None:
        """Go on within an epoch: its first `batches` on this rank were done before the interruption."""
        self.epoch, self._done = epoch, (epoch, batches)

    def __len__(self) -> int:
        ranks = distributed.world_size()
        count = self.episodes // (self.per_batch * ranks)
        if not count:
            raise UsageError(
                f"{self.episodes} episodes do not fill one batch of {self.per_batch} on each of {ranks} ranks: take more episodes"
            )
        return count

    def __iter__(self) -> Iterator[list[Key]]:
        ranks, rank = distributed.world_size(), distributed.rank()
        rows = self._draw(self.episodes)[: len(self) * self.per_batch * ranks][rank::ranks]
        done = self._done[1] if self._done[0] == self.epoch else 0
        for batch in rows.reshape(len(self), -1)[done:]:
            yield [(self.epoch, row) for row in batch.tolist()]

    def _draw(self, episodes: int) -> Integers:
        return draw_episodes(
            self.labels, way=self.way, shot=self.shot, queries=self.queries, episodes=episodes,
            rng=np.random.default_rng([self.seed, self.epoch]),
        )  # fmt: skip


def draw_episodes(
    labels: npt.ArrayLike, *, way: int, shot: int, queries: int, episodes: int, rng: np.random.Generator
) -> Integers:
    """Rows of some episodes.

    Parameters
    ----------
    labels : (N,) integers
        Rows below 0 are never drawn, nor are classes with fewer than `shot` + `queries` rows.
    way, shot, queries, episodes : int
    rng : numpy Generator

    Returns
    -------
    array (episodes, way * (shot + queries))
        In the order that the module tells. No row and no class comes twice in an episode; all subsets are equally likely.

    Raises
    ------
    UsageError
        If a number does not fit.
    DataError
        If too few classes have enough rows.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> draw_episodes([0, 0, 0, 1, 1, 1], way=2, shot=1, queries=2, episodes=1, rng=rng).tolist()
    [[2, 4, 0, 1, 5, 3]]
    """
    labels = np.asarray(labels)
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise UsageError(f"labels must be integers of shape (N,), got {labels.dtype} of shape {labels.shape}")
    if way < 2 or shot < 1 or queries < 1 or episodes < 1:
        raise UsageError(
            f"an episode has at least two classes, one support row and one query of each, and there is at least one episode; "
            f"got way {way}, shot {shot}, queries {queries}, episodes {episodes}"
        )
    wanted = shot + queries
    rows = np.argsort(labels, kind="stable")[np.count_nonzero(labels < 0) :]  # by class
    sizes = np.unique(labels[rows], return_counts=True)[1]
    starts = sizes.cumsum() - sizes
    fit = np.flatnonzero(sizes >= wanted)
    if len(fit) < way:
        raise DataError(
            f"an episode of {way} classes with {shot} support and {queries} query pictures each needs {way} classes of {wanted} "
            f"pictures or more, and {len(fit)} of {len(sizes)} classes have so many: choose fewer ways, shots or queries"
        )
    chosen = fit[_distinct(np.full(episodes, len(fit)), way, rng)]  # (E, W)
    places = _distinct(sizes[chosen], wanted, rng)  # (E, W, S + Q)
    found = rows[starts[chosen][..., None] + places]
    parts = (found[..., :shot].reshape(episodes, -1), found[..., shot:].reshape(episodes, -1))
    return np.concatenate(parts, axis=1)


def _distinct(sizes: Integers, count: int, rng: np.random.Generator) -> Integers:
    """For every size n (...): `count` different numbers below n in an order drawn at random (..., count).

    Floyd's way: the j-th number is drawn below n - count + j + 1, or, if it is there already, is the last of these.
    """
    found = np.empty((*sizes.shape, count), np.int64)
    for j in range(count):
        last = sizes - count + j
        drawn = rng.integers(0, last + 1)
        there = (found[..., :j] == drawn[..., None]).any(-1)
        found[..., j] = np.where(there, last, drawn)
    return rng.permuted(found, axis=-1)
