"""SimCLR: two views of a picture find each other among all views of the batch.

A Simple Framework for Contrastive Learning of Visual Representations, Chen et al., ICML 2020, arXiv 2002.05709. The baseline
of most claims here, and the learner inside of some systems.
"""

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
    encoder, num_features, ..., momentum, warmup_epochs
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
        num_features: int,
        num_samples: int = 0,
        steps_per_epoch: int = 1,
        seed: int = 0,
        epochs: int = 100,
        batch_size: int = 256,
        optimizer: Optimizer = "lars",
        lr: float = 0.3,
        weight_decay: float = 1e-6,
        momentum: float = 0.9,
        warmup_epochs: float = 10,
        hidden: int = 2048,
        dim: int = 128,
        temperature: float = 0.5,
    ) -> None:
        super().__init__(
            encoder, num_features=num_features, num_samples=num_samples, steps_per_epoch=steps_per_epoch, seed=seed,
            epochs=epochs, batch_size=batch_size, optimizer=optimizer, lr=lr, weight_decay=weight_decay, momentum=momentum,
            warmup_epochs=warmup_epochs,
        )  # fmt: skip
        self.temperature = temperature
        with self.seeded():
            self.projector = mlp([num_features, hidden, dim], norm="batch")

    def step(self, batch: Batch) -> dict[str, Tensor]:
        """Loss of a batch of two views."""
        views = self.checked(batch, 2)
        features = self.encoder(torch.cat(views))
        z0, z1 = (gather_with_gradient(z) for z in self.projector(features).chunk(2))  # negatives of all ranks
        return {
            "loss": nt_xent(z0, z1, temperature=self.temperature),
            "features": features[: len(views[0])].detach(),
        }
