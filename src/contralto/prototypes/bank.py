"""Prototypes, one centre per class: how they come to be, how they move, what they say about a sample.

Prototypes are a plain tensor (C, D) of unit rows; a class that has none yet is a zero row.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from contralto.errors import UsageError

__all__ = ["class_means", "density_temperature", "ema_update", "prototype_logits"]


def class_means(embeddings: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Unit mean of every class (CAPro 4.5: sum over count + 1e-6, normalised); a class without samples is zero.

    Parameters
    ----------
    embeddings : Tensor (N, D)
    labels : Tensor (N,)
        Integers in [0, num_classes); others are left out.
    num_classes : int

    Returns
    -------
    Tensor (num_classes, D)

    Examples
    --------
    >>> class_means(torch.eye(2), torch.tensor([0, 0]), 2)
    tensor([[0.7071, 0.7071],
            [0.0000, 0.0000]])
    """
    valid = (labels >= 0) & (labels < num_classes)
    embeddings, labels = embeddings[valid], labels[valid]
    sums = embeddings.new_zeros(num_classes, embeddings.shape[1]).index_add_(0, labels, embeddings)
    count = torch.bincount(labels, minlength=num_classes).to(embeddings.dtype).unsqueeze(1)
    return F.normalize(sums / (count + 1e-6), dim=1)


@torch.no_grad()
def ema_update(prototypes: Tensor, embeddings: Tensor, labels: Tensor, momentum: float) -> Tensor:
    """Move prototypes towards the samples, one after the other, then normalise once (CAPro 5.7, closed form).

    After the samples z_1 .. z_n of class c in batch order::

        z^c <- m^n z^c + (1 - m) sum_k m^(n-k) z_k,   then every row is scaled to length one

    Parameters
    ----------
    prototypes : Tensor (C, D)
    embeddings : Tensor (N, D)
        In the order in which they count; the last weighs most.
    labels : Tensor (N,)
        Integers in [0, C).
    momentum : float
        m in [0, 1]. 1 changes nothing, 0 leaves the last sample of each class.

    Returns
    -------
    Tensor (C, D)
        New prototypes; the input is left as it was.

    Examples
    --------
    >>> ema_update(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]), torch.tensor([0]), 0.5)
    tensor([[0.7071, 0.7071]])
    """
    if not 0 <= momentum <= 1:
        raise UsageError(f"momentum must be in [0, 1], got {momentum}")
    embeddings = embeddings.to(prototypes.dtype)
    one_hot = F.one_hot(labels, prototypes.shape[0])
    count = one_hot.sum(0)
    later = (count - one_hot.cumsum(0)).gather(1, labels.unsqueeze(1)).squeeze(1)  # samples of the class still to come
    m = torch.tensor(momentum, dtype=prototypes.dtype, device=prototypes.device)
    moved = prototypes * (m**count).unsqueeze(1)
    moved.index_add_(0, labels, embeddings * ((1 - m) * m**later).unsqueeze(1))
    return F.normalize(moved, dim=1)


def density_temperature(
    distance: Tensor, count: Tensor, before: Tensor, *, low: float = 0.02, high: float = 1.0
) -> Tensor:
    """A temperature for every prototype from how densely its samples lie (FoPro 13): small where they are many and close.

    ``T_c = distance_c / (count_c ln(count_c + 10) + 1e-7)``

    Parameters
    ----------
    distance : Tensor (C,)
        Sum of the distances of the samples of each class to its prototype.
    count : Tensor (C,)
        Number of them.
    before : Tensor (C,)
        Kept for classes without a sample, where the formula would give 0 and infinite logits.
    low, high : float
        Bounds that the paper's code does not have; they keep logits finite.

    Returns
    -------
    Tensor (C,)

    Examples
    --------
    >>> density_temperature(torch.tensor([50.0, 0.0]), torch.tensor([100.0, 0.0]), torch.tensor([0.1, 0.1]))
    tensor([0.1064, 0.1000])
    """
    fresh = (distance / (count * (count + 10).log() + 1e-7)).clamp(low, high)
    return torch.where(count > 0, fresh, before)


def prototype_logits(embeddings: Tensor, prototypes: Tensor, temperature: float | Tensor) -> Tensor:
    """Similarity to every prototype over the temperature (one, or one per prototype), (N, C).

    Examples
    --------
    >>> prototype_logits(torch.tensor([[1.0, 0.0]]), torch.eye(2), 0.5)
    tensor([[2., 0.]])
    """
    return embeddings @ prototypes.T / temperature
