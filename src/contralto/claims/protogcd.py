"""ProtoGCD's claim on handwritten digits: the balance of the mean prediction is what keeps old and new classes apart.

    contralto reproduce protogcd

All 1,797 digits of scikit-learn. Classes 0 to 4 are old, half of their digits are labelled; 5 to 9 are new. Measured is the
accuracy of the classes found on the unlabelled digits, after one matching of all. Encoder: three 3 x 3 convolutions and a
linear layer, 128 features, from scratch; 60 epochs, of which the first 30 are the ramp of the pseudo-labels: half, as in the
paper. Its optimiser, at 0.03 for all arms: 0.1 is for a pretrained encoder, and worse here for the full arm on seeds 100 and 101.

Arms: *full*; *no balance*, without the entropy term; *soft* and *hard*, all pseudo-labels soft or one-hot from the start; *no
separation*; *instance*, the two losses of instances alone, and *untrained*: both of these with k-means on the features, which
knows the labels that are shown (the plain method of the field).
"""

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from contralto.claims.digits import Split, batches, conv_encoder, digit_views, digits, features_of, pretrain
from contralto.data.partial import HalfLabelledSampler, partial_labels
from contralto.evaluation.discovery import right_clusters
from contralto.neighbors.kmeans import semi_supervised_kmeans
from contralto.systems.discovery.base import DiscoverySystem
from contralto.systems.discovery.protogcd import ProtoGCD

__all__ = ["OLD", "build", "discovery_batches", "partly_labelled", "run"]

OLD, CLASSES = 5, 10
"""Old classes, and all."""
RATE = 0.03
"""Learning rate of all arms."""


def partly_labelled(seed: int) -> tuple[Split, npt.NDArray[np.int64]]:
    """All digits as the training part, with the labels that are shown (-1 = none); and the right labels.

    Examples
    --------
    >>> split, truth = partly_labelled(0)
    >>> len(truth), int((split.train_labels >= 0).sum())
    (1797, 450)
    """
    whole = digits(seed, test=0)
    truth = whole.train_labels.numpy()
    shown = partial_labels(truth, range(OLD), 0.5, np.random.default_rng([seed, 7]))
    return whole._replace(train_labels=torch.from_numpy(shown)), truth


def discovery_batches(
    split: Split, *, seed: int, batch_size: int, view: Callable[..., Any] = digit_views
) -> Callable[[int], dict[str, Any]]:
    """Step -> batch of two views, half of it labelled.

    Examples
    --------
    >>> batch = discovery_batches(partly_labelled(0)[0], seed=0, batch_size=128)(3)
    >>> int((batch["label"] >= 0).sum())
    69
    """
    sampler = HalfLabelledSampler(split.train_labels.numpy(), seed=seed)
    steps = len(split.train) // batch_size

    @lru_cache(maxsize=1)
    def order(epoch: int) -> npt.NDArray[np.int64]:
        sampler.set_epoch(epoch)
        return sampler.order()

    def rows(step: int) -> npt.NDArray[np.int64]:
        epoch, place = divmod(step, steps)
        return order(epoch)[place * batch_size : (place + 1) * batch_size]

    return batches(split, seed=seed, batch_size=batch_size, view=view, rows=rows)


def build(arm: Mapping[str, Any], *, seed: int, budget: Mapping[str, Any], samples: int) -> DiscoverySystem:
    """The system of an arm.

    Examples
    --------
    >>> budget = {"epochs": 60, "batch_size": 128}
    >>> build({"entropy": 0.0}, seed=0, budget=budget, samples=1797).total_steps
    840
    """
    settings = dict(arm)
    kind = {"protogcd": ProtoGCD, "instance": DiscoverySystem}[settings.pop("system", "protogcd")]
    epochs = int(settings.pop("epochs", budget["epochs"]))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = conv_encoder(128)
    return kind(
        encoder, num_features=128, num_samples=samples, num_classes=OLD, num_new=CLASSES - OLD, seed=seed, epochs=epochs,
        steps_per_epoch=samples // int(budget["batch_size"]), batch_size=int(budget["batch_size"]), hidden=256, dim=64,
        **{"lr": RATE, "final_lr": 1e-3 * RATE} | settings,
    )  # fmt: skip


def run(
    arm: Mapping[str, Any],
    *,
    seed: int,
    data: str,
    budget: Mapping[str, Any],
    device: str = "cpu",
    progress: Callable[[float], None] | None = None,
) -> dict[str, Any]:
    """Train one arm on one seed, and look at the classes that it found.

    Parameters
    ----------
    arm : mapping
        Arguments of the system, `system` ("protogcd" or "instance") and `epochs` where they are not the budget's.
    seed : int
    data : {"digits"}
    budget : mapping
        `epochs`, `batch_size`.
    device : str
    progress : function, optional

    Returns
    -------
    dict
        Of the unlabelled digits: `right` (N,), which lie in the cluster of their class after one matching of all, and `apart`
        (N,) after one of old and one of new classes; `old` and `new` (N,), which digits these are; `labels` (N,). `in_use`:
        clusters that hold at least a fifth of an even share of all digits.

    Examples
    --------
    >>> found = run({"system": "instance", "epochs": 0}, seed=100, data="digits", budget={"epochs": 1, "batch_size": 64})
    >>> len(found["right"]), bool(found["apart"].mean() >= found["right"].mean() > 0.5)
    (1347, True)
    """
    split, truth = partly_labelled(seed)
    system = build(arm, seed=seed, budget=budget, samples=len(truth))
    make = discovery_batches(split, seed=seed, batch_size=system.batch_size)

    def told(step: int) -> dict[str, Any]:
        if progress is not None:
            progress(step / system.total_steps)
        return make(step)

    pretrain(system, told, device=device)
    features, shown = features_of(system, split.train), split.train_labels.numpy()
    if isinstance(system, ProtoGCD):
        found = system.discover(features, shown).assigned
    else:
        found = semi_supervised_kmeans(features, shown, CLASSES, seed=seed).labels
    hidden = shown < 0
    y, c = truth[hidden], found[hidden]
    share = np.bincount(found, minlength=CLASSES) / len(found)
    return {
        "right": right_clusters(y, c, range(OLD)), "apart": right_clusters(y, c, range(OLD), protocol="apart"),
        "old": y < OLD, "new": y >= OLD, "labels": y, "in_use": int((share >= 0.2 / CLASSES).sum()),
    }  # fmt: skip
