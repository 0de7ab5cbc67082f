"""What continual learning is compared with: no measure against forgetting, replay, learning without forgetting, all data at once.

All are an encoder and one linear classifier without bias, whose rows are the classes, and differ in what they add to
cross-entropy. `compare` says among which classes a sample is to find its own: those of its task, as the heads of a multi-head
network do, or all so far.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from contralto.data.dataset import Batch
from contralto.distributed import mean_weight
from contralto.errors import UsageError
from contralto.losses.distillation import grouped_targets
from contralto.memory.replay import Rule
from contralto.memory.teacher import Mode, Teacher
from contralto.systems.continual.base import ContinualSystem

__all__ = ["Compare", "FineTuning", "Joint", "LwF", "Replay"]

Compare = Literal["task", "seen"]


class FineTuning(ContinualSystem):
    """Cross-entropy on one task after the other: the lower bound.

    Parameters
    ----------
    encoder, **base
        See `ContinualSystem`.
    compare : {"task", "seen"}
        Classes among which a sample is to find its own: those that came in the same task as its class, or all so far.

    Examples
    --------
    >>> system = FineTuning(nn.Linear(8, 4), num_features=4, num_classes=4)
    >>> system.begin_task([0, 1])
    >>> batch = {"views": [torch.randn(6, 8)], "index": torch.arange(6), "label": torch.arange(6) % 2}
    >>> sorted(system.step(batch))
    ['features', 'loss']
    """

    def __init__(
        self,
        encoder: nn.Module,
        *,
        compare: Compare = "task",
        **base: Any,
    ) -> None:
        super().__init__(encoder, **base)
        if compare not in ("task", "seen"):
            raise UsageError(f'compare must be "task" or "seen", got {compare!r}')
        self.compare = compare
        with self.seeded():
            self.head = nn.Linear(self.num_features, self.num_classes, bias=False)

    def step(self, batch: Batch) -> dict[str, Tensor]:
        """Cross-entropy of all views of a batch, and what is added to it."""
        views = self.checked(batch)
        self.observe(batch)
        x, labels = torch.cat(views), batch["label"].repeat(len(views))
        features = self.encoder(x)
        logits = self.head(features)
        weight = mean_weight(torch.tensor(len(x), device=x.device))
        more = {name: loss * weight for name, loss in self.more(x, logits).items()}
        loss = F.cross_entropy(logits.masked_fill(~self.rivals(labels), -torch.inf), labels) * weight
        return {
            "loss": torch.stack([loss, *more.values()]).sum(), "features": features[: len(views[0])].detach()
        } | more  # fmt: skip

    def rivals(self, labels: Tensor) -> Tensor:
        """Classes (N, C) among which samples are to find their own."""
        if self.compare == "seen":
            return self.seen.expand(len(labels), -1)
        first = self.task_of_class[labels].unsqueeze(1) == self.task_of_class
        return torch.where(self.current[labels].unsqueeze(1), self.current, first)

    def more(self, x: Tensor, logits: Tensor) -> dict[str, Tensor]:
        """Losses that are added, by name; here none."""
        return {}

    def class_weights(self) -> Tensor:
        """Rows of the classifier (C, F)."""
        return self.head.weight.detach()

    def logits_of(self, features: Tensor) -> Tensor:
        """Logits (N, C)."""
        logits: Tensor = self.head(features)
        return logits


class Replay(FineTuning):
    """Experience replay: cross-entropy on the task and on what is kept of earlier ones.

    Parameters
    ----------
    encoder, **base
        See `FineTuning`; by default there is a memory of 200 samples, every batch takes as many from it as from the task, and
        samples are compared with all classes so far.
    """

    def __init__(
        self,
        encoder: nn.Module,
        *,
        memory_size: int = 200,
        memory_rule: Rule = "random",
        replayed: int = 64,
        compare: Compare = "seen",
        **base: Any,
    ) -> None:
        super().__init__(
            encoder, memory_size=memory_size, memory_rule=memory_rule, replayed=replayed, compare=compare, **base
        )
        if not memory_size:
            raise UsageError("replay without a memory is fine-tuning: memory_size must be at least 1")


class Joint(FineTuning):
    """Every task is learnt with all samples of the tasks before: the upper bound.

    Parameters
    ----------
    encoder, **base
        See `FineTuning`; samples are compared with all classes so far by default.
    """

    keeps_all = True

    def __init__(
        self,
        encoder: nn.Module,
        *,
        compare: Compare = "seen",
        **base: Any,
    ) -> None:
        super().__init__(encoder, compare=compare, **base)


class LwF(FineTuning):
    """Learning without forgetting (Li and Hoiem 2016): the old classes' answers to new samples are to stay.

    Parameters
    ----------
    encoder, **base
        See `FineTuning`.
    distill_weight, distill_temperature : float
        Of the distillation, in every earlier task apart; 1 and 2 in the paper.
    teacher : {"eval", "train"}
        Mode of the frozen copy.

    Examples
    --------
    >>> system = LwF(nn.Linear(8, 4), num_features=4, num_classes=4)
    >>> batch = {"views": [torch.randn(6, 8)], "index": torch.arange(6), "label": torch.arange(6) % 2}
    >>> system.begin_task([0, 1]), system.end_task(), system.begin_task([2, 3])
    (None, None, None)
    >>> round(system.step(batch | {"label": 2 + batch["label"]})["distillation"].item(), 4)
    0.0
    """

    def __init__(
        self,
        encoder: nn.Module,
        *,
        distill_weight: float = 1.0,
        distill_temperature: float = 2.0,
        teacher: Mode = "eval",
        **base: Any,
    ) -> None:
        super().__init__(encoder, **base)
        self.distill_weight, self.distill_temperature = distill_weight, distill_temperature
        self.teacher = Teacher(mode=teacher, encoder=encoder, head=self.head)

    def more(self, x: Tensor, logits: Tensor) -> dict[str, Tensor]:
        """Distillation of the answers of every earlier task."""
        if not bool(self.teacher.taken):
            return {}
        before = self.teacher("head", self.teacher("encoder", x))
        tasks = torch.where(self.known, self.task_of_class, -1)
        loss = grouped_targets(logits, before, tasks, temperature=self.distill_temperature)
        return {"distillation": self.distill_weight * loss}

    def end_task(
        self, index: Tensor | None = None, labels: Tensor | None = None, features: Tensor | None = None
    ) -> None:
        """Keep encoder and classifier as they are now, for the next task."""
        super().end_task(index, labels, features)
        self.teacher.take(encoder=self.encoder, head=self.head)
