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


@pytest.mark.parametrize(
    ("epoch", "kept"), [(0, 10), (4, 8), (9, 6), (99, 6)]
)  # of ten; 0.4 are forgotten after ten epochs
def test_co_teaching_lets_each_head_learn_from_what_the_other_finds_easy(batch, epoch, kept):
    system = rivals.told_to_forget(0.4)(nn.Identity(), **SIZES)
    loss = system.step(batch, epoch)["loss"]
    x, label = batch["views"][0], batch["label"]
    heads = (system.classifier, system.second)
    first, second = ([F.cross_entropy(h(x[i]), label[i]).item() for i in range(10)] for h in heads)
    easy_first, easy_second = (sorted(range(10), key=lambda i: losses[i])[:kept] for losses in (first, second))
    expected = np.mean([first[i] for i in easy_second]) + np.mean([second[i] for i in easy_first])
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    loss.backward()
    assert system.classifier.weight.grad.abs().sum() > 0
    assert system.second.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", [rivals.Mixup, rivals.StrongMixup])
def test_mixup_mixes_features_and_losses_in_one_share(batch, kind):
    system = kind(nn.Identity(), **SIZES)
    loss = system.step(batch, epoch=2, batch_idx=5)["loss"].item()
    rng = np.random.default_rng([3, 2, 5])
    share = rng.beta(kind.strength, kind.strength)
    order = rng.permutation(10)
    total = 0.0
    for i, j in enumerate(order):
        logits = system.classifier(share * batch["views"][0][i] + (1 - share) * batch["views"][0][j])
        total += share * F.cross_entropy(logits, batch["label"][i]).item()
        total += (1 - share) * F.cross_entropy(logits, batch["label"][j]).item()
    assert loss == pytest.approx(total / 10, rel=1e-5)
