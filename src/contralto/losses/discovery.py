"""Losses of category discovery (ProtoGCD, arXiv 2504.03755): adaptive pseudo-labels, balance of classes, distance of prototypes.

Where samples lie on several ranks, each of these is the loss of the whole batch (`gather="all"`), so that the mean over ranks of
the gradients is its gradient.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from contralto.distributed import gather_rows, gather_with_gradient, mean_weight, own_places, reduce_over_ranks
from contralto.errors import UsageError
from contralto.losses.contrast import Gather, is_across, soft_cross_entropy
from contralto.losses.units import full_precision, unit_rows

__all__ = ["PseudoLabels", "adaptive_labels", "entropy_gap", "linear_ramp", "prototype_separation", "swapped_labels"]


class PseudoLabels(NamedTuple):
    """Targets (..., B, K) without gradient, rows sum to 1; `hard` (..., B): which rows are one-hot by choice."""

    targets: Tensor
    hard: Tensor


def linear_ramp(epoch: int, start: float, end: float, *, length: int, wait: int = 0, before: float = 0.0) -> float:
    """A number that goes from `start` to `end` over `length` epochs, both reached, then stays.

    Parameters
    ----------
    epoch : int
        From 0.
    start, end : float
    length : int
        Epochs of the ramp; with 1, `end` is there at once, as with 0.
    wait : int
        Epochs before the ramp, in which the number is `before`.
    before : float

    Examples
    --------
    >>> [linear_ramp(e, 0.0, 1.0, length=3, wait=1) for e in range(6)]
    [0.0, 0.0, 0.5, 1.0, 1.0, 1.0]
    """
    if epoch < wait:
        return before
    place = epoch - wait
    return end if place >= length - 1 else start + (end - start) * place / (length - 1)


@torch.no_grad()
def adaptive_labels(
    scores: Tensor, *, ratio: float, temperature: float = 0.05, gather: Gather = "none"
) -> PseudoLabels:
    """Pseudo-labels that harden where the model is sure, and with time (dual-level adaptive pseudo-labelling).

    The most confident samples of each view, a share `ratio` of the batch rounded down, get their best class as a one-hot row, the
    others keep their soft row. Confidence is the ratio of the largest to the second largest probability.

    Parameters
    ----------
    scores : Tensor (..., B, K)
        Cosines; every leading place is a view with a choice of its own.
    ratio : float
        In [0, 1].
    temperature : float
        Of the soft rows, sharper than that of the predictions.
    gather : {"none", "all"}
        "all": the share is one of the batch of all processes.

    Returns
    -------
    PseudoLabels

    Raises
    ------
    UsageError
        If the ratio is no share, or there is one class only: nothing to be unsure about.

    Examples
    --------
    >>> found = adaptive_labels(torch.tensor([[0.9, 0.1], [0.5, 0.45]]), ratio=0.5)
    >>> found.targets[0].tolist(), found.hard.tolist()
    ([1.0, 0.0], [True, False])
    """
    if not 0 <= ratio <= 1:
        raise UsageError(f"ratio must be in [0, 1], got {ratio}")
    if scores.ndim < 2 or scores.shape[-1] < 2:
        raise UsageError(f"scores must be of shape (..., B, K) with two classes at least, got {tuple(scores.shape)}")
    soft = (scores.detach().to(torch.promote_types(scores.dtype, torch.float32)) / temperature).softmax(-1)
    top = soft.topk(2, dim=-1).values
    sure = top[..., 0] / (top[..., 1] + 1e-6)
    across = is_across(gather)
    rows = sure.movedim(-1, 0).contiguous()  # (B, ...): samples are what is gathered
    every = gather_rows(rows) if across else rows
    count = math.floor(len(every) * ratio)
    first = every.argsort(dim=0, descending=True, stable=True)[:count]
    chosen = torch.zeros_like(every, dtype=torch.bool).scatter_(0, first, True)
    hard = (chosen[own_places(rows)] if across else chosen).movedim(0, -1)
    one_hot = F.one_hot(soft.argmax(-1), soft.shape[-1]).to(soft.dtype)
    return PseudoLabels(torch.where(hard.unsqueeze(-1), one_hot, soft), hard)


def swapped_labels(scores: Tensor, targets: Tensor, *, temperature: float = 0.1, gather: Gather = "none") -> Tensor:
    """Each of two views predicts the pseudo-labels of the other one; the mean over samples and views.

    Parameters
    ----------
    scores : Tensor (2, B, K)
        Cosines.
    targets : Tensor (2, B, K)
        Rows sum to 1; carry no gradient.
    temperature : float
        Of the predictions.
    gather : {"none", "all"}
        "all": the mean is over the samples of all processes.

    Returns
    -------
    Tensor ()

    Examples
    --------
    >>> scores = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])
    >>> swapped_labels(scores, torch.eye(2).unsqueeze(1), temperature=1.0)
    tensor(1.3133)
    """
    if scores.ndim != 3 or len(scores) != 2 or scores.shape != targets.shape:
        raise UsageError(
            f"scores and targets must both be of shape (2, B, K), got {tuple(scores.shape)} and {tuple(targets.shape)}"
        )
    logits = scores.to(targets.dtype) / temperature
    loss = soft_cross_entropy(logits, targets.flip(0)).mean()
    return loss * mean_weight(torch.tensor(scores.shape[1], device=scores.device)) if is_across(gather) else loss


def entropy_gap(scores: Tensor, *, temperature: float = 0.1, gather: Gather = "none") -> Tensor:
    """How far the mean prediction is from one that is even over all classes: ``ln K - H(mean)``, from 0 to ln K.

    Parameters
    ----------
    scores : Tensor (N, K)
        Cosines of all views.
    temperature : float
    gather : {"none", "all"}
        "all": the mean is over the rows of all processes.

    Returns
    -------
    Tensor ()

    Examples
    --------
    >>> entropy_gap(torch.eye(3), temperature=0.1), entropy_gap(torch.eye(3)[[0, 0]], temperature=0.01)
    (tensor(0.), tensor(1.0986))
    """
    p = (scores.to(torch.promote_types(scores.dtype, torch.float32)) / temperature).softmax(-1)
    total, count = p.sum(0, keepdim=True), torch.tensor(len(p), device=p.device)
    if is_across(gather):
        total, count = gather_with_gradient(total), reduce_over_ranks(count)
    mean = (total.sum(0) / count).clamp_min(torch.finfo(p.dtype).tiny)  # the slope of the entropy at 0 is infinite
    gap: Tensor = math.log(p.shape[-1]) - torch.special.entr(mean).sum()
    return gap


def prototype_separation(
    prototypes: Tensor, *, temperature: float = 0.1, base_temperature: float | None = None
) -> Tensor:
    """How near the prototypes are to one another: the mean over them of ``ln mean_j exp(cosine / temperature)``, j another one.

    Parameters
    ----------
    prototypes : Tensor (K, D)
        At least two; scaled to length one here.
    temperature : float
    base_temperature : float, optional
        Scales the result by temperature / base_temperature; default: no scaling.

    Returns
    -------
    Tensor ()
        0 for orthogonal prototypes.

    Examples
    --------
    >>> prototype_separation(torch.eye(3)), prototype_separation(torch.ones(3, 2), temperature=0.5)
    (tensor(0.), tensor(2.0000))
    """
    if len(prototypes) < 2:
        raise UsageError(f"separation is between prototypes: there must be two at least, got {len(prototypes)}")
    with full_precision(prototypes):
        (unit,) = unit_rows(prototypes)
        own = torch.eye(len(unit), dtype=torch.bool, device=unit.device)
        logits = (unit @ unit.T / temperature).masked_fill(own, -torch.inf)
        loss = logits.logsumexp(1).mean() - math.log(len(unit) - 1)
    return loss if base_temperature is None else loss * (temperature / base_temperature)
