"""Four losses that tell the softmax from its hardness, and instruments (Wang and Liu 2021, arXiv 2012.09740).

With cosines s of an anchor to its positive (s+) and to its negatives (s_j), and temperature t:

==============  ===================================================================================
contrastive     ``-log exp(s+ / t) / (exp(s+ / t) + sum_j exp(s_j / t))``
simple          ``-s+ + lambda sum_j s_j``: no softmax, no hardness
hard            `contrastive` over the hardest negatives only
hard_simple     `simple` over the hardest negatives only
==============  ===================================================================================

The softmax weighs a negative by ``exp(s_j / t)``: it looks for hard ones, the more narrowly the smaller t. The hardest are the
``ceil(alpha * M)`` most similar of an anchor's M negatives; choosing them carries no gradient, and the others get none at all.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from contralto.errors import UsageError

__all__ = ["Kind", "behaviour", "hardest", "penalty_distribution", "penalty_entropy", "separation"]

Kind = Literal["contrastive", "simple", "hard", "hard_simple"]


def behaviour(
    query: Tensor,
    key: Tensor,
    *,
    kind: Kind = "contrastive",
    temperature: float = 0.3,
    alpha: float = 0.0819,
    lam: float | None = None,
    negatives: Tensor | None = None,
    own: Tensor | None = None,
    numbers: Tensor | None = None,
    reduction: Literal["mean", "sum", "none"] = "mean",
) -> Tensor:
    """One of the four losses, of queries against their keys and negatives.

    Parameters
    ----------
    query, key : Tensor (N, D)
        Row i of one belongs to row i of the other.
    kind : {"contrastive", "simple", "hard", "hard_simple"}
    temperature : float
        Of the two kinds with a softmax.
    alpha : float
        Share of its negatives that a hard kind keeps for an anchor, at least one.
    lam : float, optional
        lambda of the simple kinds; default: 1 over the number of negatives that are kept, so that push and pull are balanced.
    negatives : Tensor (M, D), optional
        What every query is compared with, such as a memory bank or queue; default: the keys of the other rows.
    own : Tensor (N,), optional
        Which sample a query is; rows of `negatives` that are the same one are none of its negatives.
    numbers : Tensor (M,), optional
        Which sample a row of `negatives` is; default: its place.
    reduction : {"mean", "sum", "none"}
        Over queries.

    Raises
    ------
    UsageError
        If a query has no negatives.

    Examples
    --------
    >>> behaviour(torch.eye(3), torch.eye(3), temperature=1.0)
    tensor(0.5514)
    >>> behaviour(torch.eye(3), torch.eye(3), kind="simple")
    tensor(-1.)
    """
    if query.ndim != 2 or query.shape != key.shape:
        raise UsageError(f"query and key must be of one shape (N, D), got {tuple(query.shape)} and {tuple(key.shape)}")
    if kind not in ("contrastive", "simple", "hard", "hard_simple"):
        raise UsageError(f'kind must be "contrastive", "simple", "hard" or "hard_simple", got {kind!r}')
    dtype = torch.promote_types(torch.promote_types(query.dtype, key.dtype), torch.float32)
    with torch.autocast(query.device.type, enabled=False):
        query, key = F.normalize(query.to(dtype), dim=1), F.normalize(key.to(dtype), dim=1)
        if negatives is None:
            others, own = key, torch.arange(len(query), device=query.device)
        else:
            others = F.normalize(negatives.to(dtype), dim=1)
        positive, similarity = (query * key).sum(1), query @ others.T
        there = _there(similarity, own, numbers)
        if kind.startswith("hard"):
            there = hardest(similarity, alpha, there)
        count = there.sum(1)
        if not bool((count > 0).all()):
            raise UsageError(f"a batch of {len(query)} has rows without negatives: at least two samples are needed")
        if kind.endswith("simple"):
            factor = 1 / count.to(dtype) if lam is None else lam
            loss = factor * similarity.masked_fill(~there, 0).sum(1) - positive
        else:
            log_negatives = (similarity / temperature).masked_fill(~there, -torch.inf).logsumexp(1)
            loss = F.softplus(log_negatives - positive / temperature)
    return loss if reduction == "none" else loss.sum() if reduction == "sum" else loss.mean()


def hardest(similarity: Tensor, alpha: float, there: Tensor | None = None) -> Tensor:
    """The ``ceil(alpha * M)`` most similar of every row's M negatives, at least one; exactly that many also where some are equal.

    Parameters
    ----------
    similarity : Tensor (N, M)
    alpha : float
        In (0, 1].
    there : Tensor (N, M) of bool, optional
        Which columns are negatives of a row; default: all.

    Returns
    -------
    Tensor (N, M) of bool

    Examples
    --------
    >>> hardest(torch.tensor([[0.1, 0.9, 0.5, 0.7]]), 0.5).tolist()
    [[False, True, False, True]]
    """
    if not 0 < alpha <= 1:
        raise UsageError(f"alpha must be in (0, 1], got {alpha}")
    there = torch.ones_like(similarity, dtype=torch.bool) if there is None else there
    number = (there.sum(1).cpu().double() * alpha - 1e-9).ceil().clamp_min(1)  # 0.1 * 30 is a little more than 3
    most = min(int(number.max()), similarity.shape[1])
    index = similarity.detach().masked_fill(~there, -torch.inf).topk(most, dim=1).indices
    kept = torch.arange(most, device=similarity.device) < number.to(similarity.device, torch.int64).unsqueeze(1)
    return torch.zeros_like(there).scatter(1, index, kept) & there


def penalty_distribution(similarity: Tensor, temperature: float, positive: Tensor | None = None) -> Tensor:
    """How the push of an anchor's gradient is divided among its negatives: a Boltzmann distribution.

    ``r_ij = |dL/ds_ij| / |dL/ds_i+| = exp(s_ij / t) / sum_k exp(s_ik / t)`` over negatives; it does not depend on the positive.

    Parameters
    ----------
    similarity : Tensor (N, M)
        Cosines.
    temperature : float
    positive : Tensor (N,), optional
        Column of every row's positive, -1 = it is not there; default: the diagonal.

    Returns
    -------
    Tensor (N, M)
        Rows sum to one; 0 at the positive.

    Examples
    --------
    >>> penalty_distribution(torch.zeros(2, 3), 0.3)
    tensor([[0.0000, 0.5000, 0.5000],
            [0.5000, 0.0000, 0.5000]])
    """
    if positive is None:
        positive = torch.arange(len(similarity), device=similarity.device)
    logits = (similarity / temperature).masked_fill(~_there(similarity, positive), -torch.inf)
    return torch.softmax(logits, 1)


def penalty_entropy(similarity: Tensor, temperature: float, positive: Tensor | None = None) -> Tensor:
    """Entropy (N,) of `penalty_distribution`: from 0, all on the hardest negative, to the logarithm of their number.

    Examples
    --------
    >>> penalty_entropy(torch.zeros(2, 3), 0.3)
    tensor([0.6931, 0.6931])
    """
    share = penalty_distribution(similarity, temperature, positive)
    return torch.sum(torch.special.entr(share), 1)


def separation(query: Tensor, key: Tensor, *, temperature: float = 0.3, nearest: int = 10) -> dict[str, Tensor]:
    """What the paper measures of the two views of some samples, beside uniformity and tolerance.

    Parameters
    ----------
    query, key : Tensor (N, D)
        Two views of the same samples; keys of the others are a query's negatives.
    temperature : float
        Of the penalties.
    nearest : int
        How many of the most similar negatives are looked at.

    Returns
    -------
    dict
        `positive`, mean cosine of a sample's views; `nearest`, that of a view and its most similar negatives; `gap`, their
        difference: local separation, which grows as the temperature falls; `penalty_entropy`.

    Examples
    --------
    >>> separation(torch.eye(3), torch.eye(3))["gap"]
    tensor(1.)
    """
    similarity = F.normalize(query, dim=1) @ F.normalize(key, dim=1).T
    positive = similarity.diagonal().mean()
    off = similarity.masked_fill(torch.eye(len(query), dtype=torch.bool, device=query.device), -torch.inf)
    close = off.topk(min(nearest, len(query) - 1), dim=1).values.mean()
    entropy = penalty_entropy(similarity, temperature).mean()
    return {"positive": positive, "nearest": close, "gap": positive - close, "penalty_entropy": entropy}


def _there(similarity: Tensor, own: Tensor | None, numbers: Tensor | None = None) -> Tensor:
    if own is None:
        return torch.ones_like(similarity, dtype=torch.bool)
    numbers = torch.arange(similarity.shape[1], device=similarity.device) if numbers is None else numbers
    return torch.ne(numbers, own.unsqueeze(1))
