"""Heads: what sits on an encoder."""

import warnings
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from contralto.errors import UsageError

__all__ = [
    "HeadKind", "Normalize", "Relation", "Reweight", "SymmetricReLU", "dino_head", "identity_mlp", "mlp", "projection_head",
]  # fmt: skip

HeadKind = Literal["none", "mlp", "mlp3", "identity_init", "fixed"]


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


class SymmetricReLU(nn.Module):
    """A soft threshold of learnt width: ``relu(x - b) - relu(-x - b)``, the identity while b = 0.

    Parameters
    ----------
    threshold : float
        b to begin with, one number for all features.

    Examples
    --------
    >>> SymmetricReLU(1.0)(torch.tensor([-3.0, -0.5, 0.5, 3.0])).tolist()
    [-2.0, 0.0, 0.0, 2.0]
    """

    def __init__(self, threshold: float = 0.0) -> None:
        super().__init__()
        self.threshold = nn.Parameter(torch.tensor(float(threshold)))

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., D)."""
        return (x - self.threshold).relu() - (-x - self.threshold).relu()


class Reweight(nn.Module):
    """A head without weights: feature i is scaled by ``kappa ** -i``, i = 0 .. D - 1 (Xue et al. 2024).

    Training puts what the loss needs into the first features, and the last keep what it would destroy. What is used afterwards is
    its *input*.

    Parameters
    ----------
    dim : int
        D.
    kappa : float
        Above 1. With ``kappa ** -D`` below about 1e-10, the last features learn nothing.
    floor : float
        The smallest factor.

    Examples
    --------
    >>> Reweight(3, kappa=2.0)(torch.ones(1, 3))
    tensor([[1.0000, 0.5000, 0.2500]])
    """

    weight: Tensor

    def __init__(self, dim: int, kappa: float = 1.05, *, floor: float = 0.0) -> None:
        super().__init__()
        if not kappa > 0 or not 0 <= floor <= 1:
            raise UsageError(f"kappa must be above 0 and floor in [0, 1], got {kappa} and {floor}")
        power = -torch.arange(dim, dtype=torch.float64)
        weight = (torch.tensor(float(kappa), dtype=torch.float64) ** power).clamp_min(floor)
        self.register_buffer("weight", weight.to(torch.get_default_dtype()), persistent=False)
        self.kappa = kappa

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., D)."""
        return x * self.weight

    def extra_repr(self) -> str:
        """The one number."""
        return f"dim={len(self.weight)}, kappa={self.kappa}"


def identity_mlp(dim: int) -> nn.Sequential:
    """Two layers with a symmetric ReLU between them that are the identity to begin with: nothing disturbs a trained encoder.

    Examples
    --------
    >>> x = torch.randn(2, 4)
    >>> torch.equal(identity_mlp(4)(x), x)
    True
    """
    layers = nn.Linear(dim, dim), SymmetricReLU(), nn.Linear(dim, dim)
    for layer in layers[::2]:
        nn.init.eye_(layer.weight)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers)


def dino_head(dim: int, hidden: int = 2048, out: int = 256, *, last: int = 0) -> nn.Sequential:
    """DINO's head (Caron et al. 2021): three linear layers with GELU between them, weights drawn with deviation 0.02.

    Parameters
    ----------
    dim, hidden, out : int
        Widths of input, of the two layers in between, and of the third.
    last : int
        Width of a further layer without bias, on unit rows and with weight rows of length one: its outputs are cosines. 0 = none.

    Examples
    --------
    >>> dino_head(8, 16, 4)(torch.zeros(2, 8)).shape, dino_head(8, 16, 4, last=6)(torch.randn(2, 8)).abs().max() <= 1
    (torch.Size([2, 4]), tensor(True))
    """
    layers: list[nn.Module] = [
        nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, out),
    ]  # fmt: skip
    for layer in layers[::2]:
        assert isinstance(layer, nn.Linear)
        nn.init.trunc_normal_(layer.weight, std=0.02)
        nn.init.zeros_(layer.bias)
    if last:
        unit = nn.utils.parametrizations.weight_norm(nn.Linear(out, last, bias=False))
        gain = unit.parametrizations["weight"].original0
        assert isinstance(gain, nn.Parameter)
        nn.init.ones_(gain)
        gain.requires_grad_(False)
        layers += [Normalize(), unit]
    return nn.Sequential(*layers)


def projection_head(
    kind: HeadKind, dim: int, *, hidden: int = 2048, out: int | None = None, kappa: float = 1.05, floor: float = 0.0
) -> nn.Module:
    """A head by its name; one that is used in training only.

    Parameters
    ----------
    kind : {"none", "mlp", "mlp3", "identity_init", "fixed"}
        No head; two layers; three layers; `identity_mlp`; `Reweight`.
    dim : int
        Features of the encoder.
    hidden : int
        Width of the layers in between.
    out : int, optional
        Output width of "mlp" and "mlp3"; default: `dim`.
    kappa, floor : float
        Of "fixed".

    Raises
    ------
    UsageError
        If there is no such head, or it cannot have that width.

    Examples
    --------
    >>> projection_head("fixed", 128)
    Reweight(dim=128, kappa=1.05)
    """
    if kind in ("mlp", "mlp3"):
        return mlp([dim, *[hidden] * (1 if kind == "mlp" else 2), out or dim])
    if out not in (None, dim):
        raise UsageError(f"a head {kind!r} keeps the width of the features ({dim}), it cannot have {out}")
    if kind == "none":
        return nn.Identity()
    if kind == "identity_init":
        return identity_mlp(dim)
    if kind != "fixed":
        raise UsageError(f"head must be none, mlp, mlp3, identity_init or fixed; got {kind!r}")
    if max(kappa**-dim, floor) < 1e-12:
        warnings.warn(
            f"with kappa={kappa} the last of {dim} features are scaled by less than 1e-12 and learn nothing; take kappa near "
            f"{10 ** (6 / dim):.3f}, or set a floor",
            stacklevel=2,
        )
    return Reweight(dim, kappa, floor=floor)
