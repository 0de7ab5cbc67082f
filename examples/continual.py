"""Learn ten digits two at a time, in a loop of your own, and see what is still known of the first ones.

    python examples/continual.py [prd|finetune] [PICTURE.png]

No digit of an earlier task is kept. PRD keeps the relations between new samples and old prototypes; fine-tuning keeps nothing.
"""

import sys

import numpy as np
import torch
from torch import nn

from contralto.claims.digits import conv_encoder, digit_views, digits
from contralto.data.tasks import TaskSampler, split_by_class, task_of_samples
from contralto.evaluation.continual import accuracy_matrix, continual_scores, right_answers
from contralto.systems.continual.baselines import FineTuning
from contralto.systems.continual.prd import PRD

name = sys.argv[1] if len(sys.argv) > 1 else "prd"
data = digits(seed=0)
tasks = split_by_class(data.train_labels.numpy(), 5, seed=0)
test_tasks = task_of_samples(tasks, data.test_labels.numpy())

torch.manual_seed(0)
encoder = nn.Sequential(*list(conv_encoder(256))[:-1])  # the last layer would only mix what is there: 64 maps of 2 x 2
settings = {"num_features": 256, "num_classes": 10, "epochs": 15, "extra_epochs": 15, "milestones": (), "lr": 0.01}
system = PRD(encoder, hidden=128, dim=64, **settings) if name == "prd" else FineTuning(encoder, **settings)

right = []
for number, task in enumerate(tasks):
    batches = TaskSampler(task.rows, 32, seed=number)
    system.begin_task(task.classes, steps_per_epoch=len(batches))
    [optimizer], [schedule] = system.optimizers_and_schedules()
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
    seen = test_tasks <= number
    print(f"after {task.classes}: {right[-1].class_incremental[seen].mean():.0%} of all digits so far")

for protocol in ("class_incremental", "task_incremental"):
    scores = continual_scores([getattr(r, protocol) for r in right], test_tasks)
    print(protocol, {k: f"{v.value:.1%} ({v.low:.1%} to {v.high:.1%})" for k, v in scores.items()})

if len(sys.argv) > 2:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(8, 3.6), layout="constrained")
    for axis, protocol in zip(axes, ("class_incremental", "task_incremental"), strict=True):
        matrix = accuracy_matrix([getattr(r, protocol) for r in right], test_tasks)
        axis.imshow(matrix, vmin=0, vmax=1, cmap="Blues")
        for i, j in zip(*np.nonzero(~np.isnan(matrix)), strict=True):
            axis.text(j, i, f"{100 * matrix[i, j]:.0f}", ha="center", va="center")
        axis.set(title=protocol.replace("_", " "), xlabel="test of task", ylabel="after task")
    figure.savefig(sys.argv[2], dpi=120)
