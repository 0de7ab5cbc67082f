"""Two losses whose matrix is used twice: rows and columns of one matrix (CLIP), and one half of a symmetric one (NT-Xent).

Both need all denominators before the first gradient. A matrix that fits into one tile is kept until then: three products of its
size for CLIP, two for NT-Xent, whose matrix is its own transpose. A larger one is computed a second time, tile by tile: four
products for CLIP; two for NT-Xent, which needs only half of its matrix each time. Plain autograd takes three products for either
and keeps several matrices.

The logits of unit rows are at most `scale`: while its exponential is a number like any other, nothing has to be subtracted
first. Above that, CLIP takes maxima of rows and columns, and NT-Xent is left to `losses.tiled`.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from contralto.errors import UsageError
from contralto.losses.tiled import tile_rows
from contralto.losses.units import refuse_second_derivative

__all__ = ["LARGEST_SCALE", "clip_sum", "nt_xent_sum"]

LARGEST_SCALE = 60.0
"""exp(60), exp(-60), and sums over billions of either are normal numbers in single precision."""


def clip_sum(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """Sum over pairs of both cross-entropies, rows and columns, of ``scale * image @ text.T``.

    Parameters
    ----------
    image, text : Tensor (N, D)
        Unit rows; row i of one belongs to row i of the other.
    scale : Tensor ()
        1 / temperature; may carry gradient.

    Returns
    -------
    Tensor ()

    Examples
    --------
    >>> clip_sum(torch.eye(3), torch.eye(3), torch.tensor(1.0)) / 3
    tensor(1.1029)
    """
    total: Tensor = _Clip.apply(image, text, scale)
    return total


class _Clip(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        n, step = len(image), min(tile_rows(len(text), image.element_size()), len(image))
        buffer = image.new_empty(step, n)
        close = abs(float(scale)) <= LARGEST_SCALE
        own = torch.linalg.vecdot(image, text) * scale
        rows, columns = (_sums if close else _shifted_sums)(image, text, scale, buffer)
        total = (rows + columns - 2 * own).sum()
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(*_clip_gradients(image, text, scale, rows, columns, buffer, close))
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        refuse_second_derivative('needs the dense form: form="dense"')
        to_image, to_text, to_scale = ctx.saved_tensors
        return to_image * grad, to_text * grad, to_scale * grad


def _sums(image: Tensor, text: Tensor, scale: Tensor, buffer: Tensor) -> tuple[Tensor, Tensor]:
    """Logarithms of the sums over rows and over columns (N,), (N,); leaves exponentials in the buffer."""
    n, step = len(image), len(buffer)
    rows, columns = image.new_empty(n), image.new_zeros(n)
    for start in range(0, n, step):
        part = image[start : start + step]
        share = torch.mm(part * scale, text.T, out=buffer[: len(part)]).exp_()
        torch.sum(share, 1, out=rows[start : start + step])
        columns += share.sum(0)
    return rows.log_(), columns.log_()


def _shifted_sums(image: Tensor, text: Tensor, scale: Tensor, buffer: Tensor) -> tuple[Tensor, Tensor]:
    """As `_sums`, for any scale; leaves nothing of use in the buffer."""
    n, step = len(image), len(buffer)
    rows, columns = image.new_empty(n), image.new_zeros(n)
    highest = image.new_full((n,), -torch.inf)
    for start in range(0, n, step):
        part = image[start : start + step]
        logits = torch.mm(part * scale, text.T, out=buffer[: len(part)])
        rows[start : start + step] = logits.logsumexp(1)
        now = torch.maximum(highest, logits.amax(0))
        columns = columns * (highest - now).exp() + logits.sub_(now).exp_().sum(0)
        highest = now
    return rows, columns.log_().add_(highest)


def _clip_gradients(
    image: Tensor, text: Tensor, scale: Tensor, rows: Tensor, columns: Tensor, buffer: Tensor, close: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of image, text and scale."""
    n, step = len(image), len(buffer)
    to_image, to_text = torch.empty_like(image), torch.empty_like(text)
    by_row, by_column = (-rows).exp(), (-columns).exp()
    for start in range(0, n, step):
        part = image[start : start + step]
        scaled, share = part * scale, buffer[: len(part)]
        if not (close and step == n):  # else the exponentials are still there
            torch.mm(scaled, text.T, out=share)
        if close:
            if step < n:
                share.exp_()
            share.mul_(by_row[start : start + step].unsqueeze(1) + by_column)
        else:
            row = rows[start : start + step].unsqueeze(1)
            share = (share - columns).exp_().add_(share.sub_(row).exp_())
        share.diagonal(start).sub_(2)
        torch.mm(share, text, out=to_image[start : start + step])
        torch.addmm(to_text, share.T, scaled, beta=0 if start == 0 else 1, out=to_text)
    to_scale = torch.linalg.vecdot(to_image, image).sum()
    return to_image.mul_(scale), to_text, to_scale


