"""A small COCONUT and its batches of made-up recordings."""

import torch

from contralto.encoders.audio import ConvGRUEncoder
from contralto.systems.continual.coconut import COCONUT

CLASSES, MELS, WIDTH, FRAMES, SAMPLES = 4, 6, 8, 13, 40
TEXTS = torch.tensor([[4, 5, 2, 0], [6, 2, 0, 0], [5, 4, 6, 2], [6, 6, 2, 0]])
SMALL = {
    "batch_size": 8, "epochs": 2, "extra_epochs": 1, "steps_per_epoch": 3, "dim": 4, "vocabulary": 9, "length": 5,
    "decoder_dim": 8, "decoder_heads": 2, "decoder_hidden": 16, "decoder_dropout": 0.0, "memory_size": 8, "replayed": 2,
    "beam": 2,
}  # fmt: skip


def build(task=1, **arguments):
    """A system in its first task (0), or in its second one, with a memory of the first; the same at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = ConvGRUEncoder(MELS, WIDTH)
    system = COCONUT(
        encoder, num_features=WIDTH, num_classes=CLASSES, num_samples=SAMPLES, **(SMALL | arguments)
    ).train()
    system.begin_task([0, 1])
    if task:
        index = torch.arange(SAMPLES)
        labels = index % CLASSES
        old = labels < 2
        features = torch.randn(int(old.sum()), WIDTH, generator=torch.Generator().manual_seed(1))
        system.end_task(index[old], labels[old], features)
        system.begin_task([2, 3])
    return system


def batch(system, seed=0, n=8, replayed=3):
    """New recordings of the current task, and in a later one some of the memory's classes behind them."""
    g = torch.Generator().manual_seed(seed)
    first = int(system.task) == 0
    replayed = 0 if first else min(replayed, n - 1)
    label = torch.randint(2, (n,), generator=g) + (0 if first else 2)
    label[n - replayed :] -= 2
    lengths = torch.randint(4, FRAMES + 1, (n,), generator=g)
    there = torch.arange(FRAMES) < lengths[:, None]
    pitch = torch.nn.functional.one_hot(label, MELS).float().unsqueeze(1)
    x = (torch.randn(n, FRAMES, MELS, generator=g) + 2 * pitch) * there.unsqueeze(2)
    return {
        "views": [x], "lengths": lengths, "label": label, "text": TEXTS[label], "index": torch.arange(n),
        "replayed": torch.arange(n) >= n - replayed,
    }  # fmt: skip
