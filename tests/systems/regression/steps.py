"""Small regression systems and their batches."""

import inspect

import torch
from torch import nn

from contralto.systems.regression.base import Regression
from contralto.systems.regression.supremix import SupReMix

WIDTH, SAMPLES = 10, 30
SYSTEMS = {"regression": Regression, "supremix": SupReMix}
SMALL = {"batch_size": 16, "epochs": 2, "dim": 6, "num_samples": SAMPLES, "steps_per_epoch": 3}


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
    """Two noisy views of pictures, and a number from 0 to 10 that is their brightness."""
    g = torch.Generator().manual_seed(seed)
    number = torch.randint(11, (n,), generator=g).float()
    x = number.view(-1, 1, 1, 1) / 5 - 1 + 0.3 * torch.randn(n, 3, 16, 16, generator=g)
    index = torch.randperm(SAMPLES, generator=g)[:n]
    return {"views": [x + 0.1 * torch.randn(x.shape, generator=g) for _ in range(2)], "index": index, "number": number}
