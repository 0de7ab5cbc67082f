"""A first-in first-out memory of keys that outlives a step."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from contralto.errors import UsageError

__all__ = ["Queue"]


class Queue(nn.Module):
    """The last keys of the momentum encoder (MoCo; CAPro 5.3). Part of the state dict.

    Parameters
    ----------
    size : int
        Number of keys Q.
    dim : int
        Width of a key.
    seed : int
        The queue starts with random unit rows drawn from this seed.

    Examples
    --------
    >>> queue = Queue(4, 2)
    >>> queue.enqueue(torch.tensor([[0.0, 2.0]]))
    >>> queue.read()[0]
    tensor([0., 1.])
    """

    keys: Tensor
    pointer: Tensor

    def __init__(self, size: int, dim: int, *, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.register_buffer("keys", F.normalize(torch.randn(size, dim, generator=generator), dim=1))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))

    def read(self) -> Tensor:
        """A copy of all keys (Q, D), unit rows, oldest first only until the first wrap."""
        return self.keys.clone()

    @torch.no_grad()
    def enqueue(self, keys: Tensor) -> None:
        """Write keys (N, D) over the oldest; a batch that would run past the end is written at the last places instead."""
        size, n = self.keys.shape[0], keys.shape[0]
        if n > size:
            raise UsageError(
                f"a queue of {size} keys cannot take a batch of {n}: enlarge queue_size or take smaller batches"
            )
        start = min(int(self.pointer), size - n)
        self.keys[start : start + n] = keys.to(self.keys.dtype)
        self.keys.copy_(F.normalize(self.keys, dim=1))
        self.pointer.fill_((start + n) % size)
