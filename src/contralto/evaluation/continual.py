"""How a learner of one task after another is judged: the accuracy matrix, and what is read off it.

Row i of the matrix is what the learner could do after task i, column j is the test of task j. Below, T is the number of tasks and
a its entries; entries above the diagonal, of tasks that had not come yet, are NaN.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import sparse

from contralto.errors import UsageError
from contralto.evaluation.classification import Interval, group_numbers

__all__ = [
    "SCORES", "Protocols", "accuracy_matrix", "average_accuracy", "backward_transfer", "continual_scores", "forgetting",
    "right_answers",
]  # fmt: skip

Matrix = npt.NDArray[np.float64]
SCORES = ("average", "incremental", "last", "forgetting", "backward")
"""What `continual_scores` gives."""


class Protocols(NamedTuple):
    """Whether answers (N,) are right: without knowing the task of a sample, and knowing it."""

    class_incremental: npt.NDArray[np.bool_]
    task_incremental: npt.NDArray[np.bool_]


def right_answers(
    logits: npt.ArrayLike, labels: npt.ArrayLike, tasks: npt.ArrayLike, classes: Sequence[Sequence[int]]
) -> Protocols:
    """Answers to test samples by both protocols.

    Parameters
    ----------
    logits : array (N, C)
        Minus infinity for classes that have not come yet.
    labels, tasks : array (N,)
        Right class, and task, of every sample; those of task -1 are wrong.
    classes : sequence of sequence of int
        Classes of every task.

    Examples
    --------
    >>> right_answers([[1.0, 0.0, 2.0]], [0], [0], [[0, 1], [2]])
    Protocols(class_incremental=array([False]), task_incremental=array([ True]))
    """
    scores, label, task = np.asarray(logits), np.asarray(labels), np.asarray(tasks)
    of_task = np.zeros((len(classes) + 1, scores.shape[1]), bool)  # the last row is that of samples without a task
    for number, group in enumerate(classes):
        of_task[number, list(group)] = True
    within = np.where(of_task[task], scores, -np.inf)
    answered = (task >= 0) & np.isfinite(scores[np.arange(len(label)), label])
    return Protocols(answered & (scores.argmax(1) == label), answered & (within.argmax(1) == label))


def accuracy_matrix(right: npt.ArrayLike, tasks: npt.ArrayLike) -> Matrix:
    """Accuracy after every task on the test of every task so far.

    Parameters
    ----------
    right : array (T, N)
        For every task that was learnt, 1 where the answer to a test sample was right then. What stands at samples of tasks that
        had not come yet does not count.
    tasks : array (N,)
        Task of every test sample, from 0; samples of -1 are left out.

    Returns
    -------
    array (T, T)

    Examples
    --------
    >>> accuracy_matrix([[1, 1, 0], [1, 0, 1]], [0, 0, 1])
    array([[1. , nan],
           [0.5, 1. ]])
    """
    found, members = _checked(right, tasks)
    return _matrix(found @ members, np.asarray(members.sum(0)).reshape(-1))


def average_accuracy(matrix: npt.ArrayLike) -> float:
    """Mean over tasks of the accuracy after the last one: ``1/T sum_j a[T, j]``.

    Examples
    --------
    >>> average_accuracy([[1.0, np.nan], [0.5, 1.0]])
    0.75
    """
    return float(np.asarray(matrix, float)[-1].mean())


def forgetting(matrix: npt.ArrayLike) -> float:
    """Mean over all tasks but the last of what was lost of the best (Chaudhry et al. 2018): ``max_i a[i, j] - a[T, j]``, i < T.

    Below zero where the last task helped the earlier ones; 0 with one task.

    Examples
    --------
    >>> forgetting([[1.0, np.nan], [0.5, 1.0]])
    0.5
    """
    a = np.asarray(matrix, float)
    return float((np.nanmax(a[:-1, :-1], 0) - a[-1, :-1]).mean()) if len(a) > 1 else 0.0


def backward_transfer(matrix: npt.ArrayLike) -> float:
    """Mean over all tasks but the last of what later tasks changed (Lopez-Paz and Ranzato 2017): ``a[T, j] - a[j, j]``.

    Examples
    --------
    >>> backward_transfer([[1.0, np.nan], [0.5, 1.0]])
    -0.5
    """
    a = np.asarray(matrix, float)
    return float((a[-1, :-1] - a.diagonal()[:-1]).mean()) if len(a) > 1 else 0.0


def continual_scores(
    right: npt.ArrayLike,
    tasks: npt.ArrayLike,
    *,
    groups: npt.NDArray[Any] | None = None,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Interval]:
    """All measures with bootstrap intervals over test samples.

    Parameters
    ----------
    right, tasks
        See `accuracy_matrix`.
    groups : array (N,), optional
        Test samples of one group are drawn together; "" and None stand alone.
    level : float
    resamples, seed : int

    Returns
    -------
    dict
        `average`, `forgetting`, `backward` (see the functions); `last`, the accuracy after the last task over all test samples
        alike; `incremental`, the mean over i of the accuracy after task i over all samples of the tasks until then.

    Examples
    --------
    >>> scores = continual_scores([[1, 1, 0], [1, 0, 1]], [0, 0, 1])
    >>> round(scores["incremental"].value, 3), round(scores["last"].value, 3), scores["forgetting"].value
    (0.833, 0.667, 0.5)
    """
    found, members = _checked(right, tasks)
    group = group_numbers(members.shape[0], groups)
    count, size = int(group.max()) + 1, 50
    point = _measures(found @ members, np.asarray(members.sum(0)).reshape(1, -1))
    rng, drawn = np.random.default_rng(seed), []
    for _ in range(0, resamples, size):
        weight = rng.multinomial(count, np.full(count, 1 / count), size=size)[:, group].astype(float)  # (R, N)
        sums = np.stack([(weight * row) @ members for row in found], 1)  # (R, T, T)
        drawn.append(_measures(sums, weight @ members))
    low, high = np.nanquantile(np.concatenate(drawn), [(1 - level) / 2, (1 + level) / 2], axis=0)
    return {n: Interval(float(point[0, k]), float(low[k]), float(high[k])) for k, n in enumerate(SCORES)}


def _checked(right: npt.ArrayLike, tasks: npt.ArrayLike) -> tuple[Matrix, Any]:
    """Answers (T, N) and membership (N, T), of the samples that belong to a task."""
    number, found = np.asarray(tasks, np.int64), np.asarray(right, float)
    if found.ndim != 2 or number.shape != found.shape[1:]:
        raise UsageError(f"right must be (T, N) and tasks (N,), got {found.shape} and {number.shape}")
    here = (number >= 0) & (number < len(found))
    number, found = number[here], found[:, here]
    empty = np.setdiff1d(np.arange(len(found)), number)
    if len(empty):
        raise UsageError(f"task {int(empty[0])} has no test sample: each of {len(found)} tasks needs one")
    members = sparse.csr_array(
        (np.ones(len(number)), (np.arange(len(number)), number)), shape=(len(number), len(found))
    )
    come = number <= np.arange(len(found))[:, None]  # (T, N)
    return np.where(come, found, 0.0), members


def _matrix(sums: Matrix, sizes: Matrix) -> Matrix:
    """Accuracies (..., T, T) from numbers of right answers (..., T, T) and of samples (..., T)."""
    with np.errstate(invalid="ignore"):
        share = sums / sizes[..., None, :]
    later = np.triu(np.ones(sums.shape[-2:], bool), 1)
    return np.where(later, np.nan, share)


def _measures(sums: Matrix, sizes: Matrix) -> Matrix:
    """All measures (R, 5) of R resamples: right answers (R, T, T) or (T, T), and sizes (R, T)."""
    sums = sums.reshape(-1, *sums.shape[-2:])
    a = _matrix(sums, sizes)
    so_far = np.tril(np.ones(a.shape[-2:]))
    with np.errstate(invalid="ignore"):
        overall = (sums * so_far).sum(-1) / (so_far * sizes[:, None, :]).sum(-1)  # (R, T)
    old, last = a[:, :, :-1], a[:, -1, :-1]
    if a.shape[-1] > 1:
        with np.errstate(invalid="ignore"):
            best = np.fmax.reduce(old[:, :-1], axis=1)
        lost = (best - last).mean(-1)
        gained = (last - np.diagonal(a, axis1=1, axis2=2)[:, :-1]).mean(-1)
    else:
        lost = gained = np.zeros(len(a))
    return np.stack([a[:, -1].mean(-1), overall.mean(-1), overall[:, -1], lost, gained], 1)
