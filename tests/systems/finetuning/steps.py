"""Small fine-tuning systems and their batches."""

import inspect

import torch
from torch import nn

from contralto.systems.finetuning.base import FineTuning
from contralto.systems.finetuning.core_tuning import CoreTuning

CLASSES, WIDTH, SAMPLES = 3, 10, 30
SYSTEMS = {"finetuning": FineTuning, "core_tuning": CoreTuning}
SMALL = {"batch_size": 16, "epochs": 2, "dim": 6, "num_classes": CLASSES, "num_samples": SAMPLES, "steps_per_epoch": 3}


def build(name, **arguments):
    """A system on small pictures, the same at every call."""
    system = SYSTEMS[name]
    names = inspect.signature(system).parameters
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, WIDTH), nn.Tanh())
    small = {k: v for k, v in SMALL.items() if k in names}
    return system(encoder, num_features=WIDTH, **(small | arguments)).train()


def batch(name, system, seed=0, n=8):
    """One view of pictures whose class is their strongest colour."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 3, 16, 16, generator=g) + torch.randn(n, 3, 1, 1, generator=g)
    index = torch.randperm(SAMPLES, generator=g)[:n]
    return {"views": [x], "index": index, "label": x.mean((2, 3)).argmax(1)}
