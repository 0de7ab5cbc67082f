"""Small systems of continual learning in their second task, and its batches."""

import inspect

import torch
from torch import nn

from contralto.systems.continual.baselines import FineTuning, Joint, LwF, Replay
from contralto.systems.continual.prd import PRD

from tests.systems.continual import spoken

CLASSES, WIDTH, SAMPLES, SIZE = 4, 10, 30, 16
SYSTEMS = {"prd": PRD, "finetune": FineTuning, "replay": Replay, "lwf": LwF, "joint": Joint}
SMALL = {
    "batch_size": 8, "epochs": 2, "extra_epochs": 0, "hidden": 12, "dim": 6, "replayed": 2,
    "num_classes": CLASSES, "num_samples": SAMPLES, "steps_per_epoch": 3, "lr": 0.05,
}  # fmt: skip


def encoder():
    """Without batch norm, which would see other batches on two ranks."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 4, 4, 4), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 16, WIDTH), nn.Tanh())


def build(name, *, task=1, kind=None, **arguments):
    """A system on pictures, the same at every call; in its first (0) or second (1) task of classes 0, 1 and 2, 3."""
    if name == "coconut":
        return spoken.build(task=task, **arguments)
    system = kind or SYSTEMS[name]
    names = inspect.signature(system).parameters
    small = {k: v for k, v in SMALL.items() if k in names} | ({"memory_size": 8} if system is Replay else {})
    built = system(encoder(), num_features=WIDTH, **(small | arguments)).train()
    built.begin_task([0, 1])
    if task:
        index = torch.arange(12)
        built.end_task(index, index % 2, torch.randn(12, WIDTH, generator=torch.Generator().manual_seed(5)))
        with torch.no_grad():  # the student has moved on since the teacher was taken
            for number, p in enumerate(built.encoder.parameters()):
                p += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(number))
        built.begin_task([2, 3])
    return built


def batch(name, system, seed=0, n=8, *, classes=(2, 3)):
    """Two views of samples of a task; for COCONUT, recordings."""
    if name == "coconut":
        return spoken.batch(system, seed, n)
    g = torch.Generator().manual_seed(seed)
    label = torch.tensor(classes)[torch.arange(n) % len(classes)]
    x = torch.randn(n, 3, SIZE, SIZE, generator=g) + label.view(-1, 1, 1, 1)
    index = torch.randperm(SAMPLES, generator=g)[:n]
    return {"views": [x + 0.1 * torch.randn(x.shape, generator=g) for _ in range(2)], "index": index, "label": label}
