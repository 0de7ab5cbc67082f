"""The contrast engine: one expression of which most objectives of the library are cases.

For anchor i, with similarities s (N, M), positive weights P, denominator weights W and temperatures t::

    l_i = sum_p P_ip * [ log( sum_j W_ij exp(s_ij / t_ij)  (+ exp(s_ip / t_ip) if coupled) ) - s_ip / t_ip ]

Whether the denominator holds the positives and the anchor itself is the caller's choice, by W. It has two forms with the same
values: *dense* below, short and obvious, holds the whole N x M matrix; *tiled* (`losses.tiled`) never does.
"""

import warnings
from functools import cache
from typing import Literal, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from contralto.distributed import gather_with_gradient, mean_weight, world_size
from contralto.errors import UsageError
from contralto.losses.tiled import TileFunction, called, columns_of, contrast_tiled, one_hot
from contralto.losses.units import full_precision, unit_rows

__all__ = ["Form", "Gather", "Reduction", "contrast", "is_across", "mean_over_ranks", "soft_cross_entropy"]

Reduction = Literal["mean", "mean_all", "sum", "none"]
Form = Literal["auto", "dense", "tiled", "fused"]
Gather = Literal["none", "all"]


def contrast(
    query: Tensor,
    key: Tensor,
    *,
    positives: Tensor | TileFunction | None,
    weights: Tensor | TileFunction | None = None,
    temperature: float | Tensor = 0.1,
    coupled: bool = False,
    log_outside: bool = False,
    normalize: bool = True,
    reduction: Reduction = "mean",
    form: Form = "auto",
    gather: Gather = "none",
) -> Tensor:
    """Contrast every query with all keys.

    Parameters
    ----------
    query : Tensor (..., N, D)
        Anchors, raw or unit rows.
    key : Tensor (..., M, D)
        What they are compared with: another view, a queue, prototypes, class texts, or several of them concatenated.
    positives : Tensor or function
        P. Integers (..., N): the column of the one positive, -1 = none. Otherwise booleans or weights >= 0 that broadcast
        to (..., N, M). Never carries gradient. A function is called with row numbers (n, 1) and column numbers (1, m)
        and returns that tile of P. None: the loss is the logarithm of the denominator alone.
    weights : Tensor or function, optional
        W, booleans or weights >= 0 that broadcast to (..., N, M), so (M,) weighs columns; default: all columns, once.
        Integers (..., N, E): the columns that a row leaves out of its denominator, -1 = none. A function works as for
        `positives`.
    temperature : float or Tensor
        t > 0, broadcast to (..., N, M): a number, (N, 1) per anchor, (M,) per key; may carry gradient.
    coupled : bool
        Add the positive's own term to the denominator of its logarithm.
    log_outside : bool
        Take the logarithm of the weighted sum over positives instead of the sum of logarithms. Not with `coupled`.
    normalize : bool
        Scale rows to length one first. `False` takes them as they are.
    reduction : {"mean", "mean_all", "sum", "none"}
        "mean" is over the anchors that have positives, "mean_all" over all anchors; anchors without positives, or without
        anything to be compared with, count as 0.
    form : {"auto", "dense", "tiled", "fused"}
        "auto" is fused for half precision on CUDA where there is one positive a row by its column, `weights` are columns left out
        or none, and the temperature is one or one per row; otherwise tiled. Leading dimensions and second derivatives need the
        dense form.
    gather : {"none", "all"}
        "all" contrasts the queries of this process with the keys of all (`distributed.gather_with_gradient`); `positives` and
        `weights` then speak of those, see `distributed.own_places`. The mean over processes of what they return, and of their
        parameters' gradients, is that of one process with the whole batch.

    Returns
    -------
    Tensor
        A scalar, or (..., N) for "none". 0 (with gradient) when no anchor has a positive.

    Raises
    ------
    UsageError
        If a shape or a value does not fit.

    Notes
    -----
    Half precision is computed in float32; the fused form takes its products from half precision and adds up in float32. InfoNCE
    of paired views is ``positives=torch.arange(N)``; a queue of negatives is ``key=cat(view, queue)`` with `weights` 0 on the
    view's columns and ``coupled=True``; prototype contrast is ``key=prototypes, positives=labels``.

    Examples
    --------
    >>> q, k = torch.eye(3), torch.eye(3)
    >>> contrast(q, k, positives=torch.arange(3), temperature=1.0)
    tensor(0.5514)
    >>> F.cross_entropy(q @ k.T, torch.arange(3))
    tensor(0.5514)
    """
    if query.shape[-1] != key.shape[-1]:
        raise UsageError(f"query and key must have the same width, got {query.shape[-1]} and {key.shape[-1]}")
    if form not in ("auto", "dense", "tiled", "fused"):
        raise UsageError(f'form must be "auto", "dense", "tiled" or "fused", got {form!r}')
    if reduction not in ("mean", "mean_all", "sum", "none"):
        raise UsageError(f'reduction must be "mean", "mean_all", "sum" or "none", got {reduction!r}')
    if positives is None and (coupled or log_outside):
        raise UsageError("positives=None gives the logarithm of the denominator alone: neither coupled nor log_outside")
    if coupled and log_outside:
        raise UsageError("coupled=True is defined for the sum of logarithms only, not with log_outside=True")
    if not isinstance(temperature, Tensor) and not temperature > 0:
        raise UsageError(f"temperature must be above 0, got {temperature}")
    across = is_across(gather)
    if across:
        key = gather_with_gradient(key)
    positives, weights = columns_of(positives), columns_of(weights)
    if isinstance(positives, Tensor) and positives.dtype == torch.int64 and positives.shape != query.shape[:-1]:
        raise UsageError(
            f"positives by column must be of shape {tuple(query.shape[:-1])}, got {tuple(positives.shape)}"
        )
    if isinstance(weights, Tensor) and weights.dtype == torch.int64 and weights.shape[:-1] != query.shape[:-1]:
        raise UsageError(
            f"weights as integers name columns to leave out and must be of shape {(*query.shape[:-1], 'E')}, got "
            f"{tuple(weights.shape)}"
        )
    flat = query.ndim == key.ndim == 2
    simple = flat and not coupled and not log_outside and _is_simple(positives, weights, temperature, len(query))
    if form == "auto":
        form = "dense" if not flat else "fused" if simple and is_half_on_cuda(query, key) and _fused() else "tiled"
    if form in ("tiled", "fused") and not flat:
        raise UsageError(f'form="{form}" takes query (N, D) and key (M, D); leading dimensions need "dense"')
    if form == "fused" and not simple:
        raise UsageError(
            'form="fused" takes one positive a row by its column, columns left out, one temperature or one per row'
        )
    with full_precision(query):
        given = torch.promote_types(query.dtype, key.dtype)
        dtype = torch.promote_types(given, torch.float32)
        query, key = (query.to(dtype),) * 2 if query is key else (query.to(dtype), key.to(dtype))
        if normalize and form == "dense":
            query, key = F.normalize(query, dim=-1), F.normalize(key, dim=-1)
        elif normalize:
            query, key = unit_rows(query) * 2 if query is key else unit_rows(query, key)
        if form == "dense":
            loss, valid = _dense(query, key, positives, weights, temperature, coupled, log_outside)
        elif form == "tiled":
            loss, valid = contrast_tiled(
                query, key, positives=positives, weights=weights, temperature=temperature, coupled=coupled,
                log_outside=log_outside, summed=reduction != "none",
            )  # fmt: skip
        else:
            from contralto.losses.fused import contrast_fused

            loss, valid = contrast_fused(
                query.to(given), key.to(given), positives=cast(Tensor | None, positives), out=cast(Tensor | None, weights),
                temperature=temperature,
            )  # fmt: skip
    if reduction == "none":
        return loss
    count = valid.sum() if reduction == "mean" else torch.tensor(valid.numel(), device=valid.device)
    loss = loss.sum() if reduction == "sum" else loss.sum() / count.clamp_min(1)
    return mean_over_ranks(loss, count, reduction) if across else loss


