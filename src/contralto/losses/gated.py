"""Contrast inside a subspace that a gate picks for every anchor, with positives by class (Hydra / SimLAP, Wu et al. 2024).

An anchor of class y is paired with a partner class y2: samples of y2 are its positives, samples of neither class its negatives,
and those of its own class are left out. A gate per anchor, usually a function of the two classes, says which dimensions count.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from contralto.errors import UsageError
from contralto.losses.contrast import contrast

__all__ = ["PairReduction", "Placement", "gated_contrast", "gated_similarity", "multi_positive", "pair_masks"]

Placement = Literal["squared", "subspace"]
PairReduction = Literal["anchor", "pair", "none"]

_FEW = 1e-6
"""Added to the number of an anchor's positives, as in the authors' code."""


def pair_masks(labels: Tensor, partners: Tensor, key_labels: Tensor, *, both: bool = False) -> tuple[Tensor, Tensor]:
    """Which keys are positives and which are negatives of every anchor.

    Parameters
    ----------
    labels, partners : Tensor (N,)
        Class of every anchor, and the class that it is paired with.
    key_labels : Tensor (M,)
    both : bool
        Samples of the own class are positives too; otherwise they are neither (unless the partner is the own class).

    Returns
    -------
    tuple of Tensor (N, M), bool

    Examples
    --------
    >>> positives, negatives = pair_masks(torch.tensor([0]), torch.tensor([1]), torch.tensor([0, 1, 2]))
    >>> positives.tolist(), negatives.tolist()
    ([[False, True, False]], [[False, False, True]])
    """
    own = labels.unsqueeze(1) == key_labels
    partner = partners.unsqueeze(1) == key_labels
    return (partner | own if both else partner), ~(partner | own)


def gated_similarity(
    anchors: Tensor, keys: Tensor, gate: Tensor, *, placement: Placement = "squared", alpha: float | Tensor = 0.0
) -> Tensor:
    """Similarities of anchors and keys in the anchors' subspaces.

    Parameters
    ----------
    anchors : Tensor (N, D)
    keys : Tensor (M, D)
    gate : Tensor (N, D)
        In [0, 1]; the gate of an anchor is laid on both sides.
    placement : {"squared", "subspace"}
        "squared": ``sum_d z_d g_d^2 k_d`` of unit rows, so a gate can only make it smaller. "subspace": the cosine of ``g z`` and
        ``g k``, so only the proportions of a gate count.
    alpha : float or Tensor ()
        Of the similarity without a gate, this share is taken off.

    Returns
    -------
    Tensor (N, M)
        The (N, M, D) gated keys are never made.

    Examples
    --------
    >>> z, gate = torch.tensor([[0.6, 0.8]]), torch.tensor([[1.0, 0.0]])
    >>> gated_similarity(z, z, gate), gated_similarity(z, z, gate, placement="subspace")
    (tensor([[0.3600]]), tensor([[1.]]))
    """
    if anchors.shape != gate.shape or anchors.ndim != 2 or keys.ndim != 2 or keys.shape[1] != anchors.shape[1]:
        raise UsageError(
            f"anchors and gate must be of one shape (N, D) and keys (M, D), got {tuple(anchors.shape)}, "
            f"{tuple(gate.shape)} and {tuple(keys.shape)}"
        )
    _known(placement)
    with torch.autocast(anchors.device.type, enabled=False):
        z, k, g = _wide(anchors, keys, gate)
        z, k = F.normalize(z, dim=1), F.normalize(k, dim=1)
        if placement == "squared":
            return (z * (g.square() - alpha)) @ k.T
        subspace = F.normalize(z * g, dim=1)
        length = (g.square() @ k.square().T).clamp_min(1e-24).sqrt()  # of every key in every anchor's subspace
        gated = (subspace * g) @ k.T / length
        return gated - alpha * (z @ k.T) if isinstance(alpha, Tensor) or alpha else gated


def multi_positive(
    logits: Tensor, positives: Tensor, negatives: Tensor, *, reduction: PairReduction = "anchor"
) -> Tensor:
    """One softmax per positive, over itself and all negatives: ``log(exp(L_ij) + sum_k exp(L_ik)) - L_ij``.

    Parameters
    ----------
    logits : Tensor (N, M)
    positives, negatives : Tensor (N, M), bool
    reduction : {"anchor", "pair", "none"}
        "anchor": mean over the positives of an anchor, then over all anchors, of which those without positives count as 0.
        "pair": mean over all positive pairs. "none": the means over the positives of every anchor (N,).

    Returns
    -------
    Tensor

    Examples
    --------
    >>> logits, positives = torch.zeros(1, 3), torch.tensor([[True, True, False]])
    >>> multi_positive(logits, positives, ~positives)
    tensor(0.6931)
    """
    floor = torch.finfo(logits.dtype).min
    others = logits.masked_fill(~negatives, floor).logsumexp(1, keepdim=True)
    each = torch.where(positives, torch.logaddexp(others, logits) - logits, 0.0)
    if reduction == "pair":
        return each.sum() / positives.sum().clamp_min(1)
    per_anchor = each.sum(1) / (positives.sum(1).to(logits.dtype) + _FEW)
    return per_anchor if reduction == "none" else _mean(per_anchor, reduction)


def gated_contrast(
    anchors: Tensor,
    keys: Tensor,
    gate: Tensor,
    labels: Tensor,
    partners: Tensor,
    key_labels: Tensor | None = None,
    *,
    placement: Placement = "squared",
    temperature: float | Tensor = 0.1,
    alpha: float | Tensor = 0.0,
    both: bool = False,
    reduction: PairReduction = "anchor",
) -> Tensor:
    """Contrast between classes that are paired with each other, each pair in its own subspace.

    Parameters
    ----------
    anchors : Tensor (N, D)
        One view; raw rows.
    keys : Tensor (M, D)
        Another view, of the same samples or of the samples of all ranks.
    gate, placement, alpha
        See `gated_similarity`.
    labels, partners, key_labels, both
        See `pair_masks`; the labels of the keys default to `labels`.
    temperature : float or Tensor ()
        May carry gradient.
    reduction
        See `multi_positive`.

    Returns
    -------
    Tensor
        A scalar, or (N,) for "none".

    Notes
    -----
    The squared gate rescales the anchors and goes through `contralto.losses.contrast.contrast`, which does without the matrix of
    all pairs where it is large; the subspace needs a length for every pair and holds it.

    Examples
    --------
    >>> z, labels, partners = torch.eye(3), torch.tensor([0, 1, 2]), torch.tensor([1, 2, 0])
    >>> gated_contrast(z, z, torch.ones(3, 3), labels, partners, temperature=1.0)
    tensor(0.6931)
    """
    key_labels = labels if key_labels is None else key_labels
    for name, rows, wanted in (
        ("labels", labels, anchors),
        ("partners", partners, anchors),
        ("key_labels", key_labels, keys),
    ):
        if rows.shape != wanted.shape[:1]:
            raise UsageError(f"{name} must be of shape ({len(wanted)},), got {tuple(rows.shape)}")
    if _known(placement) == "subspace":
        similarity = gated_similarity(anchors, keys, gate, placement=placement, alpha=alpha)
        positives, negatives = pair_masks(labels, partners, key_labels, both=both)
        return multi_positive(similarity / temperature, positives, negatives, reduction=reduction)
    if gate.shape != anchors.shape:
        raise UsageError(f"gate must be of shape {tuple(anchors.shape)} as the anchors, got {tuple(gate.shape)}")
    with torch.autocast(anchors.device.type, enabled=False):
        z, k, g = _wide(anchors, keys, gate)
        z, k = F.normalize(z, dim=1) * (g.square() - alpha), F.normalize(k, dim=1)
    found = _found(labels, partners, key_labels, both)  # positives of every anchor
    share = torch.ones_like(z[:, 0]) if reduction == "pair" else 1 / (found.to(z.dtype) + _FEW)

    def positives_of(rows: Tensor, columns: Tensor) -> Tensor:
        there = partners[rows] == key_labels[columns]
        if both:
            there = there | (labels[rows] == key_labels[columns])
        return torch.where(there, share[rows].detach(), 0.0)

    def negatives_of(rows: Tensor, columns: Tensor) -> Tensor:
        return (labels[rows] != key_labels[columns]) & (partners[rows] != key_labels[columns])

    loss = contrast(
        z, k, positives=positives_of, weights=negatives_of, temperature=temperature, coupled=True, normalize=False,
        reduction="sum" if reduction == "pair" else "none" if reduction == "none" else "mean_all",
    )  # fmt: skip
    if reduction == "pair":
        return loss / found.sum().clamp_min(1)
    return loss if reduction == "none" else _mean(loss, reduction)


def _found(labels: Tensor, partners: Tensor, key_labels: Tensor, both: bool) -> Tensor:
    """Number of positives of every anchor (N,), by counting classes."""
    kinds, sizes = key_labels.unique(return_counts=True)

    def size_of(wanted: Tensor) -> Tensor:
        if not len(kinds):
            return torch.zeros_like(wanted)
        place = torch.searchsorted(kinds, wanted).clamp_max(len(kinds) - 1)
        return torch.where(kinds[place] == wanted, sizes[place], 0)

    found = size_of(partners)
    return found + torch.where(labels == partners, 0, size_of(labels)) if both else found


def _wide(*parts: Tensor) -> list[Tensor]:
    """All in one type of at least single precision."""
    dtype = torch.float32
    for x in parts:
        dtype = torch.promote_types(dtype, x.dtype)
    return [x.to(dtype) for x in parts]


def _known(placement: str) -> str:
    if placement not in ("squared", "subspace"):
        raise UsageError(f'placement must be "squared" or "subspace", got {placement!r}')
    return placement


def _mean(loss: Tensor, reduction: str) -> Tensor:
    if reduction != "anchor":
        raise UsageError(f'reduction must be "anchor", "pair" or "none", got {reduction!r}')
    return loss.mean() if loss.numel() else loss.sum()
