"""The contrast engine without the N x M matrix: rows in tiles, in one custom autograd function of plain torch.

A tile is some rows of the similarity matrix over all columns, so that it knows their denominators. Where the result is one
number, the gradient of every row is known up to one factor as soon as its tile is: it is added up in the pass that computes the
value (three products of the matrix's size; plain autograd takes three as well, and keeps the matrix). With a value per row
the tiles are computed a second time in the backward pass.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from contralto.losses.units import refuse_second_derivative

__all__ = ["TILE_BYTES", "TileFunction", "called", "columns_of", "contrast_tiled", "one_hot", "tile_rows"]

TileFunction = Callable[[Tensor, Tensor], Tensor]

TILE_BYTES = 24 * 2**20
"""Memory of one tile. Larger ones multiply a little faster; below 32 MiB, memory that was freed is had again without the system's
zeroing it first. See `benchmarks/contrast.py --tiles`."""


def tile_rows(columns: int, itemsize: int) -> int:
    """Rows of a tile.

    Examples
    --------
    >>> tile_rows(8192, 4)
    768
    """
    return max(TILE_BYTES // max(columns * itemsize, 1), 1)


def contrast_tiled(
    query: Tensor,
    key: Tensor,
    *,
    positives: Tensor | TileFunction | None,
    weights: Tensor | TileFunction | None = None,
    temperature: float | Tensor = 0.1,
    coupled: bool = False,
    log_outside: bool = False,
    summed: bool = True,
) -> tuple[Tensor, Tensor]:
    """Losses of all rows or their sum, and which rows count; arguments as of `contrast`, rows (N, D) and (M, D) as they are.

    Parameters
    ----------
    query, key : Tensor (N, D), (M, D)
        float32 or float64.
    positives, weights, temperature, coupled, log_outside
        See `contralto.losses.contrast.contrast`.
    summed : bool
        Give the sum over rows, with the gradient computed on the way, instead of a value per row.

    Returns
    -------
    loss : Tensor () or (N,)
    valid : Tensor (N,) bool
        Rows that have a positive and something to be compared with.

    Examples
    --------
    >>> contrast_tiled(torch.eye(3), torch.eye(3), positives=torch.arange(3), temperature=1.0)
    (tensor(1.6543), tensor([True, True, True]))
    """
    t = temperature if isinstance(temperature, Tensor) else query.new_tensor(temperature)
    t = t.to(query.dtype)
    w = out = function = None
    if not isinstance(weights, Tensor):
        function = weights
    elif weights.dtype == torch.int64:
        out = weights
    else:
        w = weights.to(query.dtype)
    tiles = _Tiles(positives, out, function, coupled, log_outside)
    loss, valid = _Contrast.apply(query, key, t, w, tiles, summed)
    return loss, valid


class _Tiles:
    """What does not carry gradient: positives, columns left out (N, E), weights by function, and the form."""

    def __init__(
        self,
        positives: Tensor | TileFunction | None,
        out: Tensor | None,
        weight_function: TileFunction | None,
        coupled: bool,
        log_outside: bool,
    ) -> None:
        self.positives, self.out, self.weight_function = positives, out, weight_function
        self.coupled, self.log_outside = coupled, log_outside
        self.all_out = out is not None and bool((out >= 0).all())  # no row has fewer columns to leave out than others

    @property
    def by_column(self) -> bool:
        """Whether a row has one positive at most, named by its column."""
        return self.positives is None or (isinstance(self.positives, Tensor) and self.positives.dtype == torch.int64)

    def leave_out(self, logits: Tensor, start: int, stop: int) -> Tensor:
        """The tile with what is left out at minus infinity, changed in place."""
        if self.out is not None:
            columns = self.out[start:stop]
            if self.all_out:
                return logits.scatter_(1, columns, -torch.inf)
            row, place = (columns >= 0).nonzero(as_tuple=True)
            logits[row, columns[row, place]] = -torch.inf
        return logits

    def dense(self, start: int, stop: int, tile: Tensor) -> Tensor:
        """Positives of some rows, dense (n, M)."""
        if self.positives is None:
            return torch.zeros_like(tile)
        if not isinstance(self.positives, Tensor):
            return called(self.positives, start, tile).to(tile.dtype)
        if self.by_column:
            return one_hot(self.positives[start:stop], tile)
        return _part(self.positives, start, stop).to(tile.dtype).expand_as(tile)


def columns_of(x: Any) -> Any:
    """Numbers of columns as int64; everything else as it is."""
    return x.long() if isinstance(x, Tensor) and x.dtype == torch.int32 else x


def called(function: TileFunction, start: int, tile: Tensor) -> Tensor:
    """What a function of row and column numbers says of a tile (..., n, M) whose first row is `start`."""
    rows = torch.arange(start, start + tile.shape[-2], device=tile.device).unsqueeze(1)
    columns = torch.arange(tile.shape[-1], device=tile.device).unsqueeze(0)
    return function(rows, columns).expand_as(tile)


def one_hot(column: Tensor, tile: Tensor) -> Tensor:
    """1 where a row (..., n) names the column of a tile (..., n, M), else 0; -1 names none."""
    columns = torch.arange(tile.shape[-1], device=tile.device)
    return (column.unsqueeze(-1) == columns).to(tile.dtype)


def _part(x: Tensor, start: int, stop: int) -> Tensor:
    """The rows of a tile, of something that broadcasts to (N, M)."""
    return x[start:stop] if x.ndim == 2 and x.shape[0] > 1 else x


def _add_part(total: Tensor, part: Tensor, start: int, stop: int) -> None:
    """Add the gradient (n, M) of a tile to that of something that broadcasts to (N, M)."""
    target = total[start:stop] if total.ndim == 2 and total.shape[0] > 1 else total
    target += part.sum_to_size(target.shape)


class _Contrast(torch.autograd.Function):
    """Rows of tiles; gradients of query, key, temperature and weights."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, t: Tensor, w: Tensor | None, tiles: _Tiles, summed: bool
    ) -> tuple[Tensor, Tensor]:
        wants = ctx.needs_input_grad[:4]
        gradients = _Gradients(query, key, t, w, wants) if summed and any(wants) else None
        loss, valid = _pass(query, key, t, w, tiles, gradients, None)
        ctx.summed = summed
        if gradients is not None:
            ctx.save_for_backward(*gradients.parts)
        elif not summed:
            ctx.tiles, ctx.wants = tiles, wants
            ctx.save_for_backward(query, key, t, w)
        ctx.mark_non_differentiable(valid)
        return loss.sum() if summed else loss, valid

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative('needs the dense form: contrast(..., form="dense")')
        if ctx.summed:
            parts = [None if p is None else grad * p for p in ctx.saved_tensors]
        else:
            query, key, t, w = ctx.saved_tensors
            gradients = _Gradients(query, key, t, w, ctx.wants)
            _pass(query, key, t, w, ctx.tiles, gradients, grad)
            parts = gradients.parts
        return (*parts, None, None)