def nt_xent_sum(z: Tensor, scale: Tensor) -> Tensor:
    """Sum over rows of the cross-entropy of ``scale * z @ z.T`` without its diagonal; the partner of row i is i + N or i - N.

    Parameters
    ----------
    z : Tensor (2 N, D)
        Unit rows; the second half belongs to the first.
    scale : Tensor ()
        1 / temperature, at most `LARGEST_SCALE`; may carry gradient.

    Returns
    -------
    Tensor ()

    Raises
    ------
    UsageError
        If the scale is larger; `contrast_tiled` has no such limit.

    Examples
    --------
    >>> nt_xent_sum(torch.eye(2).repeat(2, 1), torch.tensor(1.0)) / 4
    tensor(0.5514)
    """
    if not abs(float(scale)) <= LARGEST_SCALE:
        raise UsageError(f"scale must be at most {LARGEST_SCALE}, got {float(scale)}: use losses.tiled.contrast_tiled")
    total: Tensor = _NTXent.apply(z, scale)
    return total


class _NTXent(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, scale: Tensor) -> Tensor:
        n = len(z)
        partner = z.roll(n // 2, 0)
        own = torch.linalg.vecdot(z, partner)
        whole = tile_rows(n, z.element_size()) >= n
        if whole:
            share = torch.mm(z * scale, z.T).exp_().fill_diagonal_(0)
            sums = share.sum(1)
        else:
            sums = z.new_zeros(n)
            for start, stop, share in _upper(z, scale):
                sums[start:stop] += share.sum(1)
                sums[stop:] += share[:, stop - start :].sum(0)
        if any(ctx.needs_input_grad):
            inverse = 1 / sums
            if whole:
                share.mul_(inverse.unsqueeze(1) + inverse)  # P(j | i) + P(i | j)
                to_z = torch.addmm(partner, share, z, beta=-2)
            else:
                to_z = partner.mul_(-2)
                for start, stop, share in _upper(z, scale):
                    share.mul_(inverse[start:stop].unsqueeze(1) + inverse[start:])
                    to_z[start:stop].addmm_(share, z[start:])
                    to_z[stop:].addmm_(share[:, stop - start :].T, z[start:stop])
            to_scale = torch.linalg.vecdot(to_z, z).sum() / 2
            ctx.save_for_backward(to_z.mul_(scale), to_scale)
        return sums.log().sub_(own * scale).sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        refuse_second_derivative('needs the dense form: form="dense"')
        to_z, to_scale = ctx.saved_tensors
        return to_z * grad, to_scale * grad


def _upper(z: Tensor, scale: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """Tiles of exponentials on and right of the diagonal, itself 0, each with its rows; one overwrites the other."""
    n, start = len(z), 0
    size = tile_rows(n, z.element_size()) * n  # at least one whole row
    buffer = z.new_empty(size)
    while start < n:
        step = min(size // (n - start), n - start, 1024)
        stop = start + step
        tile = buffer[: step * (n - start)].view(step, n - start)
        torch.mm(z[start:stop] * scale, z[start:].T, out=tile).exp_()
        tile[:, :step].fill_diagonal_(0)
        yield start, stop, tile
        start = stop
