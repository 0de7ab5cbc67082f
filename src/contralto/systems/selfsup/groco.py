"""GroCo: learn an order of groups, all positives nearer than the hardest negatives, by sorting.

Contrast pairs an anchor with every negative; for its neighbourhood only those matter that lie between it and its positives. GroCo
sorts the similarities of an anchor to its positives and to its k hardest negatives by a differentiable sorting network, and
penalises what ends in the wrong group; inside a group any order will do.

Learning by Sorting: Self-supervised Learning with Group Ordering Constraints, Shvetsova et al., ICCV 2023, arXiv 2301.02009. The
paper's code multiplies out the whole permutation matrix; here the mass of the positives' ranks goes through the network in
reverse, with the same values and gradients (`losses.sorting`). The paper starts the last batch norm of every residual branch at
zero, which is the encoder's business.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from contralto.data.dataset import Batch
from contralto.distributed import mean_weight
from contralto.encoders.crops import forward_by_size
from contralto.encoders.heads import mlp
from contralto.errors import UsageError
from contralto.losses.sorting import Network, Sigmoid, groco
from contralto.systems.base import EncoderSystem
from contralto.views.batched import BatchView

__all__ = ["GroCo", "learning_rate"]


def learning_rate(base: float, batch_size: int, rule: str = "linear") -> float:
    """The paper's rates: ``32 base batch_size / 1024`` ("linear"), or ``base sqrt(batch_size)`` ("sqrt").

    They are large because the gradients of the loss are small.

    Examples
    --------
    >>> learning_rate(0.75, 1024), learning_rate(0.75, 1024, "sqrt")
    (24.0, 24.0)
    """
    if rule not in ("linear", "sqrt"):
        raise UsageError(f'rule must be "linear" or "sqrt", got {rule!r}')
    return base * 32 * batch_size / 1024 if rule == "linear" else base * math.sqrt(batch_size)


class GroCo(EncoderSystem):
    """Group ordering of positives and hardest negatives.

    Parameters
    ----------
    encoder, **base
        See `EncoderSystem`; the defaults are the paper's for a batch of 1024 and 100 epochs. `learning_rate` gives the rate for
        another batch: a rate that suits other contrastive losses is far too small for plain SGD here; Adam does not care.
    hidden, dim : int
        Widths of the projector: two hidden layers, and the output, which ends in a batch norm without scale and shift.
    hardest : int
        k, the negatives that count; below the batch less one.
    network, sigmoid, steepness
        See `contralto.losses.sorting.soft_sort`.
    stop_grad : bool
        See `contralto.losses.sorting.groco`.
    full_views : int
        Large views, which are each other's positives.
    small_crops : int
        Small views beside, anchors only.
    small_size : float
        Their side, as a share of the large one.

    Examples
    --------
    >>> system = GroCo(nn.Linear(8, 4), num_features=4, hidden=8, dim=4, hardest=3)
    >>> batch = {"views": [torch.randn(6, 8), torch.randn(6, 8)], "index": torch.arange(6)}
    >>> sorted(system.step(batch))
    ['features', 'loss']
    """

    def __init__(
        self,
        encoder: nn.Module,
        *,
        batch_size: int = 1024,
        lr: float = 24.0,
        weight_decay: float = 1e-6,
        warmup_epochs: float = 1,
        hidden: int | None = None,
        dim: int = 2048,
        hardest: int = 10,
        network: Network = "odd_even",
        sigmoid: Sigmoid = "cauchy",
        steepness: float = 1.0,
        stop_grad: bool = True,
        full_views: int = 2,
        small_crops: int = 0,
        small_size: float = 96 / 224,
        **base: Any,
    ) -> None:
        super().__init__(
            encoder, batch_size=batch_size, lr=lr, weight_decay=weight_decay, warmup_epochs=warmup_epochs, **base
        )
        if full_views < 2 or small_crops < 0:
            raise UsageError(
                f"full_views must be at least 2 and small_crops at least 0, got {full_views} and {small_crops}"
            )
        self.hardest, self.network, self.sigmoid, self.steepness = hardest, network, sigmoid, steepness
        self.stop_grad, self.full_views, self.small_crops, self.small_size = (
            stop_grad,
            full_views,
            small_crops,
            small_size,
        )
        width = hidden or self.num_features
        with self.seeded():
            self.projector = mlp([self.num_features, width, width, dim], norm="batch", last_norm="plain")

    def views(
        self, size: int, mean: tuple[float, float, float], std: tuple[float, float, float]
    ) -> Sequence[BatchView]:
        """Large views, blurred always and rarely (then solarised now and then) in turn, and the small ones."""
        from contralto.views.presets import groco_views

        small = round(size * self.small_size)
        return groco_views(size, small, self.small_crops, count=self.full_views, mean=mean, std=std)

    def step(self, batch: Batch) -> dict[str, Tensor]:
        """Loss of a batch; the first `full_views` views are the large ones."""
        views = self.checked(batch)
        features = forward_by_size(self.encoder, views)
        z = self.projector(features).unflatten(0, (len(views), -1))
        loss = groco(
            z, hardest=self.hardest, positive_views=self.full_views, network=self.network, sigmoid=self.sigmoid,
            steepness=self.steepness, stop_grad=self.stop_grad,
        )  # fmt: skip
        share = mean_weight(torch.tensor(len(views[0]), device=z.device))
        return {"loss": loss * share, "features": features[: len(views[0])].detach()}
