"""SwAV: cluster online, and predict the cluster of one view from another view.

Each large crop of a picture is assigned softly to learnt prototypes, so that a batch is spread evenly over them (Sinkhorn);
this assignment, its code, must be predicted from every other crop of the picture. The even spread keeps all embeddings from
becoming the same, so neither negatives nor a momentum network are needed. Small crops predict too, but have no codes.

Unsupervised Learning of Visual Features by Contrasting Cluster Assignments, Caron et al., NeurIPS 2020, arXiv 2006.09882. The
paper's code has a bias before the batch norm of the head, which changes nothing; it is left out here. Its queue is one per
process and told to be full by a non-zero last row; here the processes share one and its fill level is saved. The standard
deviation of the red channel in its normalisation (0.228 instead of 0.229) is not copied.
"""

import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from contralto.data.dataset import Batch
from contralto.distributed import gather_rows, mean_weight
from contralto.encoders.crops import forward_by_size
from contralto.encoders.heads import mlp
from contralto.errors import UsageError
from contralto.losses.sinkhorn import sinkhorn
from contralto.losses.swapped import swapped_prediction
from contralto.memory.past import PastViews
from contralto.prototypes.bank import assign
from contralto.prototypes.layer import PrototypeLayer
from contralto.systems.base import EncoderSystem, Optimizer
from contralto.views.batched import BatchView

__all__ = ["SwAV", "perplexity"]


def perplexity(share: Tensor) -> Tensor:
    """How many of K prototypes are in use: ``exp`` of the entropy of their mean share.

    Parameters
    ----------
    share : Tensor (..., K)
        Distributions; their mean is taken.

    Examples
    --------
    >>> perplexity(torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]))
    tensor(2.)
    """
    mean = share.reshape(-1, share.shape[-1]).mean(0)
    used: Tensor = torch.special.entr(mean).sum().exp()
    return used


