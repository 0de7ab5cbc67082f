"""GPC's other claim: splits and merges find the number of classes from a start that is far off.

    contralto reproduce gpc_number

The 1,797 digits of scikit-learn, 0 to 4 old with half of their labels, as rows of length one in 16 principal directions of their
pixels. Twenty rounds of k-means, splits and merges, without a coin, begin with 16 clusters instead of ten; Psi is the paper's.

Arms: *gpc*; *start*, no round at all; *too few*, from six clusters; *variance within*, with the variance within the labelled
classes as Psi; *learnt*, on features that tell classes better: those of half of the digits by a network that learnt from all
labels of the other half. `error` is how far the number is from ten; a seed draws the labels that are shown, the first centres
and the halves.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from sklearn.decomposition import PCA
from torch.nn import functional as F

from contralto.claims.digits import Split, digit_views, digits, mlp_encoder
from contralto.claims.protogcd import CLASSES, OLD
from contralto.data.partial import partial_labels
from contralto.neighbors.how_many import rounds_of_splits
from contralto.neighbors.knn import unit_rows

__all__ = ["learnt_features", "run"]

DIRECTIONS, ROUNDS = 16, 20


def learnt_features(split: Split, seed: int, *, steps: int = 400) -> npt.NDArray[np.float32]:
    """Features (N, 64) of the test part by a small network that learnt the classes of the training part.

    Examples
    --------
    >>> learnt_features(digits(100, test=898), 100, steps=1).shape
    (898, 64)
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder, head = mlp_encoder((64, 128, 64)), torch.nn.Linear(64, CLASSES)
    optimizer = torch.optim.Adam([*encoder.parameters(), *head.parameters()], 1e-3)
    for _ in range(steps):
        rows = torch.randint(len(split.train), (128,), generator=generator)
        loss = F.cross_entropy(head(encoder(digit_views(split.train[rows], generator))), split.train_labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.inference_mode():
        features: npt.NDArray[np.float32] = encoder.eval()(split.test).numpy()
    return features


def run(
    arm: Mapping[str, Any],
    *,
    seed: int,
    data: str,
    budget: Mapping[str, Any],
    device: str = "cpu",
    progress: Callable[[float], None] | None = None,
) -> dict[str, Any]:
    """How far the number of clusters is from that of the classes, on one seed.

    Parameters
    ----------
    arm : mapping
        `start`; `psi` and `rounds` where they are not the paper's and 20; `learnt` features instead of pixels.
    seed : int
    data : {"digits"}
    budget : mapping
        `restarts` of every k-means.
    device : str
    progress : function, optional

    Returns
    -------
    dict
        `error`.

    Examples
    --------
    >>> run({"start": 16, "rounds": 0}, seed=100, data="digits", budget={"restarts": 1})
    {'error': 6}
    """
    if arm.get("learnt"):
        split = digits(seed, test=898)
        features, truth = learnt_features(split, seed), split.test_labels.numpy()
    else:
        split = digits(seed, test=0)
        features, truth = split.train.numpy(), split.train_labels.numpy()
    shown = partial_labels(truth, range(OLD), 0.5, np.random.default_rng([seed, 7]))
    rows = PCA(DIRECTIONS, svd_solver="full").fit_transform(unit_rows(features) if arm.get("learnt") else features)
    numbers = rounds_of_splits(
        rows, shown, int(arm["start"]), psi=float(arm.get("psi", 0.005)), rounds=int(arm.get("rounds", ROUNDS)), seed=seed,
        restarts=int(budget["restarts"]),
    )  # fmt: skip
    if progress is not None:
        progress(1.0)
    return {"error": abs(numbers[-1] - CLASSES)}
