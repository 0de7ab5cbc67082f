"""Learn ten digits two at a time, in a loop of your own, and see what is still known of the first ones.

    python examples/continual.py [PICTURE.png]

No digit of an earlier task is kept. PRD keeps the relations between new samples and old prototypes, fine-tuning keeps nothing.
"""

import sys

import torch
from torch import nn

from contralto.claims.digits import conv_encoder, digit_views, digits
from contralto.data.tasks import TaskSampler, split_by_class, task_of_samples
from contralto.evaluation.continual import Protocols, accuracy_matrix, continual_scores, right_answers
from contralto.systems.continual.base import ContinualSystem
from contralto.systems.continual.baselines import FineTuning
from contralto.systems.continual.prd import PRD

data = digits(seed=0)
tasks = split_by_class(data.train_labels.numpy(), 5, seed=0)
test_tasks = task_of_samples(tasks, data.test_labels.numpy())


def learn(system: ContinualSystem) -> list[Protocols]:
    """What is right of the test digits after every task."""
    right = []
    for number, task in enumerate(tasks):
        batches = TaskSampler(task.rows, 32, seed=number)
        system.begin_task(task.classes, steps_per_epoch=len(batches))
        [optimizer], [schedule] = system.optimizers_and_schedules()  # new ones for every task
        generator = torch.Generator().manual_seed(number)
        system.train()
        for epoch in range(system.task_epochs):
            batches.set_epoch(epoch)
            for keys in batches:
                rows = torch.tensor([row for _, row in keys])
                views = [digit_views(data.train[rows], generator, degrees=0, scale=0) for _ in range(2)]
                system.step({"views": views, "index": rows, "label": data.train_labels[rows]})["loss"].backward()
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
                system.at_step_end()
        system.end_task()
        system.eval()
        with torch.no_grad():
            logits = system.predict_logits(data.test).numpy()
        right.append(right_answers(logits, data.test_labels.numpy(), test_tasks, [t.classes for t in tasks]))
        so_far = right[-1].class_incremental[test_tasks <= number].mean()
        print(f"{type(system).__name__} after {task.classes}: {so_far:.0%} of all digits so far are right", flush=True)
    return right


found = {}
for kind, heads in ((PRD, {"hidden": 128, "dim": 64}), (FineTuning, {})):
    torch.manual_seed(0)
    encoder = nn.Sequential(*list(conv_encoder(256))[:-1])  # features are 64 maps of 2 x 2
    settings = {"num_features": 256, "num_classes": 10, "epochs": 15, "extra_epochs": 15, "milestones": (), **heads}
    found[kind.__name__] = learn(kind(encoder, **settings))
    for protocol in Protocols._fields:
        scores = continual_scores([getattr(r, protocol) for r in found[kind.__name__]], test_tasks)
        told = ", ".join(f"{k} {v.value:.1%} ({v.low:.1%} to {v.high:.1%})" for k, v in scores.items())
        print(f"{kind.__name__}, {protocol}: {told}")

if len(sys.argv) > 1:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(8, 7), layout="constrained")
    for row, (name, right) in zip(axes, found.items(), strict=True):
        for axis, protocol in zip(row, Protocols._fields, strict=True):
            matrix = accuracy_matrix([getattr(r, protocol) for r in right], test_tasks)
            axis.imshow(matrix, vmin=0, vmax=1, cmap="Blues", extent=(0.5, 5.5, 5.5, 0.5))
            for i in range(5):
                for j in range(i + 1):
                    colour = "white" if matrix[i, j] > 0.6 else "black"
                    axis.text(j + 1, i + 1, f"{100 * matrix[i, j]:.0f}", color=colour, ha="center", va="center")
            axis.set(title=f"{name}, {protocol.replace('_', '-')}", xlabel="test of task", ylabel="after task")
    figure.savefig(sys.argv[1], dpi=110)
