"""Swapped prediction (SwAV, arXiv 2006.09882): the assignment of one view is predicted from the other views."""

from collections.abc import Sequence

import torch
from torch import Tensor

from contralto.errors import UsageError
from contralto.losses.contrast import Reduction, soft_cross_entropy

__all__ = ["swapped_prediction"]


def swapped_prediction(
    scores: Tensor,
    codes: Tensor,
    *,
    assigning: Sequence[int] = (0, 1),
    temperature: float = 0.1,
    reduction: Reduction = "mean",
) -> Tensor:
    """Every other view predicts the code of an assigning view (equations 1 and 2, with more than two views section 3.2).

    ``1 / |A| sum_{a in A} 1 / (V - 1) sum_{v != a} - sum_k codes_ak log softmax(scores_v / temperature)_k``

    Parameters
    ----------
    scores : Tensor (V, B, K)
        Similarities of V views of B samples to K prototypes; the gradient reaches encoder and prototypes through them.
    codes : Tensor (A, B, K)
        Assignment of each view in `assigning`; rows sum to 1; carries no gradient.
    assigning : sequence of int
        A: the views that have codes, usually the large crops.
    temperature : float
    reduction : {"mean", "sum", "none"}
        "none" gives (B,); "mean_all" is the same as "mean".

    Returns
    -------
    Tensor

    Raises
    ------
    UsageError
        If shapes do not fit, or there is one view only.

    Examples
    --------
    >>> scores = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])
    >>> swapped_prediction(scores, torch.eye(2).unsqueeze(1), temperature=1.0)
    tensor(1.3133)
    """
    views = len(scores)
    if scores.ndim != 3 or views < 2:
        raise UsageError(
            f"scores must be of shape (views, samples, prototypes), two views at least; got {tuple(scores.shape)}"
        )
    if codes.shape != (len(assigning), *scores.shape[1:]) or not set(assigning) <= set(range(views)):
        raise UsageError(
            f"codes must be of shape {(len(assigning), *scores.shape[1:])} for the views {tuple(assigning)} of {views}, got "
            f"{tuple(codes.shape)}"
        )
    with torch.autocast(scores.device.type, enabled=False):
        dtype = torch.promote_types(scores.dtype, torch.float32)
        asks = torch.tensor(assigning, device=scores.device) != torch.arange(views, device=scores.device).unsqueeze(1)
        target = torch.einsum(
            "va,abk->vbk", asks.to(dtype), codes.detach().to(dtype)
        )  # what a view has to predict, summed
        per_view = soft_cross_entropy(scores.to(dtype) / temperature, target)  # (V, B)
        loss = per_view.sum(0) / (len(assigning) * (views - 1))
    return loss if reduction == "none" else loss.sum() if reduction == "sum" else loss.mean()
