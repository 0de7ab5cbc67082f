"""Contrastive attraction and contrastive repulsion (CACR; Zheng et al. 2023, arXiv 2105.03746).

Two transport costs that are added: among the positives of a query, far ones are pulled harder; among its negatives, close ones
are pushed harder. Distances are squared ones of unit rows, in [0, 4], and `tau` multiplies them: it is an inverse temperature.

================================  =======================================================================================
`attraction`, `repulsion`         views of a batch against each other
`queue_repulsion`                 a queue and the batch itself (MoCo v2); `attraction` takes the keys
`momentum_attraction_repulsion`   queries of several views against one view of a momentum encoder (MoCo v3)
================================  =======================================================================================
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from contralto.errors import UsageError

__all__ = [
    "Weighing",
    "attraction",
    "momentum_attraction_repulsion",
    "queue_repulsion",
    "repulsion",
]

Weighing = Literal["softmax", "detached", "uniform"]
"""Weights of positives or negatives: by distance, with gradient or without; or all alike."""


class Weighted(NamedTuple):
    """A cost and the weights of what it sums up."""

    loss: Tensor
    weights: Tensor


def attraction(
    z: Tensor,
    key: Tensor | None = None,
    *,
    tau: float = 1.0,
    alpha: float = 1.0,
    weighing: Weighing = "softmax",
) -> Weighted:
    """Mean over queries of the weighted squared distance to the same sample's other views, the farthest weighing most.

    Parameters
    ----------
    z : Tensor (V, B, D)
        V views of B samples; each is a query in turn.
    key : Tensor (V, B, D), optional
        What they are drawn to, such as keys of a momentum encoder; default: `z` itself.
    tau : float
        Weights are the softmax of ``tau * distance``.
    alpha : float
        Scales the cost.
    weighing : {"softmax", "detached", "uniform"}

    Returns
    -------
    loss : Tensor ()
    weights : Tensor (V, B, V)
        Of every query; 0 at its own view.

    Examples
    --------
    >>> z = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]], [[1.0, 0.0]]])
    >>> loss, weights = attraction(z, weighing="uniform")
    >>> loss
    tensor(1.3333)
    """
    z, key = _units(z, key)
    views = len(z)
    if views < 2:
        raise UsageError(f"attraction needs at least two views of every sample, got {views}")
    with torch.autocast(z.device.type, enabled=False):
        distance = 2 - 2 * torch.einsum("vbd,wbd->vbw", z, key)  # (V, B, V)
        own = torch.eye(views, dtype=torch.bool, device=z.device).unsqueeze(1)
        weights = _weights(tau * distance, own, weighing)
        return Weighted(alpha * (weights * distance).sum(2).mean(), weights)


def repulsion(
    z: Tensor,
    *,
    tau: float = 0.9,
    beta: float = 1.0,
    weighing: Weighing = "softmax",
    cost: Literal["distance", "rbf"] = "distance",
    t: float = 2.0,
    tau_plus: float = 0.0,
    official: bool = False,
) -> Weighted:
    """Minus the weighted squared distance to other samples' views, the closest weighing most.

    Parameters
    ----------
    z : Tensor (V, B, D)
        Of every two views x < y, rows of x are queries and rows of y of other samples are negatives.
    tau : float
        Weights are the softmax of ``-tau * distance``.
    beta : float
        Scales the cost.
    weighing : {"softmax", "detached", "uniform"}
    cost : {"distance", "rbf"}
        "rbf": the logarithm of the batch's mean of ``exp(-t * distance)``.
    t : float
    tau_plus : float
        Share of negatives that are expected to be of the query's class; that much of the positive's cost is taken off. Not
        with "rbf".
    official : bool
        The published code's sign of that correction, which pushes positives apart.

    Returns
    -------
    loss : Tensor ()
        Mean over pairs of views.
    weights : Tensor (V (V - 1) / 2, B, B)
        Pairs in the order (0, 1), (0, 2), ..., (1, 2), ...; 0 at the sample itself.

    Raises
    ------
    UsageError
        If there is one sample only.

    Examples
    --------
    >>> repulsion(torch.stack([torch.eye(3)] * 2)).loss
    tensor(-2.)
    """
    z, _ = _units(z, None)
    views, n = z.shape[:2]
    if n < 2 or views < 2:
        raise UsageError(f"a batch of {n} in {views} views has no negatives: repulsion needs two samples and two views")
    if not 0 <= tau_plus < 1:
        raise UsageError(f"tau_plus must be in [0, 1), got {tau_plus}")
    if cost == "rbf" and tau_plus:
        raise UsageError('tau_plus is defined for cost="distance" only')
    with torch.autocast(z.device.type, enabled=False):
        first, second = torch.triu_indices(views, views, 1, device=z.device)
        distance = 2 - 2 * z[first] @ z[second].transpose(1, 2)  # (pairs, B, B)
        own = torch.eye(n, dtype=torch.bool, device=z.device)
        weights = _weights(-tau * distance, own, weighing)
        if cost == "rbf":
            return Weighted(beta * (weights * (-t * distance).exp()).sum(2).mean(1).log().mean(), weights)
        costs = -beta * (weights * distance).sum(2)
        if tau_plus:
            positive = distance.diagonal(dim1=1, dim2=2) * (1.0 if official else -beta)
            costs = (costs - tau_plus * positive) / (1 - tau_plus)
        return Weighted(costs.mean(), weights)


def queue_repulsion(
    z: Tensor, queue: Tensor, *, tau: float = 2.0, beta: float = 1.0, official: bool = False
) -> Weighted:
    """Repulsion from the keys of a queue and from the other samples of the same view, under one softmax.

    Parameters
    ----------
    z : Tensor (V, B, D)
    queue : Tensor (Q, D)
        Past keys; weights by them carry no gradient, those by the batch do.
    tau, beta : float
    official : bool
        As the published code: the first view's distances to the queue stand in for those of all views.

    Returns
    -------
    loss : Tensor ()
    weights : Tensor (V, B, Q + B)

    Examples
    --------
    >>> queue_repulsion(torch.eye(3)[None], torch.eye(3)).loss
    tensor(-0.1365)
    """
    z, _ = _units(z, None)
    n = z.shape[1]
    queue = F.normalize(queue.to(z.dtype), dim=1)
    with torch.autocast(z.device.type, enabled=False):
        to_queue = 2 - 2 * (z[:1].expand_as(z) if official else z) @ queue.T  # (V, B, Q)
        within = 2 - 2 * z @ z.transpose(1, 2)  # (V, B, B)
        own = torch.cat([z.new_zeros(n, len(queue)), torch.eye(n, dtype=z.dtype, device=z.device)], 1).bool()
        weights = _weights(-tau * torch.cat([to_queue.detach(), within], 2), own, "softmax")
        return Weighted(-beta * (weights * torch.cat([to_queue, within], 2)).sum(2).mean(), weights)


def momentum_attraction_repulsion(
    query: Tensor,
    key: Tensor,
    *,
    all_keys: Tensor | None = None,
    own: Tensor | None = None,
    temperature: float = 1.0,
    cost: Literal["rbf", "distance"] = "rbf",
    official: bool = False,
) -> Weighted:
    """Queries of several views against the keys of one other view (MoCo v3).

    Parameters
    ----------
    query : Tensor (L, B, D)
        Predictions of all views but the key's.
    key : Tensor (B, D)
        Of the same samples, by the momentum encoder; without gradient.
    all_keys : Tensor (M, D), optional
        Keys of this view on all ranks; default: `key`.
    own : Tensor (B,), optional
        Where the keys of these samples stand among them; default: in order.
    temperature : float
        T; 1 for a ResNet-50, 0.2 for a ViT.
    cost : {"rbf", "distance"}
        "rbf": cross-entropy of finding the own key; "distance": the own key's cosine distance minus the weighted mean of
        those of the others.
    official : bool
        As the published code: the sum over the batch for "distance", where the mean is meant.

    Returns
    -------
    loss : Tensor ()
        Sum over the queries' views, weighted by how far a view is from its key.
    weights : Tensor (L, B)
        Of the views; without gradient.

    Examples
    --------
    >>> momentum_attraction_repulsion(torch.eye(3)[None], torch.eye(3), cost="distance").loss
    tensor(-1.)
    """
    if query.ndim != 3 or key.shape != query.shape[1:]:
        raise UsageError(f"query (L, B, D) and key (B, D) do not fit: {tuple(query.shape)} and {tuple(key.shape)}")
    query, _ = _units(query, None)
    n = len(key)
    keys = key if all_keys is None else all_keys
    if len(keys) < 2:
        raise UsageError(f"a batch of {len(keys)} has no negatives: repulsion needs at least two samples")
    keys = F.normalize(keys.detach().to(query.dtype), dim=1)
    own = torch.arange(n, device=key.device) if own is None else own
    with torch.autocast(query.device.type, enabled=False):
        cosine = query @ keys.T  # (L, B, M)
        positive = cosine.gather(2, own.expand(len(query), n).unsqueeze(2)).squeeze(2)  # (L, B)
        weights = ((2 - 2 * positive.detach()) / temperature).softmax(0)
        if cost == "rbf":
            costs = 2 * temperature * ((cosine / temperature).logsumexp(2) - positive / temperature)
        else:
            distance = 1 - cosine
            among = F.one_hot(own, len(keys)).bool()
            repelled = _weights(-distance / temperature, among, "detached")
            costs = 1 - positive - (repelled * distance).sum(2)
        over_views = (weights * costs).sum(0)
        return Weighted(over_views.sum() if official and cost == "distance" else over_views.mean(), weights)


def _weights(score: Tensor, out: Tensor, weighing: Weighing) -> Tensor:
    """Weights over the last dimension that sum to one, 0 where `out`."""
    if weighing == "uniform":
        score = torch.zeros_like(score)
    elif weighing == "detached":
        score = score.detach()
    elif weighing != "softmax":
        raise UsageError(f'weighing must be "softmax", "detached" or "uniform", got {weighing!r}')
    return score.masked_fill(out, -torch.inf).softmax(-1)


def _units(z: Tensor, key: Tensor | None) -> tuple[Tensor, Tensor]:
    if z.ndim != 3 or (key is not None and key.shape != z.shape):
        given = "" if key is None else f" and {tuple(key.shape)}"
        raise UsageError(f"views must be stacked as (V, B, D), got {tuple(z.shape)}{given}")
    dtype = torch.promote_types(z.dtype, torch.float32)
    unit = F.normalize(z.to(dtype), dim=2)
    return unit, unit if key is None else F.normalize(key.to(dtype), dim=2)
