"""Two losses whose matrix is used twice: rows and columns of one matrix (CLIP), and one half of a symmetric one (NT-Xent).

Both need all denominators before the first gradient, so the matrix is computed a second time, tile by tile: four products of
its size for CLIP where plain autograd takes three and keeps several matrices; two for NT-Xent, whose matrix is its own transpose,
where plain autograd takes three.

Where no difference of two logits can leave the range of the number format (unit rows, temperature above some hundredths),
one shift serves all exponentials. Elsewhere, the exact way with maxima of rows and columns is taken.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from contralto.errors import UsageError
from contralto.losses.tiled import refuse_second_derivative, tile_rows

__all__ = ["clip_sum", "nt_xent_sum"]

_SAFE = 60.0
"""exp(-60) and sums of it are normal numbers in single precision."""


def clip_sum(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """Sum over pairs of both cross-entropies, rows and columns, of ``scale * image @ text.T``.

    Parameters
    ----------
    image, text : Tensor (N, D)
        Row i of one belongs to row i of the other.
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
        rows, columns = _both_denominators(image, text, scale)
        ctx.save_for_backward(image, text, scale, rows, columns)
        own = (image * text).sum(1) * scale
        return (rows + columns - 2 * own).sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        refuse_second_derivative('needs the dense form: form="dense"')
        image, text, scale, rows, columns = ctx.saved_tensors
        n, step = len(image), tile_rows(len(text), image.element_size())
        to_image, to_text = torch.empty_like(image), torch.zeros_like(text)
        to_scale = torch.zeros_like(scale)
        buffer = image.new_empty(min(step, n), n)
        close = bool(rows.max() - columns.min() < _SAFE) and bool(columns.max() - rows.min() < _SAFE)
        middle = rows.mean()
        by_column = (middle - columns).exp() if close else None
        for start in range(0, n, step):
            stop = min(start + step, n)
            scaled = image[start:stop] * scale
            logits = torch.mm(scaled, text.T, out=buffer[: stop - start])
            row = rows[start:stop].unsqueeze(1)
            if by_column is not None:
                # exp(s - row) (1 + exp(row - column)): one exponential instead of two.
                share = logits.sub_(row).exp_()
                share.mul_(torch.outer((row.squeeze(1) - middle).exp(), by_column).add_(1))
            else:
                share = (logits - row).exp_().add_((logits - columns).exp_())
            share.diagonal(start).sub_(2)
            part = share @ text
            to_scale += (part * image[start:stop]).sum()
            torch.mul(part, scale, out=to_image[start:stop])
            to_text.addmm_(share.T, scaled)
        return to_image.mul_(grad), to_text.mul_(grad), to_scale * grad


def _both_denominators(image: Tensor, text: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Logarithms of the sums over rows and over columns (N,), (N,)."""
    n, step = len(image), tile_rows(len(text), image.element_size())
    rows, columns = image.new_empty(n), image.new_zeros(n)
    buffer = image.new_empty(min(step, n), n)
    shift = _bound(image, text, scale)
    highest = image.new_full((n,), -torch.inf)
    for start in range(0, n, step):
        stop = min(start + step, n)
        logits = torch.mm(image[start:stop] * scale, text.T, out=buffer[: stop - start])
        if shift is not None:
            share = logits.sub_(shift).exp_()
            rows[start:stop] = share.sum(1).log_().add_(shift)
            columns += share.sum(0)
        else:
            rows[start:stop] = logits.logsumexp(1)
            now = torch.maximum(highest, logits.amax(0))
            columns = columns * (highest - now).exp() + (logits - now).exp_().sum(0)
            highest = now
    return rows, columns.log().add_(highest if shift is None else shift)


def nt_xent_sum(z: Tensor, scale: Tensor) -> Tensor:
    """Sum over rows of the cross-entropy of ``scale * z @ z.T`` without its diagonal; the partner of row i is i + N or i - N.

    Parameters
    ----------
    z : Tensor (2 N, D)
        Unit rows; the second half belongs to the first.
    scale : Tensor ()
        1 / temperature; may carry gradient.

    Returns
    -------
    Tensor ()

    Raises
    ------
    UsageError
        If the temperature is too low for one shift to serve all; `contrast_tiled` has no such limit.

    Examples
    --------
    >>> nt_xent_sum(torch.eye(2).repeat(2, 1), torch.tensor(1.0)) / 4
    tensor(0.5514)
    """
    shift = _bound(z, z, scale)
    if shift is None:
        raise UsageError("the logits are too far apart for one shift: use contralto.losses.tiled.contrast_tiled")
    total: Tensor = _NTXent.apply(z, scale, shift)
    return total


def fits_one_shift(z: Tensor, scale: Tensor) -> bool:
    """Whether `nt_xent_sum` takes these rows."""
    return _bound(z, z, scale) is not None


class _NTXent(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        n = len(z)
        sums = z.new_zeros(n)
        for start, stop, share in _upper(z, scale, shift):
            block = share[:, : stop - start]
            block.fill_diagonal_(0)
            sums[start:stop] += share.sum(1)
            sums[stop:] += share[:, stop - start :].sum(0)
        denominator = sums.log().add_(shift)
        ctx.save_for_backward(z, scale, shift, denominator)
        own = (z * z.roll(n // 2, 0)).sum(1) * scale
        return (denominator - own).sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        refuse_second_derivative('needs the dense form: form="dense"')
        z, scale, shift, denominator = ctx.saved_tensors
        inverse = (shift - denominator).exp()
        partner = z.roll(len(z) // 2, 0)
        to_z = partner * -2
        for start, stop, share in _upper(z, scale, shift):
            n = stop - start
            share[:, :n].fill_diagonal_(0)
            share.mul_(inverse[start:stop].unsqueeze(1) + inverse[start:])  # P(j | i) + P(i | j)
            to_z[start:stop].addmm_(share, z[start:])
            to_z[stop:].addmm_(share[:, n:].T, z[start:stop])
        to_scale = (to_z * z).sum() / 2
        return to_z.mul_(scale * grad), to_scale * grad, None


def _upper(z: Tensor, scale: Tensor, shift: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """Tiles of exp(s - shift) on and right of the diagonal, each with its rows; one overwrites the other."""
    n, start = len(z), 0
    size = tile_rows(n, z.element_size()) * n  # at least one whole row
    buffer = z.new_empty(size)
    while start < n:
        step = min(size // (n - start), n - start, 1024)
        stop = start + step
        tile = buffer[: step * (n - start)].view(step, n - start)
        torch.mm(z[start:stop] * scale, z[start:].T, out=tile)
        yield start, stop, tile.sub_(shift).exp_()
        start = stop


def _bound(a: Tensor, b: Tensor, scale: Tensor) -> Tensor | None:
    """The largest logit that the lengths allow; None where the smallest lies too far below it."""
    with torch.no_grad():
        bound = (torch.linalg.vector_norm(a, dim=1).amax() * torch.linalg.vector_norm(b, dim=1).amax() * scale).abs()
    return bound if bool(2 * bound < _SAFE) else None
