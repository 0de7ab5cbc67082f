"""Views of different sizes through one network."""

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor, nn

from contralto.errors import UsageError

__all__ = ["forward_by_size"]


def forward_by_size(encoder: nn.Module, views: Sequence[Tensor]) -> Tensor:
    """Features of all views; neighbouring views of one size go through the encoder together, as one batch of its norms.

    Parameters
    ----------
    encoder : nn.Module
    views : sequence of Tensor (B, ...)
        V views of the same B samples, such as two large and six small crops.

    Returns
    -------
    Tensor (V * B, ...)
        View by view: rows v * B to (v + 1) * B - 1 belong to view v.

    Examples
    --------
    >>> views = [torch.zeros(4, 3, 8, 8), torch.zeros(4, 3, 8, 8), torch.zeros(4, 3, 6, 6)]
    >>> forward_by_size(nn.AdaptiveAvgPool2d(1), views).shape
    torch.Size([12, 3, 1, 1])
    """
    if not views or len({len(view) for view in views}) > 1:
        raise UsageError(f"all views must be of the same samples, got {[len(view) for view in views]} of them")
    return torch.cat([encoder(torch.cat(list(group))) for _, group in groupby(views, key=lambda view: view.shape)])
