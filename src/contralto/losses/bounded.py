"""Losses of paired unit rows at one temperature, by as few products and passes as there can be.

The logits of unit rows are at most `scale` = 1 / temperature: while its exponential is a number like any other, nothing has to be
subtracted first, and a product with exponentials is all that a gradient takes. Above `LARGEST_SCALE`, CLIP takes maxima of rows
and columns; InfoNCE and NT-Xent are left to `losses.tiled`.

InfoNCE knows the denominator of a row as soon as its tile is there: three products of the matrix's size, in one pass. CLIP and
NT-Xent use their matrix twice, by rows and by columns, and need all denominators before the first gradient. A matrix that fits
into one tile is kept until then: three products for CLIP, two for NT-Xent, whose matrix is its own transpose. A larger one is
computed a second time, tile by tile: four products for CLIP; two for NT-Xent, which needs only half of its matrix each time.
Plain autograd takes three for each of them and keeps several matrices.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from contralto.errors import UsageError
from contralto.losses.tiled import tile_rows
from contralto.losses.units import refuse_second_derivative

__all__ = ["LARGEST_SCALE", "clip_mean", "info_nce_mean", "nt_xent_mean"]

LARGEST_SCALE = 60.0
"""exp(60), exp(-60), and sums over billions of either are normal numbers in single precision."""


def info_nce_mean(query: Tensor, key: Tensor, scale: Tensor) -> Tensor:
    """Mean over queries of the cross-entropy of ``scale * query @ key.T``.

    Parameters
    ----------
    query, key : Tensor (N, D), (M, D)
        Unit rows; the first N keys belong to the queries, the others to none.
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
    >>> info_nce_mean(torch.eye(3), torch.eye(3), torch.tensor(1.0))
    tensor(0.5514)
    """
    _check(scale)
    total: Tensor = _InfoNCE.apply(query, key, scale)
    return total


class _InfoNCE(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, scale: Tensor) -> Tensor:
        n, step = len(query), max(min(tile_rows(len(key), key.element_size()), len(query)), 1)
        buffer, sums = query.new_empty(step, len(key)), query.new_empty(n, 1)
        wants = ctx.needs_input_grad
        to_query = torch.empty_like(query) if wants[0] or wants[2] else None
        to_key = torch.empty_like(key) if wants[1] else None
        scaled = query * scale
        for start in range(0, n, step):
            part, row = scaled[start : start + step], sums[start : start + step]
            share = torch.mm(part, key.T, out=buffer[: len(part)]).exp_()
            torch.sum(share, 1, keepdim=True, out=row)
            if any(wants):
                share.div_(row).diagonal(start).sub_(1)
            if to_query is not None:
                torch.mm(share, key, out=to_query[start : start + step])
            if to_key is not None:
                torch.addmm(to_key, share.T, part, beta=0 if start == 0 else 1, out=to_key)
        own, to_scale = torch.linalg.vecdot(scaled, key[:n]), None
        if to_query is not None:
            to_scale = torch.linalg.vecdot(to_query, query).sum() if wants[2] else None
            to_query.mul_(scale)
        _keep(ctx, to_query, to_key, to_scale, count=n)
        return sums.squeeze(1).log_().sub_(own).sum() / max(n, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _kept(ctx, grad)


def _keep(ctx: Any, *of_sum: Tensor | None, count: int) -> None:
    """Keep gradients of a sum until those of the mean over `count` are asked for."""
    ctx.save_for_backward(*of_sum)
    ctx.count = max(count, 1)


def _kept(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    refuse_second_derivative('needs the dense form: contrast(..., form="dense")')
    share = grad / ctx.count
    return tuple(None if x is None else x * share for x in ctx.saved_tensors)


def clip_mean(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """Mean over pairs, and over rows and columns, of the cross-entropies of ``scale * image @ text.T``.

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
    >>> clip_mean(torch.eye(3), torch.eye(3), torch.tensor(1.0))
    tensor(0.5514)
    """
    total: Tensor = _Clip.apply(image, text, scale)
    return total


class _Clip(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        n, step = len(image), max(min(tile_rows(len(text), image.element_size()), len(image)), 1)
        buffer, wants = image.new_empty(step, n), any(ctx.needs_input_grad)
        scaled = image * scale
        if abs(scale.item()) <= LARGEST_SCALE:
            rows, columns = _sums(scaled, text, buffer)
            logs = rows.log() + columns.log()
            shares = _shares(scaled, text, buffer, 1 / rows, 1 / columns) if wants else iter(())
        else:
            rows, columns = _logs_of_sums(scaled, text, buffer)
            logs = rows + columns
            shares = _far_shares(scaled, text, buffer, rows, columns) if wants else iter(())
        own = torch.linalg.vecdot(scaled, text)
        if wants:
            to_image, to_text = torch.empty_like(image), torch.empty_like(text)
            for start, share in shares:
                share.diagonal(start).sub_(2)
                torch.mm(share, text, out=to_image[start : start + step])
                part = scaled[start : start + step]
                torch.addmm(to_text, share.T, part, beta=0 if start == 0 else 1, out=to_text)
            to_scale = torch.linalg.vecdot(to_image, image).sum() if ctx.needs_input_grad[2] else None
            _keep(ctx, to_image.mul_(scale), to_text, to_scale, count=2 * n)
        return logs.sub_(own, alpha=2).sum() / max(2 * n, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _kept(ctx, grad)


def _sums(scaled: Tensor, text: Tensor, buffer: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of exponentials over rows and over columns (N,), (N,); leaves the last tile in the buffer."""
    n, step = len(scaled), len(buffer)
    rows, columns = scaled.new_empty(n), scaled.new_zeros(n)
    for start in range(0, n, step):
        part = scaled[start : start + step]
        share = torch.mm(part, text.T, out=buffer[: len(part)]).exp_()
        torch.sum(share, 1, out=rows[start : start + step])
        columns += share.sum(0)
    return rows, columns