class _Gradients:
    """Where the gradients of query, key, temperature and weights are added up; None for what wants none."""

    def __init__(self, query: Tensor, key: Tensor, t: Tensor, w: Tensor | None, wants: tuple[bool, ...]) -> None:
        given = (query, key, t, w)
        self.parts: list[Tensor | None] = [
            torch.zeros_like(x) if x is not None and want else None for x, want in zip(given, wants, strict=True)
        ]


def _pass(
    query: Tensor,
    key: Tensor,
    t: Tensor,
    w: Tensor | None,
    tiles: _Tiles,
    gradients: _Gradients | None,
    upstream: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Losses and validity of all rows, tile by tile; adds up gradients on the way."""
    n, m = len(query), len(key)
    loss, valid = query.new_empty(n), torch.empty(n, dtype=torch.bool, device=query.device)
    step = tile_rows(m, query.element_size())
    by_row = t.numel() == 1 or t.shape == (n, 1)
    by_weight = tiles.weight_function is None and (w is None or w.shape[-1:].numel() == w.numel() == m)
    wants_weight = gradients is not None and gradients.parts[3] is not None
    quick = tiles.by_column and by_row and by_weight and not tiles.log_outside and not wants_weight
    bias = None if w is None or not quick else w.reshape(m).log()
    buffer = query.new_empty(min(step, n), m) if quick else query
    for start in range(0, n, step):
        stop = min(start + step, n)
        u = None if upstream is None else upstream[start:stop]
        if quick:
            found = _quick_tile(query[start:stop], key, t, tiles, start, stop, bias, buffer, gradients, u)
        else:
            found = _tile(query[start:stop], key, t, w, tiles, start, stop, gradients, u)
        loss[start:stop], valid[start:stop] = found
    return loss, valid


def _quick_tile(
    query: Tensor,
    key: Tensor,
    t: Tensor,
    tiles: _Tiles,
    start: int,
    stop: int,
    bias: Tensor | None,
    buffer: Tensor,
    gradients: _Gradients | None,
    upstream: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """One positive a row, weights by column, temperature by row: few passes over the tile, and no second one in memory."""
    n = stop - start
    inverse = 1 / (t.reshape(1, 1) if t.numel() == 1 else t[start:stop])
    scaled, share = query * inverse, buffer[:n]
    if bias is None:
        torch.mm(scaled, key.T, out=share)
    else:
        torch.addmm(bias, scaled, key.T, out=share)
    tiles.leave_out(share, start, stop)
    own, has, column = scaled.new_zeros(()), torch.ones(n, dtype=torch.bool, device=query.device), None
    if isinstance(tiles.positives, Tensor):
        column = tiles.positives[start:stop]
        has = column >= 0
        column = column.clamp_min(0)
        own = torch.linalg.vecdot(scaled, key[column])  # without the weight of its column
    highest = share.amax(1)
    nothing = highest == -torch.inf
    share = torch.softmax(share, 1, out=share if share.is_cpu else None)  # row by row: may overwrite what it reads
    log_denominator = highest - share.amax(1).log()
    factor = None
    if tiles.coupled:
        both = torch.where(nothing, own, torch.logaddexp(log_denominator, own))
        factor = -torch.expm1(own - both)  # what the others hold of the denominator
        loss, valid = both - own, has
    else:
        loss, valid = log_denominator - own, has & ~nothing
    counts = valid & ~nothing
    if gradients is not None:
        if column is not None:
            share.scatter_add_(1, column.unsqueeze(1), share.new_full((1, 1), -1.0).expand(n, 1))
        if not bool(counts.all()):
            share.masked_fill_(~counts.unsqueeze(1), 0.0)
        for more in (factor, upstream):
            if more is not None:
                inverse = inverse * torch.where(counts, more, 0.0).unsqueeze(1)
        to_query, to_key, to_t, _ = gradients.parts
        if to_query is not None or to_t is not None:
            part = torch.mm(share, key, out=None if to_query is None else to_query[start:stop]).mul_(inverse)
            if to_t is not None:
                _add_part(to_t, (part * query).sum(1, keepdim=True) / -_part(t, start, stop), start, stop)
        if to_key is not None:
            to_key.addmm_(share.T, query * inverse)
    return torch.where(valid, loss, 0.0), valid


def _tile(
    query: Tensor,
    key: Tensor,
    t: Tensor,
    w: Tensor | None,
    tiles: _Tiles,
    start: int,
    stop: int,
    gradients: _Gradients | None,
    upstream: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The whole equation on one tile, with its derivatives."""
    t_part = _part(t, start, stop)
    logits = query @ key.T / t_part  # (n, M)
    P = tiles.dense(start, stop, logits)
    positive = P > 0
    P = torch.where(positive, P, 0.0)
    W = None
    if tiles.weight_function is not None:
        W = called(tiles.weight_function, start, logits).to(logits.dtype)
    elif w is not None:
        W = _part(w, start, stop)
    floor = torch.finfo(logits.dtype).min
    masked = logits if W is None else logits + W.log()
    if tiles.out is not None:
        masked = tiles.leave_out(masked.clone(), start, stop)
    L = masked.clamp_min(floor).logsumexp(-1, keepdim=True)
    valid = positive.any(-1) if tiles.positives is not None else torch.ones_like(positive[:, 0])
    # c: derivative of the loss by L; rest: what else of the derivative by the logits there is.
    if tiles.coupled:
        both = torch.logaddexp(L.expand_as(logits), logits)
        loss = torch.where(positive, P * (both - logits), 0.0).sum(-1)
        own = torch.where(positive, P * (logits - both).exp(), 0.0)
        c, rest = (P - own).sum(-1, keepdim=True), own - P
    else:
        valid = valid & (masked > floor).any(-1)
        if tiles.log_outside:
            inside = logits + P.log()
            inner = inside.clamp_min(floor).logsumexp(-1, keepdim=True)
            loss = (L - inner).squeeze(-1)
            c, rest = torch.ones_like(L), -(inside - inner).exp()
        elif tiles.positives is None:
            loss, c, rest = L.squeeze(-1), torch.ones_like(L), -P
        else:
            loss = torch.where(positive, P * (L - logits), 0.0).sum(-1)
            c, rest = P.sum(-1, keepdim=True), -P
    if gradients is not None:
        keep = valid.unsqueeze(-1)
        u = 1.0 if upstream is None else upstream.unsqueeze(-1)
        G = torch.where(keep, u * (c * (masked - L).exp() + rest), 0.0)
        to_query, to_key, to_t, to_w = gradients.parts
        if to_w is not None:
            _add_part(to_w, torch.where(keep, u * c * (logits - L).exp(), 0.0), start, stop)
        G = G / t_part
        if to_t is not None:
            _add_part(to_t, -G * logits, start, stop)
        if to_query is not None:
            to_query[start:stop] = G @ key
        if to_key is not None:
            to_key.addmm_(G.T, query)
    return torch.where(valid, loss, 0.0), valid
