"""SimCLR: two views of a picture find each other among all views of the batch.

A Simple Framework for Contrastive Learning of Visual Representations, Chen et al., ICML 2020, arXiv 2002.05709. The baseline
of most claims here, and the learner inside of some systems.
"""

from typing import Any

import torch
from torch import Tensor, nn

from contralto.data.dataset import Batch
from contralto.distributed import gather_with_gradient
from contralto.encoders.heads import mlp
from contralto.losses.pairs import nt_xent
from contralto.systems.base import EncoderSystem, Optimizer

__all__ = ["SimCLR"]


class SimCLR(EncoderSystem):
    """NT-Xent on the projections of two views.

    Parameters
    ----------
    encoder, **base
        See `EncoderSystem`. The rate is for the batch as it is; the paper's rule is ``0.3 * batch_size / 256`` with LARS.
    hidden, dim : int
        Widths of the projector.
    temperature : float

    Examples
    --------
    >>> system = SimCLR(nn.Linear(8, 4), num_features=4, hidden=8, dim=4)
    >>> batch = {"views": [torch.randn(6, 8), torch.randn(6, 8)], "index": torch.arange(6)}
    >>> sorted(system.step(batch))
    ['features', 'loss']
    """

    def __init__(
        self,
        encoder: nn.Module,
        *,
        optimizer: Optimizer = "lars",
        lr: float = 0.3,
        weight_decay: float = 1e-6,
        warmup_epochs: float = 10,
        hidden: int = 2048,
        dim: int = 128,
        temperature: float = 0.5,
        **base: Any,
    ) -> None:
        super().__init__(
            encoder, optimizer=optimizer, lr=lr, weight_decay=weight_decay, warmup_epochs=warmup_epochs, **base
        )
        self.temperature = temperature
        with self.seeded():
            self.projector = mlp([self.num_features, hidden, dim], norm="batch")

    def step(self, batch: Batch) -> dict[str, Tensor]:
        """Loss of a batch of two views."""
        views = self.checked(batch, 2)
        features = self.encoder(torch.cat(views))
        z0, z1 = (gather_with_gradient(z) for z in self.projector(features).chunk(2))  # negatives of all ranks
        return {
            "loss": nt_xent(z0, z1, temperature=self.temperature),
            "features": features[: len(views[0])].detach(),
        }
