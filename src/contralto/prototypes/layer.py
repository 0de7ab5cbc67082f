"""Learnt prototypes: a linear layer without bias, whose rows are centres."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from contralto.losses.units import full_precision

__all__ = ["CosineLayer", "PrototypeLayer"]


class PrototypeLayer(nn.Module):
    """Similarities to K learnt prototypes (SwAV, arXiv 2006.09882).

    Call `normalize` before every forward pass, so that the scores of unit rows are cosines; between, an optimiser may let the
    lengths drift. To freeze the prototypes, drop their gradient after the backward pass (`freeze`): with none at all, neither
    momentum nor weight decay moves them, and all processes still agree on which parameters take part.

    Parameters
    ----------
    dim, count : int
        D and K.

    Examples
    --------
    >>> layer = PrototypeLayer(4, 10)
    >>> layer.normalize()
    >>> layer(F.normalize(torch.randn(3, 4), dim=1)).abs().amax() <= 1.000001
    tensor(True)
    """

    def __init__(self, dim: int, count: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(nn.Linear(dim, count, bias=False).weight.detach().clone())

    @torch.no_grad()
    def normalize(self) -> None:
        """Scale the prototypes to length one, in place."""
        self.weight.copy_(F.normalize(self.weight, dim=1))

    def freeze(self) -> None:
        """Drop the gradient."""
        self.weight.grad = None

    def forward(self, z: Tensor) -> Tensor:
        """Embeddings (..., D) to scores (..., K)."""
        return z @ self.weight.T


class CosineLayer(nn.Module):
    """Cosines to K learnt prototypes, whatever the lengths of rows and weights: weight normalisation with a gain of one.

    The length of a weight row changes no score; it only grows or shrinks under the optimiser, and is never reset.

    Parameters
    ----------
    dim, count : int
        D and K.

    Examples
    --------
    >>> layer = CosineLayer(4, 10)
    >>> layer(torch.randn(3, 4)).abs().amax() <= 1.000001
    tensor(True)
    """

    def __init__(self, dim: int, count: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(nn.Linear(dim, count, bias=False).weight.detach().clone())

    def unit(self) -> Tensor:
        """The prototypes (K, D), rows of length one; they carry gradient."""
        return F.normalize(self.weight, dim=1)

    def forward(self, z: Tensor) -> Tensor:
        """Embeddings (..., D) to cosines (..., K), in single precision at least: they are divided by small temperatures."""
        dtype = torch.promote_types(z.dtype, self.weight.dtype)
        with full_precision(z):
            return F.normalize(z.to(dtype), dim=-1) @ self.unit().to(dtype).T
