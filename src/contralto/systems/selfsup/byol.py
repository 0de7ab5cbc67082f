"""BYOL: predict, from one view, what a slowly moving copy of the network makes of the other one; there are no negatives.

Bootstrap Your Own Latent: A New Approach to Self-Supervised Learning, Grill et al., NeurIPS 2020, arXiv 2006.07733.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from contralto.data.dataset import Batch
from contralto.distributed import mean_weight
from contralto.encoders.heads import mlp
from contralto.memory.momentum import momentum_copy, momentum_update
from contralto.systems.base import EncoderSystem, Optimizer
from contralto.views.batched import BatchView

__all__ = ["BYOL"]


class BYOL(EncoderSystem):
    """Both directions of ``2 - 2 cos(prediction, target)``, added.

    Parameters
    ----------
    encoder, **base
        See `EncoderSystem`. The paper's rate is ``0.2 * batch_size / 256`` with LARS.
    hidden, dim : int
        Widths of projector and predictor.
    decay : float
        Of the target network at the beginning; it rises to 1 by half a cosine over all steps.

    Examples
    --------
    >>> system = BYOL(nn.Linear(8, 4), num_features=4, hidden=8, dim=4)
    >>> batch = {"views": [torch.randn(6, 8), torch.randn(6, 8)], "index": torch.arange(6)}
    >>> sorted(system.step(batch))
    ['features', 'loss']
    """

    def __init__(
        self,
        encoder: nn.Module,
        *,
        epochs: int = 300,
        optimizer: Optimizer = "lars",
        lr: float = 0.2,
        weight_decay: float = 1.5e-6,
        warmup_epochs: float = 10,
        hidden: int = 4096,
        dim: int = 256,
        decay: float = 0.996,
        **base: Any,
    ) -> None:
        super().__init__(
            encoder,
            epochs=epochs,
            optimizer=optimizer,
            lr=lr,
            weight_decay=weight_decay,
            warmup_epochs=warmup_epochs,
            **base,
        )
        self.decay = decay
        with self.seeded():
            self.projector = mlp([self.num_features, hidden, dim], norm="batch")
            self.predictor = mlp([dim, hidden, dim], norm="batch")
        self.target_encoder, self.target_projector = momentum_copy(encoder), momentum_copy(self.projector)

    def views(
        self, size: int, mean: tuple[float, float, float], std: tuple[float, float, float]
    ) -> Sequence[BatchView]:
        """The paper's two views, of which the second is solarised now and then."""
        from contralto.views.presets import byol_pair

        return byol_pair(size, mean=mean, std=std)

    def step(self, batch: Batch) -> dict[str, Tensor]:
        """Loss of a batch of two views; the target network moves at the end of the step."""
        views = self.checked(batch, 2)
        features = [self.encoder(view) for view in views]
        predictions = [self.predictor(self.projector(f)) for f in features]
        with torch.no_grad():
            targets = [self.target_projector(self.target_encoder(view)) for view in views]
        loss = sum(
            2 - 2 * F.cosine_similarity(p, t, dim=1).mean() for p, t in zip(predictions, targets[::-1], strict=True)
        )
        assert isinstance(loss, Tensor)
        loss = loss * mean_weight(torch.tensor(len(views[0]), device=loss.device))
        return {"loss": loss, "features": features[0].detach()}

    def at_step_end(self) -> None:
        """Move the target network towards the new weights."""
        decay = 1 - (1 - self.decay) * (math.cos(math.pi * self.progress) + 1) / 2
        momentum_update(self.target_encoder, self.encoder, decay)
        momentum_update(self.target_projector, self.projector, decay)
        super().at_step_end()
