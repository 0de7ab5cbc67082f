"""Optimiser and schedule of large-batch pretraining: LARS in its two common forms, warm-up and cosine."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from contralto.errors import UsageError

__all__ = ["LARS", "warmup_cosine"]


class LARS(torch.optim.Optimizer):
    """SGD with momentum whose step is scaled by the norms of weight and gradient (You et al. 2017), without dampening.

    Two forms are in use. `larc=False` (SimCLR, BYOL, PixPro): ``g <- g + wd w``, then ``g <- g * trust |w| / (|g| + eps)``.
    `larc=True` (SwAV's): ``g <- (g + wd w) * trust |w| / (|g| + wd |w| + eps)``, where a tensor with norm 0 of weight or
    gradient is neither scaled nor decayed. The learning rate is outside of the ratio in both.

    Parameters
    ----------
    params : iterable of Tensor or of groups
        Groups with ``adapt=False`` get plain SGD; usual for biases and norms (see `EncoderSystem.configure_optimizers`).
    lr, momentum, weight_decay : float
    trust : float
    eps : float
    larc : bool
    clip : bool
        The ratio becomes ``min(ratio / lr, 1)``: no step is longer than one of SGD with the same rate (solo-learn's form).

    Examples
    --------
    >>> w = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    >>> w.grad = torch.tensor([0.0, 2.0])
    >>> LARS([w], lr=1.0, momentum=0.0, trust=0.1).step()
    >>> w.data
    tensor([3.0000, 3.5000])
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        *,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust: float = 1e-3,
        eps: float = 1e-8,
        larc: bool = False,
        clip: bool = False,
    ) -> None:
        if lr < 0 or not 0 <= momentum < 1 or weight_decay < 0 or trust <= 0:
            raise UsageError(
                f"lr and weight_decay must be at least 0, momentum in [0, 1), trust above 0; got lr={lr}, "
                f"momentum={momentum}, weight_decay={weight_decay}, trust={trust}"
            )
        defaults = {
            "lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust, "eps": eps, "larc": larc,
            "clip": clip, "adapt": True,
        }  # fmt: skip
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step; returns what `closure` does."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            weights: list[Tensor] = [p for p in group["params"] if p.grad is not None]
            if not weights:
                continue
            gradients = self._scaled(weights, [p.grad for p in weights], group)  # type: ignore[misc]
            if group["momentum"]:
                moments = [self.state[p].setdefault("momentum", torch.zeros_like(p)) for p in weights]
                torch._foreach_mul_(moments, group["momentum"])
                torch._foreach_add_(moments, gradients)
                gradients = moments
            torch._foreach_add_(weights, gradients, alpha=-group["lr"])
        return loss

    def _scaled(self, weights: list[Tensor], gradients: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
        decay, eps = group["weight_decay"], group["eps"]
        decayed = list(torch._foreach_add(gradients, weights, alpha=decay)) if decay else gradients
        if not group["adapt"]:
            return decayed
        of_weight = torch.stack(torch._foreach_norm(weights))
        if group["larc"]:
            of_gradient = torch.stack(torch._foreach_norm(gradients))
            ratio = group["trust"] * of_weight / (of_gradient + decay * of_weight + eps)
        else:
            of_gradient = torch.stack(torch._foreach_norm(decayed))
            ratio = group["trust"] * of_weight / (of_gradient + eps)
        if group["clip"]:
            ratio = (ratio / max(group["lr"], eps)).clamp(max=1)
        both = (of_weight > 0) & (of_gradient > 0)
        ratio = torch.where(both, ratio, torch.ones_like(ratio))
        scaled = torch._foreach_mul(decayed, list(ratio.unbind()))
        if not group["larc"]:
            return list(scaled)
        return [torch.where(b, s, g) for b, s, g in zip(both.unbind(), scaled, gradients, strict=True)]


def warmup_cosine(step: int, *, total: int, warmup: int, peak: float, start: float = 0.0, final: float = 0.0) -> float:
    """Learning rate of a step: linear from `start` to `peak` (both reached), then half a cosine down to `final`.

    Parameters
    ----------
    step : int
        From 0.
    total, warmup : int
        Steps in all, and of the warm-up.
    peak, start, final : float

    Examples
    --------
    >>> [round(warmup_cosine(s, total=6, warmup=2, peak=1.0), 3) for s in range(7)]
    [0.0, 1.0, 1.0, 0.854, 0.5, 0.146, 0.0]
    """
    if step < warmup:
        return peak if warmup == 1 else start + (peak - start) * step / (warmup - 1)
    rest = max(total - warmup, 1)
    return final + (peak - final) / 2 * (1 + math.cos(math.pi * min(step - warmup, rest) / rest))
