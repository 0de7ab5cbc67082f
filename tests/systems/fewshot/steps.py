"""Small few-shot systems and their batches."""

import inspect

import torch
from torch import nn

from contralto.systems.fewshot.base_classifier import BaseClassifier
from contralto.systems.fewshot.protonet import ProtoNet
from contralto.systems.fewshot.susana import SuSana

CLASSES, WIDTH, SAMPLES = 4, 10, 40
SYSTEMS = {"susana": SuSana, "protonet": ProtoNet, "base_classifier": BaseClassifier}
SMALL = {
    "way": 2, "shot": 1, "queries": 3, "episodes": 3, "batch_size": 8, "epochs": 2, "num_classes": CLASSES, "lr": 1e-2,
    "num_samples": SAMPLES, "steps_per_epoch": 3,
}  # fmt: skip


def build(name, **arguments):
    """A system on small pictures, the same at every call; an episode of it is eight rows."""
    system = SYSTEMS[name]
    names = inspect.signature(system).parameters
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, WIDTH), nn.Tanh())
    small = {k: v for k, v in SMALL.items() if k in names}
    return system(encoder, num_features=WIDTH, **(small | arguments)).train()


def batch(name, system, seed=0, n=8):
    """Episodes of pictures whose class is their colour; of less than a whole one, its first rows."""
    way, shot, queries = (getattr(system, k, SMALL[k]) for k in ("way", "shot", "queries"))
    g = torch.Generator().manual_seed(seed)
    colours = torch.randn(CLASSES, 3, 1, 1, generator=torch.Generator().manual_seed(99))
    labels = []
    for _ in range(-(-n // (way * (shot + queries)))):
        classes = torch.randperm(CLASSES, generator=g)[:way]
        labels += [classes.repeat_interleave(shot), classes.repeat_interleave(queries)]
    labels = torch.cat(labels)[:n]
    x = colours[labels] + torch.randn(n, 3, 16, 16, generator=g)
    return {"views": [x], "index": torch.randperm(SAMPLES, generator=g)[:n], "label": labels}
