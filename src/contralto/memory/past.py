"""Past embeddings of views, with their fill level: what SwAV adds to small batches."""

import torch
from torch import Tensor, nn

from contralto.distributed import gather_rows, rank, world_size
from contralto.errors import UsageError

__all__ = ["PastViews"]


class PastViews(nn.Module):
    """The last embeddings of each of some views, first in first out, newest first. Part of the state dict.

    Every process holds the rows of all processes, in the order of the global batch, and reads its share of them: a checkpoint of
    one process is complete, and may go on with another number of processes.

    Parameters
    ----------
    views : int
        A, views that are kept apart.
    size : int
        Rows per view, over all processes.
    dim : int

    Examples
    --------
    >>> past = PastViews(2, 4, 3)
    >>> past.enqueue(torch.ones(2, 2, 3))
    >>> past.read() is None
    True
    >>> past.enqueue(torch.zeros(2, 2, 3))
    >>> past.read()[0, :, 0]
    tensor([0., 0., 1., 1.])
    """

    rows: Tensor
    filled: Tensor

    def __init__(self, views: int, size: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("rows", torch.zeros(views, size, dim))
        self.register_buffer("filled", torch.zeros((), dtype=torch.int64))

    @property
    def is_full(self) -> bool:
        """Whether every place has been written."""
        return int(self.filled) == self.rows.shape[1]

    def read(self) -> Tensor | None:
        """A copy of this process's share (A, size / processes, D), or None while it is filling."""
        return self.rows[:, rank() :: world_size()].clone() if self.is_full else None

    @torch.no_grad()
    def enqueue(self, z: Tensor) -> None:
        """Put the embeddings (A, B, D) of a batch in front; the oldest go."""
        size = self.rows.shape[1]
        fresh = gather_rows(z.transpose(0, 1)).transpose(0, 1).to(self.rows.dtype)
        n = fresh.shape[1]
        if n > size:
            raise UsageError(
                f"a queue of {size} embeddings cannot take a batch of {n}: enlarge it or take smaller batches"
            )
        self.rows.copy_(torch.cat([fresh, self.rows[:, : size - n]], 1))
        self.filled.copy_((self.filled + n).clamp(max=size))
