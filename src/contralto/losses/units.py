"""What every form of the engine begins with: rows of length one in full precision."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from contralto.errors import UsageError

__all__ = ["full_precision", "refuse_second_derivative", "unit_rows"]

_SHORTEST = 1e-12
"""As in `torch.nn.functional.normalize`: shorter rows are divided by this."""


def unit_rows(*rows: Tensor) -> tuple[Tensor, ...]:
    """Every matrix (N, D) with its rows scaled to length one, in the widest of their types, at least single precision.

    The values and gradients of `torch.nn.functional.normalize` in fewer steps, once differentiable.

    Examples
    --------
    >>> unit_rows(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    (tensor([[0.6000, 0.8000],
            [0.0000, 0.0000]]),)
    """
    dtype = torch.float32
    for x in rows:
        dtype = torch.promote_types(dtype, x.dtype)
    units: tuple[Tensor, ...] = _Unit.apply(*(x.to(dtype) for x in rows))
    return units


class _Unit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *rows: Tensor) -> tuple[Tensor, ...]:
        lengths = [torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp_min_(_SHORTEST) for x in rows]
        units = tuple(x / length for x, length in zip(rows, lengths, strict=True))
        ctx.save_for_backward(*units, *lengths)
        return units

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative('needs the dense form: contrast(..., form="dense")')
        n = len(grads)
        units, lengths = ctx.saved_tensors[:n], ctx.saved_tensors[n:]
        return tuple(
            _across(grad, unit).div_(length) if wants else None
            for grad, unit, length, wants in zip(grads, units, lengths, ctx.needs_input_grad, strict=True)
        )


def _across(grad: Tensor, unit: Tensor) -> Tensor:
    """What of every row of `grad` is at right angles to that of `unit`."""
    along = unit * torch.linalg.vecdot(grad, unit).unsqueeze(1)
    return torch.sub(grad, along, out=along)


def full_precision(x: Tensor) -> AbstractContextManager[Any]:
    """Where nothing is cast to half precision behind one's back."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def refuse_second_derivative(instead: str) -> None:
    """Raise in a backward pass that is to be differentiated again."""
    if torch.is_grad_enabled():
        raise UsageError(f"a second derivative {instead}")
