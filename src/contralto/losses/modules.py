"""The losses of `losses.pairs` as modules that keep their settings, and a temperature that is learnt."""

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from contralto.errors import UsageError
from contralto.losses.contrast import Gather, Reduction
from contralto.losses.pairs import clip, dcl, info_nce, nt_xent, siglip, sup_con

__all__ = ["CLIP", "DCL", "InfoNCE", "NTXent", "SigLIP", "SupCon", "Temperature"]


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

    def __init__(self, temperature: float = 0.1, reduction: Reduction = "mean", gather: Gather = "none") -> None:
        super().__init__(temperature=temperature, reduction=reduction, gather=gather)


class NTXent(_Loss):
    """Module form of `nt_xent`.

    Examples
    --------
    >>> NTXent(temperature=1.0)(torch.eye(2), torch.eye(2))
    tensor(0.5514)
    """

    function = staticmethod(nt_xent)

    def __init__(self, temperature: float = 0.1, reduction: Reduction = "mean", gather: Gather = "none") -> None:
        super().__init__(temperature=temperature, reduction=reduction, gather=gather)


class DCL(_Loss):
    """Module form of `dcl`.

    Examples
    --------
    >>> DCL(temperature=1.0)(torch.eye(2), torch.eye(2))
    tensor(-0.3069)
    """

    function = staticmethod(dcl)

    def __init__(
        self,
        temperature: float = 0.1,
        sigma: float | None = None,
        reduction: Reduction = "mean",
        gather: Gather = "none",
    ) -> None:
        super().__init__(temperature=temperature, sigma=sigma, reduction=reduction, gather=gather)


class SupCon(_Loss):
    """Module form of `sup_con`.

    Examples
    --------
    >>> SupCon(temperature=1.0)(torch.eye(2).repeat(2, 1), torch.tensor([0, 1, 0, 1]))
    tensor(0.5514)
    """

    function = staticmethod(sup_con)

    def __init__(
        self,
        temperature: float = 0.1,
        base_temperature: float | None = None,
        reduction: Reduction = "mean",
        gather: Gather = "none",
    ) -> None:
        super().__init__(temperature=temperature, base_temperature=base_temperature, reduction=reduction)


class Temperature(nn.Module):
    """A temperature that is learnt; calling it gives the temperature of now.

    Parameters
    ----------
    temperature : float
        To begin with.
    by : {"log_scale", "value"}
        What is learnt: the logarithm of 1 / temperature, as in CLIP, or the temperature itself.
    lowest, highest : float
        Bounds. Whatever is beyond them learns only to come back.

    Examples
    --------
    >>> temperature = Temperature(0.07)
    >>> loss = InfoNCE()(torch.eye(3), torch.eye(3), temperature=temperature())
    >>> loss.backward()
    >>> temperature.parameter.grad is not None
    True
    """

    def __init__(
        self,
        temperature: float = 0.07,
        by: Literal["log_scale", "value"] = "log_scale",
        lowest: float = 0.01,
        highest: float = 10.0,
    ) -> None:
        super().__init__()
        if by not in ("log_scale", "value"):
            raise UsageError(f'by must be "log_scale" or "value", got {by!r}')
        if not 0 < lowest <= temperature <= highest:
            raise UsageError(f"temperature must be between {lowest} and {highest}, got {temperature}")
        start = temperature if by == "value" else -math.log(temperature)
        self.parameter = nn.Parameter(torch.tensor(start))
        self.by, self.lowest, self.highest = by, lowest, highest

    def forward(self) -> Tensor:
        """The temperature ()."""
        if self.by == "value":
            value: Tensor = _Within.apply(self.parameter, self.lowest, self.highest)
            return value
        log_scale: Tensor = _Within.apply(self.parameter, -math.log(self.highest), -math.log(self.lowest))
        return (-log_scale).exp()

    def extra_repr(self) -> str:
        """Parametrisation and bounds."""
        return f"by={self.by}, lowest={self.lowest}, highest={self.highest}"


class _Within(torch.autograd.Function):
    """Clamps, and lets a step of descent pass that leads back inside: with torch.clamp, what is beyond once stays there."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, lowest: float, highest: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.bounds = lowest, highest
        return x.clamp(lowest, highest)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (x,), (lowest, highest) = ctx.saved_tensors, ctx.bounds
        outwards = ((x < lowest) & (grad > 0)) | ((x > highest) & (grad < 0))
        return grad.masked_fill(outwards, 0.0), None, None


class CLIP(nn.Module):
    """`clip` with a learnt temperature, by its clamped logarithm.

    Parameters
    ----------
    temperature : float
        To begin with.
    max_scale : float
        Highest factor of the cosines.
    gather
        See `contrast`.

    Examples
    --------
    >>> loss = CLIP(temperature=1.0)(torch.eye(3), torch.eye(3))
    >>> loss.requires_grad, round(loss.item(), 4)
    (True, 0.5514)
    """

    def __init__(self, temperature: float = 0.07, max_scale: float = 100.0, gather: Gather = "none") -> None:
        super().__init__()
        self.temperature = Temperature(temperature, lowest=1 / max_scale)
        self.gather = gather

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        """The loss of a batch of pairs (N, D), (N, D)."""
        return clip(image, text, temperature=self.temperature(), gather=self.gather)


class SigLIP(nn.Module):
    """`siglip` with learnt scale and bias.

    Examples
    --------
    >>> SigLIP()(torch.eye(2), torch.eye(2)).requires_grad
    True
    """

    def __init__(self, scale: float = 10.0, bias: float = -10.0, gather: Gather = "none") -> None:
        super().__init__()
        self.log_scale, self.bias = nn.Parameter(torch.tensor(scale).log()), nn.Parameter(torch.tensor(bias))
        self.gather = gather

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        """The loss of a batch of pairs (N, D), (N, D)."""
        return siglip(image, text, scale=self.log_scale.exp(), bias=self.bias, gather=self.gather)
