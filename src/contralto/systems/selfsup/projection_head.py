"""Which layer to take: an encoder trained under one of several heads, with both layers at hand.

Training makes features the more unequal the deeper the layer: the last carries what the loss wants, the one before the head is
closer to even. A task that needs what the training destroys, starves or drowns is better served before the head, which is why a
head is used in training and dropped afterwards. A fixed reweighting of the features, one number to choose, can take its place.

Investigating the Benefits of Projection Head for Representation Learning, Xue et al., ICLR 2024, arXiv 2403.11391. Theory:
`systems.selfsup.theory`. In the authors' code any head with a hidden width is by now the reweighting one; here it goes by name.
Their supervised contrastive loss is not a number where an anchor has no positive; such anchors are skipped here.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from contralto.data.dataset import Batch
from contralto.distributed import gather_rows, gather_with_gradient, mean_weight
from contralto.encoders.heads import HeadKind, projection_head
from contralto.errors import DataError, UsageError
from contralto.losses.pairs import nt_xent, sup_con
from contralto.systems.base import EncoderSystem, Optimizer

__all__ = ["Objective", "ProjectionHead"]

Objective = Literal["nt_xent", "sup_con", "cross_entropy"]


class ProjectionHead(EncoderSystem):
    """An encoder under a head; `representation` gives the features before or after it.

    Parameters
    ----------
    encoder, **base
        See `EncoderSystem`; the defaults are those of the self-supervised experiment.
    head : {"mlp", "none", "mlp3", "identity_init", "fixed"}
        See `contralto.encoders.heads.projection_head`.
    hidden : int
        Width of its hidden layers.
    dim : int, optional
        Output width of "mlp" and "mlp3"; default: as many as there are features.
    kappa, floor : float
        Of "fixed". ``kappa ** -num_features`` is best between 1e-2 and 1e-10.
    objective : {"nt_xent", "sup_con", "cross_entropy"}
        Two views of a sample against all others; all rows of a class against all others; a linear classifier behind the head.
    num_classes : int
        Of "cross_entropy".
    temperature : float
        Of the contrastive objectives.

    Notes
    -----
    A fixed head is invertible: a probe of standardised features finds the same before and after it. Compare its features with
    those of ``head="none"``.

    Examples
    --------
    >>> system = ProjectionHead(nn.Linear(8, 4), num_features=4, hidden=8)
    >>> batch = {"views": [torch.randn(6, 8), torch.randn(6, 8)], "index": torch.arange(6)}
    >>> sorted(system.step(batch))
    ['features', 'loss']
    """

    def __init__(
        self,
        encoder: nn.Module,
        *,
        epochs: int = 400,
        batch_size: int = 512,
        optimizer: Optimizer = "adam",
        lr: float = 1e-3,
        weight_decay: float = 1e-6,
        head: HeadKind = "mlp",
        hidden: int = 2048,
        dim: int | None = None,
        kappa: float = 1.05,
        floor: float = 0.0,
        objective: Objective = "nt_xent",
        num_classes: int = 0,
        temperature: float = 0.5,
        **base: Any,
    ) -> None:
        super().__init__(
            encoder, epochs=epochs, batch_size=batch_size, optimizer=optimizer, lr=lr, weight_decay=weight_decay, **base
        )
        if objective not in ("nt_xent", "sup_con", "cross_entropy"):
            raise UsageError(f"objective must be nt_xent, sup_con or cross_entropy; got {objective!r}")
        if objective == "cross_entropy" and num_classes < 2:
            raise UsageError(f"num_classes must be at least 2 for cross_entropy, got {num_classes}")
        self.objective, self.temperature, self.num_classes = objective, temperature, num_classes
        width = dim if dim is not None and head in ("mlp", "mlp3") else self.num_features
        with self.seeded():
            self.head = projection_head(head, self.num_features, hidden=hidden, out=dim, kappa=kappa, floor=floor)
            self.classifier = nn.Linear(width, num_classes) if objective == "cross_entropy" else None

    def step(self, batch: Batch) -> dict[str, Tensor]:
        """Loss of a batch: two views for "nt_xent", any number of them with labels otherwise."""
        views = self.checked(batch, 2 if self.objective == "nt_xent" else None)
        n = len(views[0])
        features = self.encoder(torch.cat(views))
        h = self.head(features)
        if self.objective == "nt_xent":
            z0, z1 = (gather_with_gradient(part) for part in h.chunk(2))
            loss = nt_xent(z0, z1, temperature=self.temperature)
        elif self.classifier is None:
            z, labels = gather_with_gradient(h), gather_rows(self._labels(batch).repeat(len(views)))
            loss = sup_con(z, labels, temperature=self.temperature)
        else:
            labels = self._labels(batch).repeat(len(views))
            loss = F.cross_entropy(self.classifier(h), labels) * mean_weight(torch.tensor(n, device=h.device))
        return {"loss": loss, "features": features[:n].detach()}

    def representation(self, x: Tensor, *, use_head: bool = False) -> Tensor:
        """Features (N, F) before the head, or what the loss sees behind it."""
        features: Tensor = self.encoder(x)
        return self.head(features) if use_head else features

    def _labels(self, batch: Batch) -> Tensor:
        if "label" not in batch:
            raise UsageError(f"the objective {self.objective} needs 'label' in every batch")
        labels: Tensor = batch["label"]
        if (labels < 0).any():
            raise DataError(f"the objective {self.objective} needs a label for every sample, and some have none")
        return labels
