"""Losses of pairs and classes on the contrast engine: as functions, and as modules that keep their settings.

=====================  ==========================================  ======================================================
loss                   positives                                   denominator
=====================  ==========================================  ======================================================
`info_nce`             the key of the same row                     all keys, and further negatives
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
from torch import Tensor, nn
from torch.nn import functional as F

from contralto.errors import UsageError
from contralto.losses.bounded import LARGEST_SCALE, clip_sum, info_nce_sum, nt_xent_sum
from contralto.losses.contrast import Reduction, contrast
from contralto.losses.tiled import tile_rows
from contralto.losses.units import full_precision, refuse_second_derivative, unit_rows

__all__ = [
    "CLIP", "DCL", "InfoNCE", "NTXent", "SigLIP", "SupCon",
    "clip", "dcl", "hard_negative", "info_nce", "nt_xent", "siglip", "sup_con",
]  # fmt: skip


def info_nce(
    query: Tensor,
    key: Tensor,
    *,
    negatives: Tensor | None = None,
    temperature: float | Tensor = 0.1,
    reduction: Reduction = "mean",
) -> Tensor:
    """InfoNCE (van den Oord et al. 2018): find the key of every query among all keys.

    Parameters
    ----------
    query, key : Tensor (N, D)
        Row i of one belongs to row i of the other.
    negatives : Tensor (Q, D), optional
        Further keys that belong to no query, such as a queue (MoCo).
    temperature : float or Tensor
        A number, or (N, 1) per query; may carry gradient.
    reduction
        See `contrast`.

    Examples
    --------
    >>> info_nce(torch.eye(3), torch.eye(3), temperature=1.0)
    tensor(0.5514)
    """
    _same_shape(query, key)
    keys = key if negatives is None else torch.cat([key, negatives])
    n = len(query)
    if reduction != "none" and _bounded(temperature):
        with full_precision(query):
            a, b = unit_rows(query, keys)
            total = info_nce_sum(a, b, 1 / _as(temperature, a).reshape(()))
            return total if reduction == "sum" else total / max(n, 1)
    own = torch.arange(n, device=query.device)
    return contrast(query, keys, positives=own, temperature=temperature, reduction=reduction)


def nt_xent(z0: Tensor, z1: Tensor, *, temperature: float | Tensor = 0.1, reduction: Reduction = "mean") -> Tensor:
    """NT-Xent of SimCLR (Chen et al. 2020, equation 1): find the other view among all other rows of both views.

    Parameters
    ----------
    z0, z1 : Tensor (N, D)
        Two views of the same samples.
    temperature : float or Tensor ()
    reduction
        Over the 2 N rows, `z0` first; see `contrast`.

    Examples
    --------
    >>> nt_xent(torch.eye(2), torch.eye(2), temperature=1.0)
    tensor(0.5514)
    """
    z = _both(z0, z1)
    n = len(z)
    if reduction != "none" and _bounded(temperature):
        with full_precision(z):
            (unit,) = unit_rows(z)
            total = nt_xent_sum(unit, 1 / _as(temperature, unit).reshape(()))
            return total if reduction == "sum" else total / max(n, 1)
    own = torch.arange(n, device=z.device)
    return contrast(
        z, z, positives=own.roll(n // 2), weights=own.unsqueeze(1), temperature=temperature, reduction=reduction
    )


def dcl(
    z0: Tensor,
    z1: Tensor,
    *,
    temperature: float | Tensor = 0.1,
    sigma: float | None = None,
    detach_weight: bool = True,
    reduction: Reduction = "mean",
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

    Raises
    ------
    UsageError
        If there is one sample only: nothing would be left to compare with.

    Examples
    --------
    >>> dcl(torch.eye(2), torch.eye(2), temperature=1.0)
    tensor(-0.3069)
    """
    z = _both(z0, z1)
    n = len(z)
    if n < 4:
        raise UsageError(f"a batch of {n // 2} has no negatives: decoupled contrast needs at least two samples")
    own = torch.arange(n, device=z.device)
    partner = own.roll(n // 2)
    out = torch.stack([own, partner], 1)
    loss = contrast(z, z, positives=partner, weights=out, temperature=temperature, reduction=reduction)
    if sigma is None:
        return loss
    unit = F.normalize(z.to(loss.dtype), dim=1)
    similarity = (unit * unit[partner]).sum(1)
    weight = 2 - n * (similarity / sigma).softmax(0)
    more = (1 - (weight.detach() if detach_weight else weight)) * similarity / temperature
    return loss + (more if reduction == "none" else more.sum() if reduction == "sum" else more.mean())


def hard_negative(
    z0: Tensor,
    z1: Tensor,
    *,
    temperature: float = 0.5,
    beta: float = 1.0,
    tau_plus: float = 0.1,
    reduction: Reduction = "mean",
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
    z = _both(z0, z1)
    n = len(z)
    if n < 4:
        raise UsageError(f"a batch of {n // 2} has no negatives: at least two samples are needed")
    with full_precision(z):
        (unit,) = unit_rows(z)
        logits = unit @ unit.T / temperature
        own = torch.arange(n, device=z.device)
        partner = own.roll(n // 2)
        positive = logits.gather(1, partner[:, None]).squeeze(1)
        out = torch.stack([own, partner], 1)
        negative = logits.scatter(1, out, -torch.inf)
        count = n - 2
        hard = (beta * logits.detach()).scatter(1, out, -torch.inf).log_softmax(1)
        mean = (negative + hard).logsumexp(1).exp()  # weighted mean of exp(s / t)
        estimate = ((mean - tau_plus * positive.exp()) / (1 - tau_plus)).clamp_min(math.exp(-1 / temperature))
        loss = (positive.exp() + count * estimate).log() - positive
    return loss if reduction == "none" else loss.sum() if reduction == "sum" else loss.mean()


def sup_con(
    z: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = 0.1,
    base_temperature: float | None = None,
    reduction: Reduction = "mean",
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

    Examples
    --------
    >>> sup_con(torch.eye(2).repeat(2, 1), torch.tensor([0, 1, 0, 1]), temperature=1.0)
    tensor(0.5514)
    """
    if labels.shape != z.shape[:1]:
        raise UsageError(f"labels must be of shape ({len(z)},), got {tuple(labels.shape)}")
    _, kind, size = labels.unique(return_inverse=True, return_counts=True)
    share = 1 / (size[kind] - 1).clamp_min(1).to(torch.promote_types(z.dtype, torch.float32))

    def positives(rows: Tensor, columns: Tensor) -> Tensor:
        same = (kind[rows] == kind[columns]) & (rows != columns)
        return torch.where(same, share[rows], 0.0)

    own = torch.arange(len(z), device=z.device).unsqueeze(1)
    loss = contrast(z, z, positives=positives, weights=own, temperature=temperature, reduction=reduction)
    return loss if base_temperature is None else loss * (temperature / base_temperature)


def clip(image: Tensor, text: Tensor, *, temperature: float | Tensor = 0.07, reduction: Reduction = "mean") -> Tensor:
    """The loss of CLIP (Radford et al. 2021): half the sum of InfoNCE in both directions.

    Parameters
    ----------
    image, text : Tensor (N, D)
        Row i of one belongs to row i of the other.
    temperature : float or Tensor ()
        May carry gradient; with CLIP's clamped log scale it is ``1 / log_scale.exp().clamp(max=100)``.
    reduction
        See `contrast`.

    Examples
    --------
    >>> clip(torch.eye(3), torch.eye(3), temperature=1.0)
    tensor(0.5514)
    """
    _same_shape(image, text)
    n = len(image)
    if reduction != "none" and _is_one(temperature):
        with full_precision(image):
            a, b = unit_rows(image, text)
            total = clip_sum(a, b, 1 / _as(temperature, a).reshape(())) / 2
            return total if reduction == "sum" else total / max(n, 1)
    there = info_nce(image, text, temperature=temperature, reduction=reduction)
    return (there + info_nce(text, image, temperature=temperature, reduction=reduction)) / 2


def siglip(image: Tensor, text: Tensor, *, scale: float | Tensor = 10.0, bias: float | Tensor = -10.0) -> Tensor:
    """The loss of SigLIP (Zhai et al. 2023): is this pair one that belongs together, for every pair.

    Parameters
    ----------
    image, text : Tensor (N, D)
        Row i of one belongs to row i of the other.
    scale, bias : float or Tensor ()
        Of the logits; learnt in the paper from these starting values (scale there as its logarithm).

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
    with full_precision(image):
        a, b = unit_rows(image, text)
        total: Tensor = _SigLIP.apply(a, b, _as(scale, a), _as(bias, a))
    return total / len(image)


class _SigLIP(torch.autograd.Function):
    """Sum over pairs of softplus(-y logit), y = 1 on the diagonal and -1 off it, by tiles of rows."""

    @staticmethod
    def forward(ctx: Any, image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:

        n, step = len(image), tile_rows(len(text), image.element_size())
        total = image.new_zeros(())
        to_image, to_text = torch.empty_like(image), torch.zeros_like(text)
        to_bias = torch.zeros_like(bias)
        for start in range(0, n, step):
            stop = min(start + step, n)
            logits = torch.addmm(bias.expand(1, 1), image[start:stop] * scale, text.T)
            own = logits.diagonal(start).clone()
            total += F.softplus(logits).sum() - own.sum()  # softplus(-x) = softplus(x) - x
            share = logits.sigmoid_()
            share.diagonal(start).sub_(1)
            to_bias += share.sum()
            torch.mm(share, text, out=to_image[start:stop])
            to_text.addmm_(share.T, image[start:stop])
        ctx.save_for_backward(to_image, to_text, (to_image * image).sum(), to_bias, scale)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        refuse_second_derivative("of siglip is not there")
        to_image, to_text, to_scale, to_bias, scale = ctx.saved_tensors
        return to_image * (scale * grad), to_text * (scale * grad), to_scale * grad, to_bias * grad


def _both(z0: Tensor, z1: Tensor) -> Tensor:
    _same_shape(z0, z1)
    return torch.cat([z0, z1])


def _is_one(temperature: float | Tensor) -> bool:
    return not isinstance(temperature, Tensor) or temperature.numel() == 1


def _bounded(temperature: float | Tensor) -> bool:
    """Whether the losses of `losses.bounded` take it."""
    return _is_one(temperature) and torch.as_tensor(temperature).item() * LARGEST_SCALE >= 1


def _as(x: float | Tensor, like: Tensor) -> Tensor:
    return x.to(like) if isinstance(x, Tensor) else like.new_tensor(x)


def _same_shape(a: Tensor, b: Tensor) -> None:
    if a.ndim != 2 or a.shape != b.shape:
        raise UsageError(f"both sides must be of one shape (N, D), got {tuple(a.shape)} and {tuple(b.shape)}")


class _Loss(nn.Module):
    """Keeps the settings of a function."""

    function: Any

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.settings = settings

    def forward(self, *inputs: Tensor, **more: Any) -> Tensor:
        """The loss of some inputs; further arguments go before the settings."""
        loss: Tensor = type(self).function(*inputs, **(self.settings | more))
        return loss

    def extra_repr(self) -> str:
        """The settings."""
        return ", ".join(f"{k}={v}" for k, v in self.settings.items())


class InfoNCE(_Loss):
    """Module form of `info_nce`.

    Examples
    --------
    >>> InfoNCE(temperature=1.0)(torch.eye(3), torch.eye(3))
    tensor(0.5514)
    """

    function = staticmethod(info_nce)

    def __init__(self, temperature: float = 0.1, reduction: Reduction = "mean") -> None:
        super().__init__(temperature=temperature, reduction=reduction)


class NTXent(_Loss):
    """Module form of `nt_xent`.

    Examples
    --------
    >>> NTXent(temperature=1.0)(torch.eye(2), torch.eye(2))
    tensor(0.5514)
    """

    function = staticmethod(nt_xent)

    def __init__(self, temperature: float = 0.1, reduction: Reduction = "mean") -> None:
        super().__init__(temperature=temperature, reduction=reduction)


class DCL(_Loss):
    """Module form of `dcl`.

    Examples
    --------
    >>> DCL(temperature=1.0)(torch.eye(2), torch.eye(2))
    tensor(-0.3069)
    """

    function = staticmethod(dcl)

    def __init__(self, temperature: float = 0.1, sigma: float | None = None, reduction: Reduction = "mean") -> None:
        super().__init__(temperature=temperature, sigma=sigma, reduction=reduction)


class SupCon(_Loss):
    """Module form of `sup_con`.

    Examples
    --------
    >>> SupCon(temperature=1.0)(torch.eye(2).repeat(2, 1), torch.tensor([0, 1, 0, 1]))
    tensor(0.5514)
    """

    function = staticmethod(sup_con)

    def __init__(
        self, temperature: float = 0.1, base_temperature: float | None = None, reduction: Reduction = "mean"
    ) -> None:
        super().__init__(temperature=temperature, base_temperature=base_temperature, reduction=reduction)


class CLIP(nn.Module):
    """`clip` with a learnt temperature: ``exp(log_scale)``, never above `max_scale`.

    Parameters
    ----------
    temperature : float
        To begin with.
    max_scale : float
        Highest factor of the cosines.

    Examples
    --------
    >>> loss = CLIP(temperature=1.0)(torch.eye(3), torch.eye(3))
    >>> loss.requires_grad, round(loss.item(), 4)
    (True, 0.5514)
    """

    def __init__(self, temperature: float = 0.07, max_scale: float = 100.0) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(1 / temperature).log())
        self.max_scale = max_scale

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        """The loss of a batch of pairs (N, D), (N, D)."""
        return clip(image, text, temperature=1 / self.log_scale.exp().clamp(max=self.max_scale))


class SigLIP(nn.Module):
    """`siglip` with learnt scale and bias.

    Examples
    --------
    >>> SigLIP()(torch.eye(2), torch.eye(2)).requires_grad
    True
    """

    def __init__(self, scale: float = 10.0, bias: float = -10.0) -> None:
        super().__init__()
        self.log_scale, self.bias = nn.Parameter(torch.tensor(scale).log()), nn.Parameter(torch.tensor(bias))

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        """The loss of a batch of pairs (N, D), (N, D)."""
        return siglip(image, text, scale=self.log_scale.exp(), bias=self.bias)
