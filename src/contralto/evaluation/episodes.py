"""N-way K-shot evaluation: how well embeddings serve classes of which a few pictures are labelled, over many drawn episodes."""

from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from contralto.data.episodes import draw_episodes
from contralto.errors import UsageError
from contralto.evaluation.classification import Interval

__all__ = ["EpisodeClassifier", "FewShot", "classify_episodes", "few_shot_accuracy"]

EpisodeClassifier = Literal["prototype", "nearest", "probe"]
BLOCK = 2**24
"""Numbers of features that are gathered at a time."""


class FewShot(NamedTuple):
    """What `few_shot_accuracy` found."""

    accuracy: Interval
    """Mean over episodes, and 1.96 standard errors around it."""
    episodes: npt.NDArray[np.float64]
    """(E,) accuracy of every episode."""
    classes: npt.NDArray[np.float64]
    """(C,) accuracy of the queries of every class, by its number; NaN for one that was not drawn."""


def few_shot_accuracy(
    features: npt.ArrayLike,
    labels: npt.ArrayLike,
    *,
    way: int = 5,
    shot: int = 1,
    queries: int = 15,
    episodes: int = 600,
    classifier: EpisodeClassifier = "prototype",
    normalize: bool = False,
    seed: int = 0,
) -> FewShot:
    """Accuracy over episodes drawn by the seed: the same episodes for whatever features.

    Parameters
    ----------
    features : array (N, D)
    labels : array (N,)
        Rows below 0 are left out.
    way, shot, queries, episodes : int
    classifier : {"prototype", "nearest", "probe"}
        The nearest mean of a class; the nearest support picture; or logistic regression on the support, features of length one.
    normalize : bool
        Scale features to length one for the other two as well.
    seed : int

    Returns
    -------
    FewShot

    Raises
    ------
    DataError
        If too few classes have `shot` + `queries` rows.
    UsageError
        If an argument does not fit.

    Notes
    -----
    The interval is the field's: it speaks of other episodes from these classes and pictures, not of other classes.

    Examples
    --------
    >>> labels = np.repeat(np.arange(6), 10)
    >>> found = few_shot_accuracy(np.eye(6)[labels], labels, queries=5, episodes=20)
    >>> found.accuracy
    Interval(value=1.0, low=1.0, high=1.0)
    """
    x, y = torch.from_numpy(np.array(features, np.float32)), np.asarray(labels)
    if x.ndim != 2 or y.shape != x.shape[:1]:
        raise UsageError(f"features (N, D) and labels (N,) do not fit: {tuple(x.shape)} and {y.shape}")
    if not torch.isfinite(x).all():
        row = int((~torch.isfinite(x)).any(1).nonzero()[0])
        raise UsageError(f"features of row {row} hold values that are no numbers")
    rng = np.random.default_rng([seed, 7])
    rows = draw_episodes(y, way=way, shot=shot, queries=queries, episodes=episodes, rng=rng)
    if normalize or classifier == "probe":
        x = F.normalize(x, dim=1)
    step = max(1, BLOCK // (rows.shape[1] * x.shape[1]))
    right = np.concatenate(
        [
            _right(x[torch.from_numpy(rows[first : first + step])], way, shot, classifier)
            for first in range(0, episodes, step)
        ]
    )
    each = right.mean(1)
    half = 1.96 * float(each.std(ddof=1)) / episodes**0.5 if episodes > 1 else float("nan")
    value = float(each.mean())
    asked = y[rows[:, way * shot :]].ravel()
    count = np.bincount(asked, minlength=int(y.max()) + 1)
    hits = np.bincount(asked, right.ravel(), minlength=len(count))
    by_class = np.where(count > 0, hits / np.maximum(count, 1), np.nan)
    return FewShot(Interval(value, value - half, value + half), each, by_class)


def classify_episodes(support: Tensor, queries: Tensor, *, classifier: EpisodeClassifier = "prototype") -> Tensor:
    """Which class of its episode every query is given.

    Parameters
    ----------
    support : Tensor (E, W, S, D)
    queries : Tensor (E, M, D)
    classifier : {"prototype", "nearest", "probe"}

    Returns
    -------
    Tensor (E, M) of integers in [0, W)

    Examples
    --------
    >>> classify_episodes(torch.eye(2).view(1, 2, 1, 2), torch.tensor([[[0.1, 0.9], [0.8, 0.0]]]))
    tensor([[1, 0]])
    """
    if classifier == "prototype":
        return torch.cdist(queries, support.mean(2)).argmin(-1)
    if classifier == "nearest":
        return torch.cdist(queries, support.flatten(1, 2)).argmin(-1) // support.shape[2]
    if classifier == "probe":
        return _probe(support, queries)
    raise UsageError(f"classifier must be prototype, nearest or probe, got {classifier!r}")


def _right(x: Tensor, way: int, shot: int, classifier: EpisodeClassifier) -> npt.NDArray[np.float64]:
    """1 where a query is classified rightly, else 0 (E, W * Q); x (E, W * (S + Q), D)."""
    support, queries = x[:, : way * shot], x[:, way * shot :]
    found = classify_episodes(support.unflatten(1, (way, shot)), queries, classifier=classifier)
    truth = torch.arange(way).repeat_interleave(queries.shape[1] // way)
    return (found == truth).double().numpy()


def _probe(support: Tensor, queries: Tensor, *, C: float = 1.0, steps: int = 1000, tolerance: float = 1e-5) -> Tensor:
    """Logistic regression of every episode, all at once: ``C sum(loss) + |w|^2 / 2``, centred and without intercept.

    The weights lie in the span of the support, so that what is sought is one number per support row and class; found by
    Nesterov's accelerated gradient, whose step is safe because the curvature of the loss is at most half the largest eigenvalue
    of the products of the support.
    """
    ways, shots = support.shape[1:3]
    rows = support.flatten(1, 2)
    middle = rows.mean(1, keepdim=True)
    rows, asked = rows - middle, queries - middle
    products = rows @ rows.transpose(1, 2)  # (E, n, n)
    truth = F.one_hot(torch.arange(ways, device=rows.device).repeat_interleave(shots), ways).to(rows.dtype)
    largest = torch.linalg.matrix_norm(products, 2)[:, None, None]
    step = 1 / (C * largest / 2 + 1)
    pace = (1 - step.sqrt()) / (1 + step.sqrt())  # the penalty has curvature 1
    a = before = torch.zeros(*rows.shape[:2], ways, dtype=rows.dtype, device=rows.device)
    for _ in range(steps):
        ahead = a + pace * (a - before)
        slope = C * ((products @ ahead).softmax(-1) - truth) + ahead
        before, a = a, ahead - step * slope
        if slope.abs().max() < tolerance:
            break
    return ((asked @ rows.transpose(1, 2)) @ a).argmax(-1)
