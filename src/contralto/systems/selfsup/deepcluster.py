"""DeepCluster-v2: before every epoch all pictures are clustered, and the clusters are the labels of the epoch.

The offline counterpart of SwAV, from the same paper and code: k-means over remembered embeddings of the last epoch instead of a
balanced assignment within the batch. The centroids are the weights of the classifier, so nothing has to be learnt anew when the
clusters change; several clusterings at a time, of either large crop in turn, are averaged.

Unsupervised Learning of Visual Features by Contrasting Cluster Assignments, Caron et al., NeurIPS 2020, arXiv 2006.09882,
appendix D; after Deep Clustering for Unsupervised Learning of Visual Features, ECCV 2018. The paper's code fills the memory
in a pass before the first epoch; here the first epoch does, and no weight changes in it.
"""

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
from contralto.neighbors.kmeans import kmeans
from contralto.prototypes.layer import PrototypeLayer
from contralto.systems.base import EncoderSystem, Optimizer
from contralto.views.batched import BatchView

__all__ = ["DeepClusterV2"]

UNKNOWN = -100


class DeepClusterV2(EncoderSystem):
    """Clusters of all samples as labels, renewed before every epoch.

    Parameters
    ----------
    encoder, **base
        See `EncoderSystem`; `num_samples` must be given, and `index` of a batch be below it.
    hidden, dim : int
        Widths of the projector.
    num_prototypes : sequence of int
        Clusters of each clustering, at most as many as there are samples.
    temperature : float
    iterations : int
        Of k-means.
    small_crops : int
        Small crops beside the two large ones.
    small_size : float
        Their side, as a share of the large one.

    Examples
    --------
    >>> system = DeepClusterV2(nn.Linear(8, 4), num_features=4, num_samples=6, hidden=8, dim=4, num_prototypes=[3])
    >>> batch = {"views": [torch.randn(6, 8), torch.randn(6, 8)], "index": torch.arange(6)}
    >>> system.step(batch)["loss"].item()  # the first epoch fills the memory
    0.0
    >>> system.at_step_end()
    >>> system.step(batch)["loss"].item() > 0
    True
    """

    memory: Tensor
    seen: Tensor
    clusters: Tensor

    def __init__(
        self,
        encoder: nn.Module,
        *,
        epochs: int = 400,
        batch_size: int = 4096,
        optimizer: Optimizer = "larc",
        lr: float = 4.8,
        weight_decay: float = 1e-6,
        warmup_epochs: float = 10,
        start_lr: float = 0.3,
        final_lr: float = 0.0048,
        hidden: int = 2048,
        dim: int = 128,
        num_prototypes: Sequence[int] = (3000, 3000, 3000),
        temperature: float = 0.1,
        iterations: int = 10,
        small_crops: int = 6,
        small_size: float = 96 / 224,
        **base: Any,
    ) -> None:
        super().__init__(
            encoder,
            epochs=epochs,
            batch_size=batch_size,
            optimizer=optimizer,
            lr=lr,
            weight_decay=weight_decay,
            warmup_epochs=warmup_epochs,
            start_lr=start_lr,
            final_lr=final_lr,
            **base,
        )
        if not num_prototypes or not 2 <= min(num_prototypes) <= max(num_prototypes) <= self.num_samples:
            raise UsageError(
                f"num_prototypes must name numbers from 2 to that of the samples ({self.num_samples}), got {list(num_prototypes)}"
            )
        self.temperature, self.iterations = temperature, iterations
        self.small_crops, self.small_size = small_crops, small_size
        with self.seeded():
            self.projector = mlp([self.num_features, hidden, dim], norm="batch")
            self.prototypes = nn.ModuleList(PrototypeLayer(dim, count) for count in num_prototypes)
        self.prototypes.requires_grad_(False)
        self.register_buffer("memory", torch.zeros(2, self.num_samples, dim))
        self.register_buffer("seen", torch.zeros(self.num_samples, dtype=torch.bool))
        self.register_buffer("clusters", torch.full((len(num_prototypes), self.num_samples), UNKNOWN))

    def views(
        self, size: int, mean: tuple[float, float, float], std: tuple[float, float, float]
    ) -> Sequence[BatchView]:
        """Two large crops, and the small ones."""
        from contralto.views.presets import multi_crop

        return multi_crop(size, round(size * self.small_size), self.small_crops, mean=mean, std=std)

    def step(self, batch: Batch) -> dict[str, Tensor]:
        """Loss of a batch; the first step of an epoch clusters what the last one has left in the memory."""
        views = self.checked(batch)
        if len(views) < 2:
            raise UsageError("DeepClusterV2 takes at least two views of every sample, got 1")
        if self.done and self.done % self.steps_per_epoch == 0:
            self.cluster()
        features = forward_by_size(self.encoder, views)
        z = F.normalize(self.projector(features), dim=1)
        labels = self.clusters[:, batch["index"]]  # (heads, B)
        known = (labels[0] >= 0).sum()
        share = mean_weight(known) / (known.clamp_min(1) * len(views) * len(self.prototypes))
        losses = [
            F.cross_entropy(layer(z) / self.temperature, own.repeat(len(views)), ignore_index=UNKNOWN, reduction="sum")
            for layer, own in zip(self.prototypes, labels, strict=True)
        ]
        self._remember(z.detach().unflatten(0, (len(views), -1))[:2], batch["index"])
        return {"loss": torch.stack(losses).sum() * share, "features": features[: len(views[0])].detach()}

    @torch.no_grad()
    def cluster(self) -> None:
        """Give every sample that was seen its clusters, and make their centroids the prototypes."""
        rows = torch.nonzero(self.seen).squeeze(1)
        for number, layer in enumerate(self.prototypes):
            assert isinstance(layer, PrototypeLayer)
            found = kmeans(
                self.memory[number % 2][rows].float().cpu().numpy(), len(layer.weight), seed=self.seed + self.done + number,
                iterations=self.iterations, restarts=1, spherical=True,
            )  # fmt: skip
            layer.weight.copy_(torch.from_numpy(found.centroids))
            self.clusters[number].fill_(UNKNOWN)
            self.clusters[number, rows] = torch.from_numpy(found.labels).to(rows.device)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Leave all weights as they are while there are no clusters."""
        if self.done < self.steps_per_epoch:
            for p in self.parameters():
                p.grad = None

    @torch.no_grad()
    def _remember(self, z: Tensor, index: Tensor) -> None:
        """Keep the embeddings (2, B, D) of the large crops, of all processes."""
        rows = gather_rows(index)
        self.memory[:, rows] = gather_rows(z.transpose(0, 1)).transpose(0, 1).to(self.memory.dtype)
        self.seen[rows] = True
