"""Batches that hold one group each: one cluster, one class, one domain.

In such a batch what the group has in common tells nobody from anybody, so that contrast has to look for something else
(multistage contrastive learning); in other methods it keeps negatives within a class or a domain.
"""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
from torch.utils.data import Sampler

from contralto import distributed
from contralto.data.dataset import Key
from contralto.errors import UsageError

__all__ = ["GroupBatchSampler"]

Integers = npt.NDArray[np.int64]


class GroupBatchSampler(Sampler[list[Key]]):
    """Yields batches of (epoch, row), each from one group, as a function of (seed, epoch) alone.

    A pass over the data shuffles every group, cuts it into batches and takes one batch of each group in turn, from the lowest
    number up, until all are used up: every row comes at most once in a pass. With W ranks, a group gives W batches at once, one
    to each rank (row j of the shuffled group to rank j mod W), so that all ranks see the same group at the same time.

    Parameters
    ----------
    groups : (N,) integers
        Group of every row; rows of a group below 0 are never drawn.
    batch_size : int
        Rows of a batch of one rank.
    seed : int
        The same on all ranks.
    batches : int, optional
        Batches of an epoch on one rank; default: one pass. More are taken from further passes; of a pass that is not needed
        whole, the batches are drawn at random, so that every group keeps its share.
    smallest : int, optional
        What is left of a group is a batch of its own if it has at least so many rows for each rank; default: it is dropped in
        this pass, and a group smaller than W batches is never seen. Groups are never mixed.

    Raises
    ------
    UsageError
        If there is not one batch, which is known once the number of ranks is: at `len` or the first batch.

    Examples
    --------
    As `batch_sampler` of a `DataLoader`:

    >>> groups = [0, 0, 1, 1, 1, 0, 0, 2]
    >>> sampler = GroupBatchSampler(groups, batch_size=2, seed=0)
    >>> [[groups[row] for _, row in batch] for batch in sampler]
    [[0, 0], [1, 1], [0, 0]]
    """

    def __init__(
        self,
        groups: npt.ArrayLike,
        batch_size: int,
        *,
        seed: int,
        batches: int | None = None,
        smallest: int | None = None,
    ) -> None:
        groups = np.asarray(groups)
        if groups.ndim != 1 or not np.issubdtype(groups.dtype, np.integer):
            raise UsageError(f"groups must be integers of shape (N,), got {groups.dtype} of shape {groups.shape}")
        if batch_size < 1:
            raise UsageError(f"batch_size must be at least 1, got {batch_size}")
        if batches is not None and batches < 1:
            raise UsageError(f"batches must be at least 1, got {batches}")
        if smallest is not None and not 1 <= smallest <= batch_size:
            raise UsageError(f"smallest must be between 1 and the batch size, {batch_size}; got {smallest}")
        self.groups, self.batch_size, self.seed = groups.astype(np.int64), batch_size, seed
        self.batches, self.smallest, self.epoch = batches, smallest, 0
        self._done = (0, 0)
        self._rows = np.flatnonzero(self.groups >= 0)
        self.names, self._group, self._count = np.unique(
            self.groups[self._rows], return_inverse=True, return_counts=True
        )

    @property
    def sampler(self) -> "GroupBatchSampler":
        """Itself: trainers tell the epoch to the sampler of a batch sampler."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch; the trainer calls it."""
        self.epoch = epoch

    def start_at(self, epoch: int, batches: int) -> None:
        """Go on within an epoch: its first `batches` on this rank were done before the interruption."""
        self.epoch, self._done = epoch, (epoch, batches)

    def __len__(self) -> int:
        return self.batches or self._plan()[1]

    def sequence(self) -> Integers:
        """Groups of the batches of one pass (len of a pass,), in their order."""
        keep, _ = self._plan()
        width = self.batch_size * distributed.world_size()
        turns = -(-keep // width)
        group = np.repeat(np.arange(len(keep)), turns)
        turn = np.arange(len(group)) - np.repeat(turns.cumsum() - turns, turns)
        return self.names[group[np.lexsort((group, turn))]]

    def __iter__(self) -> Iterator[list[Key]]:
        there, per_pass = self._plan()[1], len(self)
        done = self._done[1] if self._done[0] == self.epoch else 0
        for number in range(-(-per_pass // there)):
            if done >= there:  # passes that were done whole are not drawn again
                done -= there
                continue
            rng = np.random.default_rng([self.seed, self.epoch, number])
            rows, starts = self._pass(rng)
            wanted = min(per_pass - number * there, there)
            chosen = np.arange(there) if wanted == there else np.sort(rng.choice(there, wanted, replace=False))
            for b in chosen[done:]:
                yield [(self.epoch, row) for row in rows[starts[b] : starts[b + 1]].tolist()]
            done = 0

    def _plan(self) -> tuple[Integers, int]:
        """How many rows of every group a pass takes, and how many batches that makes on every rank."""
        ranks = distributed.world_size()
        width = self.batch_size * ranks
        rest = self._count % width // ranks * ranks
        keep = self._count // width * width
        if self.smallest is not None:
            keep = keep + np.where(rest >= self.smallest * ranks, rest, 0)
        batches = int((-(-keep // width)).sum())
        if not batches:
            largest = int(self._count.max()) if len(self._count) else 0
            raise UsageError(
                f"no group has the {width} rows of a batch over all ranks, the largest of {len(self._count)} has {largest}: "
                f"choose a smaller batch size or fewer groups, or let `smallest` keep batches that are not full"
            )
        return keep, batches

    def _pass(self, rng: np.random.Generator) -> tuple[Integers, Integers]:
        """Rows of one pass on this rank in their order, and where each batch begins, and the end."""
        keep, _ = self._plan()
        ranks, rank = distributed.world_size(), distributed.rank()
        shuffled = rng.permutation(len(self._rows))
        shuffled = shuffled[np.argsort(self._group[shuffled], kind="stable")]
        group = self._group[shuffled]
        place = np.arange(len(group)) - np.searchsorted(group, group)
        kept = place < keep[group]
        rows, group, place = self._rows[shuffled[kept]], group[kept], place[kept]
        turn = place // (self.batch_size * ranks)
        order = np.lexsort((place, group, turn))[rank::ranks]  # every batch of all ranks is a multiple of their number
        group, turn = group[order], turn[order]
        new = np.flatnonzero((np.diff(group) != 0) | (np.diff(turn) != 0)) + 1
        return rows[order], np.concatenate([[0], new, [len(order)]])