def _shares(
    scaled: Tensor, text: Tensor, buffer: Tensor, by_row: Tensor, by_column: Tensor
) -> Iterator[tuple[int, Tensor]]:
    """Tiles of P(j | i) + P(i | j), each with its first row; one overwrites the other."""
    n, step = len(scaled), len(buffer)
    for start in range(0, n, step):
        part = scaled[start : start + step]
        share = buffer[: len(part)]
        if step < n:  # else `_sums` has left them there
            torch.mm(part, text.T, out=share).exp_()
        yield start, _times_sum(share, by_row[start : start + step], by_column)


def _times_sum(tile: Tensor, by_row: Tensor, by_column: Tensor) -> Tensor:
    """The tile times (by_row + by_column), in place and some rows at a time: a second tile would cost more than the product."""
    step = max(2**18 // max(len(by_column), 1), 1)
    for start in range(0, len(tile), step):
        tile[start : start + step].mul_(by_row[start : start + step].unsqueeze(1) + by_column)
    return tile


def _logs_of_sums(scaled: Tensor, text: Tensor, buffer: Tensor) -> tuple[Tensor, Tensor]:
    """Logarithms of what `_sums` gives, for logits of any size."""
    n, step = len(scaled), len(buffer)
    rows, columns = scaled.new_empty(n), scaled.new_zeros(n)
    highest = scaled.new_full((n,), -torch.inf)
    for start in range(0, n, step):
        part = scaled[start : start + step]
        logits = torch.mm(part, text.T, out=buffer[: len(part)])
        rows[start : start + step] = logits.logsumexp(1)
        now = torch.maximum(highest, logits.amax(0))
        columns = columns * (highest - now).exp() + logits.sub_(now).exp_().sum(0)
        highest = now
    return rows, columns.log_().add_(highest)


def _far_shares(
    scaled: Tensor, text: Tensor, buffer: Tensor, rows: Tensor, columns: Tensor
) -> Iterator[tuple[int, Tensor]]:
    """What `_shares` gives, for logits of any size, from logarithms of sums."""
    n, step = len(scaled), len(buffer)
    for start in range(0, n, step):
        part = scaled[start : start + step]
        logits = torch.mm(part, text.T, out=buffer[: len(part)])
        by_column = (logits - columns).exp_()
        yield start, logits.sub_(rows[start : start + step].unsqueeze(1)).exp_().add_(by_column)


def nt_xent_mean(z: Tensor, scale: Tensor) -> Tensor:
    """Mean over rows of the cross-entropy of ``scale * z @ z.T`` without its diagonal; the partner of row i is i + N or i - N.

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
    >>> nt_xent_mean(torch.eye(2).repeat(2, 1), torch.tensor(1.0))
    tensor(0.5514)
    """
    _check(scale)
    total: Tensor = _NTXent.apply(z, scale)
    return total


def _check(scale: Tensor) -> None:
    if not abs(scale.item()) <= LARGEST_SCALE:
        raise UsageError(f"scale must be at most {LARGEST_SCALE}, got {scale.item()}: use losses.tiled.contrast_tiled")


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
                _times_sum(share, inverse, inverse)  # P(j | i) + P(i | j)
                to_z = torch.addmm(partner, share, z, beta=-2)
            else:
                to_z = partner.mul_(-2)
                for start, stop, share in _upper(z, scale):
                    _times_sum(share, inverse[start:stop], inverse[start:])
                    to_z[start:stop].addmm_(share, z[start:])
                    to_z[stop:].addmm_(share[:, stop - start :].T, z[start:stop])
            to_scale = torch.linalg.vecdot(to_z, z).sum() / 2 if ctx.needs_input_grad[1] else None
            _keep(ctx, to_z.mul_(scale), to_scale, count=n)
        return sums.log().sub_(own * scale).sum() / max(n, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _kept(ctx, grad)


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
