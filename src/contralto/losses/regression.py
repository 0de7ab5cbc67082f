"""Contrast for regression: samples with a number each, whose embeddings are to lie in the order of their numbers.

=====================  ===========================================  =========================================================
loss                   positives                                    denominator
=====================  ===========================================  =========================================================
`sup_re_mix`           rows of the same number, and mixtures of     all other rows and all mixtures, those of a far number more
                       two rows on either side of it
`sup_con_numbers`      rows of the same number                      all other rows, those of a far number more
`rank_n_contrast`      every other row                              all rows whose number is at least as far
=====================  ===========================================  =========================================================

Numbers are taken in their own units: a window of 5 is five of them, and the weight of a row grows by one with every one of
them. Rows count as of the same number when it is equal, so round it to what is meaningful.
"""

import math
from typing import Literal

import torch
from torch import Tensor

from contralto.errors import UsageError
from contralto.losses.contrast import contrast
from contralto.losses.mixing import beta_shares
from contralto.losses.units import full_precision, unit_rows

__all__ = ["Weight", "distance_weights", "mixing_shares", "rank_n_contrast", "sup_con_numbers", "sup_re_mix"]

Weight = Literal["l1", "squared", "none"]


def sup_re_mix(
    z: Tensor,
    numbers: Tensor,
    shares: Tensor | None,
    *,
    window: float | None = 5.0,
    temperature: float = 0.3,
    weight: Weight = "l1",
    shift: Literal["joint", "blocks"] = "joint",
    nearest: int | None = None,
    normalize: bool = True,
) -> Tensor:
    """SupReMix: supervised contrast with mixtures of embeddings as hard negatives and hard positives.

    Of anchor i, a hard negative mixes it with a row k of another number, ``a v_i + (1 - a) v_k``, and has the number in between;
    a hard positive mixes rows j and k on either side of it, so that the mixture has the number of the anchor. No mixture carries
    gradient, and none is ever made: its product with the anchor is the mixture of the products.

    Parameters
    ----------
    z : Tensor (R, D)
        All views of all samples.
    numbers : Tensor (R,)
    shares : Tensor (R, R), optional
        The anchor's share ``a`` in the mixture of row i and row k (`mixing_shares`); what stands where numbers are equal is not
        looked at. None leaves the hard negatives out.
    window : float, optional
        Hard positives are made of rows nearer than this. None leaves them out.
    temperature : float
    weight : {"l1", "squared", "none"}
        In the denominator a row or mixture weighs ``|difference of numbers| + 1``, ``difference^2 + 1``, or 1.
    shift : {"joint", "blocks"}
        "joint" is one softmax over rows and mixtures. "blocks" is the released code: logits of rows and of mixtures are lowered
        by their own largest one before they meet, which makes the hardest mixture count like the row itself.
    nearest : int, optional
        Hard positives are made of no more than so many rows on each side, the nearest ones; default: all up to 256 rows, else 64.
    normalize : bool
        Scale rows to length one first.

    Returns
    -------
    Tensor
        Mean over the rows that have positives.

    Raises
    ------
    UsageError
        If shapes or values do not fit.

    Notes
    -----
    Memory is R times the largest number of pairs of one anchor.

    Examples
    --------
    >>> z, y = torch.eye(4).repeat(2, 1), torch.arange(4.0).repeat(2)
    >>> shares = mixing_shares(8, generator=torch.Generator().manual_seed(0))
    >>> bool(sup_re_mix(z, y, shares) > sup_con_numbers(z, y, temperature=0.3))
    True
    """
    r = len(z)
    _check(z, numbers, temperature)
    if shares is not None and shares.shape != (r, r):
        raise UsageError(f"shares must be of shape ({r}, {r}), got {tuple(shares.shape)}")
    if window is not None and not window > 0:
        raise UsageError(f"window must be above 0, got {window}")
    if shift not in ("joint", "blocks"):
        raise UsageError(f'shift must be "joint" or "blocks", got {shift!r}')
    with full_precision(z):
        v = unit_rows(z)[0] if normalize else z.to(torch.promote_types(z.dtype, torch.float32))
        y = numbers.to(v)
        own = torch.eye(r, dtype=torch.bool, device=v.device)
        apart = y[:, None] - y  # (R, R), of anchor and other
        real = v @ v.T / temperature
        mixed = v @ v.detach().T / temperature  # gradient through the anchor alone
        same = (apart == 0) & ~own
        count, found = same.sum(1), torch.where(same, real, 0.0).sum(1)
        blocks: list[Tensor] = []  # logits of mixtures with the logarithm of their weight, each (R, ...)
        highest: list[Tensor] = []
        if shares is not None:
            a = torch.where(apart == 0, 0.0, shares.to(v))
            logits = torch.lerp(mixed, mixed.diagonal()[:, None], a)
            there = apart != 0
            blocks.append((logits + distance_weights((1 - a) * apart, weight).log()).masked_fill(~there, -torch.inf))
            highest.append(logits.detach().masked_fill(~there, 0.0).amax(1))
        if window is not None:
            logits, there = _between(mixed, y, window, nearest if nearest is not None or r <= 256 else 64)
            blocks.append(logits.masked_fill(~there, -torch.inf).flatten(1))
            highest.append(logits.detach().masked_fill(~there, 0.0).flatten(1).amax(1))
            count = count + there.flatten(1).sum(1)
        weighted = (real + distance_weights(apart, weight).log()).masked_fill(own, -torch.inf)
        if shift == "blocks" and blocks:
            of_rows, of_mixtures = real.detach().amax(1), torch.stack([*highest, torch.zeros_like(highest[0])]).amax(0)
            weighted, found = weighted - of_rows[:, None], found - same.sum(1) * of_rows
            blocks = [block - of_mixtures[:, None] for block in blocks]
        if window is not None:
            found = found + torch.where(there.flatten(1), blocks[-1], 0.0).sum(1)
        denominator = torch.cat([weighted, *blocks], 1).logsumexp(1)
        valid = count > 0
        each = torch.where(valid, denominator - found / count.clamp_min(1), 0.0)
        return each.sum() / valid.sum().clamp_min(1)


