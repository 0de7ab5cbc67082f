"""Hydra's claim on handwritten digits: positives of other classes only teach nothing, unless a gate picks their subspace.

Classes 0 to 5 are learnt with labels, 6 to 9 are new. Every arm sees the same digits, views, batches and first weights for the
same number of steps; then a logistic regression on frozen, standardised features gets five labels per class, ten times anew.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from contralto.claims.digits import Split, batches, digit_views, digits, features_of, mlp_encoder, pretrain
from contralto.evaluation.representation import effective_rank, probe_right
from contralto.systems.selfsup.hydra import Hydra

__all__ = ["build", "run"]

KNOWN, DRAWS, LABELS = 6, 10, 5
"""Classes that are learnt; draws of the labels of a probe; labels per class."""


def build(arm: Mapping[str, Any], *, seed: int, steps: int) -> Hydra:
    """The system of an arm.

    Examples
    --------
    >>> build({"gate": "open", "pairing": "distinct"}, seed=0, steps=3).total_steps
    3
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = mlp_encoder((64, 128, 128))
    return Hydra(
        encoder, num_features=128, num_classes=KNOWN, seed=seed, epochs=1 if steps else 0, steps_per_epoch=max(steps, 1),
        optimizer="adam", lr=1e-3, final_lr=1e-3, weight_decay=1e-4, warmup_epochs=0, hidden=128, dim=64, embedding=64,
        gate_hidden=128, **arm,
    )  # fmt: skip


def run(
    arm: dict[str, Any], *, seed: int, data: str, budget: dict[str, Any], device: str, progress: Callable[[float], None]
) -> dict[str, Any]:
    """Train one arm on one seed and probe it.

    Returns
    -------
    dict
        `right` (N,): share of the draws in which the probe named a test digit rightly; `known` and `new` (N,): which of them are
        of classes that were learnt; `rank` and `rank_projected`: effective ranks of features and projections of the known.

    Examples
    --------
    >>> found = run({"steps": 0}, seed=100, data="digits", budget={"batch_size": 16}, device="cpu", progress=print)
    >>> sorted(found), bool(found["right"].mean() > 0.5)
    (['known', 'new', 'rank', 'rank_projected', 'right'], True)
    """
    settings = dict(arm)
    steps = int(settings.pop("steps", budget.get("steps", 0)))
    system = build(settings, seed=seed, steps=steps)
    whole = digits(seed)
    learnt = whole.train_labels < KNOWN
    split = Split(whole.train[learnt], whole.train_labels[learnt], whole.test, whole.test_labels)
    make = batches(
        split, seed=seed, batch_size=budget["batch_size"],
        view=lambda x, g: digit_views(x, g, degrees=0, scale=0, shift=1, contrast=(0.7, 1.3), noise=0.1),
    )  # fmt: skip

    def told(step: int) -> dict[str, Any]:
        progress(step / steps)
        return make(step)

    pretrain(system, told, device=device)
    train, test = (features_of(system, x) for x in (whole.train, whole.test))
    y, truth = whole.train_labels.numpy(), whole.test_labels.numpy()
    right = np.zeros(len(test))
    for part, held in ((y < KNOWN, truth < KNOWN), (y >= KNOWN, truth >= KNOWN)):
        draws = [
            probe_right(train[part], y[part], test[held], truth[held], per_class=LABELS, seed=1000 * seed + draw)
            for draw in range(DRAWS)
        ]
        right[held] = np.mean(draws, 0)
    known = truth < KNOWN
    with torch.inference_mode():
        projected = system.projector(torch.from_numpy(test[known]).to(device)).cpu().numpy()
    return {
        "right": right, "known": known, "new": ~known, "rank": effective_rank(test[known]),
        "rank_projected": effective_rank(projected),
    }  # fmt: skip
