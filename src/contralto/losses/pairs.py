"""Losses of pairs and classes on the contrast engine. `losses.modules` has them as modules.

=====================  ==========================================  ======================================================
loss                   positives                                   denominator
=====================  ==========================================  ======================================================
`info_nce`             the key of the same row                     all keys, and further negatives
`soft_info_nce`        all keys, as much as is said           all keys
`nt_xent`              the other view                              all other rows of both views
`dcl`                  the other view                              the same without the positive
`hard_negative`        the other view                              negatives weighted by their own similarity
`sup_con`              all other rows of the same class            all other rows
`clip`                 the partner in the other modality           all partners, in both directions
`siglip`               the partner, as a yes-or-no question        none
=====================  ==========================================  ======================================================

Rows are scaled to length one; similarities are cosines. All but `siglip` and `hard_negative` are cases of
`contralto.losses.contrast.contrast`, and all but `hard_negative` do without the matrix of all pairs where it is large.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from contralto.distributed import gather_rows, gather_with_gradient, own_places
from contralto.errors import UsageError
from contralto.losses.bounded import LARGEST_SCALE, clip_mean, info_nce_mean, nt_xent_mean
from contralto.losses.contrast import Gather, Reduction, contrast, is_across, is_half_on_cuda, mean_over_ranks
from contralto.losses.tiled import tile_rows
from contralto.losses.units import full_precision, refuse_second_derivative, unit_rows

__all__ = [
    "clip", "dcl", "focal", "hard_negative", "hardest", "info_nce", "nt_xent", "siglip", "soft_info_nce", "sup_con",
]  # fmt: skip


def info_nce(
    query: Tensor,
    key: Tensor,
    *,
    negatives: Tensor | None = None,
    temperature: float | Tensor = 0.1,
    reduction: Reduction = "mean",
    gather: Gather = "none",
) -> Tensor:
    """InfoNCE (van den Oord et al. 2018): find the key of every query among all keys.

    Parameters
    ----------
    query, key : Tensor (N, D)
        Row i of one belongs to row i of the other.
    negatives : Tensor (Q, D), optional
        Further keys that belong to no query, such as a queue (MoCo); the same on all processes.
    temperature : float or Tensor
        A number, or (N, 1) per query; may carry gradient.
    reduction
        See `contrast`.
    gather
        "all" contrasts with the rows of all processes; see `contrast`.

    Examples
    --------
    >>> info_nce(torch.eye(3), torch.eye(3), temperature=1.0)
    tensor(0.5514)
    """
    _same_shape(query, key)
    n, across = len(query), is_across(gather)
    places = own_places(key) if across else None
    key = gather_with_gradient(key) if across else key
    keys = key if negatives is None else torch.cat([key, negatives])
    if reduction != "none" and not across and _bounded(temperature, query, keys):
        with full_precision(query):
            a, b = unit_rows(query, keys)
            mean = info_nce_mean(a, b, _scale(temperature, a))
            return mean * n if reduction == "sum" else mean
    own = torch.arange(n, device=key.device) if places is None else places
    loss = contrast(query, keys, positives=own, temperature=temperature, reduction=reduction)
    return mean_over_ranks(loss, torch.tensor(n), reduction) if across else loss


def soft_info_nce(
    query: Tensor,
    key: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor = 0.1,
    reduction: Reduction = "mean",
) -> Tensor:
    """InfoNCE with soft targets: how much of every key a query is to find.

    Parameters
    ----------
    query, key : Tensor (N, D), (M, D)
    targets : Tensor (N, M)
        Weights >= 0, scaled to sum 1 over each row; rows of zeros count as nothing. They never carry gradient.
    temperature, reduction
        See `contrast`.

    Examples
    --------
    >>> soft_info_nce(torch.eye(3), torch.eye(3), 0.8 * torch.eye(3) + 0.1, temperature=1.0)
    tensor(0.7333)
    """
    total = targets.sum(1, keepdim=True)
    share = targets / torch.where(total > 0, total, 1.0)
    return contrast(query, key, positives=share, temperature=temperature, reduction=reduction)


def nt_xent(
    z0: Tensor,
    z1: Tensor,
    *,
    temperature: float | Tensor = 0.1,
    reduction: Reduction = "mean",
    gather: Gather = "none",
) -> Tensor:
    """NT-Xent of SimCLR (Chen et al. 2020, equation 1): find the other view among all other rows of both views.

    Parameters
    ----------
    z0, z1 : Tensor (N, D)
        Two views of the same samples.
    temperature : float or Tensor ()
    reduction
        Over the 2 N rows, `z0` first; see `contrast`.
    gather
        "all" contrasts with the rows of all processes; see `contrast`.

    Examples
    --------
    >>> nt_xent(torch.eye(2), torch.eye(2), temperature=1.0)
    tensor(0.5514)
    """
    _same_shape(z0, z1)
    if reduction != "none" and not is_across(gather) and _bounded(temperature, z0, z1):
        with full_precision(z0):
            (unit,) = unit_rows(torch.cat([z0, z1]))
            mean = nt_xent_mean(unit, _scale(temperature, unit))
            return mean * len(unit) if reduction == "sum" else mean
    z, keys, own, partner = _two_views(z0, z1, gather)
    out = own.unsqueeze(1)
    loss = contrast(z, keys, positives=partner, weights=out, temperature=temperature, reduction=reduction)
    return loss if keys is z else mean_over_ranks(loss, torch.tensor(len(z)), reduction)


def dcl(
    z0: Tensor,
    z1: Tensor,
    *,
    temperature: float | Tensor = 0.1,
    sigma: float | None = None,
    detach_weight: bool = True,
    reduction: Reduction = "mean",
    gather: Gather = "none",
) -> Tensor:
    """Decoupled contrastive learning (Yeh et al. 2022): NT-Xent without the positive in the denominator.

    Parameters
    ----------
    z0, z1 : Tensor (N, D)
        Two views of the same samples, at least two.
    temperature : float or Tensor ()
    sigma : float, optional
        DCLW: the term of the positive is weighted by ``2 - exp(s / sigma) / mean exp(s / sigma)``, more where the two views are
        far apart; 0.5 in the paper.
    detach_weight : bool
        Treat that weight as a constant.
    reduction
        Over the 2 N rows.
    gather
        "all" contrasts with the rows of all processes; see `contrast`.

    Raises
    ------
    UsageError
        If there is one sample only: nothing would be left to compare with.

    Examples
    --------
    >>> dcl(torch.eye(2), torch.eye(2), temperature=1.0)
    tensor(-0.3069)
    """
    z, keys, own, partner = _two_views(z0, z1, gather)
    _refuse_one(keys)
    out = torch.stack([own, partner], 1)
    loss = contrast(z, keys, positives=partner, weights=out, temperature=temperature, reduction=reduction)
    if sigma is not None:
        unit, other = F.normalize(z.to(loss.dtype), dim=1), F.normalize(keys[partner].to(loss.dtype), dim=1)
        similarity = (unit * other).sum(1)
        everyone = similarity if keys is z else gather_with_gradient(similarity)
        weight = 2 - len(keys) * (similarity / sigma - (everyone / sigma).logsumexp(0)).exp()
        more = (1 - (weight.detach() if detach_weight else weight)) * similarity / temperature
        loss = loss + (more if reduction == "none" else more.sum() if reduction == "sum" else more.mean())
    return loss if keys is z else mean_over_ranks(loss, torch.tensor(len(z)), reduction)


def hard_negative(
    z0: Tensor,
    z1: Tensor,
    *,
    temperature: float = 0.5,
    beta: float = 1.0,
    tau_plus: float = 0.1,
    reduction: Reduction = "mean",
    gather: Gather = "none",
) -> Tensor:
    """Contrast with hard negatives and a correction for false ones (Robinson et al. 2021).

    Negatives weigh ``exp(beta s / t)``, scaled to mean one; of their weighted mean, the share `tau_plus` that is expected to
    be of the same class is taken off: ``max((mean - tau_plus exp(s+ / t)) / (1 - tau_plus), exp(-1 / t))`` of each.

    Parameters
    ----------
    z0, z1 : Tensor (N, D)
        Two views of the same samples, at least two.
    temperature : float
    beta : float
        Concentration; 0 weighs all negatives alike.
    tau_plus : float
        Expected share of negatives that are of the anchor's class, in [0, 1); 0 corrects nothing.
    reduction
        Over the 2 N rows.
    gather
        "all" contrasts with the rows of all processes; see `contrast`.

    Notes
    -----
    Holds the matrix of all pairs: the weights depend on it.

    Examples
    --------
    >>> plain = nt_xent(torch.eye(2), torch.eye(2), temperature=1.0)
    >>> torch.allclose(hard_negative(torch.eye(2), torch.eye(2), temperature=1.0, beta=0.0, tau_plus=0.0), plain)
    True
    """
    if not 0 <= tau_plus < 1:
        raise UsageError(f"tau_plus must be in [0, 1), got {tau_plus}")
    z, keys, own, partner = _two_views(z0, z1, gather)
    _refuse_one(keys)
    with full_precision(z):
        unit, others = unit_rows(z, keys)
        logits = unit @ others.T / temperature
        positive = logits.gather(1, partner[:, None]).squeeze(1)
        out = torch.stack([own, partner], 1)
        negative = logits.scatter(1, out, -torch.inf)
        count = len(keys) - 2
        hard = (beta * logits.detach()).scatter(1, out, -torch.inf).log_softmax(1)
        mean = (negative + hard).logsumexp(1).exp()  # weighted mean of exp(s / t)
        estimate = ((mean - tau_plus * positive.exp()) / (1 - tau_plus)).clamp_min(math.exp(-1 / temperature))
        loss = (positive.exp() + count * estimate).log() - positive
    loss = loss if reduction == "none" else loss.sum() if reduction == "sum" else loss.mean()
    return loss if keys is z else mean_over_ranks(loss, torch.tensor(len(z)), reduction)


@torch.no_grad()
def hardest(query: Tensor, key: Tensor, count: int, *, out: Tensor | None = None) -> Tensor:
    """Columns of the keys that are most similar to each query, without the matrix of all pairs.

    Parameters
    ----------
    query, key : Tensor (N, D), (M, D)
    count : int
        How many.
    out : Tensor (N, E) of integers, optional
        Columns that a query leaves out, such as its positive; -1 = none.

    Returns
    -------
    Tensor (N, count)
        Most similar first.

    Examples
    --------
    The positive against its two hardest negatives, each query with keys of its own:

    >>> q, k, own = torch.eye(4), torch.eye(4).roll(1, 1) + torch.eye(4), torch.arange(4)
    >>> columns = hardest(q, k, 2, out=own.unsqueeze(1))
    >>> keys = k[torch.cat([own.unsqueeze(1), columns], 1)]
    >>> contrast(q.unsqueeze(1), keys, positives=torch.zeros(4, 1, dtype=torch.int64)).shape
    torch.Size([])
    """
    left = len(key) - (0 if out is None else out.shape[1])
    if not 0 < count <= left:
        raise UsageError(f"count must be between 1 and {left}, the keys that are left, got {count}")
    found = torch.empty(len(query), count, dtype=torch.int64, device=query.device)
    with full_precision(query):
        unit, others = unit_rows(query, key)
        step = tile_rows(len(key), unit.element_size())
        for start in range(0, len(query), step):
            logits = unit[start : start + step] @ others.T
            if out is not None:
                columns = out[start : start + step]
                row, place = (columns >= 0).nonzero(as_tuple=True)
                logits[row, columns[row, place]] = -torch.inf
            found[start : start + step] = logits.topk(count, 1).indices
    return found


def focal(losses: Tensor, gamma: float = 2.0) -> Tensor:
    """Losses of anchors (N,), each by ``(1 - p)^gamma`` with p = exp(-loss) (Lin et al. 2017): less of what is found already.

    Examples
    --------
    >>> focal(info_nce(torch.eye(3), torch.eye(3), temperature=1.0, reduction="none")).mean()
    tensor(0.0991)
    """
    return (-torch.expm1(-losses)) ** gamma * losses


def sup_con(
    z: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = 0.1,
    base_temperature: float | None = None,
    reduction: Reduction = "mean",
    gather: Gather = "none",
) -> Tensor:
    """Supervised contrast (Khosla et al. 2020, equation 2, the "out" form): all others of the class against all others.

    Parameters
    ----------
    z : Tensor (N, D)
        Views of one sample are rows with the same label.
    labels : Tensor (N,)
    temperature : float or Tensor
    base_temperature : float, optional
        Scales the loss by temperature / base_temperature; default: no scaling.
    reduction
        "mean" is over the rows that have another one of their class.
    gather
        "all" contrasts with the rows of all processes; see `contrast`.

    Examples
    --------
    >>> sup_con(torch.eye(2).repeat(2, 1), torch.tensor([0, 1, 0, 1]), temperature=1.0)
    tensor(0.5514)
    """
    if labels.shape != z.shape[:1]:
        raise UsageError(f"labels must be of shape ({len(z)},), got {tuple(labels.shape)}")
    across = is_across(gather)
    own = own_places(z) if across else torch.arange(len(z), device=z.device)
    keys, everyone = (gather_with_gradient(z), gather_rows(labels)) if across else (z, labels)
    _, kind, size = everyone.unique(return_inverse=True, return_counts=True)
    others = size[kind] - 1  # of the same class
    share = 1 / others.clamp_min(1).to(torch.promote_types(z.dtype, torch.float32))

    def positives(rows: Tensor, columns: Tensor) -> Tensor:
        row = own[rows]
        return torch.where((kind[row] == kind[columns]) & (row != columns), share[row], 0.0)

    loss = contrast(
        z, keys, positives=positives, weights=own.unsqueeze(1), temperature=temperature, reduction=reduction
    )
    if across:
        loss = mean_over_ranks(loss, (others[own] > 0).sum(), reduction)
    return loss if base_temperature is None else loss * (temperature / base_temperature)


def clip(
    image: Tensor,
    text: Tensor,
    *,
    temperature: float | Tensor = 0.07,
    reduction: Reduction = "mean",
    gather: Gather = "none",
) -> Tensor:
    """The loss of CLIP (Radford et al. 2021): half the sum of InfoNCE in both directions.

    Parameters
    ----------
    image, text : Tensor (N, D)
        Row i of one belongs to row i of the other.
    temperature : float or Tensor ()
        May carry gradient; with CLIP's clamped log scale it is ``1 / log_scale.exp().clamp(max=100)``.
    reduction
        See `contrast`.
    gather
        "all" contrasts with the rows of all processes; see `contrast`.

    Examples
    --------
    >>> clip(torch.eye(3), torch.eye(3), temperature=1.0)
    tensor(0.5514)
    """
    _same_shape(image, text)
    n = len(image)
    bounded = _is_one(temperature) and not is_half_on_cuda(image, text)
    if reduction != "none" and bounded and not is_across(gather):
        with full_precision(image):
            a, b = unit_rows(image, text)
            mean = clip_mean(a, b, _scale(temperature, a))
            return mean * n if reduction == "sum" else mean
    there, back = (
        info_nce(x, y, temperature=temperature, reduction=reduction, gather=gather)
        for x, y in ((image, text), (text, image))
    )
    return (there + back) / 2


def siglip(
    image: Tensor,
    text: Tensor,
    *,
    scale: float | Tensor = 10.0,
    bias: float | Tensor = -10.0,
    gather: Gather = "none",
) -> Tensor:
    """The loss of SigLIP (Zhai et al. 2023): is this pair one that belongs together, for every pair.

    Parameters
    ----------
    image, text : Tensor (N, D)
        Row i of one belongs to row i of the other.
    scale, bias : float or Tensor ()
        Of the logits; learnt in the paper from these starting values (scale there as its logarithm).
    gather
        "all" contrasts with the rows of all processes; see `contrast`.

    Returns
    -------
    Tensor
        Sum over all pairs, over N.

    Examples
    --------
    >>> siglip(torch.eye(2), torch.eye(2))
    tensor(0.6932)
    """
    _same_shape(image, text)
    n, across = len(image), is_across(gather)
    own = own_places(text) if across else torch.arange(n, device=text.device)
    texts = gather_with_gradient(text) if across else text
    with full_precision(image):
        a, b = unit_rows(image, texts)
        total: Tensor = _SigLIP.apply(a, b, _as(scale, a), _as(bias, a), own)
    return mean_over_ranks(total / max(n, 1), torch.tensor(n), "mean") if across else total / max(n, 1)


class _SigLIP(torch.autograd.Function):
    """Sum over pairs of softplus(-y logit), y = 1 where a row meets its own column and -1 elsewhere, by tiles of rows."""

    @staticmethod
    def forward(ctx: Any, image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, own: Tensor) -> Tensor:
        n, step = len(image), tile_rows(len(text), image.element_size())
        total = image.new_zeros(())
        to_image, to_text = torch.empty_like(image), torch.zeros_like(text)
        to_bias = torch.zeros_like(bias)
        for start in range(0, n, step):
            part, column = image[start : start + step], own[start : start + step].unsqueeze(1)
            logits = torch.addmm(bias.expand(1, 1), part * scale, text.T)
            total += F.softplus(logits).sum() - logits.gather(1, column).sum()  # softplus(-x) = softplus(x) - x
            share = logits.sigmoid_().scatter_add_(1, column, logits.new_full((1, 1), -1.0).expand(len(part), 1))
            to_bias += share.sum()
            torch.mm(share, text, out=to_image[start : start + step])
            to_text.addmm_(share.T, part)
        ctx.save_for_backward(to_image, to_text, (to_image * image).sum(), to_bias, scale)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("of siglip is not there")
        to_image, to_text, to_scale, to_bias, scale = ctx.saved_tensors
        return to_image * (scale * grad), to_text * (scale * grad), to_scale * grad, to_bias * grad, None


def _two_views(z0: Tensor, z1: Tensor, gather: Gather) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows of both views (2 N, D), what they are compared with, and the columns there of themselves and of their partners."""
    _same_shape(z0, z1)
    z = torch.cat([z0, z1])
    if not is_across(gather):
        own = torch.arange(len(z), device=z.device)
        return z, z, own, own.roll(len(z0))
    place = own_places(z0)
    keys = torch.cat([gather_with_gradient(z0), gather_with_gradient(z1)])
    other = place + len(keys) // 2
    return z, keys, torch.cat([place, other]), torch.cat([other, place])


