"""The contrast engine for CUDA in two kernels: one positive a row, columns left out, one temperature or one per row.

Rows and keys may be of half precision; all sums are of single precision. Nothing of the size of the matrix is ever in memory.

The first kernel goes over all keys for some rows, as flash attention does with keys for values: it gives the logarithms of the
denominators and the mean key under every row's softmax, which is all that the gradient of the queries takes. The second goes over
all rows for some keys, computes the softmax again, and adds up the gradient of the keys. Four products of the matrix's size where
three are needed; no atomic additions, so two runs are equal to the bit.

Importing this module needs triton; with `TRITON_INTERPRET=1` in the environment its kernels run on the CPU, slowly.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from contralto.errors import UsageError
from contralto.losses.units import refuse_second_derivative

__all__ = ["contrast_fused"]

ROWS, KEYS, DEPTH, WIDTH = 64, 64, 64, 256
"""Rows and keys of a tile, depth of the steps of its product, and most columns of a gradient that one program adds up."""


def contrast_fused(
    query: Tensor, key: Tensor, *, positives: Tensor | None, out: Tensor | None, temperature: float | Tensor
) -> tuple[Tensor, Tensor]:
    """Losses of all rows (N,), and which rows count; as `contralto.losses.tiled.contrast_tiled` without weights.

    Parameters
    ----------
    query, key : Tensor (N, D), (M, D)
        Of one type: float16, bfloat16 or float32.
    positives : Tensor (N,) of int64, optional
        Column of the positive, -1 = none; None for the logarithm of the denominator alone.
    out : Tensor (N, E) of int64, optional
        Columns left out, -1 = none.
    temperature : float or Tensor
        A number, () or (N, 1).
    """
    if not query.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise UsageError(f'form="fused" runs on CUDA, got rows on {query.device}')
    n = len(query)
    t = temperature if isinstance(temperature, Tensor) else torch.tensor(temperature, device=query.device)
    scale = (1 / t.float()).reshape(-1).expand(n).contiguous()
    column = torch.full((n,), -1, device=query.device) if positives is None else positives
    loss, there = _Fused.apply(query.contiguous(), key.contiguous(), scale, column, out)
    valid = there if positives is None else there & (positives >= 0)
    return torch.where(valid, loss, 0.0), valid


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, scale: Tensor, column: Tensor, out: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        (n, d), m = query.shape, len(key)
        width = min(triton.next_power_of_2(max(d, 16)), WIDTH)
        logs = torch.empty(n, dtype=torch.float32, device=query.device)
        mean_key = torch.empty(n, d, dtype=torch.float32, device=query.device)
        left = 0 if out is None else out.shape[1]
        out = column if out is None else out.contiguous()
        exact = query.dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
        sizes = {
            "E": left, "D": d, "ROWS": ROWS, "KEYS": KEYS, "DEPTH": DEPTH, "WIDTH": width,
            "PRECISION": "ieee" if exact else "tf32", "WIDE": not query.is_cuda,
        }  # fmt: skip
        _over_keys[triton.cdiv(n, ROWS), triton.cdiv(d, width)](query, key, scale, out, logs, mean_key, n, m, **sizes)
        positive = torch.where((column >= 0).unsqueeze(1), key[column.clamp_min(0)].float(), 0.0)
        own = torch.linalg.vecdot(query.float(), positive) * scale
        rest = mean_key.sub_(positive)  # gradient of a row over its scale
        there = logs > -torch.inf
        ctx.save_for_backward(query, key, scale, column, out, logs, rest)
        ctx.sizes = sizes
        ctx.mark_non_differentiable(there)
        return logs - own, there

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative('needs the dense form: contrast(..., form="dense")')
        query, key, scale, column, out, logs, rest = ctx.saved_tensors
        n, m, sizes = len(query), len(key), ctx.sizes
        to_query = to_key = to_scale = None
        if ctx.needs_input_grad[0]:
            to_query = (rest * (grad * scale).unsqueeze(1)).to(query.dtype)
        if ctx.needs_input_grad[1]:
            to_key = torch.empty_like(key)
            by_row = (grad * scale).contiguous()
            grid = triton.cdiv(m, KEYS), triton.cdiv(sizes["D"], sizes["WIDTH"])
            _over_rows[grid](query, key, scale, column, out, logs, by_row, to_key, n, m, **sizes)
        if ctx.needs_input_grad[2]:
            to_scale = grad * torch.linalg.vecdot(query.float(), rest)
        return to_query, to_key, to_scale, None, None


@triton.jit
def _logits(
    query, key, scale, out, row, column, n, m,
    E: tl.constexpr, D: tl.constexpr, DEPTH: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """A tile of logits (ROWS, KEYS), minus infinity at what is left out or not there."""
    logits = tl.zeros((ROWS, KEYS), dtype=tl.float32)
    for start in range(0, D, DEPTH):
        depth = start + tl.arange(0, DEPTH)
        inside = depth < D
        a = tl.load(query + row[:, None] * D + depth[None, :], mask=(row < n)[:, None] & inside[None, :], other=0.0)
        b = tl.load(key + column[None, :] * D + depth[:, None], mask=(column < m)[None, :] & inside[:, None], other=0.0)
        if WIDE:  # the interpreter multiplies the bits of bfloat16
            a, b = a.to(tl.float32), b.to(tl.float32)
        logits = tl.dot(a, b, logits, input_precision=PRECISION)
    by_row = tl.load(scale + row, mask=row < n, other=0.0)
    logits = tl.where((column < m)[None, :], logits * by_row[:, None], -float("inf"))
    for e in range(E):
        left_out = tl.load(out + row * E + e, mask=row < n, other=-1)
        logits = tl.where(left_out[:, None] == column[None, :], -float("inf"), logits)
    return logits


@triton.jit
def _add(weights, rows, total, PRECISION: tl.constexpr, WIDE: tl.constexpr):
    """Total + weights @ rows; float16 has no numbers as small as weights are."""
    if rows.dtype == tl.bfloat16:
        weights = weights.to(tl.bfloat16)
    if WIDE or rows.dtype != tl.bfloat16:
        weights, rows = weights.to(tl.float32), rows.to(tl.float32)
    return tl.dot(weights, rows, total, input_precision=PRECISION)


@triton.jit
def _over_keys(
    query, key, scale, out, logs, mean_key, n, m,
    E: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, DEPTH: tl.constexpr, WIDTH: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """For some rows: logarithms of denominators (ROWS,), and some columns of the mean key (ROWS, WIDTH)."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    part = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    highest = tl.full((ROWS,), -float("inf"), dtype=tl.float32)
    total = tl.zeros((ROWS,), dtype=tl.float32)
    mean = tl.zeros((ROWS, WIDTH), dtype=tl.float32)
    for start in range(0, m, KEYS):
        column = (start + tl.arange(0, KEYS)).to(tl.int64)
        logits = _logits(query, key, scale, out, row, column, n, m, E, D, DEPTH, ROWS, KEYS, PRECISION, WIDE)
        now = tl.maximum(highest, tl.max(logits, 1))
        shift = tl.where(now == -float("inf"), 0.0, now)  # rows without a key so far
        share = tl.exp(logits - shift[:, None])
        shrink = tl.exp(highest - shift)
        total = total * shrink + tl.sum(share, 1)
        values = tl.load(
            key + column[:, None] * D + part[None, :], mask=(column < m)[:, None] & (part < D)[None, :], other=0.0
        )
        mean = _add(share, values, mean * shrink[:, None], PRECISION, WIDE)
        highest = now
    some = total > 0.0
    mean = mean / tl.where(some, total, 1.0)[:, None]
    tl.store(mean_key + row[:, None] * D + part[None, :], mean, mask=(row < n)[:, None] & (part < D)[None, :])
    if tl.program_id(1) == 0:
        log = tl.where(some, highest + tl.log(tl.where(some, total, 1.0)), -float("inf"))
        tl.store(logs + row, log, mask=row < n)


