"""Losses between the cells of two feature maps whose places in the picture are known (PixPro, Xie et al. 2021).

A cell of one view and a cell of the other are a positive pair where they show the same place: `positive_cells` says which, from
the boxes that the views were cut from. `pixel_consistency` makes positive pairs agree, `pixel_contrast` also tells them from
all other cells of the other view, and `propagate` smooths a map by the similarity of its cells before it is compared.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from contralto.errors import UsageError
from contralto.losses.contrast import contrast

__all__ = ["cell_centres", "pixel_consistency", "pixel_contrast", "positive_cells", "propagate"]

_FEW = 1e-6
"""Added to the number of positive pairs, as in the authors' code."""


def cell_centres(boxes: Tensor, height: int, width: int) -> Tensor:
    """Where the cells of a feature map lie in the picture that the view was cut from.

    Parameters
    ----------
    boxes : Tensor (N, 4)
        (x1, y1, x2, y2) of every view in unit coordinates of its picture; x1 > x2 where the view is mirrored.
    height, width : int
        Of the map.

    Returns
    -------
    Tensor (N, height * width, 2)
        x and y of every cell, row by row.

    Examples
    --------
    >>> cell_centres(torch.tensor([[0.0, 0.0, 1.0, 1.0], [1.0, 0.0, 0.0, 1.0]]), 1, 2)
    tensor([[[0.2500, 0.5000],
             [0.7500, 0.5000]],
    <BLANKLINE>
            [[0.7500, 0.5000],
             [0.2500, 0.5000]]])
    """
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise UsageError(f"boxes must be of shape (N, 4), got {tuple(boxes.shape)}")
    x1, y1, x2, y2 = boxes.unsqueeze(2).unbind(1)  # (N, 1) each
    columns = torch.arange(width, device=boxes.device, dtype=boxes.dtype) + 0.5
    rows = torch.arange(height, device=boxes.device, dtype=boxes.dtype) + 0.5
    # A mirrored view has a negative width of its cells, which puts their centres right by itself.
    x, y = x1 + columns * (x2 - x1) / width, y1 + rows * (y2 - y1) / height
    return torch.stack(torch.broadcast_tensors(x.unsqueeze(1), y.unsqueeze(2)), 3).flatten(1, 2)


def positive_cells(
    boxes_q: Tensor,
    boxes_k: Tensor,
    size_q: tuple[int, int],
    size_k: tuple[int, int] | None = None,
    *,
    threshold: float = 0.7,
) -> Tensor:
    """Which cells of two views show the same place: centres closer than `threshold` times the larger cell's diagonal.

    Parameters
    ----------
    boxes_q, boxes_k : Tensor (N, 4)
        See `cell_centres`.
    size_q, size_k : tuple of int
        Height and width of the maps; the second defaults to the first.
    threshold : float
        T; a pair at exactly this distance is not positive.

    Returns
    -------
    Tensor (N, cells of q, cells of k), bool
        The mask of the exchanged views is its transpose.

    Examples
    --------
    >>> whole, right = torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.tensor([[0.5, 0.0, 1.0, 1.0]])
    >>> positive_cells(whole, right, (1, 2), threshold=0.3).int()
    tensor([[[0, 0],
             [1, 1]]], dtype=torch.int32)
    """
    size_k = size_k or size_q
    if boxes_q.shape != boxes_k.shape:
        raise UsageError(f"both views need a box per picture, got {tuple(boxes_q.shape)} and {tuple(boxes_k.shape)}")
    dtype = torch.promote_types(boxes_q.dtype, torch.float32)
    boxes_q, boxes_k = boxes_q.detach().to(dtype), boxes_k.detach().to(dtype)
    centres_q, centres_k = cell_centres(boxes_q, *size_q), cell_centres(boxes_k, *size_k)
    apart: Tensor = torch.linalg.vector_norm(centres_q.unsqueeze(2) - centres_k.unsqueeze(1), dim=3)
    larger = torch.maximum(_diagonal(boxes_q, size_q), _diagonal(boxes_k, size_k))
    return apart / larger[:, None, None] < threshold


