"""ICNN: how well nearest neighbours tell classes apart, as a score in (0, 1] and as a loss (SuSana Distancia, arXiv 2305.09062).

The score looks at the k nearest neighbours of every row and asks three things: are those of the own class near, compared with
the nearest of another class (lambda intra); are those of other classes far (lambda inter); and how many are of the own class
(gamma, a count that has no gradient)? Numbers and letters follow the released code; the printed form differs in versions.

Where the released code drops the first neighbour as the point itself, a point is left out here by its number: a twin at the
same place stays. Neighbours in another set (`pool`) are all kept.
"""

import torch
from torch import Tensor

from contralto.errors import UsageError
from contralto.losses.episodes import distances

__all__ = ["icnn_loss", "icnn_score"]

EPS = 1e-7


def icnn_score(
    x: Tensor,
    labels: Tensor,
    *,
    k: int = 4,
    window: int | None = None,
    omega: bool = False,
    pool: Tensor | None = None,
    pool_labels: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """How well the nearest neighbours of a labelled set tell its classes apart; 1 is best.

    Parameters
    ----------
    x : Tensor (..., N, D)
        One set, or several in the leading dimensions. Distances are those of the rows as they are.
    labels : Tensor (..., N)
    k : int
        Neighbours that are judged. With k + 1 rows to choose from or fewer, one less than there are, and then the count of
        neighbours of the own class is left out (taken as 1).
    window : int, optional
        Neighbours among which the nearest of another class is looked for; default k + 1. At most all others.
    omega : bool
        Take a third part into the mean: one minus the variance of the distances to the k neighbours, scaled to [0, 1] in each
        row. The paper has such a part, the released code no longer; its form here is that of an older version.
    pool : Tensor (..., M, D), optional
        Where neighbours come from, with `pool_labels` (..., M); default: the other rows of x.
    eps : float
        Under the root of the distances.

    Returns
    -------
    Tensor (...)
        Gradient flows through the distances only; which rows are neighbours, labels and counts are constants.

    Raises
    ------
    UsageError
        If there are fewer than three rows (two in a pool), the window is smaller than k, or shapes do not fit.

    Notes
    -----
    Holds the N x N distances. Unchanged by turns and shifts of x, and by its scale but for the small constants.

    Examples
    --------
    >>> x = torch.tensor([[0.0], [0.1], [0.2], [5.0], [5.1], [5.2]])
    >>> icnn_score(x, torch.tensor([0, 0, 0, 1, 1, 1]), k=2)
    tensor(0.9932)
    >>> icnn_score(x, torch.tensor([0, 1, 0, 1, 0, 1]), k=2) < 0.6
    tensor(True)
    """
    _fit(x, labels, pool, pool_labels)
    d, same = _neighbours(x, labels, pool, pool_labels, eps)  # (..., N, M), nearest first
    there = d.shape[-1]
    whole = k + 1 < there  # else the judged neighbours are nearly all there are, and their count says nothing
    k = k if whole else there - 1
    window = min(k + 1 if window is None else window, there)
    if k < 1 or window < k:
        raise UsageError(
            f"window must hold at least the k = {k} neighbours that are judged, and k be at least 1; got {window}"
        )
    d, same = d[..., :window], same[..., :window]
    other = torch.where(same, torch.inf, d).amin(-1)  # the nearest of another class
    d, same = d[..., :k], same[..., :k]
    parts = [(_intra(d, same, other) + _inter(d, ~same)) / 2]
    parts.append(same.to(d.dtype).mean((-2, -1)) if whole else torch.ones_like(parts[0]))
    if omega:
        parts.append(_omega(d))
    return torch.stack(parts).mean(0)


def icnn_loss(
    x: Tensor,
    labels: Tensor,
    *,
    k: int = 4,
    window: int | None = None,
    omega: bool = False,
    pool: Tensor | None = None,
    pool_labels: Tensor | None = None,
) -> Tensor:
    """``-ln(score)`` of `icnn_score`, mean over sets. It has jumps where neighbours change: small learning rates.

    Parameters
    ----------
    x, labels, k, window, omega, pool, pool_labels
        See `icnn_score`.

    Examples
    --------
    >>> x = torch.tensor([[0.0], [0.1], [0.2], [5.0], [5.1], [5.2]], requires_grad=True)
    >>> icnn_loss(x, torch.tensor([0, 0, 0, 1, 1, 1]), k=2).backward()
    >>> bool((x.grad[:3].sum() > 0) & (x.grad[3:].sum() < 0))
    True
    """
    score = icnn_score(x, labels, k=k, window=window, omega=omega, pool=pool, pool_labels=pool_labels)
    return -score.log().mean()


def _neighbours(
    x: Tensor, labels: Tensor, pool: Tensor | None, pool_labels: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Distances of every row to all others, or to all of a pool, ascending; and whether those are of its class."""
    if pool is None or pool_labels is None:
        e = distances(x, x, eps=eps)
        e = e.masked_fill(torch.eye(e.shape[-1], dtype=torch.bool, device=e.device), torch.inf)
        keys, drop = labels, 1
    else:
        e, keys, drop = distances(x, pool, eps=eps), pool_labels, 0
    order = e.detach().argsort(dim=-1, stable=True)
    order = order[..., : e.shape[-1] - drop]  # the row itself, infinitely far, comes last
    same = labels.unsqueeze(-1) == keys.unsqueeze(-2)
    return e.gather(-1, order), same.gather(-1, order)


def _intra(d: Tensor, same: Tensor, other: Tensor) -> Tensor:
    """One minus how far neighbours of the own class are, against the nearest of another; of a row without any, nothing."""
    ratio = d / (other.unsqueeze(-1) + EPS)  # 0 where no other class is in the window
    ratio = ratio / ratio.amax(-1, keepdim=True).clamp_min(1)
    return 1 - _mean_of_rows(ratio, same)


def _inter(d: Tensor, differs: Tensor) -> Tensor:
    """How far neighbours of other classes are, against the farthest of them anywhere; 1 where there is none at all."""
    far = d * differs
    share = _mean_of_rows(far / (far.amax((-2, -1), keepdim=True) + EPS), differs)
    return (share - (~differs).flatten(-2).all(-1).to(d.dtype)).abs()


def _mean_of_rows(values: Tensor, counted: Tensor) -> Tensor:
    """Mean over the counted values of a row, then over the rows that have some."""
    count = counted.sum(-1).to(values.dtype)
    means = (values * counted).sum(-1) / (count + EPS)
    return means.sum(-1) / ((count > 0).sum(-1).to(values.dtype) + EPS)


def _omega(d: Tensor) -> Tensor:
    """One minus the variance of the distances of a row, scaled to [0, 1] in it; mean over rows."""
    low = d[..., :1]
    scaled = (d - low) / (d[..., -1:] - low + EPS)
    return 1 - scaled.var(-1, correction=0).mean(-1)


def _fit(x: Tensor, labels: Tensor, pool: Tensor | None, pool_labels: Tensor | None) -> None:
    if x.ndim < 2 or labels.shape != x.shape[:-1]:
        raise UsageError(f"x (..., N, D) and labels (..., N) do not fit: {tuple(x.shape)} and {tuple(labels.shape)}")
    if (pool is None) != (pool_labels is None):
        raise UsageError("a pool comes with pool_labels, and pool_labels with a pool")
    if pool is None and x.shape[-2] < 3:
        raise UsageError(f"neighbours need at least three rows to be judged, got {x.shape[-2]}")
    if pool is not None and pool_labels is not None:
        if pool_labels.shape != pool.shape[:-1] or pool.shape[:-2] != x.shape[:-2] or pool.shape[-1] != x.shape[-1]:
            raise UsageError(
                f"pool (..., M, D) and pool_labels (..., M) do not fit: {tuple(pool.shape)} and {tuple(pool_labels.shape)}"
            )
        if pool.shape[-2] < 2:
            raise UsageError("a pool needs at least two rows")
