"""AdaInf: generated pictures help contrastive learning if real ones are repeated and the augmentation is made weaker.

More data make the graph of samples that augmentations connect denser, which is what strong augmentation was for; but they come
from another distribution, and strong augmentation also changes what a picture shows. So real pictures are drawn about ten
times as often as generated ones, and augmentation is halved; the loss and the number of steps stay as they are.

Do Generated Data Always Help Contrastive Learning?, Wang, Zhang and Wang, ICLR 2024, arXiv 2403.12448. The official code copies
the real pictures ten times; here rows are repeated (`contralto.data.mixture.MixtureSampler`), and nothing is copied. There, a
script reads generated pictures with their colours in another order than real ones; here both are RGB.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from contralto.data.mixture import source_shares
from contralto.errors import UsageError
from contralto.systems.base import Optimizer
from contralto.systems.selfsup.wrapped import Base, Wrapped
from contralto.views.presets import adainf_pair

__all__ = ["AdaInf", "knob_grid"]

Triple = tuple[float, float, float]


class AdaInf(Wrapped):
    """A learner on real and generated pictures, with its augmentation weakened.

    Parameters
    ----------
    encoder, num_features, ..., momentum
        See `EncoderSystem`. An epoch is as many draws as there are real pictures, with or without generated ones, so that the
        number of steps does not depend on them. Rates are those of the paper for two devices, ``lr * batch_size / 256``.
    warmup_epochs : float
        1 % of the steps.
    base : {"simclr", "moco", "byol"}
    hidden, dim, temperature, queue_size, decay
        Of the base, see `Wrapped`.
    generated : str, optional
        Path or address of the generated pictures, which `contralto fit` reads; they must come from a model of the training
        pictures alone. In a loop of one's own, see `contralto.data.mixture.MixtureSampler`.
    dup : int
        How often a real picture is drawn while a generated one is drawn once.
    strength : float
        Of the augmentation: 1 is what is usual for the base, 0.5 AdaInf's; see `contralto.views.presets.adainf_pair`.

    Examples
    --------
    >>> system = AdaInf(nn.Linear(8, 4), num_features=4, hidden=8, dim=4)
    >>> batch = {"views": [torch.randn(6, 8), torch.randn(6, 8)], "index": torch.arange(6)}
    >>> sorted(system.step(batch))
    ['features', 'loss']
    """

    def __init__(
        self,
        encoder: nn.Module,
        *,
        num_features: int,
        num_samples: int = 0,
        steps_per_epoch: int = 1,
        seed: int = 0,
        epochs: int = 1000,
        batch_size: int = 512,
        optimizer: Optimizer = "lars",
        lr: float = 0.4,
        weight_decay: float = 1e-4,
        momentum: float = 0.9,
        warmup_epochs: float = 10,
        base: Base = "simclr",
        hidden: int = 2048,
        dim: int = 256,
        temperature: float = 0.2,
        queue_size: int = 32768,
        decay: float = 0.99,
        generated: str | None = None,
        dup: int = 10,
        strength: float = 0.5,
    ) -> None:
        super().__init__(
            encoder, num_features=num_features, num_samples=num_samples, steps_per_epoch=steps_per_epoch, seed=seed,
            epochs=epochs, batch_size=batch_size, optimizer=optimizer, lr=lr, weight_decay=weight_decay, momentum=momentum,
            warmup_epochs=warmup_epochs, base=base, hidden=hidden, dim=dim, temperature=temperature,
            queue_size=queue_size, decay=decay,
        )  # fmt: skip
        if dup < 1:
            raise UsageError(f"dup must be at least 1, got {dup}")
        if not 0 <= strength <= 1:
            raise UsageError(f"strength must be from 0 to 1, got {strength}")
        self.generated, self.dup, self.strength = generated, dup, strength

    def views(self, size: int, mean: Triple, std: Triple) -> Sequence[Any]:
        """Two views of the wanted strength."""
        return adainf_pair(size, self.strength, learner=self.base, mean=mean, std=std)

    def optimizers_and_schedules(self) -> tuple[list[torch.optim.Optimizer], list[Any]]:
        """The optimiser and its schedule; LARS as in the paper's code: a trust of 0.02, and steps no longer than SGD's."""
        [optimizer], schedules = super().optimizers_and_schedules()
        if self.optimizer == "lars":
            for group in optimizer.param_groups:
                group |= {"trust": 0.02, "larc": True, "clip": True}
        return [optimizer], schedules


def knob_grid(
    real: int,
    generated: int,
    *,
    dups: Sequence[int] = (1, 3, 10, 30),
    strengths: Sequence[float] = (0.25, 0.5, 0.75, 1.0),
) -> list[dict[str, float]]:
    """All settings of the two knobs, to be tried with the same number of steps (AdaInf 8).

    The worse the generator, the larger the best share of real pictures; the more generated pictures, the weaker the best
    augmentation. A first setting without generated pictures is the baseline of each strength.

    Parameters
    ----------
    real, generated : int
        Pictures of each kind.
    dups, strengths : sequence

    Returns
    -------
    list of dict
        `dup`, `strength`, and `real_share`, beta; `dup` is 0 where only real pictures are drawn.

    Examples
    --------
    >>> grid = knob_grid(5_000, 500_000, dups=(1, 10), strengths=(0.5,))
    >>> [(s["dup"], round(s["real_share"], 3)) for s in grid]
    [(0, 1.0), (1, 0.01), (10, 0.091)]
    """
    if real < 1 or generated < 0 or any(d < 1 for d in dups) or any(not 0 <= s <= 1 for s in strengths):
        raise UsageError(
            f"there must be real pictures, dups from 1 and strengths from 0 to 1; got {real} and {generated} pictures, "
            f"{list(dups)}, {list(strengths)}"
        )
    shares = {0: 1.0} | {d: float(source_shares([real, generated], [d, 1])[0]) for d in (dups if generated else ())}
    return [{"dup": d, "strength": s, "real_share": share} for s in strengths for d, share in shares.items()]
