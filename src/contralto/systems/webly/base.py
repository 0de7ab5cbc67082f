"""What the systems for noisy web images share: the network, the loop around a step, prototypes from trusted pictures.

A system adds its losses (`step`), its stages and its optimiser. The network is that of MoPro and its followers: an encoder, a
momentum copy of it for the keys of a queue, a projector to unit embeddings with a reconstructor behind it, a classifier of the
features and an auxiliary one of the embeddings.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F

from contralto.data.dataset import Batch
from contralto.encoders.heads import mlp
from contralto.encoders.image import freeze, unfreeze
from contralto.errors import UsageError
from contralto.losses.contrast import contrast, soft_cross_entropy
from contralto.memory.momentum import momentum_copy
from contralto.memory.queue import Queue
from contralto.prototypes.bank import class_means

__all__ = ["WeblySystem", "instance_contrast", "label_loss", "lr_factor", "scale_rule"]


class WeblySystem(LightningModule):
    """Base of `CAPro` and `FoPro`.

    A subclass calls `build` in its constructor, whose arguments are `self.arguments` from then on.

    Attributes
    ----------
    prototypes : Tensor (C, dim)
        Unit rows, zero before they are set.
    anchor_batches : function
        Set by the training job: yields the views and labels of the pictures from which prototypes are set.
    """

    stages: tuple[str, ...]
    prototypes: Tensor

    def build(
        self, encoder: nn.Module, num_classes: int, num_features: int, stage: str, queue_size: int | None
    ) -> None:
        """Make the network, from `seed`, without touching the global random state.

        Raises
        ------
        UsageError
            If the stage or the number of classes cannot be, or what `scale_rule` gives is missing.
        """
        if stage not in self.stages:
            raise UsageError(f"stage must be one of {', '.join(self.stages)}; got {stage!r}")
        if num_classes < 2:
            raise UsageError(f"num_classes must be at least 2, got {num_classes}")
        h = self.arguments
        if queue_size is None or h.momentum_prototype is None:
            missing = "queue_size" if queue_size is None else "momentum_prototype"
            raise UsageError(f"{missing} must be a number here: scale_rule gives it from the data")
        hidden = [h.hidden] if h.hidden else []
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(h.seed)
            self.encoder = encoder
            self.momentum_encoder = momentum_copy(encoder)
            self.projector = mlp([num_features, *hidden, h.dim], normalize=True)
            self.reconstructor = mlp([h.dim, *hidden, num_features])
            self.classifier = nn.Linear(num_features, num_classes, bias=False)
            self.auxiliary = nn.Linear(h.dim, num_classes, bias=False)
            self.build_more(num_classes)
        self.queue = Queue(queue_size, h.dim, seed=h.seed)
        self.register_buffer("prototypes", torch.zeros(num_classes, h.dim))
        self._parts: list[dict[str, Tensor]] = []
        self.anchor_batches: Callable[[], Iterable[Batch]] | None = None

    def build_more(self, num_classes: int) -> None:
        """Modules of the system's own; drawn after the others, from the same seed."""

    # What a system says of itself.

    def step(self, batch: Batch, epoch: int, batch_idx: int = 0) -> dict[str, Tensor]:
        """Losses of one batch."""
        raise NotImplementedError

    def fused_scores(self, logits: Tensor, z: Tensor, prototypes: Tensor, text_scores: Tensor | None = None) -> Tensor:
        """The scores (B, C) by which labels are judged, without gradient."""
        raise NotImplementedError

    def prototype_scores(self, z: Tensor, prototypes: Tensor) -> Tensor:
        """Class probabilities (B, C) by the similarity to prototypes."""
        raise NotImplementedError

    @staticmethod
    def stage_epochs(arguments: Any, stage: str) -> int:
        """Epochs of a stage; plain training gets as many as the others together."""
        raise NotImplementedError

    @property
    def first_epoch(self) -> int:
        """Number of the first epoch of this stage; stages may count through."""
        return 0

    def nothing(self) -> Tensor:
        """Zero with a gradient of zero for all parameters: every rank must reach them, also where it has no loss for them."""
        return torch.stack([0.0 * p.sum() for p in self.parameters() if p.requires_grad]).sum()

    # What the trainer calls.

    @property
    def arguments(self) -> Any:
        """The arguments of the constructor, saved with every checkpoint."""
        return self.hparams

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """One step; its losses are kept for the log of the epoch."""
        out = self.step(batch, self.first_epoch + self.current_epoch, batch_idx)
        self._parts.append({k: v.detach() for k, v in out.items()})
        return out["loss"]

    def on_train_epoch_end(self) -> None:
        """Log the mean of every loss over the steps that had it; once an epoch, because logging costs more than a step."""
        keys = dict.fromkeys(k for part in self._parts for k in part)
        means = {k: torch.stack([p[k].to(self.device) for p in self._parts if k in p]).mean() for k in keys}
        self.log_dict(means, sync_dist=True)
        self._parts.clear()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the losses of the steps of this epoch: a training may go on within it."""
        checkpoint["parts"] = self._parts

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with the losses of the epoch."""
        self._parts = checkpoint.get("parts", [])

    def set_rate(self, rate: float) -> None:
        """Learning rate of all parameters from now on."""
        for optimizer in self.trainer.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * group.get("share", 1.0)

    def freeze_encoder_until(self, epoch: int, release: int) -> None:
        """Freeze the encoder before epoch `release`; from then on it learns, with an optimiser that starts anew."""
        if epoch < release:
            freeze(self.encoder)
        elif epoch == release:
            unfreeze(self.encoder)
            for optimizer in self.trainer.optimizers:  # as in fopro's code
                optimizer.state.clear()

    @torch.no_grad()
    def init_prototypes(self) -> None:
        """Set every prototype to the mean of its trusted pictures: evaluation mode, momentum encoder and projector."""
        assert self.anchor_batches is not None, "anchor_batches must be set before prototypes are"
        training = self.training
        self.eval()
        embeddings, labels = [], []
        for batch in self.anchor_batches():
            embeddings.append(self.projector(self.momentum_encoder(batch["views"][0].to(self.device))))
            labels.append(batch["label"].to(self.device))
        self.train(training)
        self.prototypes.copy_(class_means(torch.cat(embeddings), torch.cat(labels), len(self.prototypes)))

    # What is learnt, applied.

    def forward(self, x: Tensor) -> Tensor:
        """Class probabilities (B, C) of the classifier, all that is used at inference."""
        probabilities: Tensor = self.classifier(self.encoder(x)).softmax(1)
        return probabilities

    @torch.no_grad()
    def score(self, x: Tensor, text_scores: Tensor | None = None) -> dict[str, Tensor]:
        """All scores of a batch of inputs.

        Returns
        -------
        dict
            `classifier`, `auxiliary`, `prototype`, `fused` (B, C) in [0, 1] and `embedding` (B, dim).
        """
        v = self.encoder(x)
        z = self.projector(v)
        logits = self.classifier(v)
        return {
            "classifier": logits.softmax(1),
            "auxiliary": self.auxiliary(F.normalize(z, dim=1)).softmax(1),
            "prototype": self.prototype_scores(z, self.prototypes),
            "fused": self.fused_scores(logits, z, self.prototypes, text_scores),
            "embedding": z,
        }


