"""Supervised contrast with a focal weight on every pair, for rows whose labels may be mixtures (Core-tuning, equation 5).

``p_ij = exp(z_i.z_j / t) / sum_{k != i} exp(z_i.z_k / t)``, and of anchor i ``sum_{j in P(i)} -(1 - p_ij)^gamma log p_ij``. The
weight depends on the pair and carries gradient, so this is no case of the contrast engine; its matrix is that of one batch.
"""

from typing import Literal

import torch
from torch import Tensor

from contralto.errors import UsageError
from contralto.losses.units import full_precision, unit_rows

__all__ = ["focal_sup_con", "same_targets"]


def focal_sup_con(
    z: Tensor,
    targets: Tensor,
    *,
    temperature: float = 0.07,
    gamma: float = 1.0,
    over: Literal["positives", "rows"] = "positives",
    tolerance: float = 1e-5,
) -> Tensor:
    """Focal supervised contrast over all rows.

    Parameters
    ----------
    z : Tensor (M, D)
        Scaled to length one here.
    targets : Tensor (M,) or (M, C)
        Integers: rows of the same one are positives, below 0 a row matches nothing. Or soft labels: rows whose labels agree.
    temperature : float
    gamma : float
        0 weighs all pairs alike: plain supervised contrast.
    over : {"positives", "rows"}
        What an anchor's sum is divided by: its positives (the paper) or M (the released code). The second is smaller by about
        the share of rows that are positives, so a weight of one means nothing for the other.
    tolerance : float
        Soft labels agree if no entry differs by more.

    Returns
    -------
    Tensor
        Mean over the anchors that have positives; 0 (with gradient) if none has.

    Raises
    ------
    UsageError
        If shapes or values do not fit.

    Examples
    --------
    >>> z, y = torch.eye(2).repeat(2, 1), torch.tensor([0, 1, 0, 1])
    >>> focal_sup_con(z, y, temperature=1.0, gamma=0.0), focal_sup_con(z, y, temperature=1.0)
    (tensor(0.5514), tensor(0.2337))
    """
    if not temperature > 0 or gamma < 0:
        raise UsageError(f"temperature must be above 0 and gamma at least 0, got {temperature} and {gamma}")
    if over not in ("positives", "rows"):
        raise UsageError(f'over must be "positives" or "rows", got {over!r}')
    positives = same_targets(targets, tolerance=tolerance)
    if len(positives) != len(z):
        raise UsageError(f"there must be a target for each of {len(z)} rows, got {len(positives)}")
    with full_precision(z):
        (unit,) = unit_rows(z)
        own = torch.eye(len(z), dtype=torch.bool, device=z.device)
        log_p = (unit @ unit.T / temperature).masked_fill(own, -torch.inf).log_softmax(1)
        log_p = torch.where(positives, log_p, 0.0)  # -inf of oneself, times 0, would not be a number
        weight = 1.0 if gamma == 0 else (-torch.expm1(log_p)).clamp_min(0) ** gamma
        count = positives.sum(1)
        total = torch.where(positives, -weight * log_p, 0.0).sum(1)
        each = total / (count.clamp_min(1) if over == "positives" else len(z))
        return each.sum() / (count > 0).sum().clamp_min(1)


@torch.no_grad()
def same_targets(targets: Tensor, *, tolerance: float = 1e-5) -> Tensor:
    """Which rows are positives of each other: those of one label, hard or soft, but for oneself.

    Parameters
    ----------
    targets : Tensor (M,) or (M, C)
        See `focal_sup_con`.
    tolerance : float

    Returns
    -------
    Tensor of bool (M, M)

    Examples
    --------
    >>> same_targets(torch.tensor([[1.0, 0.0], [0.3, 0.7], [1.0, 0.0], [0.3, 0.7]])).long().tolist()
    [[0, 0, 1, 0], [0, 0, 0, 1], [1, 0, 0, 0], [0, 1, 0, 0]]
    >>> same_targets(torch.tensor([4, 4, -1, -1])).sum().item()
    2
    """
    if targets.ndim == 2:
        same = torch.cdist(targets, targets, p=torch.inf) <= tolerance
    elif targets.ndim == 1 and not targets.is_floating_point():
        same = (targets[:, None] == targets) & (targets >= 0)[:, None]
    else:
        raise UsageError(f"targets are integers (M,) or soft labels (M, C), got {targets.dtype} {tuple(targets.shape)}")
    return same.fill_diagonal_(False)
