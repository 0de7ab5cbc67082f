"""CACR: contrast within the positives and within the negatives of a query, instead of one positive against all negatives.

Several views of a picture are drawn together, the farthest ones harder (contrastive attraction); views of other pictures are
pushed away, the closest ones harder (contrastive repulsion). The two transport costs are added: no positive competes with a
negative. Meant for data in which classes are of unequal size, and for more than two views.

Contrastive Attraction and Contrastive Repulsion for Representation Learning, Zheng et al., TMLR 2023, arXiv 2105.03746. Where
code and paper differ, `official=True` follows the code: its debiased form pushes positives apart, its queue form takes the first
view's distances to the queue for all views, its MoCo v3 form with distances adds over the batch instead of averaging. The
schedule is a cosine here, not steps of 1/10.
"""

import math
from collections.abc import Sequence
from itertools import groupby
from typing import Any, Literal

import torch
from torch import Tensor, nn

from contralto.data.dataset import Batch
from contralto.distributed import gather_rows, gather_with_gradient
from contralto.encoders.heads import mlp
from contralto.errors import UsageError
from contralto.losses.attraction import (
    Weighing,
    attraction,
    momentum_attraction_repulsion,
    queue_repulsion,
    repulsion,
)
from contralto.memory.momentum import momentum_copy, momentum_update
from contralto.memory.queue import Queue
from contralto.systems.base import EncoderSystem

__all__ = ["CACR"]


