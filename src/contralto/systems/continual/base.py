"""What the systems that learn one task after another share: what they are told at the ends of tasks, and how they are asked.

A job, or a loop of one's own, tells a system where tasks begin and end::

    for task in split_by_class(labels, 5, seed=0):
        system.begin_task(task.classes, steps_per_epoch=len(batches))
        [optimizer], [schedule] = system.optimizers_and_schedules()      # new ones for every task
        for epoch in range(system.task_epochs):
            for batch in batches:                                        # of the task, and of `system.memory.index`
                ...                                                      # as for any `EncoderSystem`
        system.end_task(index, labels, features)                         # of the task's samples, if `system.wants_features`
        system.predict_logits(x)                                         # over all classes so far

All that outlives a task is in the state dict.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from contralto.data.dataset import Batch
from contralto.errors import UsageError
from contralto.memory.replay import ReplayMemory, Rule
from contralto.systems.base import EncoderSystem
from contralto.views.batched import BatchView

__all__ = ["ContinualSystem"]


class ContinualSystem(EncoderSystem):
    """Base of the systems that learn classes, or domains, one task after another.

    Parameters
    ----------
    encoder, **base
        See `EncoderSystem`; epochs and schedules are those of one task, and every task has a new optimiser.
    num_classes : int
        Of all tasks.
    extra_epochs : int
        Further epochs of the first task, which finds an encoder that knows nothing.
    milestones : sequence of int, optional
        Epochs of a task at which the rate is multiplied by `decay`; None is warm-up and cosine within every task.
    decay : float
    memory_size : int
        Samples that are kept of earlier tasks; 0 is none.
    memory_rule : {"random", "closest", "barycenter", "reservoir"}
        How they are chosen, see `ReplayMemory`.
    replayed : int
        How many of a batch come from the memory, see `TaskSampler`.

    Attributes
    ----------
    memory : ReplayMemory or None
    task : Tensor ()
        Number of the current task, from 0; -1 before the first.
    finished : Tensor ()
        How many tasks have ended.
    task_of_class : Tensor (C,)
        In which task a class came first; -1 for those to come.
    current, known : Tensor (C,) of bool
        Classes of the current task; those of tasks that have ended.
    """

    needs: ClassVar[tuple[str, ...]] = ("label",)
    keeps_all: ClassVar[bool] = False
    """Whether every task is learnt with the samples of all before: no continual learning, but its upper bound."""
    rule: ClassVar[Literal["linear", "cosine"]] = "linear"
    """How `class_weights` make logits, for `Classifier.of`."""
    task: Tensor
    finished: Tensor
    task_of_class: Tensor
    current: Tensor
    known: Tensor

    def __init__(
        self,
        encoder: nn.Module,
        *,
        num_classes: int,
        batch_size: int = 128,
        lr: float = 0.01,
        extra_epochs: int = 120,
        milestones: Sequence[int] | None = (120, 160),
        decay: float = 0.1,
        memory_size: int = 0,
        memory_rule: Rule = "barycenter",
        replayed: int = 0,
        **base: Any,
    ) -> None:
        super().__init__(encoder, batch_size=batch_size, lr=lr, **base)
        if num_classes < 2 or extra_epochs < 0 or memory_size < 0 or replayed < 0:
            raise UsageError(
                f"num_classes must be at least 2, extra_epochs, memory_size and replayed at least 0; got {num_classes}, "
                f"{extra_epochs}, {memory_size}, {replayed}"
            )
        self.num_classes, self.extra_epochs, self.decay, self.replayed = num_classes, extra_epochs, decay, replayed
        self.milestones = None if milestones is None else tuple(milestones)
        self.memory = ReplayMemory(memory_size, rule=memory_rule, seed=self.seed) if memory_size else None
        self.register_buffer("task", torch.full((), -1, dtype=torch.int64))
        self.register_buffer("finished", torch.zeros((), dtype=torch.int64))
        self.register_buffer("task_of_class", torch.full((num_classes,), -1, dtype=torch.int64))
        self.register_buffer("current", torch.zeros(num_classes, dtype=torch.bool))
        self.register_buffer("known", torch.zeros(num_classes, dtype=torch.bool))

    # What a job tells.

    def begin_task(self, classes: Sequence[int], *, steps_per_epoch: int | None = None) -> None:
        """A task begins.

        Parameters
        ----------
        classes : sequence of int
            All that come in it; some may have come before.
        steps_per_epoch : int, optional
            Of this task, for its schedule; default: as before.

        Raises
        ------
        UsageError
            If the task before has not ended, or a class is none of `num_classes`.
        """
        if int(self.finished) != int(self.task) + 1:
            raise UsageError(f"task {int(self.task)} has not ended: call end_task before the next begin_task")
        found = torch.as_tensor(list(classes), dtype=torch.int64, device=self.task.device)
        if not len(found) or int(found.min()) < 0 or int(found.max()) >= self.num_classes:
            raise UsageError(f"a task has classes from 0 to {self.num_classes - 1}, got {list(classes)[:20]}")
        self.task += 1
        self.steps.zero_()
        self.steps_per_epoch = steps_per_epoch or self.steps_per_epoch
        self.current.zero_()
        self.current[found] = True
        self.task_of_class[self.current & ~self.seen] = self.task

    def end_task(
        self, index: Tensor | None = None, labels: Tensor | None = None, features: Tensor | None = None
    ) -> None:
        """A task has ended. A system that overrides this calls it too.

        Parameters
        ----------
        index, labels : Tensor (N,), optional
            Samples of the task, which a memory chooses from.
        features : Tensor (N, F), optional
            What `embed` gives for them in evaluation mode, without augmentation; see `wants_features`.
        """
        if int(self.finished) != int(self.task):
            raise UsageError("no task has begun that could end: call begin_task first")
        if self.memory is not None and self.memory.rule != "reservoir":
            if index is None or labels is None:
                raise UsageError("the memory chooses among the samples of the task: end_task needs index and labels")
            self.memory.add(index, labels, features)
        self.known |= self.current
        self.finished += 1

    @property
    def wants_features(self) -> bool:
        """Whether `end_task` needs the features of the task's samples."""
        return self.memory is not None and self.memory.rule in ("closest", "barycenter")

    @property
    def seen(self) -> Tensor:
        """Classes (C,) of all tasks so far, with the current one."""
        return self.task_of_class >= 0

    @property
    def task_epochs(self) -> int:
        """Epochs of the current task."""
        return self.epochs + (self.extra_epochs if int(self.task) <= 0 else 0)

    @property
    def total_steps(self) -> int:
        """Steps of the current task; `done` and `progress` are those of the task too."""
        return self.task_epochs * self.steps_per_epoch

    # What a system says of itself.

    def views(
        self, size: int, mean: tuple[float, float, float], std: tuple[float, float, float]
    ) -> Sequence[BatchView]:
        """Two views as in supervised contrast: crops, flips, colours and grey."""
        from contralto.views.presets import moco_pair

        return moco_pair(size, blur=0.0, mean=mean, std=std)

    def class_weights(self) -> Tensor:
        """Weights (C, F) that make logits of features by `rule`."""
        raise NotImplementedError

    def logits_of(self, features: Tensor) -> Tensor:
        """Logits (N, C) of features (N, F) over all classes, also those to come."""
        raise NotImplementedError

    def own_groups(self) -> list[dict[str, Any]]:
        """Groups of parameters with settings of their own, as an optimiser takes them; all others are in one group."""
        return []

    # What is asked of it.

    def predict_logits(self, x: Tensor, classes: Sequence[int] | Tensor | None = None) -> Tensor:
        """Logits (N, C) of samples; minus infinity for classes that cannot be.

        Parameters
        ----------
        x : Tensor (N, ...)
        classes : sequence of int or Tensor, optional
            Numbers of the classes that can be, where the task is known (task-incremental); default: all so far
            (class-incremental).
        """
        allowed = self.seen
        if classes is not None:
            numbers = torch.as_tensor(classes, dtype=torch.int64, device=allowed.device)
            allowed = torch.zeros_like(allowed).index_fill(0, numbers, True)
        return self.logits_of(self.embed(x)).masked_fill(~allowed, -torch.inf)

    def checked(self, batch: Batch, count: int | None = None) -> list[Tensor]:
        """The views of a batch, after a look at it; its labels must be of tasks that have begun.

        Raises
        ------
        UsageError
            As in `EncoderSystem`, or for a class of no task so far.
        """
        views = super().checked(batch, count)
        label = batch["label"]
        unknown = label[(label < 0) | ~self.seen[label.clamp(0, self.num_classes - 1)] | (label >= self.num_classes)]
        if len(unknown):
            raise UsageError(f"class {int(unknown[0])} belongs to no task that has begun: begin_task names its classes")
        return views

    def observe(self, batch: Batch) -> None:
        """For the reservoir of a stream: the new samples of a batch come by, in the first epoch of a task. `step` calls it."""
        if self.memory is None or self.memory.rule != "reservoir" or self.done >= self.steps_per_epoch:
            return
        new = ~batch["replayed"] if "replayed" in batch else torch.ones_like(batch["index"], dtype=torch.bool)
        self.memory.observe(batch["index"][new], batch["label"][new])

    def optimizers_and_schedules(self) -> tuple[list[torch.optim.Optimizer], list[Any]]:
        """New ones for the current task, with the groups of the system."""
        [optimizer], [schedule] = super().optimizers_and_schedules()
        own = self.own_groups()
        apart = {id(p) for group in own for p in group["params"]}
        for group in optimizer.param_groups:
            group["params"] = [p for p in group["params"] if id(p) not in apart]
        for group in own:
            optimizer.add_param_group(group)
        factor = schedule.lr_lambdas[0] if self.milestones is None else self._step_decay
        return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, factor)]

    def _step_decay(self, step: int) -> float:
        epoch = step // self.steps_per_epoch
        return float(self.decay ** sum(epoch >= milestone for milestone in self.milestones or ()))
