"""The contrast engine: one expression of which most objectives of the library are cases.

For anchor i, with similarities s (N, M), positive weights P, denominator weights W and temperatures t::

    l_i = sum_p P_ip * [ log( sum_j W_ij exp(s_ij / t_ij)  (+ exp(s_ip / t_ip) if coupled) ) - s_ip / t_ip ]

Whether the denominator holds the positives and the anchor itself is the caller's choice, by W. It has two forms with the same
values: *dense* below, short and obvious, holds the whole N x M matrix; *tiled* (`losses.tiled`) never does.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from contralto.errors import UsageError
from contralto.losses.tiled import TileFunction, called, columns_of, contrast_tiled, one_hot
from contralto.losses.units import full_precision, unit_rows

__all__ = ["Form", "Reduction", "contrast", "soft_cross_entropy"]

Reduction = Literal["mean", "mean_all", "sum", "none"]
Form = Literal["auto", "dense", "tiled"]


def contrast(
    query: Tensor,
    key: Tensor,
    *,
    positives: Tensor | TileFunction,
    weights: Tensor | TileFunction | None = None,
    temperature: float | Tensor = 0.1,
    coupled: bool = False,
    log_outside: bool = False,
    normalize: bool = True,
    reduction: Reduction = "mean",
    form: Form = "auto",
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
        and returns that tile of P.
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
    form : {"auto", "dense", "tiled"}
        "auto" is tiled unless there are leading dimensions. They and second derivatives need the dense form.

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
    Half precision is computed in float32. InfoNCE of paired views is ``positives=torch.arange(N)``; a queue of negatives
    is ``key=cat(view, queue)`` with `weights` 0 on the view's columns and ``coupled=True``; prototype contrast is
    ``key=prototypes, positives=labels``.

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
    if form not in ("auto", "dense", "tiled"):
        raise UsageError(f'form must be "auto", "dense" or "tiled", got {form!r}')
    if reduction not in ("mean", "mean_all", "sum", "none"):
        raise UsageError(f'reduction must be "mean", "mean_all", "sum" or "none", got {reduction!r}')
    if coupled and log_outside:
        raise UsageError("coupled=True is defined for the sum of logarithms only, not with log_outside=True")
    if not isinstance(temperature, Tensor) and not temperature > 0:
        raise UsageError(f"temperature must be above 0, got {temperature}")
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
    with full_precision(query):
        dtype = torch.promote_types(torch.promote_types(query.dtype, key.dtype), torch.float32)
        query, key = (query.to(dtype),) * 2 if query is key else (query.to(dtype), key.to(dtype))
        flat = query.ndim == key.ndim == 2
        if form == "tiled" or (form == "auto" and flat):
            if not flat:
                raise UsageError('form="tiled" takes query (N, D) and key (M, D); leading dimensions need "dense"')
            if normalize:
                query, key = unit_rows(query) * 2 if query is key else unit_rows(query, key)
            loss, valid = contrast_tiled(
                query, key, positives=positives, weights=weights, temperature=temperature, coupled=coupled,
                log_outside=log_outside, summed=reduction != "none",
            )  # fmt: skip
        else:
            if normalize:
                query, key = F.normalize(query, dim=-1), F.normalize(key, dim=-1)
            loss, valid = _dense(query, key, positives, weights, temperature, coupled, log_outside)
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    return loss.sum() / (valid.sum().clamp_min(1) if reduction == "mean" else max(valid.numel(), 1))


def _dense(
    query: Tensor,
    key: Tensor,
    positives: Tensor | TileFunction,
    weights: Tensor | TileFunction | None,
    temperature: float | Tensor,
    coupled: bool,
    log_outside: bool,
) -> tuple[Tensor, Tensor]:
    """Losses (..., N) and which rows count, by the whole matrix."""
    logits = query @ key.transpose(-1, -2) / temperature  # (..., N, M)
    P = _dense_positives(positives, logits).detach()
    masked = logits
    if weights is not None:
        W = _dense_weights(weights, logits)
        masked = logits + W.to(logits.dtype).log()
    # A finite floor keeps rows without any column out of inf - inf; they are skipped below.
    floor = torch.finfo(logits.dtype).min
    log_denominator = masked.clamp_min(floor).logsumexp(-1, keepdim=True)  # (..., N, 1)
    if coupled:
        per_pair = torch.logaddexp(log_denominator.expand_as(logits), logits) - logits
        loss = torch.where(P > 0, P * per_pair, 0.0).sum(-1)
        valid = (P > 0).any(-1)
    elif log_outside:
        loss = log_denominator.squeeze(-1) - (logits + P.log()).clamp_min(floor).logsumexp(-1)
        valid = (P > 0).any(-1) & (masked > floor).any(-1)
    else:
        loss = torch.where(P > 0, P * (log_denominator - logits), 0.0).sum(-1)
        valid = (P > 0).any(-1) & (masked > floor).any(-1)
    loss = torch.where(valid, loss, loss.new_zeros(()))
    return loss, valid


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
