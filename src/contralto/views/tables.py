"""Views of rows of numbers: noise on every cell, and cells left out."""

import numpy as np
import torch
from torch import Tensor

from contralto.errors import UsageError
from contralto.views.batched import uniforms

__all__ = ["draw_rows"]


def draw_rows(
    x: Tensor, *, views: int = 2, noise: float = 0.1, drop: float = 0.0, seed: int, epoch: Tensor, index: Tensor
) -> list[Tensor]:
    """Several views of standardised rows, each a function of (seed, epoch, row, view).

    Parameters
    ----------
    x : Tensor (B, F)
        With mean 0 and deviation 1 in every column.
    views : int
    noise : float
        Standard deviation of what is added to every cell.
    drop : float
        Probability that a cell is replaced by 0, the mean of its column.
    seed : int
    epoch, index : Tensor (B,)

    Returns
    -------
    list of Tensor (B, F)

    Examples
    --------
    >>> x, rows = torch.zeros(3, 4), torch.arange(3)
    >>> one, two = draw_rows(x, seed=0, epoch=torch.zeros(3), index=rows)
    >>> one.shape, bool((one == two).any()), bool(torch.equal(draw_rows(x[1:], seed=0, epoch=0, index=rows[1:])[0], one[1:]))
    (torch.Size([3, 4]), False, True)
    """
    if noise < 0 or not 0 <= drop < 1:
        raise UsageError(f"noise is at least 0 and drop a share in [0, 1), got {noise} and {drop}")
    width = x.shape[1]
    drawn = []
    for view in range(views):
        u = torch.from_numpy(np.clip(uniforms(seed, epoch, index, view, 2 * width), 2**-53, None))
        moved = x + noise * torch.special.ndtri(u[:, :width]).to(x)
        drawn.append(torch.where((u[:, width:] < drop).to(x.device), 0.0, moved))
    return drawn
