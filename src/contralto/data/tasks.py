"""A stream of tasks from one data set: by class, by domain, or drifting without any boundary; and the batches of a task.

Everything is a function of the seed: which classes come together, the order of the tasks, and every batch.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch.utils.data import Sampler

from contralto import distributed
from contralto.data.dataset import Key
from contralto.errors import UsageError

__all__ = [
    "Task",
    "TaskSampler",
    "class_order",
    "split_by_class",
    "split_by_domain",
    "split_by_drift",
    "task_of_samples",
]

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Task:
    """One stretch of a stream.

    Parameters
    ----------
    name : str
    classes : tuple of int
        Those that belong to it; in a split by class or by drift no class belongs to two tasks.
    rows : (N,) integers
        Samples that come in it.
    """

    name: str
    classes: tuple[int, ...]
    rows: Integers


def class_order(num_classes: int, seed: int | None) -> Integers:
    """In which order classes come: drawn by the seed, or by number if there is none.

    Examples
    --------
    >>> class_order(4, None).tolist(), sorted(class_order(4, 0).tolist())
    ([0, 1, 2, 3], [0, 1, 2, 3])
    """
    return np.arange(num_classes) if seed is None else np.random.default_rng([seed, 21]).permutation(num_classes)


def split_by_class(
    labels: npt.ArrayLike, tasks: int, *, seed: int | None = None, order: Sequence[int] | None = None
) -> list[Task]:
    """Tasks of disjoint classes.

    Parameters
    ----------
    labels : array (N,)
        Classes; samples of -1 belong to no task.
    tasks : int
        At most as many as there are classes. Where they do not divide, earlier tasks have one class more.
    seed : int, optional
        Draws the order of the classes; default: that of their numbers.
    order : sequence of int, optional
        An order of one's own, of all classes.

    Returns
    -------
    list of Task

    Examples
    --------
    >>> [(t.classes, t.rows.tolist()) for t in split_by_class([0, 1, 2, 0, -1], 2)]
    [((0, 1), [0, 1, 3]), ((2,), [2])]
    """
    given = _labels(labels)
    groups = _cut(given, tasks, seed, order)
    return [
        Task(f"task {number}", tuple(group.tolist()), np.flatnonzero(np.isin(given, group)))
        for number, group in enumerate(groups, 1)
    ]


def split_by_domain(labels: npt.ArrayLike, domains: npt.NDArray[Any], *, seed: int | None = None) -> list[Task]:
    """A task for every domain, with all classes that are found in it.

    Parameters
    ----------
    labels : array (N,)
        Classes; samples of -1 belong to no task.
    domains : array (N,)
        Name of the domain of every sample.
    seed : int, optional
        Draws the order of the domains; default: that of their names.

    Examples
    --------
    >>> tasks = split_by_domain([0, 1, 0, 1], np.array(["photo", "photo", "art", "art"]))
    >>> [(t.name, t.classes, t.rows.tolist()) for t in tasks]
    [('art', (0, 1), [2, 3]), ('photo', (0, 1), [0, 1])]
    """
    given, found = _labels(labels), np.asarray(domains).astype(str)
    if len(found) != len(given):
        raise UsageError(f"labels and domains have one entry per sample, got {len(given)} and {len(found)}")
    names = np.unique(found[given >= 0])
    names = names[class_order(len(names), seed)]
    rows = [np.flatnonzero((found == name) & (given >= 0)) for name in names]
    return [Task(str(n), tuple(np.unique(given[r]).tolist()), r) for n, r in zip(names, rows, strict=True)]


def split_by_drift(labels: npt.ArrayLike, tasks: int, *, width: float = 0.5, seed: int = 0) -> list[Task]:
    """A stream without tasks, whose classes come and go gradually, cut into stretches.

    Classes are dealt to `tasks` groups as by `split_by_class`; a sample of group g comes at time g + 1/2 plus normal noise of
    deviation `width`, and the stream is all samples in the order of their times, each once. A stretch is as long as its group is
    large, and has that as its `classes`, for the measures; among its samples are others, which a learner is not told.

    Parameters
    ----------
    labels : array (N,)
        Classes; samples of -1 do not come.
    tasks : int
    width : float
        In lengths of a task; 0 is a split by class with a boundary.
    seed : int
        Of the order of classes and of the times.

    Returns
    -------
    list of Task
        Rows in the order of the stream.

    Examples
    --------
    >>> labels = np.repeat([0, 1], 50)
    >>> [round(float((labels[t.rows] == t.classes[0]).mean()), 2) for t in split_by_drift(labels, 2, width=0.5)]
    [0.88, 0.88]
    >>> [round(float((labels[t.rows] == t.classes[0]).mean()), 2) for t in split_by_drift(labels, 2, width=0.0)]
    [1.0, 1.0]
    """
    if not width >= 0:
        raise UsageError(f"width must be at least 0, got {width}")
    given = _labels(labels)
    groups = _cut(given, tasks, seed, None)
    rows = np.flatnonzero(given >= 0)
    group_of = np.empty(int(given.max()) + 1, np.int64)
    for number, group in enumerate(groups):
        group_of[group] = number
    rng = np.random.default_rng([seed, 22])
    rows = rows[rng.permutation(len(rows))]  # ties, at width 0, are broken by chance
    time = group_of[given[rows]] + 0.5 + width * rng.standard_normal(len(rows))
    stream = rows[np.argsort(time, kind="stable")]
    sizes = np.bincount(group_of[given[rows]], minlength=len(groups))
    parts = np.split(stream, np.cumsum(sizes)[:-1])
    return [
        Task(f"stretch {number}", tuple(group.tolist()), part)
        for number, (group, part) in enumerate(zip(groups, parts, strict=True), 1)
    ]


def task_of_samples(
    tasks: Sequence[Task], labels: npt.ArrayLike, domains: npt.NDArray[Any] | None = None
) -> npt.NDArray[np.int64]:
    """To which task samples belong that are not in the stream, those of a test for instance: by domain, or else by class.

    Parameters
    ----------
    tasks : sequence of Task
    labels : array (N,)
    domains : array (N,), optional
        Of a split by domain.

    Returns
    -------
    (N,) integers
        Number of the task from 0; -1 for samples that belong to none.

    Examples
    --------
    >>> task_of_samples(split_by_class([0, 1, 2, 3], 2), [3, 0, 1, -1]).tolist()
    [1, 0, 0, -1]
    """
    given = _labels(labels)
    if domains is not None:
        number_of = {task.name: number for number, task in enumerate(tasks)}
        found = [number_of.get(name, -1) for name in np.asarray(domains).astype(str).tolist()]
        return np.where(given >= 0, np.array(found, np.int64).reshape(-1), -1)
    size = max([int(given.max(initial=-1)), *(c for task in tasks for c in task.classes)]) + 2
    number = np.full(size, -1, np.int64)  # the last place is that of label -1
    for place, task in enumerate(tasks):
        number[list(task.classes)] = place
    return number[given]


def _labels(labels: npt.ArrayLike) -> Integers:
    found = np.asarray(labels)
    if found.ndim != 1 or not (found.size == 0 or np.issubdtype(found.dtype, np.integer)):
        raise UsageError(f"labels must be integers (N,), got {found.dtype} {found.shape}")
    return found.astype(np.int64)


def _cut(labels: Integers, tasks: int, seed: int | None, order: Sequence[int] | None) -> list[Integers]:
    """The classes that are there, in their order, in `tasks` groups."""
    there = np.unique(labels[labels >= 0])
    if not 1 <= tasks <= len(there):
        raise UsageError(f"tasks must be between 1 and {len(there)}, the number of classes, got {tasks}")
    if order is None:
        ordered = there[class_order(len(there), seed)]
    else:
        ordered = np.asarray(order, np.int64)
        if sorted(ordered.tolist()) != there.tolist():
            raise UsageError(f"order must name each of the {len(there)} classes once, got {list(order)[:20]}")
    return np.array_split(ordered, tasks)


class TaskSampler(Sampler[list[Key]]):
    """Batches of (epoch, row) of one task and of what is kept of earlier ones, as a function of (seed, epoch) alone.

    Parameters
    ----------
    rows : (N,) integers
        Samples of the task.
    batch_size : int
        Of one rank; more than there are samples means all of them.
    seed : int
    memory : (M,) integers, optional
        Samples that are replayed.
    replayed : int
        How many of a batch come from the memory: every pass over the task then has as many batches as it needs for its own
        samples, and the memory is gone through as often as that takes. 0 shuffles the memory among the samples of the task.
        Before there is a memory, batches are full of the task.
    first_epoch : int
        Number of the first epoch in the stream, so that no two tasks share their order and views.

    Raises
    ------
    UsageError
        If there is nothing to draw from, or no place is left for the task.

    Notes
    -----
    What is left of a pass and fills no batch is left out.

    Examples
    --------
    >>> sampler = TaskSampler(np.arange(4), 3, seed=0, memory=np.array([8, 9]), replayed=1)
    >>> [sorted(row for _, row in batch)[:2] for batch in sampler], len(sampler)
    ([[2, 3], [0, 1]], 2)
    """

    def __init__(
        self,
        rows: npt.ArrayLike,
        batch_size: int,
        *,
        seed: int,
        memory: npt.ArrayLike = (),
        replayed: int = 0,
        first_epoch: int = 0,
    ) -> None:
        self.rows, self.memory = np.asarray(rows, np.int64), np.asarray(memory, np.int64)
        if not len(self.rows):
            raise UsageError("there is nothing to train on: the task has no samples")
        if replayed < 0 or replayed >= batch_size:
            raise UsageError(
                f"replayed must leave a place for the task in a batch of {batch_size}, and be at least 0; got {replayed}"
            )
        self.seed, self.first_epoch, self.epoch = seed, first_epoch, 0
        self._done = (0, 0)
        self.replayed = replayed if len(self.memory) else 0
        if not self.replayed:
            self.rows = np.concatenate([self.rows, self.memory])
        self.batch_size = min(batch_size - self.replayed, len(self.rows))  # of the task's own

    @property
    def sampler(self) -> "TaskSampler":
        """Itself: trainers tell the epoch to the sampler of a batch sampler."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, counted within the task; the trainer calls it."""
        self.epoch = epoch

    def start_at(self, epoch: int, batches: int) -> None:
        """Go on within an epoch: its first `batches` on this rank were done before the interruption."""
        self.epoch, self._done = epoch, (epoch, batches)

    def __len__(self) -> int:
        return max(len(self.rows) // (self.batch_size * distributed.world_size()), 1)

    def __iter__(self) -> Iterator[list[Key]]:
        ranks, rank = distributed.world_size(), distributed.rank()
        epoch = self.first_epoch + self.epoch
        rng = np.random.default_rng([self.seed, 23, epoch])
        order = np.resize(rng.permutation(self.rows), (len(self), self.batch_size, ranks))[..., rank]
        if self.replayed:
            wanted = len(self) * self.replayed * ranks
            passes = -(-wanted // len(self.memory))
            drawn = rng.permuted(np.tile(self.memory, (passes, 1)), axis=1).reshape(-1)[:wanted]
            order = np.concatenate([order, drawn.reshape(len(self), self.replayed, ranks)[..., rank]], 1)
        done = self._done[1] if self._done[0] == self.epoch else 0
        for batch in order[done:].tolist():
            yield [(epoch, row) for row in batch]
