"""DCL: SimCLR or MoCo without the positive in the denominator, so that small batches learn as well as large ones.

In InfoNCE the positive stands in the denominator, too; this multiplies the whole gradient of an anchor by a factor q, which is
near zero where the positive is easy or the negatives are few. Leaving it out is InfoNCE with q = 1: easy positives no longer
silence hard negatives, nor the reverse. DCLW also weighs the positive's term, more where the two views are far apart.

Decoupled Contrastive Learning, Yeh et al., ECCV 2022, arXiv 2110.06848. There is no official code. The two implementations in
use add or average the two directions (here: the mean over all 2 N rows), take the mean in DCLW's weight over a process's rows
(here: over those of all), and let gradient through that weight or not (here: not, `detach_weight`). Rate and decay are those of
usual SimCLR on small sets; the paper's rates could not be looked up.
"""

from typing import Any

import torch
from torch import Tensor, nn

from contralto.data.dataset import Batch
from contralto.distributed import gather_rows, gather_with_gradient
from contralto.encoders.heads import mlp
from contralto.losses.decoupled import decoupled_info_nce
from contralto.losses.pairs import dcl
from contralto.memory.momentum import momentum_copy, momentum_update
from contralto.memory.queue import Queue
from contralto.systems.base import EncoderSystem

__all__ = ["DecoupledContrast"]


class DecoupledContrast(EncoderSystem):
    """Decoupled contrast of two views, or of a view with its key and a queue.

    Parameters
    ----------
    encoder, **base
        See `EncoderSystem`. DCL has larger gradients than NT-Xent: under SGD its best rate may be a smaller one.
    hidden, dim : int
        Widths of the projector.
    temperature : float
    sigma : float, optional
        DCLW: the positive's term is weighted by ``2 - exp(s / sigma) / mean exp(s / sigma)``; 0.5 in the paper.
    detach_weight : bool
        Treat that weight as a constant. Not with a queue, where it always is one.
    queue_size : int
        0: negatives are the other samples of the batch. Otherwise MoCo's form, with a queue of so many keys.
    decay : float
        Of the momentum network of that form.

    Examples
    --------
    >>> system = DecoupledContrast(nn.Linear(8, 4), num_features=4, hidden=8, dim=4)
    >>> batch = {"views": [torch.randn(6, 8), torch.randn(6, 8)], "index": torch.arange(6)}
    >>> sorted(system.step(batch))
    ['coupling', 'features', 'loss']
    """

    def __init__(
        self,
        encoder: nn.Module,
        *,
        epochs: int = 200,
        hidden: int = 2048,
        dim: int = 128,
        temperature: float = 0.1,
        sigma: float | None = None,
        detach_weight: bool = True,
        queue_size: int = 0,
        decay: float = 0.999,
        **base: Any,
    ) -> None:
        super().__init__(encoder, epochs=epochs, **base)
        self.temperature, self.sigma, self.detach_weight, self.decay = temperature, sigma, detach_weight, decay
        with self.seeded():
            self.projector = mlp([self.num_features, hidden, dim], norm="batch")
        if queue_size:
            self.key_network = momentum_copy(nn.Sequential(encoder, self.projector))
            self.queue = Queue(queue_size, dim, seed=self.seed)
        self.queue_size = queue_size

    def step(self, batch: Batch) -> dict[str, Tensor]:
        """Loss of a batch of two views; `coupling` is the mean factor q that InfoNCE would have put on gradients."""
        views = self.checked(batch, 2)
        return self._with_queue(*views) if self.queue_size else self._within_batch(*views)

    def _within_batch(self, x0: Tensor, x1: Tensor) -> dict[str, Tensor]:
        features = self.encoder(torch.cat([x0, x1]))
        z0, z1 = (gather_with_gradient(z) for z in self.projector(features).chunk(2))
        each = dcl(z0, z1, temperature=self.temperature, reduction="none")
        coupling = each.detach().sigmoid().mean()  # q = U / (exp(s / t) + U), and the loss is log U - s / t
        if self.sigma is not None:
            each = dcl(
                z0,
                z1,
                temperature=self.temperature,
                sigma=self.sigma,
                detach_weight=self.detach_weight,
                reduction="none",
            )
        return {"loss": each.mean(), "features": features[: len(x0)].detach(), "coupling": coupling}

    def _with_queue(self, x0: Tensor, x1: Tensor) -> dict[str, Tensor]:
        """The momentum network moves first, the keys go into the queue last."""
        momentum_update(self.key_network, nn.Sequential(self.encoder, self.projector), self.decay)
        features = self.encoder(x0)
        query = gather_with_gradient(self.projector(features))
        with torch.no_grad():
            key = gather_rows(self.key_network(x1))
        given: dict[str, Any] = {"negatives": self.queue.read(), "temperature": self.temperature}
        each = decoupled_info_nce(query, key, reduction="none", **given)
        coupling = each.detach().sigmoid().mean()
        if self.sigma is not None:
            each = decoupled_info_nce(query, key, sigma=self.sigma, reduction="none", **given)
        self.queue.enqueue(key)
        return {"loss": each.mean(), "features": features.detach(), "coupling": coupling}
