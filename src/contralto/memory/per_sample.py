"""Numbers that are kept for every sample of a data set, by its stable index."""

import torch
from torch import Tensor, nn

from contralto.errors import UsageError

__all__ = ["PerSample"]


class PerSample(nn.Module):
    """One or several numbers per sample, part of the state dict.

    Parameters
    ----------
    size : int
        Number of samples.
    **start : float or bool
        Names of what is kept, with the value to begin with; attributes of that name are tensors (size,).

    Examples
    --------
    >>> memory = PerSample(3, temperature=0.1, seen=False)
    >>> memory.write(torch.tensor([2, 2]), temperature=torch.tensor([0.5, 0.7]))
    >>> memory.read(torch.tensor([1, 2]))
    {'temperature': tensor([0.1000, 0.5000]), 'seen': tensor([False, False])}
    """

    def __init__(self, size: int, **start: float | bool) -> None:
        super().__init__()
        if size < 1:
            raise UsageError(f"num_samples must be the number of training samples, at least 1; got {size}")
        self.size, self.names = size, tuple(start)
        for name, value in start.items():
            self.register_buffer(
                name, torch.full((size,), value, dtype=torch.bool if isinstance(value, bool) else None)
            )

    def read(self, index: Tensor) -> dict[str, Tensor]:
        """Copies of what is kept of the samples `index` (B,)."""
        self._check(index)
        return {name: self.get_buffer(name)[index] for name in self.names}

    @torch.no_grad()
    def write(self, index: Tensor, **values: Tensor) -> None:
        """Keep new values (B,) of the samples `index` (B,); of a sample that is there twice, the first value is kept."""
        self._check(index)
        same = index.unsqueeze(1) == index
        earliest = (same * torch.arange(len(index), 0, -1, device=index.device)).argmax(1)
        for name, value in values.items():
            buffer = self.get_buffer(name)
            buffer[index] = value[earliest].to(buffer)

    def _check(self, index: Tensor) -> None:
        if index.ndim != 1 or index.is_floating_point():
            raise UsageError(f"index must be integers (B,), got {index.dtype} {tuple(index.shape)}")
        if len(index) and not bool(((index >= 0) & (index < self.size)).all()):
            wrong = index[(index < 0) | (index >= self.size)][0]
            raise UsageError(
                f"index {int(wrong)} is not among the {self.size} samples: set num_samples to their number"
            )
