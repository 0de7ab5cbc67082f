"""PRD: replay-free continual learning that keeps the relations between old prototypes and new samples.

The encoder learns by supervised contrast of the current task, and one prototype per class follows the mean direction of its
class without touching the encoder. From the second task on, the encoder and the old prototypes, which move along, are asked to
keep what the model at the end of the last task says of the current batch: for every old prototype, which samples are close to it.
No sample of an earlier task is stored.

Prototype-Sample Relation Distillation: Towards Replay-Free Continual Learning, Asadi et al., ICML 2023, arXiv 2303.14771. Where
paper and pre-release code differ:

- The paper's relation is a distribution over the samples of the batch for every prototype (`axis`: "samples", the default), from
  cosines. The code's is one over the prototypes of a task for every sample ("prototypes"), from features that are not normalised,
  at temperature 1. With one old class in a task that says nothing. The paper does not name its temperature: 0.1 here.
- The frozen copy stays in training mode in the code: its batch norm sees the current batch, as the learning one's does, so that
  the two are comparable (`teacher`: "train"). "eval" is the textbook's.
- The code keeps one optimiser for all tasks; here every task has a new one, so that no momentum of a task reaches the next.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from contralto.data.dataset import Batch
from contralto.distributed import mean_weight
from contralto.encoders.heads import mlp
from contralto.errors import UsageError
from contralto.losses.distillation import Axis, feature_distance, relation_distillation
from contralto.losses.pairs import sup_con
from contralto.memory.teacher import Mode, Teacher
from contralto.systems.continual.base import ContinualSystem

__all__ = ["PRD", "prototype_loss"]


def prototype_loss(features: Tensor, prototypes: Tensor, labels: Tensor) -> Tensor:
    """One minus the cosine of every sample with the prototype of its class (N,); the features take no gradient.

    Parameters
    ----------
    features : Tensor (N, D)
    prototypes : Tensor (C, D)
    labels : Tensor (N,)

    Examples
    --------
    >>> prototype_loss(torch.eye(2), torch.eye(2), torch.tensor([0, 0]))
    tensor([0., 1.])
    """
    return 1 - F.cosine_similarity(features.detach(), prototypes[labels], dim=1)


class PRD(ContinualSystem):
    """Supervised contrast, prototypes that follow, and distillation of their relations to samples.

    Parameters
    ----------
    encoder, **base
        See `ContinualSystem`. The paper keeps no sample.
    hidden, dim : int
        Widths of the projector of three layers.
    projector_norm : {"none", "batch"}
        Batch norm in the projector. Not in the paper: features of a fresh network are all alike, and without it contrast may stay
        at the logarithm of the batch for hundreds of steps.
    temperature : float
        Of supervised contrast.
    base_temperature : float
        Scales supervised contrast by temperature / base_temperature, as in the code.
    alpha, beta : float
        Weights of the losses of prototypes and of distillation; 2 to 8 and 4 to 12 in the paper's experiments.
    axis : {"samples", "prototypes"}
        Over what relations are distributed, see `relation_distillation`.
    distill_temperature : float, optional
        Default: 0.1 for "samples", 1 for "prototypes".
    teacher : {"train", "eval"}
        Mode of the frozen copy.
    distill : {"relations", "features"}
        "features" is the plain alternative: cosine of each feature to that of the copy, with the same weight. Not in the paper.
    prototype_lr : float

    Attributes
    ----------
    prototypes : nn.Linear
        Row c of its weight is the prototype of class c; never renormalised in place.

    Examples
    --------
    >>> system = PRD(nn.Linear(8, 4), num_features=4, num_classes=4, hidden=8, dim=4)
    >>> system.begin_task([0, 1])
    >>> batch = {"views": [torch.randn(6, 8), torch.randn(6, 8)], "index": torch.arange(6), "label": torch.arange(6) % 2}
    >>> sorted(system.step(batch))
    ['contrast', 'features', 'loss', 'prototypes']
    >>> system.end_task()
    >>> system.begin_task([2, 3])
    >>> sorted(system.step(batch | {"label": 2 + batch["label"]}))
    ['contrast', 'features', 'loss', 'prototypes', 'relations']
    """

    rule = "cosine"

    def __init__(
        self,
        encoder: nn.Module,
        *,
        hidden: int = 512,
        dim: int = 128,
        projector_norm: Literal["none", "batch"] = "none",
        temperature: float = 0.1,
        base_temperature: float = 0.07,
        alpha: float = 2.0,
        beta: float = 4.0,
        axis: Axis = "samples",
        distill_temperature: float | None = None,
        teacher: Mode = "train",
        distill: Literal["relations", "features"] = "relations",
        prototype_lr: float = 0.01,
        **base: Any,
    ) -> None:
        super().__init__(encoder, **base)
        if axis not in ("samples", "prototypes") or distill not in ("relations", "features"):
            raise UsageError(
                f'axis must be "samples" or "prototypes", distill "relations" or "features"; got {axis!r}, {distill!r}'
            )
        if alpha < 0 or beta < 0:
            raise UsageError(f"alpha and beta are weights, at least 0; got {alpha}, {beta}")
        self.temperature, self.base_temperature, self.alpha, self.beta = temperature, base_temperature, alpha, beta
        self.axis, self.distill, self.prototype_lr = axis, distill, prototype_lr
        self.distill_temperature = distill_temperature or (0.1 if axis == "samples" else 1.0)
        with self.seeded():
            self.projector = mlp([self.num_features, hidden, hidden, dim], norm=projector_norm)
            self.prototypes = nn.Linear(self.num_features, self.num_classes, bias=False)
        self.teacher = Teacher(mode=teacher, encoder=encoder, prototypes=self.prototypes)

    def step(self, batch: Batch) -> dict[str, Tensor]:
        """Losses of a batch of two views of the current task."""
        views = self.checked(batch, 2)
        self.observe(batch)
        x, labels = torch.cat(views), batch["label"].repeat(2)
        features = self.encoder(x)
        z = self.projector(features)
        contrast = sup_con(
            z, labels, temperature=self.temperature, base_temperature=self.base_temperature, gather="all"
        )
        every = mean_weight(torch.tensor(len(x), device=x.device))
        prototypes = prototype_loss(features, self.prototypes.weight, labels).mean() * every
        out = {"contrast": contrast, "prototypes": prototypes}
        loss = contrast + self.alpha * prototypes
        if self.beta and bool(self.teacher.taken):
            out["relations"] = self.distillation(x, features)
            loss = loss + self.beta * out["relations"]
        return {"loss": loss, "features": features[: len(views[0])].detach()} | out

    def distillation(self, x: Tensor, features: Tensor) -> Tensor:
        """How far the features (N, F) of samples, and the old prototypes, are from what the model was after the last task."""
        before = self.teacher("encoder", x)
        if self.distill == "features":
            mean = feature_distance(features, before, kind="cosine")
            return mean * mean_weight(torch.tensor(len(features), device=features.device))
        old = self.known.nonzero().squeeze(1)
        return relation_distillation(
            features, self.prototypes.weight[old], before, self.teacher.weight("prototypes")[old], axis=self.axis,
            temperature=self.distill_temperature, groups=self.task_of_class[old], gather="all",
        )  # fmt: skip

    def end_task(
        self, index: Tensor | None = None, labels: Tensor | None = None, features: Tensor | None = None
    ) -> None:
        """Keep encoder and prototypes as they are now, for the next task."""
        super().end_task(index, labels, features)
        self.teacher.take(encoder=self.encoder, prototypes=self.prototypes)

    def class_weights(self) -> Tensor:
        """The prototypes (C, F)."""
        return self.prototypes.weight.detach()

    def logits_of(self, features: Tensor) -> Tensor:
        """Cosines (N, C): prototypes of different tasks have no common scale but this."""
        return F.normalize(features, dim=1) @ F.normalize(self.prototypes.weight, dim=1).T

    def own_groups(self) -> list[dict[str, Any]]:
        """Prototypes have a rate of their own, and neither momentum nor decay, which would move those of earlier tasks."""
        group: dict[str, Any] = {"params": [self.prototypes.weight], "lr": self.prototype_lr, "weight_decay": 0.0}
        return [group | ({"momentum": 0.0} if self.optimizer in ("sgd", "lars", "larc") else {})]
