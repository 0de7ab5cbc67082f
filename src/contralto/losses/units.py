"""Rows of length one, in few passes over memory."""

from typing import Any

import torch
from torch import Tensor

from contralto.errors import UsageError

__all__ = ["refuse_second_derivative", "unit_rows"]

_SHORTEST = 1e-12
"""As in `torch.nn.functional.normalize`: shorter rows are divided by this."""


def unit_rows(x: Tensor) -> Tensor:
    """Rows (N, D) scaled to length one: `torch.nn.functional.normalize` with fewer steps each way, once differentiable.

    Examples
    --------
    >>> unit_rows(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    tensor([[0.6000, 0.8000],
            [0.0000, 0.0000]])
    """
    rows: Tensor = _Unit.apply(x)
    return rows


class _Unit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp_min_(_SHORTEST)
        unit = x / length
        ctx.save_for_backward(unit, length)
        return unit

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        refuse_second_derivative('needs the dense form: contrast(..., form="dense")')
        unit, length = ctx.saved_tensors
        along = torch.linalg.vecdot(grad, unit).unsqueeze(1)
        return torch.addcmul(grad, unit, along, value=-1).div_(length)


def refuse_second_derivative(instead: str) -> None:
    """Raise in a backward pass that is to be differentiated again."""
    if torch.is_grad_enabled():
        raise UsageError(f"a second derivative {instead}")