def is_half_on_cuda(*rows: Tensor) -> bool:
    """Whether the fused form is the faster one: all rows of one half precision, on CUDA."""
    kinds = {(x.device.type, x.dtype) for x in rows}
    return len(kinds) == 1 and kinds <= {("cuda", torch.float16), ("cuda", torch.bfloat16)}


def _is_simple(positives: object, weights: object, temperature: float | Tensor, rows: int) -> bool:
    """Whether the fused form takes these."""
    by_column = positives is None or (isinstance(positives, Tensor) and positives.dtype == torch.int64)
    leaves_out = weights is None or (isinstance(weights, Tensor) and weights.dtype == torch.int64)
    by_row = not isinstance(temperature, Tensor) or temperature.numel() == 1 or temperature.shape == (rows, 1)
    return by_column and leaves_out and by_row


@cache
def _fused() -> bool:
    """Whether the fused form works here; says once why not."""
    try:
        from contralto.losses.fused import contrast_fused

        with torch.enable_grad():
            x = torch.eye(16, dtype=torch.float16, device="cuda", requires_grad=True)
            contrast_fused(x, x, positives=None, out=None, temperature=1.0)[0].sum().backward()
    except Exception as error:  # whatever a compiler or a driver raises
        warnings.warn(f"contrast: the fused form does not work here, the tiled one is taken: {error}", stacklevel=3)
        return False
    return True


