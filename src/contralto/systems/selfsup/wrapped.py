"""Systems around another learner: they change what it sees or in which order, not its loss."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from contralto.data.dataset import Batch
from contralto.errors import UsageError
from contralto.systems.base import EncoderSystem, Optimizer
from contralto.systems.selfsup.byol import BYOL
from contralto.systems.selfsup.moco import MoCo
from contralto.systems.selfsup.simclr import SimCLR

__all__ = ["Base", "Wrapped"]

Base = Literal["simclr", "moco", "byol"]


class Wrapped(EncoderSystem):
    """A system whose loss is that of SimCLR, MoCo v2 or BYOL.

    Parameters
    ----------
    encoder, num_features, ..., warmup_epochs
        See `EncoderSystem`; optimiser and schedule are of this system, for all parts of the learner.
    base : {"simclr", "moco", "byol"}
    hidden, dim : int
        Widths of its projector (and predictor).
    temperature : float
        Of SimCLR and MoCo.
    queue_size : int
        Of MoCo.
    decay : float
        Of the momentum network of MoCo and BYOL.

    Attributes
    ----------
    learner : EncoderSystem
        Has the encoder and all heads.
    """

    learner: EncoderSystem

    def __init__(
        self,
        encoder: nn.Module,
        *,
        num_features: int,
        num_samples: int,
        steps_per_epoch: int,
        seed: int,
        epochs: int,
        batch_size: int,
        optimizer: Optimizer,
        lr: float,
        weight_decay: float,
        momentum: float,
        warmup_epochs: float,
        base: Base,
        hidden: int,
        dim: int,
        temperature: float,
        queue_size: int,
        decay: float,
    ) -> None:
        shared: dict[str, Any] = {
            "num_features": num_features, "num_samples": num_samples, "steps_per_epoch": steps_per_epoch, "seed": seed,
            "epochs": epochs, "batch_size": batch_size, "optimizer": optimizer, "lr": lr, "weight_decay": weight_decay,
            "momentum": momentum,
        }  # fmt: skip
        super().__init__(encoder, warmup_epochs=warmup_epochs, **shared)
        shared |= {"hidden": hidden, "dim": dim}
        if base == "simclr":
            self.learner = SimCLR(encoder, temperature=temperature, **shared)
        elif base == "moco":
            self.learner = MoCo(encoder, temperature=temperature, queue_size=queue_size, decay=decay, **shared)
        elif base == "byol":
            self.learner = BYOL(encoder, decay=decay, **shared)
        else:
            raise UsageError(f"base must be simclr, moco or byol; got {base!r}")
        self.base: Base = base
        del self._modules["encoder"]  # it is the learner's: one module under two names would be saved twice

    @property
    def encoder(self) -> nn.Module:  # type: ignore[override]
        """The encoder of the learner."""
        return self.learner.encoder

    def views(self, size: int, mean: tuple[float, float, float], std: tuple[float, float, float]) -> Sequence[Any]:
        """The views of the learner."""
        return self.learner.views(size, mean, std)

    def step(self, batch: Batch) -> dict[str, Tensor]:
        """The losses of the learner."""
        return self.learner.step(batch)

    def embed(self, x: Tensor) -> Tensor:
        """What the learner gives after training (N, F)."""
        return self.learner.embed(x)

    def at_step_end(self) -> None:
        """Count the step, here and in the learner."""
        self.learner.at_step_end()
        super().at_step_end()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """What the learner does to gradients."""
        self.learner.on_before_optimizer_step(optimizer)