class CACR(EncoderSystem):
    """Attraction plus repulsion of K + 1 views.

    Parameters
    ----------
    encoder, **base
        See `EncoderSystem`. The paper's rate is ``0.12 * batch_size / 256``.
    form : {"batch", "queue", "momentum"}
        Views of the batch against each other; with momentum keys and a queue (MoCo v2); or with a predictor against the batch's
        momentum keys (MoCo v3).
    num_views : int
        K + 1, all of one size; each is a query in turn.
    small_views : int
        Further views of less than half the side, queries only; of the form "momentum".
    key_views : int
        How many of the large views the momentum network sees in that form; 0 = all.
    hidden, dim : int
        Widths of the projector; `hidden=0` is one linear layer, which the paper's small encoders end with.
    tau_pos, tau_neg : float
        Inverse temperatures of the weights. 1 and 0.9 on CIFAR-10, 1 and 2 on larger sets.
    alpha, beta : float
        Scale attraction and repulsion.
    weigh_positives, weigh_negatives : {"softmax", "detached", "uniform"}
        Weights by distance with gradient or without, or all alike (the paper's ablations); of the form "batch".
    cost : {"distance", "rbf"}
        Of the repulsion; of the forms "batch" and "momentum", in which the paper takes "rbf".
    tau_plus : float
        Debiased repulsion of the form "batch", 0.1 in the paper.
    temperature : float
        T of the form "momentum": 1 for a ResNet-50, 0.2 for a ViT.
    queue_size : int
        Keys of the form "queue".
    decay : float
        Of the momentum network; in the form "momentum" it rises to 1 by half a cosine (0.996 in the paper).
    official : bool
        Follow the published code where it differs, see above.

    Examples
    --------
    >>> system = CACR(nn.Linear(8, 4), num_features=4, num_views=3, dim=4)
    >>> batch = {"views": [torch.randn(6, 8) for _ in range(3)], "index": torch.arange(6)}
    >>> sorted(system.step(batch))
    ['attraction', 'features', 'loss', 'repulsion']
    """

    def __init__(
        self,
        encoder: nn.Module,
        *,
        epochs: int = 200,
        batch_size: int = 128,
        form: Literal["batch", "queue", "momentum"] = "batch",
        num_views: int = 5,
        small_views: int = 0,
        key_views: int = 2,
        hidden: int = 0,
        dim: int = 128,
        tau_pos: float = 1.0,
        tau_neg: float = 0.9,
        alpha: float = 1.0,
        beta: float = 1.0,
        weigh_positives: Weighing = "softmax",
        weigh_negatives: Weighing = "softmax",
        cost: Literal["distance", "rbf"] = "distance",
        tau_plus: float = 0.0,
        temperature: float = 1.0,
        queue_size: int = 65536,
        decay: float = 0.999,
        official: bool = False,
        **base: Any,
    ) -> None:
        super().__init__(encoder, epochs=epochs, batch_size=batch_size, **base)
        if form not in ("batch", "queue", "momentum"):
            raise UsageError(f'form must be "batch", "queue" or "momentum", got {form!r}')
        if num_views < 2:
            raise UsageError(f"num_views must be at least 2, got {num_views}")
        if form != "momentum" and small_views:
            raise UsageError('small_views are for form="momentum"')
        if form != "batch" and (weigh_positives, weigh_negatives, tau_plus) != ("softmax", "softmax", 0.0):
            raise UsageError('weigh_positives, weigh_negatives and tau_plus are for form="batch"')
        self.form, self.num_views, self.small_views = form, num_views, small_views
        self.key_views = key_views or num_views
        self.tau_pos, self.tau_neg, self.alpha, self.beta = tau_pos, tau_neg, alpha, beta
        self.weigh_positives, self.weigh_negatives = weigh_positives, weigh_negatives
        self.cost, self.tau_plus, self.temperature = cost, tau_plus, temperature
        self.decay, self.official = decay, official
        with self.seeded():
            if form == "momentum":  # heads of MoCo v3
                width = hidden or 4096
                self.projector = mlp([self.num_features, width, width, dim], norm="batch", last_norm="plain")
                self.predictor = mlp([dim, width, dim], norm="batch", last_norm="plain")
            else:
                self.projector = mlp([self.num_features, *([hidden] if hidden else []), dim])
        if form != "batch":
            self.key_network = momentum_copy(nn.Sequential(encoder, self.projector))
        if form == "queue":
            self.queue = Queue(queue_size, dim, seed=self.seed)

    def views(self, size: int, mean: tuple[float, float, float], std: tuple[float, float, float]) -> Sequence[Any]:
        """`num_views` large views and `small_views` small ones, with the paper's changes of colour."""
        from contralto.views.batched import BatchView

        if self.form == "batch":
            look: dict[str, Any] = {"jitter": (0.4, 0.4, 0.4, 0.4), "jitter_p": 1.0, "grey": 0.2}
        else:  # MoCo v2
            look = {"jitter": (0.4, 0.4, 0.4, 0.1), "jitter_p": 0.8, "grey": 0.2, "blur_p": 0.5}
        large = BatchView(size, scale=(0.2, 1.0), mean=mean, std=std, **look)
        small = BatchView(max(round(size * 96 / 224), 1), scale=(0.05, 0.4), mean=mean, std=std, **look)
        return [large] * self.num_views + [small] * self.small_views

    def step(self, batch: Batch) -> dict[str, Tensor]:
        """Loss of a batch of views, and its two parts."""
        views = self.checked(batch, self.num_views + self.small_views)
        if self.form == "batch":
            return self._within_batch(views)
        return self._with_queue(views) if self.form == "queue" else self._with_predictor(views)

    def _within_batch(self, views: list[Tensor]) -> dict[str, Tensor]:
        features, z = self._encoded(views)
        pull = attraction(z, tau=self.tau_pos, alpha=self.alpha, weighing=self.weigh_positives).loss
        push = repulsion(
            z, tau=self.tau_neg, beta=self.beta, weighing=self.weigh_negatives, cost=self.cost, tau_plus=self.tau_plus,
            official=self.official,
        ).loss  # fmt: skip
        return _parts(features, pull, push)

    def _with_queue(self, views: list[Tensor]) -> dict[str, Tensor]:
        """The momentum network moves first, the last view's keys go into the queue last."""
        momentum_update(self.key_network, nn.Sequential(self.encoder, self.projector), self.decay)
        features, query = self._encoded(views)
        with torch.no_grad():
            key = torch.stack([gather_rows(self.key_network(view)) for view in views])
        pull = attraction(query, key, tau=self.tau_pos, alpha=self.alpha, weighing="detached").loss
        push = queue_repulsion(query, self.queue.read(), tau=self.tau_neg, beta=self.beta, official=self.official).loss
        self.queue.enqueue(key[-1])
        return _parts(features, pull, push)

    def _with_predictor(self, views: list[Tensor]) -> dict[str, Tensor]:
        decay = 1 - (1 - self.decay) * (math.cos(math.pi * self.progress) + 1) / 2
        momentum_update(self.key_network, nn.Sequential(self.encoder, self.projector), decay)
        features, query = self._encoded(views, self.predictor)
        losses = []
        for i, view in enumerate(views[: self.key_views]):
            with torch.no_grad():
                key = gather_rows(self.key_network(view))
            others = torch.cat([query[:i], query[i + 1 :]])
            losses.append(
                momentum_attraction_repulsion(
                    others, key, temperature=self.temperature, cost=self.cost, official=self.official
                ).loss
            )
        return {"loss": torch.stack(losses).mean(), "features": features}

    def _encoded(self, views: list[Tensor], head: nn.Module | None = None) -> tuple[Tensor, Tensor]:
        """Features of the first view (B, F), without gradient; embeddings of all views and ranks (V, B, D)."""
        features: list[Tensor] = []
        embeddings: list[Tensor] = []
        for _, same in groupby(views, key=lambda view: view.shape):  # one pass for views of one size
            group = list(same)
            found = self.encoder(torch.cat(group))
            z = self.projector(found)
            features += found.chunk(len(group))
            embeddings += (z if head is None else head(z)).chunk(len(group))
        return features[0].detach(), torch.stack([gather_with_gradient(z) for z in embeddings])


def _parts(features: Tensor, pull: Tensor, push: Tensor) -> dict[str, Tensor]:
    return {"loss": pull + push, "features": features, "attraction": pull.detach(), "repulsion": push.detach()}
