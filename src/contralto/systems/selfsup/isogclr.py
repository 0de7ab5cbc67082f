"""iSogCLR: contrast against all negatives of the data, not those of a batch, with a temperature for every item.

A small batch estimates the logarithm of a mean with a bias: a running mean per item takes it away (SogCLR). One temperature for
all is wrong where some items have many look-alikes and others none: here it is the dual variable of a distributionally robust
objective, and moves until the weights of an item's negatives diverge from uniform by `rho`. Frequent things get large
temperatures, rare ones small ones; the temperatures themselves say which is which.

Not All Semantics are Created Equal: Contrastive Self-supervised Learning with Automatic Temperature Individualization, Qiu et
al., ICML 2023, arXiv 2305.11965; Provable Stochastic Optimization for Global Contrastive Learning: Small Batch Does Not Harm
Performance, Yuan et al., ICML 2022, arXiv 2202.12387. Code and paper differ, and `official=True` follows the code: running means
start at 0 (here: at the first batch that an item is in), exponents of the two-view form leave out the positive (here: they are
differences to it, as in the objective). Its variant in which a network tells the temperatures is left out.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from contralto.data.dataset import Batch
from contralto.distributed import gather_rows, gather_with_gradient
from contralto.encoders.heads import mlp
from contralto.errors import UsageError
from contralto.losses.global_contrast import (
    ItemState,
    TemperatureRule,
    bimodal_global_contrast,
    global_contrast,
    queue_global_contrast,
    step_size,
)
from contralto.memory.momentum import momentum_copy, momentum_update
from contralto.memory.per_sample import PerSample
from contralto.memory.queue import Queue
from contralto.systems.base import EncoderSystem, Optimizer

__all__ = ["BimodalGlobalContrast", "ISogCLR"]


class ISogCLR(EncoderSystem):
    """Robust global contrast of two views, or of a view with its key and a queue.

    Parameters
    ----------
    encoder, **base
        See `EncoderSystem`. `num_samples` is needed. Losses are those of cosines, not of logits: rates of SimCLR with plain SGD
        are too small here, and LARS hides it.
    hidden, dim : int
        Widths of the projector, which has no batch norm.
    gamma : float
        Weight of a batch in the running means.
    rho : float
        Divergence from uniform that temperatures aim at, 0.1 to 0.5; larger means smaller temperatures.
    temperature, temperature_min, temperature_max : float
        To begin with, and the bounds.
    eta, beta : float
        Step size of temperatures, and weight of the new gradient in the running one.
    eta_schedule : {"const", "cosine", "exp"}
        How `eta` goes over epochs.
    clamp : float
        Largest absolute gradient of a temperature.
    learn_temperature : bool
        `False`: SogCLR, all temperatures stay as they are.
    queue_size : int
        0: negatives are the other samples of the batch. Otherwise MoCo's form, with a queue of so many keys.
    decay : float
        Of the momentum network of that form.
    official : bool
        Follow the published code where it differs, see above.

    Examples
    --------
    >>> system = ISogCLR(nn.Linear(8, 4), num_features=4, num_samples=10, hidden=8, dim=4)
    >>> batch = {"views": [torch.randn(6, 8), torch.randn(6, 8)], "index": torch.arange(6)}
    >>> sorted(system.step(batch))
    ['features', 'loss', 'temperature']
    >>> system.temperatures()[6:]
    tensor([nan, nan, nan, nan])
    """

    def __init__(
        self,
        encoder: nn.Module,
        *,
        epochs: int = 400,
        batch_size: int = 128,
        optimizer: Optimizer = "lars",
        lr: float = 0.8,
        weight_decay: float = 5e-4,
        warmup_epochs: float = 10,
        start_lr: float = 0.01,
        final_lr: float = 0.0008,
        hidden: int = 128,
        dim: int = 128,
        gamma: float = 0.8,
        rho: float = 0.4,
        temperature: float = 0.1,
        temperature_min: float = 0.05,
        temperature_max: float = 1.0,
        eta: float = 0.03,
        eta_schedule: Literal["const", "cosine", "exp"] = "const",
        beta: float = 0.5,
        clamp: float = 3.0,
        learn_temperature: bool = True,
        queue_size: int = 0,
        decay: float = 0.999,
        official: bool = False,
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
        if learn_temperature and not temperature_min <= temperature <= temperature_max:
            raise UsageError(
                f"temperature must begin within its bounds {temperature_min} and {temperature_max}, got {temperature}"
            )
        self.gamma, self.rho, self.beta, self.clamp = gamma, rho, beta, clamp
        self.bounds, self.eta, self.eta_schedule = (temperature_min, temperature_max), eta, eta_schedule
        self.learn_temperature, self.decay, self.official = learn_temperature, decay, official
        with self.seeded():
            self.projector = mlp([self.num_features, hidden, dim])
        self.items = PerSample(self.num_samples, log_mean=-torch.inf, momentum=0.0, temperature=temperature, seen=False)
        self.rule(0)
        if queue_size:
            self.key_network = momentum_copy(nn.Sequential(encoder, self.projector))
            self.queue = Queue(queue_size, dim, seed=self.seed)
        self.queue_size = queue_size

    def rule(self, epoch: int) -> TemperatureRule:
        """How running means and temperatures move in an epoch."""
        return TemperatureRule(
            gamma=self.gamma, rho=self.rho, eta=step_size(self.eta, self.eta_schedule, epoch, max(self.epochs, 1)),
            beta=self.beta, low=self.bounds[0], high=self.bounds[1], clamp=self.clamp, learn=self.learn_temperature,
        )  # fmt: skip

    def step(self, batch: Batch) -> dict[str, Tensor]:
        """Loss of a batch of two views; running means and temperatures of its items move, on all ranks alike."""
        views = self.checked(batch, 2)
        index = gather_rows(batch["index"])
        state, epoch = ItemState(**self.items.read(index)), self.done // self.steps_per_epoch
        if self.queue_size:
            features, loss, after = self._with_queue(views, state, self.rule(epoch))
        else:
            features = self.encoder(torch.cat(views))
            z0, z1 = (gather_with_gradient(z) for z in self.projector(features).chunk(2))
            restart = self.official and self.learn_temperature and epoch == 0
            loss, after = global_contrast(
                z0, z1, state, self.rule(epoch), index=index, restart=restart, official=self.official
            )
        self.items.write(index, **after.kept())
        first = features[: len(views[0])].detach()
        return {"loss": loss, "features": first, "temperature": after.temperature.mean()}

    def _with_queue(
        self, views: list[Tensor], state: ItemState, rule: TemperatureRule
    ) -> tuple[Tensor, Tensor, ItemState]:
        """The momentum network moves first, the keys go into the queue last."""
        momentum_update(self.key_network, nn.Sequential(self.encoder, self.projector), self.decay)
        features = self.encoder(views[0])
        query = gather_with_gradient(self.projector(features))
        with torch.no_grad():
            key = gather_rows(self.key_network(views[1]))
        with torch.autocast(query.device.type, enabled=False):  # cosines over small temperatures
            past = self.queue.read()
            query, key = F.normalize(query.to(past.dtype), dim=1), F.normalize(key.to(past.dtype), dim=1)
            cosine = torch.cat([(query * key).sum(1, keepdim=True), query @ past.T], 1)
        loss, after = queue_global_contrast(cosine, state, rule, official=self.official)
        self.queue.enqueue(key)
        return features, loss, after

    def temperatures(self) -> Tensor:
        """The temperature of every item (num_samples,), high where there are many alike; NaN for those never seen."""
        tau: Tensor = self.items.get_buffer("temperature")
        return tau.masked_fill(~self.items.get_buffer("seen"), torch.nan)


class BimodalGlobalContrast(nn.Module):
    """The loss of iSogCLR for image-text pairs, with what it keeps of every image and every text: in the place of CLIP's loss.

    Parameters
    ----------
    num_images, num_texts : int
        How many there are in the data.
    gamma, rho, temperature, temperature_min, temperature_max, eta, beta, clamp, learn_temperature, official
        See `ISogCLR`; the defaults are those for captions in the paper.

    Examples
    --------
    >>> loss = BimodalGlobalContrast(num_images=10, num_texts=10)
    >>> index = torch.arange(3)
    >>> loss(torch.eye(3), torch.eye(3), index, index)
    tensor(-2.)
    """

    def __init__(
        self,
        num_images: int,
        num_texts: int,
        *,
        gamma: float = 0.8,
        rho: float = 6.0,
        temperature: float = 0.01,
        temperature_min: float = 0.005,
        temperature_max: float = 1.0,
        eta: float = 0.03,
        beta: float = 0.9,
        clamp: float = 5.0,
        learn_temperature: bool = True,
        official: bool = False,
    ) -> None:
        super().__init__()
        self.rule = TemperatureRule(
            gamma=gamma, rho=rho, eta=eta, beta=beta, low=temperature_min, high=temperature_max, clamp=clamp,
            learn=learn_temperature,
        )  # fmt: skip
        self.official = official
        start = {"log_mean": -torch.inf, "momentum": 0.0, "temperature": temperature, "seen": False, "offset": 0.0}
        self.images, self.texts = PerSample(num_images, **start), PerSample(num_texts, **start)

    def forward(self, image: Tensor, text: Tensor, image_index: Tensor, text_index: Tensor) -> Tensor:
        """Loss of a batch of pairs (B, D), (B, D), of all ranks together; in training, states move."""
        image, text = gather_with_gradient(image), gather_with_gradient(text)
        image_index, text_index = gather_rows(image_index), gather_rows(text_index)
        loss, of_images, of_texts = bimodal_global_contrast(
            image, text, ItemState(**self.images.read(image_index)), ItemState(**self.texts.read(text_index)), self.rule,
            image_index=image_index, text_index=text_index, official=self.official,
        )  # fmt: skip
        if self.training:
            self.images.write(image_index, **of_images.kept())
            self.texts.write(text_index, **of_texts.kept())
        return loss
