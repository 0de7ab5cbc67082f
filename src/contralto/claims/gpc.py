"""GPC's claim on handwritten digits: contrast with the centres of a semi-supervised Gaussian mixture finds classes better.

    contralto reproduce gpc

All 1,797 digits of scikit-learn; 0 to 4 are old, half of their digits are labelled, 5 to 9 are new. Encoder: three 3 x 3
convolutions and a linear layer, 64 features, from scratch, with Adam at 1e-3: for some epochs all arms learn by the losses of
instances alone, as a stand-in for the pretrained network of the paper. Psi is the variance within the labelled classes.

Arms: *known*, with ten clusters and no splits or merges; *gpc*, with the number of clusters to be found from 16 on;
*instance*, the losses of instances to the end; *untrained*. All are measured alike: k-means on the features into ten clusters
that begins with the labelled digits, and the share of unlabelled digits in the cluster of their class after one matching of
all. `number_error` is how far the number of clusters at the end is from ten.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from contralto.claims.digits import conv_encoder, digit_views, features_of, pretrain
from contralto.claims.protogcd import CLASSES, OLD, discovery_batches, partly_labelled
from contralto.evaluation.discovery import right_clusters
from contralto.neighbors.kmeans import semi_supervised_kmeans
from contralto.systems.discovery.base import DiscoverySystem
from contralto.systems.discovery.gpc import GPC

__all__ = ["run"]

FEATURES = 64
SHARED: dict[str, Any] = {"optimizer": "adam", "lr": 1e-3, "final_lr": 0.0, "temperature_instance": 0.1}
"""Of all arms."""


def run(
    arm: Mapping[str, Any],
    *,
    seed: int,
    data: str,
    budget: Mapping[str, Any],
    device: str = "cpu",
    progress: Callable[[float], None] | None = None,
) -> dict[str, Any]:
    """Train one arm on one seed, and cluster its features.

    Parameters
    ----------
    arm : mapping
        Arguments of the system, `system` ("gpc" or "instance") and `epochs` where they are not the budget's.
    seed : int
    data : {"digits"}
    budget : mapping
        `epochs`, `batch_size`, and `wait_epochs` before the first clustering.
    device : str
    progress : function, optional

    Returns
    -------
    dict
        Of the unlabelled digits: `right` (N,), which lie in the cluster of their class; `old` and `new` (N,), which digits these
        are; `labels` (N,). For GPC `number_error` as well.

    Examples
    --------
    >>> found = run({"system": "instance", "epochs": 0}, seed=100, data="digits", budget={"epochs": 1, "batch_size": 64})
    >>> len(found["right"]), sorted(found)
    (1347, ['labels', 'new', 'old', 'right'])
    """
    split, truth = partly_labelled(seed)
    shown = split.train_labels.numpy()
    settings, batch_size = dict(arm), int(budget["batch_size"])
    epochs = int(settings.pop("epochs", budget["epochs"]))
    steps = len(truth) // batch_size
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = conv_encoder(FEATURES)
    kind: type[DiscoverySystem] = DiscoverySystem
    if settings.pop("system", "gpc") == "gpc":
        own = {"wait_epochs": int(budget["wait_epochs"]), "psi": 0.0, "kmeans_restarts": 3}
        kind, settings = GPC, own | settings
    system = kind(
        encoder, num_features=FEATURES, num_samples=len(truth), num_classes=OLD, seed=seed, epochs=epochs,
        steps_per_epoch=steps, batch_size=batch_size, hidden=256, dim=64, **(SHARED | settings),
    )  # fmt: skip
    make = discovery_batches(split, seed=seed, batch_size=batch_size, view=digit_views)

    def told(step: int) -> dict[str, Any]:
        if step % steps == 0 and system.asks_features(step // steps):
            system.eval()
            system.at_epoch_start(features_of(system, split.train), shown)
            system.train()
        if progress is not None:
            progress(step / system.total_steps)
        return make(step)

    pretrain(system, told, device=device)
    found = semi_supervised_kmeans(features_of(system, split.train), shown, CLASSES, seed=seed).labels
    hidden = shown < 0
    y = truth[hidden]
    out = {"right": right_clusters(y, found[hidden], range(OLD)), "old": y < OLD, "new": y >= OLD, "labels": y}
    if isinstance(system, GPC):
        out["number_error"] = np.abs(system.number - CLASSES)
    return out
