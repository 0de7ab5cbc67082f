"""How contrastive losses behave: four losses that tell the softmax from its hardness, and a temperature to sweep.

The softmax weighs every negative by exp(s / t), so it looks for hard ones, and the temperature says how narrowly: small ones
spread everything out and push apart what belongs to one kind (uniform), large ones do the opposite (tolerant). The hardness
is the useful part: with the hardest negatives picked by hand, even a linear loss works. `losses.behaviour` has the losses and
the penalties of negatives, `evaluation.representation.analyse` uniformity and tolerance of any encoder.

Understanding the Behaviour of Contrastive Loss, Wang and Liu, CVPR 2021, arXiv 2012.09740. No code was published. lambda of the
simple losses is not known and balances pull and push here. The projector's output has a batch norm here (`output_norm`): hard
losses collapse from a start in which all features lie in one cone, and temperatures do not compare there. The schedule is a
cosine, not steps. As in the paper, the loss is not rescaled by the temperature: sweep it with Adam, or tune the rate for each.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from contralto.data.dataset import Batch
from contralto.distributed import gather_rows, gather_with_gradient
from contralto.encoders.heads import mlp
from contralto.errors import UsageError
from contralto.losses.behaviour import Kind, behaviour
from contralto.memory.bank import MemoryBank
from contralto.memory.momentum import momentum_copy, momentum_update
from contralto.memory.queue import Queue
from contralto.systems.base import EncoderSystem

__all__ = ["ContrastiveBehaviour"]


class ContrastiveBehaviour(EncoderSystem):
    """One of four losses, against a memory bank, a queue or the batch.

    Parameters
    ----------
    encoder, **base
        See `EncoderSystem`. With a bank, `num_samples` is needed.
    hidden, dim : int
        Widths of the projector; `hidden=0` is one linear layer.
    output_norm : bool
        Batch norm, without scale and shift, at its end.
    loss : {"contrastive", "simple", "hard", "hard_simple"}
        See `contralto.losses.behaviour`.
    temperature : float
        0.3 is the paper's best for "contrastive"; 0.7 to 1 for "hard".
    alpha : float
        Share of negatives that hard losses keep.
    lam : float, optional
        lambda of the simple losses; default: 1 over the number of negatives.
    negatives : {"bank", "queue", "batch"}
        "bank": the positive is the sample's own slot, an average of past features, and negatives are other samples' slots; any
        number of views. "queue": the positive is the other view's key by a momentum network. "batch": the other view, in both
        directions.
    num_negatives : int
        Slots that are drawn anew in every step; hard losses look at all of the bank.
    rate : float
        Share of a slot that an update keeps.
    queue_size : int
    decay : float
        Of the momentum network.

    Examples
    --------
    >>> system = ContrastiveBehaviour(nn.Linear(8, 4), num_features=4, num_samples=20, dim=4, loss="hard")
    >>> batch = {"views": [torch.randn(6, 8)], "index": torch.arange(6)}
    >>> sorted(system.step(batch))
    ['features', 'loss']
    """

    def __init__(
        self,
        encoder: nn.Module,
        *,
        epochs: int = 200,
        batch_size: int = 128,
        lr: float = 0.03,
        weight_decay: float = 5e-4,
        hidden: int = 0,
        dim: int = 128,
        output_norm: bool = True,
        loss: Kind = "contrastive",
        temperature: float = 0.3,
        alpha: float = 0.0819,
        lam: float | None = None,
        negatives: Literal["bank", "queue", "batch"] = "bank",
        num_negatives: int = 4095,
        rate: float = 0.5,
        queue_size: int = 4096,
        decay: float = 0.999,
        **base: Any,
    ) -> None:
        super().__init__(encoder, epochs=epochs, batch_size=batch_size, lr=lr, weight_decay=weight_decay, **base)
        if negatives not in ("bank", "queue", "batch"):
            raise UsageError(f'negatives must be "bank", "queue" or "batch", got {negatives!r}')
        self.negatives, self.num_negatives, self.decay = negatives, num_negatives, decay
        self.hard = loss.startswith("hard")
        self.given: dict[str, Any] = {"kind": loss, "temperature": temperature, "alpha": alpha, "lam": lam}
        with self.seeded():
            self.projector = mlp(
                [self.num_features, *([hidden] if hidden else []), dim],
                norm="batch",
                last_norm="plain" if output_norm else "none",
            )
        if negatives == "bank":
            self.bank = MemoryBank(self.num_samples, dim, rate=rate, seed=self.seed)
        elif negatives == "queue":
            self.key_network = momentum_copy(nn.Sequential(encoder, self.projector))
            self.queue = Queue(queue_size, dim, seed=self.seed)

    def views(self, size: int, mean: tuple[float, float, float], std: tuple[float, float, float]) -> Sequence[Any]:
        """Crop, flip, colours and grey, once for a bank and twice otherwise."""
        from contralto.views.batched import BatchView

        view = BatchView(
            size, scale=(0.2, 1.0), jitter=(0.4, 0.4, 0.4, 0.4), jitter_p=1.0, grey=0.2, mean=mean, std=std
        )
        return [view] if self.negatives == "bank" else [view, view]

    def step(self, batch: Batch) -> dict[str, Tensor]:
        """Loss of a batch; bank or queue move last."""
        views = self.checked(batch, None if self.negatives == "bank" else 2)
        if self.negatives == "bank":
            return self._with_bank(views, gather_rows(batch["index"]))
        return self._with_queue(*views) if self.negatives == "queue" else self._within_batch(*views)

    def _with_bank(self, views: list[Tensor], index: Tensor) -> dict[str, Tensor]:
        features = self.encoder(torch.cat(views))
        z = [gather_with_gradient(part) for part in self.projector(features).chunk(len(views))]
        slots, drawn = self.bank.read(index), self._drawn()
        others = self.bank.features if drawn is None else self.bank.read(drawn)
        losses = [behaviour(q, slots, negatives=others, own=index, numbers=drawn, **self.given) for q in z]
        self.bank.update(index, torch.stack(z).detach().mean(0))
        return {"loss": torch.stack(losses).mean(), "features": features[: len(views[0])].detach()}

    def _drawn(self) -> Tensor | None:
        """Slots that serve as negatives in this step, a function of the seed and the step; None: all."""
        size = len(self.bank.features)
        if self.hard or size <= self.num_negatives:
            return None
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.done)
        return torch.randint(size, (self.num_negatives,), generator=generator).to(self.bank.features.device)

    def _with_queue(self, x0: Tensor, x1: Tensor) -> dict[str, Tensor]:
        """The momentum network moves first."""
        momentum_update(self.key_network, nn.Sequential(self.encoder, self.projector), self.decay)
        features = self.encoder(x0)
        with torch.no_grad():
            key = gather_rows(self.key_network(x1))
        query = gather_with_gradient(self.projector(features))
        loss = behaviour(query, key, negatives=self.queue.read(), **self.given)
        self.queue.enqueue(key)
        return {"loss": loss, "features": features.detach()}

    def _within_batch(self, x0: Tensor, x1: Tensor) -> dict[str, Tensor]:
        features = self.encoder(torch.cat([x0, x1]))
        z0, z1 = (gather_with_gradient(z) for z in self.projector(features).chunk(2))
        loss = (behaviour(z0, z1, **self.given) + behaviour(z1, z0, **self.given)) / 2
        return {"loss": loss, "features": features[: len(x0)].detach()}
