"""What several processes share: rank, gathering, broadcasting. With one process, every function is the identity."""

from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from contralto.errors import UsageError

__all__ = [
    "gather_rows", "gather_with_gradient", "is_main", "mean_weight", "own_places", "rank", "reduce_over_ranks", "world_size",
]  # fmt: skip


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """Number of this process, 0 when there is only one."""
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if is_distributed() else 1


def is_main() -> bool:
    """Whether this process is the one that writes files."""
    return rank() == 0


@torch.no_grad()
def gather_rows(x: Tensor) -> Tensor:
    """The rows of all processes in the order of the global batch, without gradient.

    Samples are dealt to the ranks in turn (`data.dataset.EpochSampler`), so row p of rank r stands at place p * ranks + r.

    Parameters
    ----------
    x : Tensor (N, ...)
        Rows of this process; the number of rows may differ between processes.

    Returns
    -------
    Tensor (sum of N, ...)

    Examples
    --------
    >>> gather_rows(torch.arange(3.0))
    tensor([0., 1., 2.])
    """
    x = x.detach().contiguous()
    if world_size() == 1:
        return x
    counts = [torch.zeros(1, dtype=torch.int64, device=x.device) for _ in range(world_size())]
    dist.all_gather(counts, torch.tensor([x.shape[0]], device=x.device))
    sizes = [int(c) for c in counts]
    padded = x.new_zeros((max(sizes), *x.shape[1:]))
    padded[: x.shape[0]] = x
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    there = torch.arange(max(sizes))[:, None] < torch.tensor(sizes)  # (rows, ranks)
    return torch.stack(parts, 1)[there.to(x.device)]


def gather_with_gradient(x: Tensor, uneven: Literal["pad", "refuse"] = "pad") -> Tensor:
    """As `gather_rows`, but every row takes the gradients of all processes, added.

    So when the loss of the whole batch is the mean over processes of what they compute, the mean over processes of their
    parameters' gradients, which `DistributedDataParallel` takes, is the gradient of that loss. All must take part in the backward
    pass.

    Parameters
    ----------
    x : Tensor (N, ...)
        Rows of this process.
    uneven : {"pad", "refuse"}
        Whether processes may have different numbers of rows.

    Returns
    -------
    Tensor (sum of N, ...)

    Raises
    ------
    UsageError
        On all processes, if numbers of rows differ and `uneven` is "refuse".

    Examples
    --------
    >>> gather_with_gradient(torch.ones(2, requires_grad=True))
    tensor([1., 1.], requires_grad=True)
    """
    if world_size() == 1:
        return x
    if uneven == "refuse":
        sizes = gather_rows(torch.tensor([len(x)], device=x.device)).tolist()
        if len(set(sizes)) > 1:
            raise UsageError(
                f"processes have different numbers of rows, {sizes}: drop the last batch, or let them be padded"
            )
    gathered: Tensor = _Gather.apply(x)
    return gathered


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(own_places(x))
        return gather_rows(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (own,) = ctx.saved_tensors
        grad = grad.contiguous().clone()
        dist.all_reduce(grad)
        return grad[own]


def own_places(x: Tensor) -> Tensor:
    """Where the rows of this process stand among those of all (N,), as `gather_rows` gives them.

    Examples
    --------
    >>> own_places(torch.zeros(3, 8))
    tensor([0, 1, 2])
    """
    owner = torch.full((x.shape[0],), rank(), device=x.device)
    return (gather_rows(owner) == rank()).nonzero().squeeze(1)


def mean_weight(count: Tensor) -> float:
    """What a mean over `count` local rows is multiplied by, so that the mean over ranks is the mean over all rows.

    Examples
    --------
    >>> mean_weight(torch.tensor(3))
    1.0
    """
    if world_size() == 1:
        return 1.0
    total = count.detach().clone()
    dist.all_reduce(total)
    return int(count) * world_size() / max(int(total), 1)


@torch.no_grad()
def reduce_over_ranks(x: Tensor, how: Literal["sum", "max"] = "sum") -> Tensor:
    """The sum or maximum of a tensor of one shape over all processes, without gradient.

    Examples
    --------
    >>> reduce_over_ranks(torch.tensor([1.0, 2.0]))
    tensor([1., 2.])
    """
    if world_size() == 1:
        return x
    reduced = x.detach().clone()
    dist.all_reduce(reduced, dist.ReduceOp.SUM if how == "sum" else dist.ReduceOp.MAX)
    return reduced
