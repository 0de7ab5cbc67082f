"""Fine-tuning of a pretrained encoder on labels: cross-entropy, and supervised contrast beside it where it is asked for.

The baseline of `systems.finetuning.core_tuning`, whose recipe it shares: a linear classifier without bias on the features of the
encoder, and for the contrast a projector that is dropped afterwards.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from contralto.data.dataset import Batch
from contralto.distributed import gather_rows, gather_with_gradient, mean_weight
from contralto.encoders.heads import mlp
from contralto.errors import DataError, UsageError
from contralto.losses.pairs import sup_con
from contralto.systems.base import EncoderSystem
from contralto.views.batched import BatchView, uniforms
from contralto.views.rotation import rotate

__all__ = ["FineTuning"]

_ANGLE = 1000
"""Stands for the view among what an angle is a function of: no view has this number."""


class FineTuning(EncoderSystem):
    """Cross-entropy on labels, plus `eta` times supervised contrast.

    Parameters
    ----------
    encoder, **base
        See `EncoderSystem`; the whole encoder learns. SGD is Nesterov's.
    num_classes : int
    eta : float
        Weight of the contrast; 0 is plain cross-entropy, without a projector.
    temperature : float
        Of the contrast.
    dim : int
        Output width of the projector; its hidden layer is as wide as the features.
    micro_batch : int
        A step takes its batch in parts of this many rows, as gradients that are added up over small batches do: batch norm and
        contrast see one part at a time. Across processes, contrast sees the parts of the whole batch.
    crop : float
        Share of the side of a picture that a view covers; 0.94 is 256 of 272 pixels.
    degrees : float
        Largest angle by which views are turned, to both sides.

    Examples
    --------
    >>> system = FineTuning(nn.Linear(8, 4), num_features=4, num_classes=3)
    >>> batch = {"views": [torch.randn(6, 8)], "index": torch.arange(6), "label": torch.arange(6) % 3}
    >>> sorted(system.step(batch)), system.logits(torch.randn(2, 8)).shape
    (['cross_entropy', 'features', 'loss'], torch.Size([2, 3]))
    """

    needs: ClassVar[tuple[str, ...]] = ("label",)

    def __init__(
        self,
        encoder: nn.Module,
        *,
        num_classes: int = 2,
        lr: float = 0.01,
        eta: float = 0.0,
        temperature: float = 0.07,
        dim: int = 256,
        micro_batch: int = 64,
        crop: float = 0.94,
        degrees: float = 15.0,
        **base: Any,
    ) -> None:
        super().__init__(encoder, lr=lr, **base)
        if num_classes < 2:
            raise UsageError(f"num_classes must be at least 2, got {num_classes}")
        if eta < 0 or micro_batch < 2 or not 0 < crop <= 1:
            raise UsageError(
                f"eta is at least 0, micro_batch at least 2, crop a share in (0, 1]; got {eta}, {micro_batch}, {crop}"
            )
        self.num_classes, self.eta, self.temperature = num_classes, eta, temperature
        self.micro_batch, self.crop, self.degrees = micro_batch, crop, degrees
        with self.seeded():
            self.classifier = nn.Linear(self.num_features, num_classes, bias=False)
            self.projector = (
                mlp([self.num_features, self.num_features, dim], normalize=True) if self.eta else nn.Identity()
            )

    def views(
        self, size: int, mean: tuple[float, float, float], std: tuple[float, float, float]
    ) -> Sequence[BatchView]:
        """One view: a square of `crop` of the side at a random place, flipped half of the time; it is turned afterwards."""
        return [BatchView(size, (self.crop**2, self.crop**2), (1.0, 1.0), mean=mean, std=std)]

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Draw the views of a batch of `pictures`, each turned by its own angle."""
        drawn = super().on_after_batch_transfer(batch, dataloader_idx)
        if "pictures" not in batch or not self.degrees:
            return drawn
        u = uniforms(self.seed, batch["epoch"].cpu(), batch["index"].cpu(), _ANGLE, 1)[:, 0]
        angles = torch.from_numpy(self.degrees * (2 * u - 1))
        return drawn | {"views": [rotate(view, angles) for view in drawn["views"]]}

    def step(self, batch: Batch) -> dict[str, Tensor]:
        """Loss of a batch of one view."""
        features, labels = self.features_of(batch)
        parts = self.parts_of_all(features, labels)
        drawn = torch.Generator().manual_seed((self.seed << 32) + self.done)
        each = [self.part_losses(f, y, drawn) for f, y in parts]
        weight = torch.tensor([len(y) for _, y in parts], device=features.device) / sum(len(y) for _, y in parts)
        ce, con = (torch.stack([part[k] for part in each]) @ weight.to(each[0][k].dtype) for k in (0, 1))
        if not self.mixes and not self.eta:  # rows are independent: this process has the loss of its own
            ce = ce * mean_weight(torch.tensor(len(labels), device=ce.device))
        told = {"contrast": con} if self.eta else {}
        return {"loss": ce + self.eta * con, "cross_entropy": ce, **told, "features": features.detach()}

    mixes: ClassVar[bool] = False
    """Whether the loss of one row depends on others even without contrast."""

    def part_losses(self, features: Tensor, labels: Tensor, drawn: torch.Generator) -> tuple[Tensor, Tensor]:
        """Cross-entropy and contrast of a part (b, F); what is `drawn` is a function of the seed and the step."""
        ce = F.cross_entropy(self.classifier(features), labels)
        if not self.eta:
            return ce, ce.new_zeros(())
        return ce, sup_con(self.projector(features), labels, temperature=self.temperature)

    def features_of(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Features (B, F) and labels (B,) of a batch, after a look at it."""
        [view] = self.checked(batch, 1)
        labels: Tensor = batch["label"]
        if (labels < 0).any() or (labels >= self.num_classes).any():
            raise DataError(
                f"fine-tuning needs a label from 0 to {self.num_classes - 1} for every sample; sample "
                f"{int(batch['index'][(labels < 0) | (labels >= self.num_classes)][0])} has another"
            )
        return torch.cat([self.encoder(part) for part in _parts(view, self.micro_batch)]), labels

    def parts_of_all(self, features: Tensor, labels: Tensor) -> list[tuple[Tensor, Tensor]]:
        """The parts in which a step sees its batch, of all processes where rows are compared with each other."""
        if self.mixes or self.eta:
            features, labels = gather_with_gradient(features), gather_rows(labels)
        return list(zip(_parts(features, self.micro_batch), _parts(labels, self.micro_batch), strict=True))

    def logits(self, x: Tensor) -> Tensor:
        """Class scores (N, C)."""
        found: Tensor = self.classifier(self.encoder(x))
        return found

    def optimizers_and_schedules(self) -> tuple[list[torch.optim.Optimizer], list[Any]]:
        """As in `EncoderSystem`; SGD looks ahead (Nesterov)."""
        optimizers, schedules = super().optimizers_and_schedules()
        if self.optimizer == "sgd":
            for group in optimizers[0].param_groups:
                group["nesterov"] = group["momentum"] > 0
        return optimizers, schedules


def _parts(x: Tensor, size: int) -> tuple[Tensor, ...]:
    """Parts of about `size` rows, all of nearly the same length: none is left with a row or two."""
    return x.tensor_split(max(1, round(len(x) / size)))
