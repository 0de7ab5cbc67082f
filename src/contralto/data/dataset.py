"""Datasets and sampling: what reaches a training step, and in which order.

A batch is a dict with fixed keys:

=============  ======================  =====================================================================
key            shape                   meaning
=============  ======================  =====================================================================
`views`        list of (B, ...)        one tensor per view: pixels (B, 3, S, S), or features (B, D) of a frozen encoder
`index`        (B,) int64              row of the manifest; per-sample state is kept under it
`label`        (B,) int64              given label
`anchor`       (B,) bool               the label is trusted (chosen by text)
`weight`       (B,) float32            sample weight
`text_scores`  (B, C) float32          P(class | text), only where a system asks for it
`posterior`    (B, C) float32          P(class) by reconciled witnesses, rows sum to at most 1; only where there is one
`target`       (B, C) float32          soft label to learn from, rows sum to 1; only where there is one
=============  ======================  =====================================================================

All order is a function of (seed, epoch) and all randomness of a sample one of (seed, epoch, index, view): a sampler yields
(epoch, index) pairs, so a dataset needs no state and workers, ranks and interruptions change nothing.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from contralto import distributed
from contralto.errors import UsageError
from contralto.views.image import EvalView, View, draw_views, view_generator

__all__ = ["Batch", "EpochSampler", "FeatureDataset", "ImageDataset", "Key"]

Batch = dict[str, Any]
Key = tuple[int, int]


class EpochSampler(Sampler[Key]):
    """Yields (epoch, row) in an order that is a function of (seed, epoch) alone.

    Parameters
    ----------
    size : int
        Number of rows.
    seed : int
    labels : (N,) integers, optional
        When given, classes are drawn equally often (class-balanced, with replacement); an epoch is still `size` draws.
    share : (N,), optional
        Probability of every row, for draws with replacement of another kind.
    halves : (N,) integers, optional
        A group for every row: an epoch takes half of each (rounded up) at random, and all rows of group -1 (FoPro 1).

    Examples
    --------
    >>> sampler = EpochSampler(3, seed=0)
    >>> sampler.set_epoch(5)
    >>> sorted(sampler)
    [(5, 0), (5, 1), (5, 2)]
    """

    def __init__(
        self,
        size: int,
        *,
        seed: int,
        labels: npt.NDArray[np.int64] | None = None,
        share: npt.NDArray[np.float64] | None = None,
        halves: npt.NDArray[np.int64] | None = None,
    ) -> None:
        if size < 1:
            raise UsageError("there is nothing to train on: no image is left after filtering")
        self.size, self.seed, self.epoch = size, seed, 0
        self._done = (0, 0)
        self.share, self.halves = share, halves
        if halves is not None:  # how many of each group an epoch takes, by the row's place in its group
            groups, self._group, counts = np.unique(halves, return_inverse=True, return_counts=True)
            self._take = np.where(groups == -1, counts, -(-counts // 2))
            self.size = int(self._take.sum())
        if labels is not None:
            _, inverse, counts = np.unique(labels, return_inverse=True, return_counts=True)
            self.share = 1 / counts[inverse] / len(counts)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch; the trainer calls it."""
        self.epoch = epoch

    def start_at(self, epoch: int, draws: int) -> None:
        """Go on within an epoch: its first `draws` on this rank were done before the interruption."""
        self.epoch, self._done = epoch, (epoch, draws)

    def __len__(self) -> int:
        return -(-self.size // distributed.world_size())

    def order(self) -> npt.NDArray[np.int64]:
        """Rows of this epoch in their order, over all ranks."""
        rng = np.random.default_rng([self.seed, self.epoch])
        if self.halves is not None:
            return self._half(rng)
        if self.share is not None:
            return rng.choice(self.size, self.size, p=self.share)
        return rng.permutation(self.size)

    def __iter__(self) -> Iterator[Key]:
        ranks, rank = distributed.world_size(), distributed.rank()
        # the last ranks start again at the front, so that all have as many
        order = np.resize(self.order(), len(self) * ranks)
        done = self._done[1] if self._done[0] == self.epoch else 0
        yield from ((self.epoch, int(i)) for i in order[rank::ranks][done:])

    def _half(self, rng: np.random.Generator) -> npt.NDArray[np.int64]:
        """The rows of this epoch: the first half of every group, all shuffled."""
        shuffled = rng.permutation(len(self._group))
        by_group = shuffled[np.argsort(self._group[shuffled], kind="stable")]
        group = self._group[by_group]
        place = np.arange(len(group)) - np.searchsorted(group, group)
        return rng.permutation(by_group[place < self._take[group]])


class ImageDataset(Dataset[Batch]):
    """Pictures as random views.

    Parameters
    ----------
    read : function
        Row -> encoded bytes, which are decoded here within bounds and no finer than the views need, or uint8 array (H, W, 3).
    fields : mapping of str to Tensor (N, ...)
        What comes along with each row (`label`, `anchor`, ...).
    views : sequence of View
        One tensor each in `views`.
    seed : int
    """

    def __init__(
        self,
        read: Callable[[int], bytes | npt.NDArray[np.uint8]],
        fields: Mapping[str, Tensor],
        views: Sequence[View | EvalView],
        *,
        seed: int,
    ) -> None:
        self.read, self.fields, self.views, self.seed = read, dict(fields), list(views), seed

    def __len__(self) -> int:
        return len(self.fields["label"])

    def __getitem__(self, key: Key) -> Batch:
        epoch, row = key
        generators = [view_generator(self.seed, epoch, row, v) for v in range(len(self.views))]
        views = draw_views(self.read(row), self.views, generators)
        return {"views": views, "index": torch.tensor(row), **{k: v[row] for k, v in self.fields.items()}}


class FeatureDataset(Dataset[Batch]):
    """Features of a frozen encoder for several random views of each picture, computed once.

    Parameters
    ----------
    views : sequence of array (V, N, D)
        Per view V drawn variants; each epoch takes one of them for each sample.
    fields : mapping of str to Tensor (N, ...)
    seed : int

    Notes
    -----
    Whole batches are fetched at once (`__getitems__`): use with ``collate_fn=lambda batch: batch``, as `pipelines` does.
    """

    def __init__(self, views: Sequence[npt.NDArray[Any]], fields: Mapping[str, Tensor], *, seed: int) -> None:
        self.views = [torch.from_numpy(np.ascontiguousarray(v)) for v in views]
        self.fields, self.seed = dict(fields), seed
        self._choices: tuple[int, list[Tensor]] = (-1, [])

    def __len__(self) -> int:
        return len(self.fields["label"])

    def __getitems__(self, keys: list[Key]) -> Batch:
        rows = torch.tensor([row for _, row in keys])
        choices = self._choose(keys[0][0])
        views = [v[choice[rows], rows].float() for v, choice in zip(self.views, choices, strict=True)]
        return {"views": views, "index": rows, **{k: v[rows] for k, v in self.fields.items()}}

    def _choose(self, epoch: int) -> list[Tensor]:
        """Which variant every row takes in an epoch, per view; drawn once per epoch."""
        if self._choices[0] != epoch:
            generators = [np.random.default_rng([self.seed, epoch, number]) for number in range(len(self.views))]
            drawn = [rng.integers(len(v), size=len(self)) for rng, v in zip(generators, self.views, strict=True)]
            self._choices = (epoch, [torch.from_numpy(d) for d in drawn])
        return self._choices[1]

    def __getitem__(self, key: Key) -> Batch:
        batch = self.__getitems__([key])
        return {k: [v[0] for v in value] if k == "views" else value[0] for k, value in batch.items()}
