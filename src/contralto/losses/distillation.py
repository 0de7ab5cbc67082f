"""Staying true to a teacher: its answers, its features, or the relations between its samples and its prototypes.

=======================  ==============================================================================================
loss                     what is kept
=======================  ==============================================================================================
`soft_targets`           the teacher's distribution over classes or tokens
`grouped_targets`        the same in several groups of classes, each a distribution of its own (the heads of tasks)
`feature_distance`       the features themselves
`relation_distillation`  for every prototype, which samples of the batch it is close to; or for every sample, which prototypes
=======================  ==============================================================================================

Teachers carry no gradient, whatever they are.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from contralto.distributed import gather_rows, gather_with_gradient, mean_weight
from contralto.errors import UsageError
from contralto.losses.contrast import Gather, Reduction, is_across

__all__ = ["Axis", "feature_distance", "grouped_targets", "relation_distillation", "soft_targets"]

Axis = Literal["samples", "prototypes"]


def soft_targets(
    logits: Tensor,
    teacher: Tensor,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    scale: bool = False,
    reduction: Reduction = "mean",
) -> Tensor:
    """KL divergence of the teacher's distribution to the student's (Hinton et al. 2015), over the last dimension.

    Parameters
    ----------
    logits, teacher : Tensor (..., C)
        Of classes (N, C), or of the tokens of sequences (N, L, C).
    temperature : float
        Of both.
    mask : Tensor (...) of bool, optional
        Which rows count, such as those tokens that are no padding.
    scale : bool
        Multiply by the square of the temperature, so that gradients stay as large.
    reduction : {"mean", "sum", "none"}
        Over the rows that count; the mean of none is 0. "none" gives (...), 0 where a row does not count.

    Examples
    --------
    >>> soft_targets(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 1.0]]))
    tensor(0.1109)
    """
    if logits.shape != teacher.shape:
        raise UsageError(f"logits and teacher must be of one shape, got {tuple(logits.shape)}, {tuple(teacher.shape)}")
    own, wanted = (x / temperature for x in (logits, teacher.detach()))
    divergence = F.kl_div(own.log_softmax(-1), wanted.log_softmax(-1), reduction="none", log_target=True).sum(-1)
    return _reduced(divergence * (temperature**2 if scale else 1), mask, reduction)


def grouped_targets(
    logits: Tensor,
    teacher: Tensor,
    groups: Tensor,
    *,
    temperature: float = 1.0,
    scale: bool = False,
    reduction: Reduction = "mean",
) -> Tensor:
    """`soft_targets` in every group of classes apart, added up over the groups.

    Parameters
    ----------
    logits, teacher : Tensor (N, C)
    groups : Tensor (C,) of integers
        To which group a class belongs, such as the task in which it came; classes below 0 do not count. A group of one class says
        nothing: its distribution is 1.
    temperature, scale
        See `soft_targets`.
    reduction
        Over samples.

    Examples
    --------
    >>> logits, teacher = torch.zeros(1, 3), torch.tensor([[0.0, 1.0, 5.0]])
    >>> grouped_targets(logits, teacher, torch.tensor([0, 0, 1]))
    tensor(0.1109)
    """
    if logits.shape != teacher.shape or groups.shape != logits.shape[1:]:
        raise UsageError(
            f"logits and teacher must be (N, C) and groups (C,), got {tuple(logits.shape)}, {tuple(teacher.shape)}, "
            f"{tuple(groups.shape)}"
        )
    counted = groups >= 0
    _, group = groups[counted].unique(return_inverse=True)
    own = _log_softmax_by_group(logits[:, counted] / temperature, group)
    wanted = _log_softmax_by_group(teacher.detach()[:, counted] / temperature, group)
    divergence = (wanted.exp() * (wanted - own)).sum(1)
    return _reduced(divergence * (temperature**2 if scale else 1), None, reduction)


def _log_softmax_by_group(logits: Tensor, group: Tensor) -> Tensor:
    """Logarithms (N, C) of a softmax in each group of columns."""
    if not logits.shape[1]:
        return logits
    shape, index = (len(logits), int(group.max()) + 1), group.expand_as(logits)
    top = logits.new_full(shape, -torch.inf).scatter_reduce(1, index, logits.detach(), "amax")
    shifted = logits - top.gather(1, index)
    total = logits.new_zeros(shape).scatter_add(1, index, shifted.exp()).log()
    return shifted - total.gather(1, index)


def feature_distance(
    features: Tensor,
    teacher: Tensor,
    *,
    kind: Literal["mse", "cosine"] = "mse",
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """How far features are from those of the teacher.

    Parameters
    ----------
    features, teacher : Tensor (..., D)
    kind : {"mse", "cosine"}
        Mean of squared differences; or one minus the cosine.
    mask : Tensor (...) of bool, optional
        Which rows count.
    reduction
        Over the rows that count.

    Examples
    --------
    >>> x = torch.tensor([[1.0, 0.0]])
    >>> feature_distance(x, 2 * x), feature_distance(x, 2 * x, kind="cosine")
    (tensor(0.5000), tensor(0.))
    """
    if features.shape != teacher.shape:
        raise UsageError(
            f"features and teacher must be of one shape, got {tuple(features.shape)}, {tuple(teacher.shape)}"
        )
    teacher = teacher.detach()
    if kind == "cosine":
        distance = 1 - F.cosine_similarity(features, teacher, dim=-1)
    elif kind == "mse":
        distance = (features - teacher).square().mean(-1)
    else:
        raise UsageError(f'kind must be "mse" or "cosine", got {kind!r}')
    return _reduced(distance, mask, reduction)


def relation_distillation(
    features: Tensor,
    prototypes: Tensor,
    teacher_features: Tensor,
    teacher_prototypes: Tensor,
    *,
    axis: Axis = "samples",
    temperature: float = 0.1,
    groups: Tensor | None = None,
    gather: Gather = "none",
) -> Tensor:
    """Relations between samples and old prototypes, as the teacher has them (PRD 5).

    Parameters
    ----------
    features, teacher_features : Tensor (N, D)
        Of the same samples.
    prototypes, teacher_prototypes : Tensor (C, D)
        Of old classes. Those of the student take gradient: they move with its features.
    axis : {"samples", "prototypes"}
        "samples", the paper: for every prototype a distribution over the samples of the batch, from cosines; mean over
        prototypes. "prototypes", the released code: for every sample a distribution over the prototypes of each group, from
        products of the raw feature and the unit prototype; mean over samples, added up over groups.
    temperature : float
        Cosines at temperature 1 are next to even and say nothing: 0.1 for "samples", 1 for "prototypes".
    groups : Tensor (C,) of integers, optional
        For "prototypes": the task of every prototype; default: one group of all.
    gather : {"none", "all"}
        "all" takes the samples of all processes as one batch.

    Returns
    -------
    Tensor ()
        0 without prototypes.

    Examples
    --------
    >>> x, p = torch.eye(3), torch.eye(3)[:2]
    >>> relation_distillation(x, p, x, p), relation_distillation(x.roll(1, 0), p, x, p) > 1
    (tensor(0.), tensor(True))
    """
    if features.shape != teacher_features.shape or prototypes.shape != teacher_prototypes.shape:
        raise UsageError(
            f"student and teacher must have features (N, D) and prototypes (C, D) of the same shapes, got "
            f"{tuple(features.shape)}, {tuple(teacher_features.shape)} and {tuple(prototypes.shape)}, "
            f"{tuple(teacher_prototypes.shape)}"
        )
    if not len(prototypes):
        return features.sum() * 0.0
    unit, teacher_unit = F.normalize(prototypes, dim=1), F.normalize(teacher_prototypes.detach(), dim=1)
    if axis == "prototypes":
        if groups is None:
            groups = torch.zeros(len(prototypes), dtype=torch.int64, device=prototypes.device)
        scores, wanted = features @ unit.T, teacher_features.detach() @ teacher_unit.T
        loss = grouped_targets(scores, wanted, groups, temperature=temperature)
        count = torch.tensor(len(features), device=features.device)
        return loss * mean_weight(count) if is_across(gather) else loss
    if axis != "samples":
        raise UsageError(f'axis must be "samples" or "prototypes", got {axis!r}')
    if is_across(gather):
        features, teacher_features = gather_with_gradient(features), gather_rows(teacher_features)
    scores = unit @ F.normalize(features, dim=1).T
    wanted = teacher_unit @ F.normalize(teacher_features.detach(), dim=1).T
    return soft_targets(scores, wanted, temperature=temperature)


def _reduced(values: Tensor, mask: Tensor | None, reduction: Reduction) -> Tensor:
    """Values of rows, of which those count that `mask` says."""
    if reduction not in ("mean", "sum", "none"):
        raise UsageError(f'reduction must be "mean", "sum" or "none", got {reduction!r}')
    if mask is not None:
        values = torch.where(mask, values, 0.0)
    if reduction == "none":
        return values
    count = values.numel() if mask is None else int(mask.sum())
    return values.sum() / max(count, 1) if reduction == "mean" else values.sum()