@triton.jit
def _over_rows(
    query, key, scale, positive, out, logs, by_row, to_key, n, m,
    E: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, DEPTH: tl.constexpr, WIDTH: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """For some keys: some columns of their gradient (KEYS, WIDTH)."""
    column = (tl.program_id(0) * KEYS + tl.arange(0, KEYS)).to(tl.int64)
    part = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    gradient = tl.zeros((KEYS, WIDTH), dtype=tl.float32)
    for start in range(0, n, ROWS):
        row = (start + tl.arange(0, ROWS)).to(tl.int64)
        logits = _logits(query, key, scale, out, row, column, n, m, E, D, DEPTH, ROWS, KEYS, PRECISION, WIDE)
        log = tl.load(logs + row, mask=row < n, other=-float("inf"))
        some = log > -float("inf")
        share = tl.where(some[:, None], tl.exp(logits - tl.where(some, log, 0.0)[:, None]), 0.0)
        own = tl.load(positive + row, mask=row < n, other=-1)
        share -= tl.where(own[:, None] == column[None, :], 1.0, 0.0)
        share *= tl.load(by_row + row, mask=row < n, other=0.0)[:, None]
        rows = tl.load(
            query + row[:, None] * D + part[None, :], mask=(row < n)[:, None] & (part < D)[None, :], other=0.0
        )
        gradient = _add(tl.trans(share), rows, gradient, PRECISION, WIDE)
    tl.store(
        to_key + column[:, None] * D + part[None, :], gradient.to(to_key.dtype.element_ty),
        mask=(column < m)[:, None] & (part < D)[None, :],
    )  # fmt: skip