def _between(mixed: Tensor, y: Tensor, window: float, nearest: int | None) -> tuple[Tensor, Tensor]:
    """Logits (R, A, B) of mixtures of the rows below and above every anchor that have its number, and which there are."""
    apart = y[:, None] - y
    sides = []
    for below in (apart, -apart):
        near = (below > 0) & (below < window)
        most = int(near.sum(1).max()) if len(y) else 0
        take = max(1, most if nearest is None else min(most, nearest))
        distance, column = below.masked_fill(~near, torch.inf).topk(min(take, len(y)), largest=False)
        sides.append((distance, mixed.gather(1, column)))
    (low, below), (high, above) = sides
    there = torch.isfinite(low)[:, :, None] & torch.isfinite(high)[:, None]
    low, high = (torch.where(torch.isfinite(x), x, 1.0) for x in (low, high))
    share = high[:, None] / (low[:, :, None] + high[:, None])  # of the row below: a y_j + (1 - a) y_k = y_i
    return share * below[:, :, None] + (1 - share) * above[:, None], there


def mixing_shares(
    rows: int,
    *,
    alpha: float = 2.0,
    beta: float = 8.0,
    generator: torch.Generator,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Shares (rows, rows) of anchors in their hard negatives, from Beta(alpha, beta), one for every pair.

    Parameters
    ----------
    rows : int
    alpha, beta : float
        2 and 8 leave the anchor a fifth; the paper also tries 8 and 2, and 5 and 5.
    generator : torch.Generator
    dtype : torch.dtype, optional

    Examples
    --------
    >>> mixing_shares(3, generator=torch.Generator().manual_seed(0)).shape
    torch.Size([3, 3])
    """
    return beta_shares((rows, rows), alpha, beta, generator=generator, dtype=dtype)


def distance_weights(apart: Tensor, weight: Weight = "l1") -> Tensor:
    """Weights in the denominator by differences of numbers: 1 where there is none.

    Examples
    --------
    >>> distance_weights(torch.tensor([0.0, -2.0])).tolist(), distance_weights(torch.tensor([0.0, -2.0]), "squared").tolist()
    ([1.0, 3.0], [1.0, 5.0])
    """
    if weight == "l1":
        return apart.abs() + 1
    if weight == "squared":
        return apart.square() + 1
    if weight != "none":
        raise UsageError(f'weight must be "l1", "squared" or "none", got {weight!r}')
    return torch.ones_like(apart)


def sup_con_numbers(z: Tensor, numbers: Tensor, *, temperature: float = 0.3, weight: Weight = "l1") -> Tensor:
    """Supervised contrast whose classes are equal numbers, with negatives that weigh more the farther they are.

    Parameters
    ----------
    z : Tensor (R, D)
        Scaled to length one here.
    numbers : Tensor (R,)
    temperature : float
    weight : {"l1", "squared", "none"}
        "none" is plain supervised contrast.

    Returns
    -------
    Tensor
        Mean over the rows that have another one of their number.

    Examples
    --------
    >>> z, y = torch.eye(3).repeat(2, 1), torch.arange(3.0).repeat(2)
    >>> sup_con_numbers(z, y, temperature=1.0, weight="none"), sup_con_numbers(z, y, temperature=1.0)
    (tensor(0.9048), tensor(1.4860))
    """
    _check(z, numbers, temperature)
    y = numbers.to(torch.promote_types(z.dtype, torch.float32))
    apart = y[:, None] - y
    out = 1 - torch.eye(len(z), dtype=apart.dtype, device=apart.device)
    same = (apart == 0) * out
    return contrast(
        z, z, positives=same / same.sum(1, keepdim=True).clamp_min(1), weights=distance_weights(apart, weight) * out,
        temperature=temperature,
    )  # fmt: skip


def rank_n_contrast(z: Tensor, numbers: Tensor, *, temperature: float = 2.0) -> Tensor:
    """Rank-N-Contrast (Zha et al. 2023): every row before those whose number is as far from the anchor's, or farther.

    ``-1 / (R (R - 1)) sum_{i != j} [ s_ij - log sum_{k != i, |y_i - y_k| >= |y_i - y_j|} exp s_ik ]``, ``s = -|z_i - z_k| / t``.

    Parameters
    ----------
    z : Tensor (R, D)
        As they are, at least two.
    numbers : Tensor (R,)
    temperature : float

    Returns
    -------
    Tensor
        Mean over all ordered pairs, which are sorted by distance, not compared with each other: O(R^2 log R).

    Examples
    --------
    >>> rank_n_contrast(torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([0.0, 1.0, 2.0]))
    tensor(0.3891)
    """
    _check(z, numbers, temperature)
    r = len(z)
    if r < 2:
        raise UsageError("rank_n_contrast compares rows with each other: at least two are needed")
    with full_precision(z):
        x = z.to(torch.promote_types(z.dtype, torch.float32))
        y = numbers.to(x)
        # The products of long rows lose what the distance of close ones is made of, so differences are taken.
        s = -torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist") / temperature
        others = _without_diagonal(r, z.device)
        s, apart = s.gather(1, others), (y[:, None] - y).abs().gather(1, others)
        far, order = apart.sort(dim=1, stable=True)
        sorted_s = s.gather(1, order)
        at_least = sorted_s.flip(1).logcumsumexp(1).flip(1)  # of a place and all behind it
        first = torch.searchsorted(far, far)  # equal distances begin at one place
        return (at_least.gather(1, first) - sorted_s).mean()


def _without_diagonal(r: int, device: torch.device) -> Tensor:
    """Columns (R, R - 1) of all others."""
    column = torch.arange(r - 1, device=device).expand(r, -1)
    return column + (column >= torch.arange(r, device=device)[:, None]).long()


def _check(z: Tensor, numbers: Tensor, temperature: float) -> None:
    if z.ndim != 2 or numbers.shape != z.shape[:1]:
        raise UsageError(
            f"there must be rows (R, D) and a number for each, got {tuple(z.shape)} and {tuple(numbers.shape)}"
        )
    if not (temperature > 0 and math.isfinite(temperature)):
        raise UsageError(f"temperature must be above 0, got {temperature}")
