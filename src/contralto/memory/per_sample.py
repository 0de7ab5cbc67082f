"""Numbers that are kept for every sample of a data set, by its stable index."""

import torch
from torch import Tensor, nn

from contralto.errors import UsageError

__all__ = ["PerSample", "check_index", "earliest"]


def check_index(index: Tensor, size: int) -> None:
    """Refuse what does not name samples of a data set of this size.

    Examples
    --------
    >>> check_index(torch.tensor([3]), 3)
    Traceback (most recent call last):
    contralto.errors.UsageError: index 3 is not among the 3 samples: set num_samples to their number
    """
    if index.ndim != 1 or index.is_floating_point():
        raise UsageError(f"index must be integers (B,), got {index.dtype} {tuple(index.shape)}")
    wrong = index[(index < 0) | (index >= size)]
    if len(wrong):
        raise UsageError(f"index {int(wrong[0])} is not among the {size} samples: set num_samples to their number")


def earliest(index: Tensor) -> Tensor:
    """Place (B,) at which every sample of a batch stands first: what is written twice by way of it is the same twice.

    Examples
    --------
    >>> earliest(torch.tensor([7, 5, 7, 5]))
    tensor([0, 1, 0, 1])
    """
    same = index.unsqueeze(1) == index
    return torch.argmax(same * torch.arange(len(index), 0, -1, device=index.device), 1)


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
        check_index(index, self.size)
        return {name: self.get_buffer(name)[index] for name in self.names}

    @torch.no_grad()
    def write(self, index: Tensor, **values: Tensor) -> None:
        """Keep new values (B,) of the samples `index` (B,); of a sample that is there twice, the first value is kept."""
        check_index(index, self.size)
        first = earliest(index)
        for name, value in values.items():
            buffer = self.get_buffer(name)
            buffer[index] = value[first].to(buffer)
