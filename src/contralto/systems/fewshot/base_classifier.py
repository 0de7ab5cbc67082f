"""A plain classifier of the base classes, for comparison with episodic training; and a good start for it.

A Closer Look at Few-shot Classification, Chen et al., ICLR 2019, arXiv 1904.04232, "Baseline": encoder and linear layer learn the
base classes together from ordinary batches; new classes get prototypes or a linear probe on the frozen encoder. The linear layer
is not used afterwards.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from contralto.data.dataset import Batch
from contralto.errors import DataError, UsageError
from contralto.systems.base import EncoderSystem, Optimizer
from contralto.systems.fewshot.base import few_shot_view
from contralto.views.batched import BatchView

__all__ = ["BaseClassifier"]


class BaseClassifier(EncoderSystem):
    """Encoder and linear classifier of the base classes.

    Parameters
    ----------
    encoder, **base
        See `EncoderSystem`.
    num_classes : int
        Base classes.
    crop, flip, jitter : float
        See `few_shot_view`.

    Examples
    --------
    >>> import torch
    >>> system = BaseClassifier(nn.Linear(8, 4), num_features=4, num_classes=3)
    >>> batch = {"views": [torch.randn(4, 8)], "index": torch.arange(4), "label": torch.tensor([0, 2, 1, 0])}
    >>> sorted(system.step(batch))
    ['accuracy', 'features', 'loss']
    """

    needs = ("label",)

    def __init__(
        self,
        encoder: nn.Module,
        *,
        num_classes: int,
        epochs: int = 400,
        batch_size: int = 16,
        optimizer: Optimizer = "adam",
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        crop: float = 0.5,
        flip: float = 0.5,
        jitter: float = 0.4,
        **base: Any,
    ) -> None:
        super().__init__(
            encoder, epochs=epochs, batch_size=batch_size, optimizer=optimizer, lr=lr, weight_decay=weight_decay, **base
        )
        if num_classes < 2:
            raise UsageError(f"num_classes must be at least 2, got {num_classes}")
        self.num_classes, self.crop, self.flip, self.jitter = num_classes, crop, flip, jitter
        with self.seeded():
            self.classifier = nn.Linear(self.num_features, num_classes)

    def views(
        self, size: int, mean: tuple[float, float, float], std: tuple[float, float, float]
    ) -> Sequence[BatchView]:
        """One view of every picture."""
        return [few_shot_view(size, crop=self.crop, flip=self.flip, jitter=self.jitter, mean=mean, std=std)]

    def step(self, batch: Batch) -> dict[str, Tensor]:
        """Cross-entropy of a batch."""
        [x] = self.checked(batch, 1)
        labels = batch["label"]
        if (labels < 0).any() or (labels >= self.num_classes).any():
            raise DataError(f"labels must be those of the {self.num_classes} base classes, for every sample")
        features = self.encoder(x)
        logits = self.classifier(features)
        right = (logits.detach().argmax(1) == labels).float().mean()
        return {"loss": F.cross_entropy(logits, labels), "accuracy": right, "features": features.detach()}
