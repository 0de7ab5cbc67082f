"""Softmax with an additive margin, of the cosine (AM-Softmax, Wang et al. 2018) or of the angle (ArcFace, Deng et al. 2019)."""

import math

import torch
from torch import Tensor

from contralto.errors import UsageError

__all__ = ["angular_margin_logits", "margin_logits"]


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


def angular_margin_logits(similarities: Tensor, labels: Tensor, margin: float, temperature: float | Tensor) -> Tensor:
    """Cosines with an angle as handicap for the label's own column (ArcFace, Deng et al. 2019): ``cos(theta + margin) / t``.

    Beyond ``theta = pi - margin``, where the cosine would rise again, it goes on as a straight line.

    Parameters
    ----------
    similarities : Tensor (N, C)
        Cosines.
    labels : Tensor (N,)
        In [0, C).
    margin : float
        In radians.
    temperature : float or Tensor

    Returns
    -------
    Tensor (N, C)

    Examples
    --------
    >>> angular_margin_logits(torch.tensor([[0.5, 0.25]]), torch.tensor([0]), 0.5, 1.0)
    tensor([[0.0236, 0.2500]])
    """
    if isinstance(temperature, float) and not temperature > 0:
        raise UsageError(f"temperature must be above 0, got {temperature}")
    own = similarities.gather(1, labels.unsqueeze(1))
    # The slope of the sine at a cosine of 1 is infinite.
    sine = (1 - own.square()).clamp_min(1e-12).sqrt()
    turned = own * math.cos(margin) - sine * math.sin(margin)
    beyond = own - math.sin(margin) * margin
    turned = torch.where(own > math.cos(math.pi - margin), turned, beyond)
    return similarities.scatter(1, labels.unsqueeze(1), turned) / temperature