class SwAV(EncoderSystem):
    """Swapped prediction of balanced cluster assignments.

    Parameters
    ----------
    encoder, **base
        See `EncoderSystem`; the defaults are the paper's for a batch of 4096. The rate is not linear in the batch: 0.6 at 256.
    hidden, dim : int
        Widths of the projector.
    num_prototypes : sequence of int
        K; several numbers make independent sets of prototypes, whose losses are averaged.
    temperature : float
        Of the predictions.
    epsilon, sinkhorn_iterations : float, int
        Of the codes, see `sinkhorn`; 0 iterations are a softmax, which collapses.
    freeze_steps : int
        The prototypes stay as they were drawn for so many steps; one epoch in the paper.
    queue_size : int
        Past embeddings per large crop, over all processes, which make the codes of a small batch more precise; lowered to a
        multiple of the batch. 0 = none.
    queue_epoch : int
        Epoch from which on the queue is filled, and used once it is full.
    small_crops : int
        Small crops beside the two large ones.
    small_size : float
        Their side, as a share of the large one.
    check_every : int
        Steps between looks at whether all embeddings have become the same; 0 = never.

    Notes
    -----
    A loss that stays at ``log(num_prototypes)`` says that all embeddings are equal: a smaller `epsilon` (0.03), a longer
    `freeze_steps`, milder or fewer crops help. The check warns of this.

    Examples
    --------
    >>> system = SwAV(nn.Linear(8, 4), num_features=4, hidden=8, dim=4, num_prototypes=[5])
    >>> batch = {"views": [torch.randn(6, 8), torch.randn(6, 8)], "index": torch.arange(6)}
    >>> sorted(system.step(batch))
    ['features', 'loss', 'perplexity']
    """

    def __init__(
        self,
        encoder: nn.Module,
        *,
        batch_size: int = 4096,
        optimizer: Optimizer = "larc",
        lr: float = 4.8,
        weight_decay: float = 1e-6,
        warmup_epochs: float = 10,
        start_lr: float = 0.3,
        final_lr: float = 0.0048,
        hidden: int = 2048,
        dim: int = 128,
        num_prototypes: Sequence[int] = (3000,),
        temperature: float = 0.1,
        epsilon: float = 0.05,
        sinkhorn_iterations: int = 3,
        freeze_steps: int = 313,
        queue_size: int = 0,
        queue_epoch: int = 15,
        small_crops: int = 6,
        small_size: float = 96 / 224,
        check_every: int = 100,
        **base: Any,
    ) -> None:
        super().__init__(
            encoder,
            batch_size=batch_size,
            optimizer=optimizer,
            lr=lr,
            weight_decay=weight_decay,
            warmup_epochs=warmup_epochs,
            start_lr=start_lr,
            final_lr=final_lr,
            **base,
        )
        if not num_prototypes or min(num_prototypes) < 2:
            raise UsageError(f"num_prototypes must name numbers of at least 2, got {list(num_prototypes)}")
        if small_crops < 0 or freeze_steps < 0 or queue_size < 0:
            raise UsageError("small_crops, freeze_steps and queue_size must be at least 0")
        self.temperature, self.epsilon, self.sinkhorn_iterations = temperature, epsilon, sinkhorn_iterations
        self.freeze_steps, self.queue_epoch, self.check_every = freeze_steps, queue_epoch, check_every
        self.small_crops, self.small_size = small_crops, small_size
        with self.seeded():
            self.projector = mlp([self.num_features, hidden, dim], norm="batch")
            self.prototypes = nn.ModuleList(PrototypeLayer(dim, count) for count in num_prototypes)
        kept = queue_size - queue_size % batch_size if queue_size >= batch_size else 0
        if queue_size and not kept:
            raise UsageError(f"queue_size must be 0 or at least a batch ({batch_size}), got {queue_size}")
        self.queue = PastViews(2, kept, dim) if kept else None

    def views(
        self, size: int, mean: tuple[float, float, float], std: tuple[float, float, float]
    ) -> Sequence[BatchView]:
        """Two large crops, and the small ones."""
        from contralto.views.presets import multi_crop

        return multi_crop(size, round(size * self.small_size), self.small_crops, mean=mean, std=std)

    def step(self, batch: Batch) -> dict[str, Tensor]:
        """Loss of a batch; the first two views are the large crops, whose codes all other views predict."""
        views = self.checked(batch)
        if len(views) < 2:
            raise UsageError("SwAV takes at least two views of every sample, got 1")
        for layer in self._layers:
            layer.normalize()
        features = forward_by_size(self.encoder, views)
        z = F.normalize(self.projector(features), dim=1).unflatten(0, (len(views), -1))  # (V, B, D)
        large = z[:2].detach()
        queueing = self.queue is not None and self.done >= self.queue_epoch * self.steps_per_epoch
        past = self.queue.read() if self.queue is not None and queueing else None
        scores = [layer(z) for layer in self._layers]
        losses = [
            swapped_prediction(s, self.codes(layer, s[:2].detach(), past), temperature=self.temperature)
            for layer, s in zip(self._layers, scores, strict=True)
        ]
        if self.queue is not None and queueing:
            self.queue.enqueue(large)
        loss = torch.stack(losses).mean() * mean_weight(torch.tensor(len(views[0]), device=z.device))
        used = perplexity((scores[0][:2].detach().float() / self.temperature).softmax(-1))
        self._look(large, used)
        return {"loss": loss, "features": features[: len(views[0])].detach(), "perplexity": used}

    @torch.no_grad()
    def codes(self, layer: PrototypeLayer, scores: Tensor, past: Tensor | None = None) -> Tensor:
        """Codes (2, B, K) of the large crops from their scores (2, B, K); past embeddings (2, L, D) share the prototypes."""
        n = scores.shape[1]
        found = []
        for view, own in enumerate(scores):
            rows = own if past is None else torch.cat([layer(past[view].to(own.dtype)), own])
            codes = sinkhorn(rows, epsilon=self.epsilon, iterations=self.sinkhorn_iterations)
            found.append(codes[-n:])  # the rows of the batch stand last
        return torch.stack(found)

    @torch.no_grad()
    def assign(self, x: Tensor) -> Tensor:
        """The prototype (N,) that is nearest to each sample; call it in evaluation mode."""
        return assign(self.projector(self.encoder(x)), self._layers[0].weight)[0]

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Keep the prototypes as they are, to begin with."""
        if self.done < self.freeze_steps:
            for layer in self._layers:
                layer.freeze()

    @property
    def _layers(self) -> list[PrototypeLayer]:
        return [layer for layer in self.prototypes if isinstance(layer, PrototypeLayer)]

    def _look(self, z: Tensor, used: Tensor) -> None:
        """Warn where all embeddings have become the same."""
        if not self.check_every or self.done == 0 or self.done % self.check_every:
            return
        spread = 1 - gather_rows(z[0]).float().mean(0).norm()  # of unit rows: 0 where all are equal, near 1 where even
        if spread < 0.01 or used < 1.5:
            warnings.warn(
                f"SwAV has collapsed at step {self.done}: embeddings differ by {float(spread):.4f} (0 = all the same) and "
                f"{float(used):.1f} of {len(self._layers[0].weight)} prototypes are in use. Lower epsilon (0.03), raise "
                f"freeze_steps, or take milder or fewer crops; a loss of {math.log(len(self._layers[0].weight)):.3f} is "
                f"that of guessing",
                stacklevel=2,
            )
