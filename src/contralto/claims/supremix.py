"""The claim of SupReMix: with mixtures, supervised contrast leaves features from which a linear probe tells numbers better.

    contralto reproduce supremix

Handwritten digits of scikit-learn (2, 3, 4, 5 and 7), turned by an angle from -60 to 60 degrees in bins of 4; the number is
that of the bin, 0 to 30. 600 digits for training, turned once each; 1,500 test pictures of the other digits. Encoder
64-128-128 with ReLU, linear head of 64; batch 32, two views with noise of 0.1, 600 steps, Adam at 1e-3, temperature 0.3,
window 5, Beta(2, 8): the pilot's recipe, with the paper's step of the rate at four fifths. All arms see the same pictures,
views and order. Then a ridge probe on the encoder's features, its penalty chosen by leave-one-out on the training part.

Measure: absolute error of every test picture, in bins; pictures of one digit stand together in the bootstrap. Rank-N-Contrast
(on the features themselves, at 2, as its paper has it) is told beside, and least absolute error twice: by the same probe, and
by the output that was trained.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from contralto.claims.digits import SIDE, Split, batches, features_of, pretrain
from contralto.encoders.tables import TableEncoder
from contralto.evaluation.regression import fit_probe
from contralto.systems.regression.supremix import SupReMix
from contralto.views.rotation import rotate

__all__ = ["Turned", "run", "turn", "turned_digits"]

CLASSES = (2, 3, 4, 5, 7)
BINS, DEGREES = 31, 4


class Turned(NamedTuple):
    """Pictures (N, 64) with the bins of their angles (N,), in two parts, and which digits (N,) the test pictures are of."""

    split: Split
    digits: np.ndarray[Any, np.dtype[np.int64]]


def turn(x: Tensor, degrees: Tensor) -> Tensor:
    """Digits (N, 64), each turned by its angle.

    Examples
    --------
    >>> x = torch.rand(2, 64)
    >>> torch.allclose(turn(x, torch.zeros(2)), x, atol=1e-5)
    True
    """
    return rotate(x.view(-1, 1, SIDE, SIDE), degrees).flatten(1)


def turned_digits(seed: int, *, train: int = 600, test: int = 1500) -> Turned:
    """Turned digits; no digit is in both parts.

    Examples
    --------
    >>> found = turned_digits(0)
    >>> found.split.train.shape, found.split.test.shape, found.split.train_labels.max().item()
    (torch.Size([600, 64]), torch.Size([1500, 64]), 30.0)
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    rng = np.random.default_rng([seed, 1])
    order = rng.permutation(np.flatnonzero(np.isin(data.target, CLASSES)))
    kept, held = order[:train], order[train:]
    chosen = np.resize(held, test)
    numbers = [torch.from_numpy(rng.integers(BINS, size=n)).float() for n in (len(kept), test)]
    parts = [
        turn(torch.from_numpy(data.data[rows] / 16).float(), DEGREES * (bins - BINS // 2))
        for rows, bins in zip((kept, chosen), numbers, strict=True)
    ]
    return Turned(Split(parts[0], numbers[0], parts[1], numbers[1]), chosen)


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
        `method`; `own` for the output that was trained in place of a probe; `steps` where they are not the budget's.
    seed : int
    data : {"digits"}
    budget : mapping
        `steps`, `batch_size`, `train`, `test`.
    device : str
    progress : function, optional

    Returns
    -------
    dict
        `error` (N,) per test picture, in bins; `groups`, its digit.

    Examples
    --------
    >>> budget = {"steps": 2, "batch_size": 8, "train": 40, "test": 60}
    >>> found = run({"method": "supremix"}, seed=100, data="digits", budget=budget)
    >>> sorted(found), len(found["error"])
    (['error', 'groups'], 60)
    """
    split, digits = turned_digits(seed, train=int(budget["train"]), test=int(budget["test"]))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = TableEncoder(SIDE**2, width=128, depth=2)
    system = SupReMix(
        encoder, num_features=128, seed=seed, epochs=int(arm.get("steps", budget["steps"])), method=arm["method"],
        batch_size=int(budget["batch_size"]), dim=64,
    )  # fmt: skip
    system.learn_scale(split.train_labels)
    make = batches(split, seed=seed, batch_size=int(budget["batch_size"]), view=_noisy)
    pretrain(system, lambda step: _numbered(make(step)), device=device)
    if progress is not None:
        progress(0.9)
    if arm.get("own"):
        with torch.inference_mode():
            told = system.tell(split.test.to(device)).double().cpu().numpy()
    else:
        probe = fit_probe(features_of(system, split.train), split.train_labels.numpy())
        told = probe.tell(features_of(system, split.test))
    return {"error": np.abs(told - split.test_labels.numpy()), "groups": digits.astype(str)}


def _noisy(x: Tensor, generator: torch.Generator) -> Tensor:
    return x + 0.1 * torch.randn(x.shape, generator=generator)


def _numbered(batch: dict[str, Any]) -> dict[str, Any]:
    return {"number": batch.pop("label")} | batch
