"""Rotation of pictures in a batch, each by its own angle."""

import torch
from torch import Tensor
from torch.nn import functional as F

from contralto.errors import UsageError

__all__ = ["rotate"]


def rotate(x: Tensor, degrees: Tensor) -> Tensor:
    """Pictures turned around their middle, bilinear; what comes in from beyond the border is 0.

    Parameters
    ----------
    x : Tensor (B, C, H, W)
    degrees : Tensor (B,)
        Counter-clockwise as seen.

    Examples
    --------
    >>> x = torch.arange(4.0).view(1, 1, 2, 2)
    >>> rotate(x, torch.tensor([90.0])).round().flatten().tolist()
    [1.0, 3.0, 0.0, 2.0]
    """
    if x.ndim != 4 or degrees.shape != x.shape[:1]:
        raise UsageError(
            f"rotate takes pictures (B, C, H, W) and an angle for each, got {tuple(x.shape)}, {tuple(degrees.shape)}"
        )
    angle = torch.deg2rad(degrees.to(x))
    ratio = x.shape[2] / x.shape[3]  # coordinates go from -1 to 1 along both sides, whatever their lengths
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    theta = torch.stack([torch.stack([cos, -sin * ratio, zero], 1), torch.stack([sin / ratio, cos, zero], 1)], 1)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, align_corners=False)
