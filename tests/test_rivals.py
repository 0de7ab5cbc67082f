"""The rivals that `benchmarks/webly.py` trains itself, against loops."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import rivals

SIZES = {"num_classes": 3, "num_features": 6, "hidden": 8, "dim": 4, "queue_size": 16, "stage": "plain", "seed": 3}


@pytest.fixture
def batch():
    g = torch.Generator().manual_seed(0)
    return {"views": [torch.randn(10, 6, generator=g)], "label": torch.randint(3, (10,), generator=g)}


def test_co_teaching_lets_each_head_learn_from_what_the_other_finds_easy(batch):
    system = rivals.told_to_forget(0.4)(nn.Identity(), **SIZES)
    loss = system.step(batch, epoch=99)["loss"]
    x, label = batch["views"][0], batch["label"]
    first, second = (
        [float(F.cross_entropy(h(x[i]), label[i])) for i in range(10)] for h in (system.classifier, system.second)
    )
    easy_first, easy_second = (sorted(range(10), key=lambda i: losses[i])[:6] for losses in (first, second))
    expected = np.mean([first[i] for i in easy_second]) + np.mean([second[i] for i in easy_first])
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    loss.backward()
    assert system.classifier.weight.grad.abs().sum() > 0
    assert system.second.weight.grad.abs().sum() > 0


def test_co_teaching_forgets_nothing_at_first_and_more_by_and_by(batch):
    system = rivals.told_to_forget(0.5)(nn.Identity(), **SIZES)
    losses = [float(system.step(batch, epoch=e)["loss"]) for e in (0, 4, 9, 50)]
    assert losses[0] > losses[1] > losses[2] == losses[3]


@pytest.mark.parametrize("kind", [rivals.Mixup, rivals.StrongMixup])
def test_mixup_mixes_features_and_losses_in_one_share(batch, kind):
    system = kind(nn.Identity(), **SIZES)
    loss = float(system.step(batch, epoch=2, batch_idx=5)["loss"])
    rng = np.random.default_rng([3, 2, 5])
    share = rng.beta(kind.strength, kind.strength)
    order = rng.permutation(10)
    total = 0.0
    for i, j in enumerate(order):
        logits = system.classifier(share * batch["views"][0][i] + (1 - share) * batch["views"][0][j])
        total += share * float(F.cross_entropy(logits, batch["label"][i]))
        total += (1 - share) * float(F.cross_entropy(logits, batch["label"][j]))
    assert loss == pytest.approx(total / 10, rel=1e-5)