def instance_contrast(z: Tensor, key: Tensor, negatives: Tensor, temperature: float) -> Tensor:
    """Every embedding against the key of its other view, and the keys of the queue (MoCo).

    Parameters
    ----------
    z, key : Tensor (B, d)
        Unit rows; `key` carries no gradient.
    negatives : Tensor (Q, d)
        Unit rows of earlier batches.
    temperature : float

    Returns
    -------
    Tensor
        Mean over the batch.
    """
    columns = torch.cat([z.new_zeros(len(key)), z.new_ones(len(negatives))])  # own key (coupled) and the queue
    return contrast(
        z,
        torch.cat([key, negatives.to(key.dtype)]),
        positives=torch.arange(len(z), device=z.device),
        weights=columns,
        temperature=temperature,
        coupled=True,
        normalize=False,
    )


def label_loss(logits: Tensor, label: Tensor, soft: Tensor | None = None) -> Tensor:
    """Cross-entropy (N,) against the labels, or against soft ones where there are some."""
    if soft is None:
        return F.cross_entropy(logits, label, reduction="none")
    return soft_cross_entropy(logits, soft)


def scale_rule(n_images: int, num_classes: int) -> dict[str, Any]:
    """What must scale with the size of the data, where an argument is None.

    With n = N / C images per class: anchors per class K = n / 5 within [10, 50]; prototype momentum m_p = 1 - 2 / n within
    [0.9, 0.999], so that a prototype forgets its start within an epoch; queue of N / 3 keys within [256, 8192].

    Examples
    --------
    >>> scale_rule(3276, 22)
    {'anchors': 29, 'momentum_prototype': 0.9866, 'queue_size': 1092}
    >>> scale_rule(2_400_000, 1000)
    {'anchors': 50, 'momentum_prototype': 0.999, 'queue_size': 8192}
    """
    n = n_images / num_classes
    return {
        "anchors": int(min(max(n // 5, 10), 50)),
        "momentum_prototype": round(min(max(1 - 2 / n, 0.9), 0.999), 4),
        "queue_size": int(min(max(n_images // 3, 256), 8192)),
    }


def lr_factor(epoch: int, warmup: int, epochs: int) -> float:
    """Learning rate of an epoch over the base rate (CAPro 5.8): linear warm-up, then cosine.

    Examples
    --------
    >>> [round(lr_factor(e, 5, 60), 3) for e in (0, 1, 5, 60)]
    [0.2, 0.2, 1.0, 0.0]
    """
    if epoch <= warmup and warmup > 0:
        return max(epoch, 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (epoch - warmup) / max(epochs - warmup, 1)))
