"""Decoupled contrast (Yeh et al. 2022, arXiv 2110.06848) beyond two views of a batch: queues, partners, classes.

The factor that decoupling takes out is here, too.

InfoNCE multiplies the whole gradient of an anchor by ``q = U / (exp(s+ / t) + U)``, U the sum over its negatives: near zero when
the positive is easy or the negatives are few. Decoupled losses are InfoNCE with q = 1, by leaving the positive out of the
denominator. `contralto.losses.pairs.dcl` is the form for two views of a batch.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from contralto.errors import UsageError
from contralto.losses.contrast import Reduction, contrast

__all__ = ["coupling", "decoupled_info_nce", "decoupled_sup_con", "expected_coupling"]


def decoupled_info_nce(
    query: Tensor,
    key: Tensor,
    *,
    negatives: Tensor | None = None,
    temperature: float | Tensor = 0.1,
    sigma: float | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """InfoNCE whose denominator holds negatives only: ``-s+ / t + log sum_j exp(s_j / t)``.

    Parameters
    ----------
    query, key : Tensor (N, D)
        Row i of one belongs to row i of the other: another view, the nearest neighbour's (NNCLR), a text (CLIP: half the sum
        of both directions).
    negatives : Tensor (Q, D), optional
        What every query is compared with, such as a queue (MoCo). Default: the keys of all other rows.
    temperature : float or Tensor
        A number, or (N, 1) per query.
    sigma : float, optional
        DCLW: weight the positive's term by ``2 - exp(s / sigma) / mean exp(s / sigma)``, without gradient.
    reduction
        See `contrast`.

    Raises
    ------
    UsageError
        If there is one row only and no `negatives`.

    Examples
    --------
    >>> decoupled_info_nce(torch.eye(3), torch.eye(3), temperature=1.0)
    tensor(-0.3069)
    >>> decoupled_info_nce(torch.eye(3), torch.eye(3), negatives=-torch.eye(3)[:1], temperature=1.0)
    tensor(-1.3333)
    """
    if query.ndim != 2 or query.shape != key.shape:
        raise UsageError(f"query and key must be of one shape (N, D), got {tuple(query.shape)} and {tuple(key.shape)}")
    own = torch.arange(len(query), device=query.device)
    keys, weights = key, own.unsqueeze(1)
    if negatives is None:
        if len(query) < 2:
            raise UsageError(f"a batch of {len(query)} has no negatives: decoupled contrast needs at least two samples")
    else:
        keys = torch.cat([key, negatives.to(key.dtype)])
        weights = torch.cat([key.new_zeros(len(key)), key.new_ones(len(negatives))])

    def plain(reduction: Reduction) -> Tensor:
        return contrast(query, keys, positives=own, weights=weights, temperature=temperature, reduction=reduction)

    if sigma is None:
        return plain(reduction)
    loss = plain("none")
    similarity = (F.normalize(query.to(loss.dtype), dim=1) * F.normalize(key.to(loss.dtype), dim=1)).sum(1)
    missing = (similarity.detach() / sigma).softmax(0) * len(query) - 1  # of the weight to one
    scale = torch.as_tensor(temperature).to(similarity).reshape(-1)
    weighted = loss + missing * similarity / scale
    return weighted if reduction == "none" else weighted.sum() if reduction == "sum" else weighted.mean()


def decoupled_sup_con(
    z: Tensor, labels: Tensor, *, temperature: float | Tensor = 0.1, reduction: Reduction = "mean"
) -> Tensor:
    """Supervised contrast with rows of other classes only in the denominator; not in the paper.

    Parameters
    ----------
    z : Tensor (N, D)
        Views of one sample are rows with the same label.
    labels : Tensor (N,)
    temperature : float or Tensor
    reduction
        "mean" is over the rows that have another one of their class, and one of another class.

    Examples
    --------
    >>> decoupled_sup_con(torch.eye(2).repeat(2, 1), torch.tensor([0, 1, 0, 1]), temperature=1.0)
    tensor(-0.3069)
    """
    if labels.shape != z.shape[:1]:
        raise UsageError(f"labels must be of shape ({len(z)},), got {tuple(labels.shape)}")
    _, kind, size = labels.unique(return_inverse=True, return_counts=True)
    share = 1 / (size[kind] - 1).clamp_min(1).to(torch.promote_types(z.dtype, torch.float32))

    def positives(rows: Tensor, columns: Tensor) -> Tensor:
        same = (kind[rows] == kind[columns]) & (rows != columns)
        return torch.where(same, share[rows], 0.0)

    def others(rows: Tensor, columns: Tensor) -> Tensor:
        return torch.ne(kind[rows], kind[columns])

    return contrast(z, z, positives=positives, weights=others, temperature=temperature, reduction=reduction)


def coupling(loss: Tensor) -> Tensor:
    """The factor q of every anchor's gradient, from its InfoNCE loss L: ``q = 1 - exp(-L)``.

    Examples
    --------
    >>> coupling(torch.tensor([0.0, 0.01, 3.0]))
    tensor([0.0000, 0.0100, 0.9502])
    """
    return -torch.expm1(-loss)


def expected_coupling(batch_size: int, cosine: float, temperature: float = 0.1) -> float:
    """The q of NT-Xent where the positive has this cosine and all negatives have cosine 0: the paper's argument in a number.

    Examples
    --------
    >>> [round(expected_coupling(n, 0.9), 4) for n in (32, 256, 4096)]
    [0.0076, 0.0592, 0.5027]
    """
    negatives = 2 * (batch_size - 1)
    return 1 / (1 + math.exp(cosine / temperature) / negatives) if negatives else 0.0
