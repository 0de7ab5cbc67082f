"""What the systems that train an encoder share: views in, loss out, optimiser, schedule, and what is used afterwards.

A system adds its heads, its views and `step`. It is usable in a loop of one's own::

    system = SimCLR(encoder, num_features=512, steps_per_epoch=len(loader))
    [optimizer], [schedule] = system.optimizers_and_schedules()
    for batch in loader:                                 # {"views": [(B, 3, S, S), (B, 3, S, S)], "index": (B,)}
        system.step(batch)["loss"].backward()
        system.on_before_optimizer_step(optimizer)
        optimizer.step(), optimizer.zero_grad(), schedule.step()
        system.at_step_end()
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Literal

import torch
from lightning import LightningModule
from torch import Tensor, nn

from contralto.data.dataset import Batch
from contralto.errors import ContraltoError, DataError, UsageError
from contralto.systems.optim import LARS, warmup_cosine
from contralto.views.batched import BatchView, draw_batch

__all__ = ["EncoderSystem", "Optimizer"]

Optimizer = Literal["sgd", "lars", "larc", "adam", "adamw"]


class EncoderSystem(LightningModule):
    """Base of the systems that learn an encoder from views of samples, labelled or not.

    Parameters
    ----------
    encoder : nn.Module
        Views (B, ...) to features (B, num_features).
    num_features : int
    num_samples : int
        Rows of the data; systems that keep something for every sample need it.
    steps_per_epoch : int
    seed : int
        Of the heads, and of all views.
    epochs : int
    batch_size : int
    optimizer : {"sgd", "lars", "larc", "adam", "adamw"}
        "lars" leaves tensors of one dimension (biases, norms) without decay and scaling, "larc" treats all alike.
    lr, weight_decay, momentum : float
    warmup_epochs : float
        Linear from `start_lr` to `lr`, then half a cosine down to `final_lr`, step by step.
    start_lr, final_lr : float

    Attributes
    ----------
    needs : tuple of str
        Fields that a batch must have beside `views` and `index`.
    spares_flat : bool
        Whether tensors of one dimension take no weight decay whatever the optimiser; a class says so.
    done : int
        Optimiser steps so far.
    """

    needs: ClassVar[tuple[str, ...]] = ()
    spares_flat: ClassVar[bool] = False
    steps: Tensor

    def __init_subclass__(cls, **rest: Any) -> None:
        """The signature of a system names all that it takes: arguments of its own, and those it hands on as ``**base``."""
        super().__init_subclass__(**rest)
        cls.__signature__ = _signature(cls)  # type: ignore[attr-defined]

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
        optimizer: Optimizer = "sgd",
        lr: float = 0.06,
        weight_decay: float = 1e-4,
        momentum: float = 0.9,
        warmup_epochs: float = 0,
        start_lr: float = 0.0,
        final_lr: float = 0.0,
    ) -> None:
        super().__init__()
        if num_features < 1 or steps_per_epoch < 1 or epochs < 0:
            raise UsageError(
                f"num_features and steps_per_epoch must be at least 1, epochs at least 0; got {num_features}, "
                f"{steps_per_epoch}, {epochs}"
            )
        self.encoder, self.num_features, self.num_samples = encoder, num_features, num_samples
        self.steps_per_epoch, self.seed, self.epochs, self.batch_size = steps_per_epoch, seed, epochs, batch_size
        self.optimizer, self.lr, self.weight_decay, self.momentum = optimizer, lr, weight_decay, momentum
        self.warmup_epochs, self.start_lr, self.final_lr = warmup_epochs, start_lr, final_lr
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self._parts: list[dict[str, Tensor]] = []

    @contextmanager
    def seeded(self) -> Iterator[None]:
        """What is drawn within depends on `seed` alone; the global random state is left as it was."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            yield

    # What a system says of itself.

    def views(
        self, size: int, mean: tuple[float, float, float], std: tuple[float, float, float]
    ) -> Sequence[BatchView]:
        """The views of a picture that a step wants; here SimCLR's two."""
        from contralto.views.presets import simclr_pair

        return simclr_pair(size, mean=mean, std=std)

    def take_classes(self, names: Sequence[str]) -> None:
        """Told by a job before training: the names of the labels, in the order of their numbers. Most systems do not care."""

    def step(self, batch: Batch) -> dict[str, Tensor]:
        """Losses of one batch: `loss` (scalar) and what else is to be logged; `features` (B, F) of the first view, detached."""
        raise NotImplementedError

    def checked(self, batch: Batch, count: int | None = None) -> list[Tensor]:
        """The views of a batch, after a look at it.

        Raises
        ------
        UsageError
            If there are not `count` views, a field of `needs` is missing, or the batch is one sample: nothing to compare it with.
        """
        views: list[Tensor] = list(batch["views"])
        if count is not None and len(views) != count:
            raise UsageError(f"{type(self).__name__} takes {count} views of every sample, got {len(views)}")
        if not views or len(views[0]) < 2:
            raise UsageError(f"{type(self).__name__} compares samples with each other: a batch needs at least two")
        missing = [name for name in self.needs if name not in batch]
        if missing:
            raise UsageError(f"{type(self).__name__} needs {missing[0]!r} in every batch")
        return views

    def embed(self, x: Tensor) -> Tensor:
        """What is used after training (N, F): the features of the encoder."""
        features: Tensor = self.encoder(x)
        return features

    @property
    def done(self) -> int:
        """Optimiser steps taken."""
        return int(self.steps)

    @property
    def total_steps(self) -> int:
        """Steps of the whole training."""
        return self.epochs * self.steps_per_epoch

    @property
    def progress(self) -> float:
        """Share of the training that is done, in [0, 1]."""
        return min(self.done / max(self.total_steps, 1), 1.0)

    def at_step_end(self) -> None:
        """After every optimiser step; whoever writes a loop calls it. A system that overrides it calls this one too."""
        self.steps += 1

    # What the trainer calls.

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Draw the views of a batch of `pictures`, on the device that trains."""
        if "pictures" not in batch:
            return batch
        views = self.views(self.encoder.size, self.encoder.mean, self.encoder.std)  # type: ignore[arg-type]
        pixels, boxes = draw_batch(
            views, batch["pictures"], batch["sizes"], seed=self.seed, epoch=batch["epoch"], index=batch["index"]
        )
        return {"views": pixels, "boxes": boxes} | {
            k: v for k, v in batch.items() if k not in ("pictures", "sizes", "epoch")
        }

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """One step; its losses are kept for the log of the epoch."""
        out = self.step(batch)
        if not torch.isfinite(out["loss"]):
            raise _not_a_number(batch)
        self._parts.append({k: v.detach() for k, v in out.items() if k != "features"})
        self.features = out.get("features")
        return out["loss"]

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """The trainer's step, counted before anything is saved."""
        super().optimizer_step(*args, **kwargs)
        self.at_step_end()

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

    def optimizers_and_schedules(self) -> tuple[list[torch.optim.Optimizer], list[Any]]:
        """The optimiser and its schedule, to be stepped after every optimiser step."""
        learnt = [p for p in self.parameters() if p.requires_grad]
        groups: list[dict[str, Any]] = [{"params": learnt}]
        if self.optimizer == "lars" or self.spares_flat:
            full, flat = [p for p in learnt if p.ndim > 1], [p for p in learnt if p.ndim <= 1]
            spared: dict[str, Any] = {"params": flat, "weight_decay": 0.0}
            groups = [{"params": full}, spared | ({"adapt": False} if self.optimizer == "lars" else {})]
        groups = [g for g in groups if g["params"]]
        rate: dict[str, Any] = {"lr": self.lr, "weight_decay": self.weight_decay}
        optimizer: torch.optim.Optimizer
        if self.optimizer == "sgd":
            optimizer = torch.optim.SGD(groups, momentum=self.momentum, **rate)
        elif self.optimizer in ("lars", "larc"):
            optimizer = LARS(groups, momentum=self.momentum, larc=self.optimizer == "larc", **rate)
        elif self.optimizer == "adam":
            optimizer = torch.optim.Adam(groups, **rate)
        elif self.optimizer == "adamw":
            optimizer = torch.optim.AdamW(groups, **rate)
        else:
            raise UsageError(f"optimizer must be sgd, lars, larc, adam or adamw; got {self.optimizer!r}")
        warmup = round(self.warmup_epochs * self.steps_per_epoch)

        def factor(step: int) -> float:
            if not self.lr:
                return 0.0
            rate = warmup_cosine(
                step, total=self.total_steps, warmup=warmup, peak=self.lr, start=self.start_lr, final=self.final_lr
            )
            return rate / self.lr

        return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, factor)]

    def configure_optimizers(self) -> Any:
        """For the trainer: the optimiser, and its schedule by steps."""
        [optimizer], [schedule] = self.optimizers_and_schedules()
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def _signature(cls: type[EncoderSystem]) -> inspect.Signature:
    """All arguments of a class, where one that has ``**base`` also takes those of its base; its own defaults win."""
    every: dict[str, inspect.Parameter] = {}
    for part in reversed(cls.__mro__[: cls.__mro__.index(EncoderSystem) + 1]):
        if "__init__" in vars(part):
            own = list(inspect.signature(vars(part)["__init__"]).parameters.values())[1:]
            hands_on = any(p.kind is p.VAR_KEYWORD for p in own)
            every = (every if hands_on else {}) | {p.name: p for p in own if p.kind is not p.VAR_KEYWORD}
    return inspect.Signature(list(every.values()))


def _not_a_number(batch: Batch) -> ContraltoError:
    """Why the loss is no number: samples that are none themselves, named by their index, or else the learning rate."""
    for number, view in enumerate(batch["views"]):
        wrong = ~torch.isfinite(view.flatten(1)).all(1)
        if wrong.any():
            rows = batch["index"].to(wrong.device)[wrong].tolist()
            told = ", ".join(map(str, rows[:5])) + (", ..." if len(rows) > 5 else "")
            return DataError(f"view {number} of sample {told} holds values that are no numbers (NaN or infinite)")
    return ContraltoError("the loss is not a number, though its input is finite: a smaller learning rate usually helps")
