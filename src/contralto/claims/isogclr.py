"""The claim of iSogCLR: on data with a long tail, items of frequent classes learn a larger temperature.

    contralto reproduce isogclr

The digits of scikit-learn, 110 * 0.05^(k/9) training images of the k-th class in an order drawn by the seed (about 369), views
with rotations, scalings, shifts and noise, encoder 64-256-128 with batch norm, head 128-128-32, batch 64, 400 Adam steps at 1e-3:
the pilot's recipe. Arms: SimCLR at three temperatures, SogCLR, iSogCLR with rho 0.2 and 0.4; all with the same head (iSogCLR's,
without batch norm) from the same start; one more learns temperatures only, over the encoder as it was drawn.

What decides is Spearman's correlation, over classes, of their size and the mean temperature of their images: a difference from
SogCLR, whose temperatures are all alike (a correlation of 0). Whether features are better, by a class-balanced logistic probe
(mean recall) and 10 nearest neighbours with all training labels, is reported.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr

from contralto.claims.digits import (
    Split,
    batches,
    digit_views,
    digits,
    mlp_encoder,
    pretrain,
    split_features,
    thinned,
)
from contralto.encoders.heads import mlp
from contralto.evaluation.representation import knn_right, probe_right
from contralto.systems.base import EncoderSystem
from contralto.systems.selfsup.isogclr import ISogCLR
from contralto.systems.selfsup.simclr import SimCLR

__all__ = ["build", "run"]

SIZES = [int(110 * 0.05 ** (k / 9)) for k in range(10)]
NEIGHBOURS = 10


def run(
    arm: Mapping[str, Any],
    *,
    seed: int,
    data: str,
    budget: Mapping[str, Any],
    device: str = "cpu",
    progress: Callable[[float], None] | None = None,
) -> dict[str, Any]:
    """Train and measure one arm on one seed.

    Parameters
    ----------
    arm : mapping
        `loss` ("simclr", "sogclr" or "isogclr") and arguments of the system; `steps` goes before the budget's.
    seed : int
    data : {"digits"}
    budget : mapping
        `steps`, `batch_size`.
    device : str
    progress : function, optional

    Returns
    -------
    dict
        `knn` and `probe` (N,) per test digit, `labels`; where there are temperatures per item, `spearman` and `mean_temperature`.

    Examples
    --------
    >>> found = run({"loss": "isogclr", "rho": 0.2}, seed=100, data="digits", budget={"steps": 6, "batch_size": 64})
    >>> sorted(found)
    ['knn', 'labels', 'mean_temperature', 'probe', 'spearman']
    """
    split = thinned(digits(seed), SIZES, seed)
    system = build(arm, seed, int(arm.get("steps", budget["steps"])), int(budget["batch_size"]), len(split.train))
    make = batches(split, seed=seed, batch_size=system.batch_size, view=digit_views)
    pretrain(system, make, device=device)
    if progress is not None:
        progress(0.9)
    parts = split_features(system, split)
    found: dict[str, Any] = {"labels": parts[3]}
    if isinstance(system, ISogCLR) and system.done:
        found |= _temperatures(system, split)
    return found | {
        "knn": knn_right(*parts, k=NEIGHBOURS, temperature=None),
        "probe": probe_right(*parts),
    }


def build(arm: Mapping[str, Any], seed: int, steps: int, batch_size: int, num_samples: int) -> EncoderSystem:
    """The system of an arm, not yet trained: encoder and head are the same in all arms of a seed."""
    given = {k: v for k, v in arm.items() if k not in ("loss", "steps")}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder, head = mlp_encoder(), mlp([128, 128, 32])
    common: dict[str, Any] = {
        "num_features": 128, "num_samples": num_samples, "seed": seed, "epochs": steps, "batch_size": batch_size,
        "optimizer": "adam", "lr": 1e-3, "weight_decay": 0.0, "warmup_epochs": 0, "hidden": 128, "dim": 32,
    }  # fmt: skip
    system: EncoderSystem
    if arm["loss"] == "simclr":
        system = SimCLR(encoder, **(common | given))
    else:
        learnt = {"learn_temperature": arm["loss"] == "isogclr", "temperature": 0.2, "start_lr": 0.0, "final_lr": 0.0}
        system = ISogCLR(encoder, **(common | learnt | given))
    system.projector = head
    return system


def _temperatures(system: ISogCLR, split: Split) -> dict[str, float]:
    """How temperatures go with the size of classes; 0 where they are all alike."""
    tau, labels = system.temperatures().cpu().numpy(), split.train_labels.numpy()
    seen = ~np.isnan(tau)
    present = np.unique(labels[seen])
    means = np.array([tau[seen & (labels == c)].mean() for c in present])
    order = spearmanr(np.bincount(labels)[present], means).statistic if np.ptp(means) > 1e-6 else 0.0
    return {"spearman": float(order), "mean_temperature": float(tau[seen].mean())}
