"""Softmax with an additive margin (AM-Softmax, Wang et al. 2018)."""

import torch
from torch import Tensor

from contralto.errors import UsageError

__all__ = ["margin_logits"]


def margin_logits(similarities: Tensor, labels: Tensor, margin: float | Tensor, temperature: float | Tensor) -> Tensor:
    """Similarities with a handicap for the label's own column, over a temperature: ``(s - margin * onehot(y)) / t``.

    With cross-entropy on top, the own class must win by the margin.

    Parameters
    ----------
    similarities : Tensor (N, C)
    labels : Tensor (N,)
        In [0, C).
    margin : float or Tensor (N,)
        One, or one per row.
    temperature : float or Tensor (C,)
        One, or one per column.

    Returns
    -------
    Tensor (N, C)

    See Also
    --------
    contralto.losses.contrast.contrast : the same without a margin, with any weights.

    Examples
    --------
    >>> margin_logits(torch.tensor([[0.5, 0.25]]), torch.tensor([0]), 0.25, 0.5)
    tensor([[0.5000, 0.5000]])
    """
    if isinstance(temperature, float) and not temperature > 0:
        raise UsageError(f"temperature must be above 0, got {temperature}")
    handicap = torch.as_tensor(margin, dtype=similarities.dtype, device=similarities.device).expand(len(labels))
    return (similarities.scatter_add(1, labels.unsqueeze(1), -handicap.unsqueeze(1))) / temperature
