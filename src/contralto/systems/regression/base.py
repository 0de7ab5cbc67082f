"""Regression of a number from pictures or rows: least absolute error, which the contrastive systems are compared with.

A batch has two views of every sample and `number` (B,), what is to be told, in its own units.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from contralto.data.dataset import Batch
from contralto.distributed import mean_weight
from contralto.errors import DataError, UsageError
from contralto.systems.base import EncoderSystem, Optimizer
from contralto.views.batched import BatchView
from contralto.views.tables import draw_rows

__all__ = ["Regression", "Schedule"]

Schedule = Literal["step", "cosine"]


class Regression(EncoderSystem):
    """Encoder and one linear output, trained for the least absolute error of both views.

    Parameters
    ----------
    encoder, **base
        See `EncoderSystem`.
    schedule : {"step", "cosine"}
        "step" lowers the rate to a tenth after four fifths of the training, as the paper does.
    smallest_crop, flip, colours : float
        Views of pictures: share of the area that a crop covers at least, probability of a mirrored view, strength of changes of
        brightness, contrast and saturation. Choose what leaves the number as it is: a mirrored picture has another angle.
    noise, drop : float
        Views of rows: see `contralto.views.tables.draw_rows`.

    Attributes
    ----------
    center, spread : Tensor ()
        Mean and deviation of the numbers, from `learn_scale`; 0 and 1 to begin with.

    Examples
    --------
    >>> system = Regression(nn.Linear(8, 4), num_features=4)
    >>> system.learn_scale(torch.arange(6.0))
    >>> batch = {"views": [torch.randn(6, 8), torch.randn(6, 8)], "index": torch.arange(6), "number": torch.arange(6.0)}
    >>> sorted(system.step(batch)), system.tell(torch.randn(3, 8)).shape
    (['features', 'loss', 'mae'], torch.Size([3]))
    """

    needs: ClassVar[tuple[str, ...]] = ("number",)
    center: Tensor
    spread: Tensor

    def __init__(
        self,
        encoder: nn.Module,
        *,
        batch_size: int = 64,
        optimizer: Optimizer = "adam",
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        schedule: Schedule = "step",
        smallest_crop: float = 0.6,
        flip: float = 0.0,
        colours: float = 0.4,
        noise: float = 0.1,
        drop: float = 0.0,
        **base: Any,
    ) -> None:
        super().__init__(encoder, batch_size=batch_size, optimizer=optimizer, lr=lr, weight_decay=weight_decay, **base)
        if schedule not in ("step", "cosine"):
            raise UsageError(f'schedule must be "step" or "cosine", got {schedule!r}')
        self.schedule: Schedule = schedule
        self.smallest_crop, self.flip, self.colours, self.noise, self.drop = smallest_crop, flip, colours, noise, drop
        self.register_buffer("center", torch.tensor(0.0))
        self.register_buffer("spread", torch.tensor(1.0))
        with self.seeded():
            self.output = nn.Linear(self.num_features, 1)

    @torch.no_grad()
    def learn_scale(self, numbers: Tensor) -> None:
        """Take mean and deviation of the numbers (N,) that are learnt from; the output is told in these.

        Raises
        ------
        UsageError
            If all are the same.
        """
        spread = numbers.double().std(correction=0)
        if not spread > 0:
            raise UsageError(f"all numbers to learn from are {float(numbers[0]):g}: there is nothing to tell")
        self.center.copy_(numbers.double().mean())
        self.spread.copy_(spread)

    def views(
        self, size: int, mean: tuple[float, float, float], std: tuple[float, float, float]
    ) -> Sequence[BatchView]:
        """Two views of a picture, of one kind."""
        jitter = (self.colours, self.colours, self.colours, 0.0)
        return [BatchView(size, (self.smallest_crop, 1.0), flip=self.flip, jitter=jitter, mean=mean, std=std)] * 2

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Draw the views of a batch of `rows` or `pictures`."""
        if "rows" not in batch:
            return super().on_after_batch_transfer(batch, dataloader_idx)
        views = draw_rows(
            batch["rows"], noise=self.noise, drop=self.drop, seed=self.seed, epoch=batch["epoch"].cpu(),
            index=batch["index"].cpu(),
        )  # fmt: skip
        return {"views": views} | {k: v for k, v in batch.items() if k not in ("rows", "epoch")}

    def step(self, batch: Batch) -> dict[str, Tensor]:
        """Loss of a batch of two views, in deviations; and the mean absolute error, in units."""
        features, numbers = self.features_of(batch)
        told = self.output(features).squeeze(1)
        wanted = ((numbers - self.center) / self.spread).to(told.dtype).repeat(2)
        loss = F.l1_loss(told, wanted) * mean_weight(torch.tensor(len(numbers), device=told.device))
        return {
            "loss": loss,
            "mae": (loss * self.spread).detach(),
            "features": features[: len(numbers)].detach(),
        }

    def features_of(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Features (2 B, F) of both views, the first ones first, and numbers (B,), after a look at the batch."""
        views = self.checked(batch, 2)
        numbers: Tensor = batch["number"]
        if not torch.isfinite(numbers).all():
            wrong = int(batch["index"][~torch.isfinite(numbers)][0])
            raise DataError(f"sample {wrong} has no number to learn from (NaN or infinite)")
        features: Tensor = self.encoder(torch.cat(views))
        return features, numbers

    def tell(self, x: Tensor) -> Tensor:
        """The numbers (N,) of samples, by the output that was trained."""
        found: Tensor = self.output(self.encoder(x)).squeeze(1) * self.spread + self.center
        return found

    def optimizers_and_schedules(self) -> tuple[list[torch.optim.Optimizer], list[Any]]:
        """As in `EncoderSystem`, or with one step down."""
        optimizers, schedules = super().optimizers_and_schedules()
        if self.schedule == "step":
            warmup, last = round(self.warmup_epochs * self.steps_per_epoch), round(0.8 * self.total_steps)

            def factor(step: int) -> float:
                return 0.1 if step >= last else min(1.0, (step + 1) / (warmup + 1))

            for group in optimizers[0].param_groups:
                group["lr"] = group["initial_lr"]
            schedules = [torch.optim.lr_scheduler.LambdaLR(optimizers[0], factor)]
        return optimizers, schedules
