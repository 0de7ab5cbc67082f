"""Momentum (EMA) copies of a network, with one convention: ``theta_k = decay * theta_k + (1 - decay) * theta_q``."""

import copy

import torch
from torch import nn

__all__ = ["momentum_copy", "momentum_update"]


def momentum_copy(module: nn.Module) -> nn.Module:
    """A copy that takes no gradient.

    Examples
    --------
    >>> any(p.requires_grad for p in momentum_copy(nn.Linear(2, 2)).parameters())
    False
    """
    return copy.deepcopy(module).requires_grad_(False)


@torch.no_grad()
def momentum_update(target: nn.Module, source: nn.Module, decay: float) -> None:
    """Move the parameters of `target` towards those of `source`; buffers follow their own forward passes.

    Examples
    --------
    >>> a, b = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    >>> _ = nn.init.constant_(a.weight, 1.0), nn.init.constant_(b.weight, 0.0)
    >>> momentum_update(a, b, 0.9)
    >>> a.weight.item()
    0.899999...
    """
    targets: list[torch.Tensor] = list(target.parameters())
    sources = [p.detach() for p in source.parameters()]
    if targets:
        torch._foreach_mul_(targets, decay)
        torch._foreach_add_(targets, sources, alpha=1 - decay)