def _diagonal(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Of one cell (N,)."""
    x1, y1, x2, y2 = boxes.unbind(1)
    return torch.hypot((x2 - x1) / size[1], (y2 - y1) / size[0])


def pixel_consistency(
    q: Tensor, k: Tensor, positives: Tensor, *, scale: float = 2.0, reduction: str = "mean"
) -> Tensor:
    """Minus the cosine of positive pairs of cells: mean over the pairs of a picture, then over pictures (PixPro 3.2).

    One direction; PixPro adds the one with the views exchanged.

    Parameters
    ----------
    q, k : Tensor (N, C, h, w), (N, C, h', w')
        Maps of two views; the second usually without gradient.
    positives : Tensor (N, h * w, h' * w')
        From `positive_cells`.
    scale : float
        2 in the authors' code, 1 in the paper.
    reduction : {"mean", "sum", "none"}
        Over pictures; one whose views do not touch contributes 0 and counts.

    Returns
    -------
    Tensor
        A scalar in [-scale, scale], or (N,) for "none".

    Examples
    --------
    >>> q = torch.eye(2).view(1, 2, 1, 2)
    >>> pixel_consistency(q, q, torch.eye(2, dtype=torch.bool)[None])
    tensor(-2.0000)
    """
    q, k = _cells(q, k, positives)
    with torch.autocast(q.device.type, enabled=False):
        cosine = F.normalize(q, dim=2) @ F.normalize(k, dim=2).transpose(1, 2)
        pairs = positives.sum((1, 2)).float() + _FEW  # in single precision, as there
        loss = -scale * torch.where(positives, cosine, 0.0).sum((1, 2)) / pairs
    return _reduced(loss, reduction)


def pixel_contrast(
    q: Tensor, k: Tensor, positives: Tensor, *, temperature: float = 0.3, reduction: str = "mean"
) -> Tensor:
    """PixContrast: find the positive cells of the other view among all cells of the other view (PixPro 3.1, equation 2).

    ``-log( sum_{j positive} exp(cos_ij / t) / sum_{all j} exp(cos_ij / t) )``, mean over the cells of `q` that have a positive,
    then over pictures. One direction; the paper averages both.

    Parameters
    ----------
    q, k : Tensor (N, C, h, w), (N, C, h', w')
        Maps of two views; the second usually without gradient.
    positives : Tensor (N, h * w, h' * w')
        From `positive_cells`.
    temperature : float
    reduction : {"mean", "sum", "none"}
        Over pictures; one whose views do not touch contributes 0 and counts.

    Returns
    -------
    Tensor
        A scalar, or (N,) for "none".

    Examples
    --------
    >>> q = torch.eye(2).view(1, 2, 1, 2)
    >>> pixel_contrast(q, q, torch.eye(2, dtype=torch.bool)[None], temperature=1.0)
    tensor(0.3133)
    """
    q, k = _cells(q, k, positives)
    loss = contrast(q, k, positives=positives, temperature=temperature, log_outside=True, reduction="none")
    placed = positives.any(2).sum(1)
    return _reduced(loss.sum(1) / placed.clamp_min(1), reduction)


def propagate(x: Tensor, value: Tensor | None = None, *, gamma: float = 2.0, clamp: float = 0.0) -> Tensor:
    """Every cell becomes the sum of all cells, weighted by similarity (the pixel propagation module, PixPro equation 3).

    ``y_i = sum_j max(cos(x_i, x_j), clamp)^gamma g_j / |g_j|``, not divided by the weights: only directions matter afterwards.

    Parameters
    ----------
    x : Tensor (N, C, h, w)
        Decides the weights.
    value : Tensor (N, D, h, w), optional
        g, a transformation of `x`; default: `x` itself. Scaled to length one along channels, as in the authors' code.
    gamma : float
        Sharpness of the weights.
    clamp : float
        Lowest similarity.

    Returns
    -------
    Tensor (N, D, h, w)
        Gradient flows through values and through weights.

    Examples
    --------
    >>> propagate(torch.tensor([[1.0, 0.0, 0.6], [0.0, 1.0, 0.8]]).view(1, 2, 1, 3)).view(2, 3)
    tensor([[1.2160, 0.3840, 0.9600],
            [0.2880, 1.5120, 1.4400]])
    """
    value = x if value is None else value
    with torch.autocast(x.device.type, enabled=False):
        dtype = torch.promote_types(torch.promote_types(x.dtype, value.dtype), torch.float32)
        unit = F.normalize(x.to(dtype).flatten(2), dim=1)
        similarity: Tensor = (unit.transpose(1, 2) @ unit).clamp_min(clamp)
        if gamma < 1:
            similarity = similarity + 1e-6  # the derivative of the power at 0 would be infinite
        weight = similarity if gamma == 1 else similarity**gamma
        y: Tensor = F.normalize(value.to(dtype).flatten(2), dim=1) @ weight.transpose(1, 2)
    return y.view(*y.shape[:2], *x.shape[2:])


def _cells(q: Tensor, k: Tensor, positives: Tensor) -> tuple[Tensor, Tensor]:
    """Maps as cells (N, h * w, C), in one type of at least single precision."""
    if q.ndim != 4 or k.ndim != 4 or q.shape[:2] != k.shape[:2]:
        raise UsageError(
            f"maps must be of shape (N, C, h, w), N and C alike, got {tuple(q.shape)} and {tuple(k.shape)}"
        )
    expected = (len(q), q.shape[2] * q.shape[3], k.shape[2] * k.shape[3])
    if tuple(positives.shape) != expected or positives.dtype != torch.bool:
        raise UsageError(
            f"positives must be booleans of shape {expected} for these maps, got {positives.dtype} of shape "
            f"{tuple(positives.shape)}"
        )
    dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), torch.float32)
    return q.to(dtype).flatten(2).transpose(1, 2), k.to(dtype).flatten(2).transpose(1, 2)


def _reduced(loss: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    if reduction != "mean":
        raise UsageError(f'reduction must be "mean", "sum" or "none", got {reduction!r}')
    return loss.mean() if len(loss) else loss.sum()
