"""Mixtures of features, not of pictures: shares from a Beta law, the hardest pairs of a batch, what Core-tuning makes of them.

A mixture of two rows is ``share * a + (1 - share) * b``, and so is its label. `hard_mixtures` builds the rows, as a classifier is
to see them; `losses.regression` mixes by the similarities alone and never builds one.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from contralto.errors import UsageError

__all__ = ["MixingDraws", "beta_shares", "draw_mixing", "hard_mixtures", "hardest_partners"]


class MixingDraws(NamedTuple):
    """What is random in `hard_mixtures`, for B rows."""

    order: Tensor
    """(B,) the row that each one is mixed with for its hard negative: a permutation."""
    negative: Tensor
    """(B,) share of that other row."""
    positive: Tensor
    """(B,) share of the hardest positive."""


def beta_shares(
    shape: tuple[int, ...], alpha: float, beta: float, *, generator: torch.Generator, dtype: torch.dtype | None = None
) -> Tensor:
    """Shares in [0, 1] from Beta(alpha, beta).

    Parameters
    ----------
    shape : tuple of int
    alpha, beta : float
        Above 0; 1 and 1 draw uniformly.
    generator : torch.Generator
        On the CPU, where the shares are drawn.
    dtype : torch.dtype, optional

    Raises
    ------
    UsageError
        If alpha or beta is not above 0.

    Examples
    --------
    >>> x = beta_shares((10_000,), 2.0, 8.0, generator=torch.Generator().manual_seed(0))
    >>> round(x.mean().item(), 2)
    0.2
    """
    if not (alpha > 0 and beta > 0):
        raise UsageError(f"the two numbers of a Beta law are above 0, got {alpha} and {beta}")
    seed = int(torch.randint(2**62, (), generator=generator))
    drawn = torch.from_numpy(np.asarray(np.random.default_rng(seed).beta(alpha, beta, shape)))
    return drawn.to(dtype or torch.get_default_dtype())


def draw_mixing(
    n: int, *, alpha: float = 1.0, floor: float = 0.8, generator: torch.Generator, dtype: torch.dtype | None = None
) -> MixingDraws:
    """What Core-tuning draws for a batch: a permutation, shares of at least `floor` for negatives, any for positives.

    Parameters
    ----------
    n : int
        Rows.
    alpha : float
        Shares are from Beta(alpha, alpha).
    floor : float
        The other row's share in a hard negative is at least this.
    generator : torch.Generator
    dtype : torch.dtype, optional

    Examples
    --------
    >>> draws = draw_mixing(100, generator=torch.Generator().manual_seed(0))
    >>> sorted(draws.order.tolist()) == list(range(100)), draws.negative.min().item() >= 0.8, draws.positive.min().item() < 0.1
    (True, True, True)
    """
    if not 0 <= floor <= 1:
        raise UsageError(f"floor is a share in [0, 1], got {floor}")
    order = torch.randperm(n, generator=generator)
    negative = beta_shares((n,), alpha, alpha, generator=generator, dtype=dtype).clamp_min(floor)
    return MixingDraws(order, negative, beta_shares((n,), alpha, alpha, generator=generator, dtype=dtype))


@torch.no_grad()
def hardest_partners(features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The least similar row of the same class and the most similar one of another class, by cosine.

    Parameters
    ----------
    features : Tensor (B, D)
        Raw.
    labels : Tensor (B,)

    Returns
    -------
    positive, negative : Tensor (B,)
        Rows; a row that is alone in its class is its own positive, and one without a row of another class its own negative.

    Examples
    --------
    >>> f = torch.tensor([[1.0, 0.0], [1.0, 0.1], [1.0, 1.0], [0.5, 1.0]])
    >>> [x.tolist() for x in hardest_partners(f, torch.tensor([0, 0, 0, 1]))]
    [[2, 2, 0, 3], [3, 3, 3, 2]]
    """
    unit = F.normalize(features.float() if features.dtype in (torch.float16, torch.bfloat16) else features, dim=1)
    similarity = unit @ unit.T
    own = torch.arange(len(features), device=features.device)
    same = labels[:, None] == labels
    mates = same & (own[:, None] != own)
    # Candidates of the wrong kind are moved out of reach, not multiplied by 0: cosines may be of either sign.
    positive = similarity.masked_fill(~mates, torch.inf).argmin(1)
    negative = similarity.masked_fill(same, -torch.inf).argmax(1)
    return torch.where(mates.any(1), positive, own), torch.where(same.all(1), own, negative)


def hard_mixtures(
    features: Tensor, labels: Tensor, num_classes: int, draws: MixingDraws, *, detach_original: bool = True
) -> tuple[Tensor, Tensor]:
    """The rows of a batch, a hard negative and a hard positive of each (Core-tuning, sections 3.1 and 3.2).

    A negative is mostly another row, drawn at random, with a little of the anchor; a positive lies between the hardest positive
    and the hardest negative of the anchor. Labels are mixed alike.

    Parameters
    ----------
    features : Tensor (B, D)
        Raw, as the encoder gives them.
    labels : Tensor (B,)
        Classes in [0, num_classes).
    num_classes : int
    draws : MixingDraws
    detach_original : bool
        No gradient reaches the encoder through the unmixed rows, as in the released code.

    Returns
    -------
    rows : Tensor (3 B, D)
        The rows, their negatives, their positives.
    targets : Tensor (3 B, num_classes)
        Rows sum to 1.

    Examples
    --------
    >>> f, draws = torch.eye(4), draw_mixing(4, generator=torch.Generator().manual_seed(0))
    >>> rows, targets = hard_mixtures(f, torch.tensor([0, 0, 1, 1]), 2, draws)
    >>> rows.shape, targets.shape, bool(torch.allclose(targets.sum(1), torch.ones(12)))
    (torch.Size([12, 4]), torch.Size([12, 2]), True)
    """
    if not len(features) == len(labels) == len(draws.order):
        raise UsageError(f"{len(features)} features, {len(labels)} labels and {len(draws.order)} draws do not fit")
    order, negative, positive = (x.to(features.device) for x in draws)
    hard, near = hardest_partners(features, labels)
    own = F.one_hot(labels, num_classes).to(features.dtype)
    s, t = (share.to(features.dtype)[:, None] for share in (negative, positive))
    first = features.detach() if detach_original else features
    rows = torch.cat([first, torch.lerp(features, features[order], s), torch.lerp(features[near], features[hard], t)])
    # (1 - s) + s is not 1 in every format: a mixture within one class keeps its label to the last bit this way.
    targets = torch.cat([own, torch.lerp(own, own[order], s), torch.lerp(own[near], own[hard], t)])
    return rows, targets
