"""MoCo v2: a view finds the other one among a queue of past keys, which a slowly moving copy of the network makes.

Momentum Contrast for Unsupervised Visual Representation Learning, He et al., CVPR 2020, arXiv 1911.05722; Improved Baselines
with Momentum Contrastive Learning, Chen et al. 2020, arXiv 2003.04297. There, batches are shuffled between GPUs so that batch
norm cannot tell a key by its batch; here, queries and keys have batches, and so statistics, of their own.
"""

from typing import Any

import torch
from torch import Tensor, nn

from contralto.data.dataset import Batch
from contralto.distributed import gather_rows, mean_weight
from contralto.encoders.heads import mlp
from contralto.memory.momentum import momentum_copy, momentum_update
from contralto.memory.queue import Queue
from contralto.systems.base import EncoderSystem

__all__ = ["MoCo"]


class MoCo(EncoderSystem):
    """InfoNCE of queries against the own key and a queue.

    Parameters
    ----------
    encoder, **base
        See `EncoderSystem`.
    hidden, dim : int
        Widths of the projector.
    temperature : float
    queue_size : int
        Keys that are kept; at least a batch.
    decay : float
        Of the momentum network.
    symmetric : bool
        Take each view as query once and average, instead of the first one only.

    Examples
    --------
    >>> system = MoCo(nn.Linear(8, 4), num_features=4, hidden=8, dim=4, queue_size=16)
    >>> batch = {"views": [torch.randn(6, 8), torch.randn(6, 8)], "index": torch.arange(6)}
    >>> sorted(system.step(batch))
    ['features', 'loss']
    """

    def __init__(
        self,
        encoder: nn.Module,
        *,
        epochs: int = 200,
        lr: float = 0.03,
        hidden: int = 2048,
        dim: int = 128,
        temperature: float = 0.2,
        queue_size: int = 65536,
        decay: float = 0.999,
        symmetric: bool = False,
        **base: Any,
    ) -> None:
        super().__init__(encoder, epochs=epochs, lr=lr, **base)
        self.temperature, self.decay, self.symmetric = temperature, decay, symmetric
        with self.seeded():
            self.projector = mlp([self.num_features, hidden, dim])
        self.key_encoder, self.key_projector = momentum_copy(encoder), momentum_copy(self.projector)
        self.queue = Queue(queue_size, dim, seed=self.seed)

    def step(self, batch: Batch) -> dict[str, Tensor]:
        """Loss of a batch of two views; the momentum network moves first, the keys go into the queue last."""
        views = self.checked(batch, 2)
        momentum_update(self.key_encoder, self.encoder, self.decay)
        momentum_update(self.key_projector, self.projector, self.decay)
        past, losses, keys = self.queue.read(), [], []
        for query, key in (views, views[::-1]) if self.symmetric else (views,):
            features = self.encoder(query)
            with torch.no_grad():
                keys.append(self.key_projector(self.key_encoder(key)))
            losses.append(self._against(self.projector(features), keys[-1], past))
            if len(losses) == 1:
                first = features.detach()
        self.queue.enqueue(torch.cat([gather_rows(k) for k in keys]))  # one view after the other, as on one rank
        loss = torch.stack(losses).mean() * mean_weight(torch.tensor(len(views[0]), device=past.device))
        return {"loss": loss, "features": first}

    def _against(self, query: Tensor, key: Tensor, past: Tensor) -> Tensor:
        """InfoNCE where only the own key and the queue are in the denominator (not the other keys of the batch)."""
        unit_q, unit_k = nn.functional.normalize(query, dim=1), nn.functional.normalize(key, dim=1)
        own = (unit_q * unit_k).sum(1, keepdim=True)
        logits = torch.cat([own, unit_q @ past.to(unit_q.dtype).T], 1) / self.temperature
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return nn.functional.cross_entropy(logits, torch.zeros(len(query), dtype=torch.int64, device=query.device))
