"""Heads: what sits on an encoder."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from contralto.errors import UsageError

__all__ = ["Normalize", "Relation", "mlp"]


class Normalize(nn.Module):
    """Scale the last dimension, or another one, to length one."""

    def __init__(self, dim: int = -1) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to unit rows (..., D)."""
        return F.normalize(x, dim=self.dim)


def mlp(
    sizes: Sequence[int],
    *,
    normalize: bool = False,
    norm: Literal["none", "batch"] = "none",
    last_norm: Literal["none", "batch", "plain", "layer"] = "none",
    kind: Literal["linear", "conv"] = "linear",
) -> nn.Sequential:
    """Linear layers with ReLU between them.

    Parameters
    ----------
    sizes : sequence of int
        Widths from input to output, at least two.
    normalize : bool
        End with unit rows.
    norm : {"none", "batch"}
        Batch norm before every ReLU; the layer before it then has no bias.
    last_norm : {"none", "batch", "plain", "layer"}
        After the last layer, which then has no bias: batch norm, learnt or "plain" (without scale and shift), or layer norm.
    kind : {"linear", "conv"}
        Rows (N, D), or the cells of maps (N, D, h, w): then layers are 1 x 1 convolutions and channels are what is normalised.

    Examples
    --------
    >>> mlp([8, 16, 4], normalize=True)
    Sequential(
      (0): Linear(in_features=8, out_features=16, bias=True)
      (1): ReLU()
      (2): Linear(in_features=16, out_features=4, bias=True)
      (3): Normalize()
    )
    """
    if len(sizes) < 2:
        raise UsageError(f"sizes must name input and output width at least, got {list(sizes)}")
    if kind == "conv" and last_norm == "layer":
        raise UsageError('last_norm="layer" is for rows, not for kind="conv"')
    layers: list[nn.Module] = []
    for width_in, width_out in pairwise(sizes[:-1]):
        layers.append(_layer(kind, width_in, width_out, bias=norm == "none"))
        if norm == "batch":
            layers.append(_batch_norm(kind, width_out))
        layers.append(nn.ReLU())
    layers.append(_layer(kind, sizes[-2], sizes[-1], bias=last_norm == "none"))
    if last_norm == "layer":
        layers.append(nn.LayerNorm(sizes[-1]))
    elif last_norm != "none":
        layers.append(_batch_norm(kind, sizes[-1], affine=last_norm == "batch"))
    if normalize:
        layers.append(Normalize(1 if kind == "conv" else -1))
    return nn.Sequential(*layers)


def _layer(kind: str, width_in: int, width_out: int, *, bias: bool) -> nn.Module:
    if kind == "conv":
        return nn.Conv2d(width_in, width_out, 1, bias=bias)
    return nn.Linear(width_in, width_out, bias=bias)


def _batch_norm(kind: str, width: int, *, affine: bool = True) -> nn.Module:
    return nn.BatchNorm2d(width, affine=affine) if kind == "conv" else nn.BatchNorm1d(width, affine=affine)


class Relation(nn.Module):
    """A learnt similarity: two bias-free layers on the pair [sample; prototype] (FoPro 2).

    The first layer is applied to samples and prototypes apart and the results are added, so that the (N, C, 2D) pairs are never
    made.

    Parameters
    ----------
    dim : int
        D, width of samples and prototypes.
    hidden : int

    Examples
    --------
    >>> import torch
    >>> Relation(4)(torch.zeros(2, 4), torch.zeros(3, 4)).shape
    torch.Size([2, 3])
    """

    def __init__(self, dim: int, hidden: int = 128) -> None:
        super().__init__()
        self.pair = nn.Linear(2 * dim, hidden, bias=False)
        self.out = nn.Linear(hidden, 1, bias=False)

    def forward(self, samples: Tensor, prototypes: Tensor) -> Tensor:
        """Logits (N, C) of samples (N, D) against prototypes (C, D)."""
        of_sample, of_prototype = self.pair.weight.chunk(2, dim=1)
        hidden = (samples @ of_sample.T).unsqueeze(1) + (prototypes @ of_prototype.T).unsqueeze(0)
        logits: Tensor = self.out(hidden.relu()).squeeze(2)
        return logits
