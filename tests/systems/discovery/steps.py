"""What tests of discovery share: a tiny system, and batches of which some samples are labelled."""

import inspect

import numpy as np
import torch
from torch import nn

from contralto.systems.registry import get_system
from contralto.views.batched import draw_batch

OLD, NEW, WIDTH, SIZE, SAMPLES = 2, 3, 12, 16, 24
SMALL = {"hidden": 16, "dim": 8, "batch_size": 8, "epochs": 2}
CENTRES = torch.randn(OLD + NEW, 6, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


class Tiny(nn.Module):
    """The smallest encoder of pictures."""

    size, mean, std, num_features = SIZE, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), WIDTH

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, WIDTH, 3, 2, 1), nn.ReLU()
        )

    def forward(self, x):
        return self.layers(x).mean((2, 3))


def build(name, **arguments):
    """A system on pictures; one that asks for the features of all samples has had them."""
    kind = get_system(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = Tiny()
    facts = {"num_features": WIDTH, "num_samples": SAMPLES, "steps_per_epoch": 3, "num_classes": OLD, "num_new": NEW}
    names = inspect.signature(kind).parameters
    system = kind(encoder, **{k: v for k, v in (facts | SMALL | arguments).items() if k in names})
    if system.asks_features(0):
        rng = np.random.default_rng(0)
        labels = np.where(np.arange(SAMPLES) % 2 == 0, np.arange(SAMPLES) // 2 % OLD, -1)
        system.at_epoch_start(rng.normal(size=(SAMPLES, WIDTH)).astype(np.float32), labels)
    return system


def batch(name, system, seed=0, n=8):
    """Two views of pictures, about half of them labelled."""
    g = torch.Generator().manual_seed(seed)
    pictures = torch.randint(256, (n, 3, 24, 24), generator=g, dtype=torch.uint8)
    index = torch.randperm(SAMPLES, generator=g)[:n]
    views = system.views(SIZE, Tiny.mean, Tiny.std)
    pixels, _ = draw_batch(views, pictures, None, seed=0, epoch=seed, index=index)
    return {
        "views": pixels,
        "index": index,
        "label": torch.where(torch.arange(n) % 2 == 0, torch.arange(n) // 2 % OLD, -1),
    }


def vectors(step, n=8, labelled=0.5):
    """Two views of vectors (n, 6) around the centre of their class, in double precision; a part of the old ones labelled."""
    g = torch.Generator().manual_seed(step)
    kind = torch.randint(OLD + NEW, (n,), generator=g)
    shown = (kind < OLD) & (torch.rand(n, generator=g) < labelled)
    views = [CENTRES[kind] + 0.3 * torch.randn(n, 6, generator=g, dtype=torch.float64) for _ in range(2)]
    return {"views": views, "index": torch.randperm(30, generator=g)[:n], "label": torch.where(shown, kind, -1)}