def _refuse_one(keys: Tensor) -> None:
    if len(keys) < 4:
        raise UsageError(f"a batch of {len(keys) // 2} has no negatives: at least two samples are needed")


def _is_one(temperature: float | Tensor) -> bool:
    return not isinstance(temperature, Tensor) or temperature.numel() == 1


def _bounded(temperature: float | Tensor, *rows: Tensor) -> bool:
    """Whether the losses of `losses.bounded` take it, and nothing is faster."""
    one = _is_one(temperature) and not is_half_on_cuda(*rows)
    return one and torch.as_tensor(temperature).item() * LARGEST_SCALE >= 1


def _scale(temperature: float | Tensor, like: Tensor) -> Tensor:
    """1 / temperature (), in the type of the rows."""
    if isinstance(temperature, Tensor):
        return 1 / temperature.to(like).reshape(())
    return like.new_tensor(1 / temperature)


def _as(x: float | Tensor, like: Tensor) -> Tensor:
    return x.to(like) if isinstance(x, Tensor) else like.new_tensor(x)


def _same_shape(a: Tensor, b: Tensor) -> None:
    if a.ndim != 2 or a.shape != b.shape:
        raise UsageError(f"both sides must be of one shape (N, D), got {tuple(a.shape)} and {tuple(b.shape)}")
