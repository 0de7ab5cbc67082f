"""Losses of few-shot episodes: queries against the prototypes of the classes of their episode.

A prototype is the mean of the support embeddings of a class. Embeddings are taken as they are, not scaled to length one: a margin
is a distance. All functions take any number of leading dimensions, so that the episodes of a step are one call.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from contralto.errors import UsageError
from contralto.losses.contrast import Reduction

__all__ = ["distances", "proto_triplet", "prototypical_cross_entropy", "prototypical_logits"]


def distances(a: Tensor, b: Tensor, *, eps: float = 1e-6) -> Tensor:
    """Euclidean distances ``sqrt(|a_i - b_j|^2 + eps)``; eps keeps the slope finite where two points coincide.

    Parameters
    ----------
    a, b : Tensor (..., N, D), (..., M, D)
    eps : float

    Returns
    -------
    Tensor (..., N, M)

    Examples
    --------
    >>> distances(torch.tensor([[0.0, 0.0]]), torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    tensor([[5.0000e+00, 1.0000e-03]])
    """
    return (_squared(a, b) + eps).sqrt()


def prototypical_logits(queries: Tensor, prototypes: Tensor, *, temperature: float = 1.0) -> Tensor:
    """``-|q - p_w|^2 / T`` (Snell et al. 2017).

    Parameters
    ----------
    queries, prototypes : Tensor (..., N, D), (..., W, D)
    temperature : float
        1 for features of a small scale; 64 is usual for the 1,600 numbers of a Conv-4.

    Returns
    -------
    Tensor (..., N, W)

    Examples
    --------
    >>> prototypical_logits(torch.tensor([[1.0, 1.0]]), torch.tensor([[0.0, 0.0], [3.0, 1.0]]), temperature=2.0)
    tensor([[-1.0000, -2.0000]])
    """
    if not temperature > 0:
        raise UsageError(f"temperature must be above 0, got {temperature}")
    return -_squared(queries, prototypes) / temperature


def prototypical_cross_entropy(
    queries: Tensor, prototypes: Tensor, labels: Tensor, *, temperature: float = 1.0, reduction: Reduction = "mean"
) -> Tensor:
    """Cross-entropy of the softmax over negative squared distances to the prototypes (Snell et al. 2017).

    Parameters
    ----------
    queries, prototypes : Tensor (..., N, D), (..., W, D)
    labels : Tensor (..., N)
        Of the queries, in [0, W): places among the prototypes.
    temperature : float
    reduction : {"mean", "sum", "none"}
        Over queries.

    Examples
    --------
    >>> prototypical_cross_entropy(torch.eye(2), torch.eye(2), torch.tensor([0, 1]))
    tensor(0.1269)
    """
    _fit(queries, prototypes, labels)
    logits = prototypical_logits(queries, prototypes, temperature=temperature)
    loss = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="none").view(labels.shape)
    return _reduced(loss, reduction)


def proto_triplet(
    queries: Tensor,
    prototypes: Tensor,
    labels: Tensor,
    *,
    margin: float = 0.5,
    eps: float = 1e-6,
    reduction: Reduction = "mean",
) -> Tensor:
    """Proto-Triplet (SuSana Distancia, arXiv 2305.09062): a query nearer to its prototype than to the nearest other by a margin.

    ``max(0, e(q, p_own) - min_w e(q, p_w) + margin)`` over the other prototypes w, with e of `distances`.

    Parameters
    ----------
    queries, prototypes : Tensor (..., N, D), (..., W, D)
        Both carry gradient.
    labels : Tensor (..., N)
        Of the queries, in [0, W).
    margin : float
        A distance: next to nothing where features have lengths of 10 and more, much where they have length one.
    eps : float
        See `distances`.
    reduction : {"mean", "sum", "none"}
        Over queries.

    Examples
    --------
    >>> proto_triplet(torch.eye(2), torch.eye(2), torch.tensor([0, 1]), margin=2.0)
    tensor(0.5868)
    """
    _fit(queries, prototypes, labels)
    e = distances(queries, prototypes, eps=eps)
    place = labels.unsqueeze(-1)
    own = e.gather(-1, place).squeeze(-1)
    nearest = e.scatter(-1, place, torch.inf).amin(-1)
    return _reduced((own - nearest + margin).clamp_min(0), reduction)


def _squared(a: Tensor, b: Tensor) -> Tensor:
    """Squared distances by differences: the way over products loses the small ones."""
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist").square()


def _reduced(loss: Tensor, reduction: Reduction) -> Tensor:
    if reduction not in ("mean", "sum", "none"):
        raise UsageError(f"reduction must be mean, sum or none, got {reduction!r}")
    return loss if reduction == "none" else loss.sum() if reduction == "sum" else loss.mean()


def _fit(queries: Tensor, prototypes: Tensor, labels: Tensor) -> None:
    if queries.shape[-1:] != prototypes.shape[-1:] or labels.shape != queries.shape[:-1]:
        raise UsageError(
            f"queries (..., N, D), prototypes (..., W, D) and labels (..., N) do not fit: {tuple(queries.shape)}, "
            f"{tuple(prototypes.shape)} and {tuple(labels.shape)}"
        )
    if prototypes.shape[-2] < 2:
        raise UsageError("an episode needs at least two classes: there is nothing to tell apart")
