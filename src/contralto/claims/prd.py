"""The claim of PRD: keeping the relations of old prototypes to new samples keeps old tasks, with no sample stored.

    contralto reproduce prd

The 1,797 handwritten digits of scikit-learn (8 x 8), 1,300 for training, in five tasks of two classes, whose order is drawn by
the seed. Encoder: three 3 x 3 convolutions 16-32-64 with batch norm and ReLU, strides 1, 2, 2, flattened: 256 features;
projector 128-128-64. Views: shifts of up to one pixel and noise of 0.1, two of each sample in every arm. Batch 32, 15 epochs per
task and 15 more for the first, SGD with momentum 0.9 at a constant rate.

Arms: *prd*, relations over samples (beta 4, temperature 0.1); *no distillation*, beta 0; *released code*, relations over
prototypes (beta 4, temperature 1); *features*, the cosine of each feature to its former self with the same weight; *fine-tuning*,
*lwf* and *joint*, a linear classifier; *replay*, the same with 20 samples kept; *first task*, an encoder that learns the first
task by contrast and then stays, with class means; *untrained*, class means of features of an encoder that learns nothing and so
forgets nothing. Measures after the last task: task-incremental and class-incremental accuracy of the test digits, mean over
classes; forgetting of the task-incremental one.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from contralto.claims.digits import Split, batches, conv_encoder, digit_views, digits, features_of, pretrain
from contralto.data.tasks import Task, TaskSampler, split_by_class, task_of_samples
from contralto.evaluation.continual import accuracy_matrix, backward_transfer, forgetting, right_answers
from contralto.systems.continual.base import ContinualSystem
from contralto.systems.continual.baselines import FineTuning, Joint, LwF, Replay
from contralto.systems.continual.prd import PRD

__all__ = ["learn_stream", "run"]

FEATURES = 256
SYSTEMS: dict[str, type[ContinualSystem]] = {
    "prd": PRD, "means": PRD, "finetune": FineTuning, "lwf": LwF, "replay": Replay, "joint": Joint,
}  # fmt: skip


def learn_stream(
    system: ContinualSystem,
    split: Split,
    tasks: list[Task],
    *,
    batch_size: int,
    learn: Callable[[ContinualSystem, Callable[[int], dict[str, Any]], int], None],
) -> list[npt.NDArray[np.float32]]:
    """Learn digits task by task.

    Parameters
    ----------
    system : ContinualSystem
    split : Split
    tasks : list of Task
        Of the training part.
    batch_size : int
    learn : function
        ``(system, make_batch, number of the task)``: learns a task; `make_batch` gives batches by step.

    Returns
    -------
    list of array (N, C)
        Logits of the test part after every task.

    Examples
    --------
    >>> split = digits(0, test=1697)
    >>> system = FineTuning(conv_encoder(16), num_features=16, num_classes=10, epochs=1, extra_epochs=0)
    >>> tasks = split_by_class(split.train_labels.numpy(), 2)
    >>> found = learn_stream(system, split, tasks, batch_size=16, learn=lambda system, make, number: pretrain(system, make))
    >>> [int(np.isfinite(logits[0]).sum()) for logits in found]
    [5, 10]
    """
    found: list[npt.NDArray[np.float32]] = []
    before: list[npt.NDArray[np.int64]] = []
    for number, task in enumerate(tasks):
        own = np.concatenate([*before, task.rows]) if system.keeps_all else task.rows
        memory: npt.ArrayLike = () if system.memory is None else system.memory.index.numpy()
        sampler = TaskSampler(own, batch_size, seed=system.seed, memory=memory, replayed=system.replayed)
        system.begin_task(task.classes, steps_per_epoch=len(sampler))
        make = batches(
            split, seed=1000 * system.seed + number, batch_size=batch_size,
            view=partial(digit_views, degrees=0.0, scale=0.0), rows=partial(_rows_of, sampler),
        )  # fmt: skip
        learn(system, make, number)
        system.eval()
        rows = torch.from_numpy(task.rows)
        features = torch.from_numpy(features_of(system, split.train[rows])) if system.wants_features else None
        system.end_task(rows, split.train_labels[rows], features)
        before.append(task.rows)
        with torch.inference_mode():
            found.append(system.predict_logits(split.test.to(system.task.device)).cpu().numpy())
    return found


def run(
    arm: Mapping[str, Any],
    *,
    seed: int,
    data: str,
    budget: Mapping[str, Any],
    device: str = "cpu",
    progress: Callable[[float], None] | None = None,
) -> dict[str, Any]:
    """Train and measure one arm on one seed.

    Parameters
    ----------
    arm : mapping
        `system`, and arguments of it; `epochs` where they are not the budget's.
    seed : int
    data : {"digits"}
    budget : mapping
        `epochs`, `extra_epochs`, `batch_size`, `test`, `tasks`.
    device : str
    progress : function, optional

    Returns
    -------
    dict
        `task_incremental` and `class_incremental` (N,) per test digit after the last task, `labels`; `forgetting` and `backward`
        of the task-incremental accuracy.
    """
    split = digits(seed, test=int(budget["test"]))
    tasks = split_by_class(split.train_labels.numpy(), int(budget["tasks"]), seed=seed)
    given = {k: v for k, v in arm.items() if k != "system"}
    kind = SYSTEMS[arm["system"]]
    if kind is PRD:
        given = {"hidden": 128, "dim": 64, "prototype_lr": given.get("lr", 0.01)} | given
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = nn.Sequential(*list(conv_encoder(FEATURES))[:-1])
    fixed: dict[str, Any] = {
        "num_features": FEATURES, "num_classes": 10, "seed": seed, "epochs": int(budget["epochs"]),
        "extra_epochs": int(budget["extra_epochs"]) if given.get("epochs", 1) else 0, "batch_size": int(budget["batch_size"]),
        "milestones": (),
    }  # fmt: skip
    system = kind(encoder, **(fixed | given))

    def learn(system: ContinualSystem, make: Callable[[int], dict[str, Any]], number: int) -> None:
        if arm["system"] != "means" or number == 0:
            pretrain(system, make, device=device)
        if arm["system"] == "means":
            rows = tasks[number].rows
            _take_means(system, split.train[rows], split.train_labels[rows])
        if progress is not None:
            progress((number + 1) / len(tasks))

    logits = learn_stream(system, split, tasks, batch_size=int(budget["batch_size"]), learn=learn)
    labels = split.test_labels.numpy()
    of_task = task_of_samples(tasks, labels)
    right = [right_answers(scores, labels, of_task, [t.classes for t in tasks]) for scores in logits]
    known = accuracy_matrix([r.task_incremental for r in right], of_task)
    return {
        "task_incremental": right[-1].task_incremental.astype(float),
        "class_incremental": right[-1].class_incremental.astype(float),
        "labels": labels,
        "forgetting": forgetting(known),
        "backward": backward_transfer(known),
    }


def _rows_of(sampler: TaskSampler, step: int) -> npt.NDArray[np.int64]:
    """Rows of the batch of a step."""
    epoch, place = divmod(step, len(sampler))
    sampler.start_at(epoch, place)
    return np.array([row for _, row in next(iter(sampler))])


def _take_means(system: ContinualSystem, x: Tensor, labels: Tensor) -> None:
    """Prototypes of some classes become the mean directions of their samples."""
    assert isinstance(system, PRD)
    unit = F.normalize(torch.from_numpy(features_of(system.eval(), x)), dim=1)
    mean = torch.zeros(system.num_classes, unit.shape[1]).index_add_(0, labels, unit)
    there = labels.unique()
    with torch.no_grad():
        system.prototypes.weight[there] = F.normalize(mean[there], dim=1).to(system.prototypes.weight)