def is_across(gather: Gather) -> bool:
    """Whether there are other processes whose rows are to be taken."""
    if gather not in ("none", "all"):
        raise UsageError(
            f'gather must be "none" or "all", got {gather!r}; keys of other processes without their gradient are not '
            "offered: the gradient of a loss over them would be wrong"
        )
    return gather == "all" and world_size() > 1


def mean_over_ranks(loss: Tensor, count: Tensor, reduction: Reduction) -> Tensor:
    """A loss over `count` anchors of this process, so scaled that its mean over processes is the loss of the whole batch."""
    return loss if reduction == "none" else loss * (world_size() if reduction == "sum" else mean_weight(count))


def _dense(
    query: Tensor,
    key: Tensor,
    positives: Tensor | TileFunction | None,
    weights: Tensor | TileFunction | None,
    temperature: float | Tensor,
    coupled: bool,
    log_outside: bool,
) -> tuple[Tensor, Tensor]:
    """Losses (..., N) and which rows count, by the whole matrix."""
    logits = query @ key.transpose(-1, -2) / temperature  # (..., N, M)
    masked = logits
    if weights is not None:
        W = _dense_weights(weights, logits)
        masked = logits + W.to(logits.dtype).log()
    # A finite floor keeps rows without any column out of inf - inf; they are skipped below.
    floor = torch.finfo(logits.dtype).min
    log_denominator = masked.clamp_min(floor).logsumexp(-1, keepdim=True)  # (..., N, 1)
    valid = (masked > floor).any(-1)
    if positives is None:
        return torch.where(valid, log_denominator.squeeze(-1), 0.0), valid
    P = _dense_positives(positives, logits).detach()
    if coupled:
        per_pair = torch.logaddexp(log_denominator.expand_as(logits), logits) - logits
        loss = torch.where(P > 0, P * per_pair, 0.0).sum(-1)
        valid = (P > 0).any(-1)
    elif log_outside:
        loss = log_denominator.squeeze(-1) - (logits + P.log()).clamp_min(floor).logsumexp(-1)
        valid = (P > 0).any(-1) & valid
    else:
        loss = torch.where(P > 0, P * (log_denominator - logits), 0.0).sum(-1)
        valid = (P > 0).any(-1) & valid
    return torch.where(valid, loss, 0.0), valid


def _dense_weights(weights: Tensor | TileFunction, logits: Tensor) -> Tensor:
    if not isinstance(weights, Tensor):
        return called(weights, 0, logits)
    if weights.dtype != torch.int64:
        return weights
    there = torch.ones_like(logits, dtype=torch.bool)
    # Columns of -1 change one that is not there.
    there = torch.cat([there, there[..., :1]], -1)
    return there.scatter(-1, torch.where(weights < 0, logits.shape[-1], weights), False)[..., :-1]


def _dense_positives(positives: Tensor | TileFunction, logits: Tensor) -> Tensor:
    if not isinstance(positives, Tensor):
        return called(positives, 0, logits).to(logits.dtype)
    if positives.dtype == torch.int64:
        return one_hot(positives, logits)
    return positives.to(logits.dtype).expand_as(logits)


def soft_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy with soft targets, per sample.

    Parameters
    ----------
    logits : Tensor (N, C)
    target : Tensor (N, C)
        Rows that sum to 1; carries no gradient.

    Returns
    -------
    Tensor (N,)

    Examples
    --------
    >>> soft_cross_entropy(torch.zeros(1, 2), torch.tensor([[0.3, 0.7]]))
    tensor([0.6931])
    """
    return -(target.detach() * F.log_softmax(logits, dim=-1)).sum(-1)
