"""A memory bank: one feature per sample of the data, an average of what the encoder made of it."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from contralto.errors import UsageError
from contralto.memory.per_sample import check_index, earliest

__all__ = ["MemoryBank"]


class MemoryBank(nn.Module):
    """Unit rows, moved towards new features and scaled to length one again (Wu et al. 2018). Part of the state dict.

    Parameters
    ----------
    size : int
        Number of samples.
    dim : int
    rate : float
        Share of the old row that an update keeps.
    seed : int
        Rows begin at random, drawn from this seed.

    Examples
    --------
    >>> bank = MemoryBank(4, 2)
    >>> old = bank.features[1].clone()
    >>> bank.update(torch.tensor([1]), torch.tensor([[0.0, 3.0]]))
    >>> expected = F.normalize(0.5 * old + 0.5 * torch.tensor([0.0, 1.0]), dim=0)
    >>> torch.allclose(bank.features[1], expected)
    True
    """

    features: Tensor

    def __init__(self, size: int, dim: int, *, rate: float = 0.5, seed: int = 0) -> None:
        super().__init__()
        if size < 1:
            raise UsageError(f"num_samples must be the number of training samples, at least 1; got {size}")
        if not 0 <= rate < 1:
            raise UsageError(f"rate must be in [0, 1), got {rate}")
        self.rate = rate
        generator = torch.Generator().manual_seed(seed)
        self.register_buffer("features", F.normalize(torch.randn(size, dim, generator=generator), dim=1))

    def read(self, index: Tensor) -> Tensor:
        """Copies (B, dim) of the rows of the samples `index` (B,)."""
        check_index(index, len(self.features))
        return self.features[index]

    @torch.no_grad()
    def update(self, index: Tensor, features: Tensor) -> None:
        """Move rows of samples `index` (B,) towards `features` (B, dim); of a sample that is there twice, the first counts."""
        check_index(index, len(self.features))
        new = F.normalize(features.to(self.features), dim=1)
        new = F.normalize(self.rate * self.features[index] + (1 - self.rate) * new, dim=1)
        self.features[index] = new[earliest(index)]
