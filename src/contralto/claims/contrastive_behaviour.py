"""The claims of "Understanding the Behaviour of Contrastive Loss": what the temperature does, and that hardness is what counts.

    contralto reproduce contrastive_behaviour

The digits of scikit-learn, views with shifts, contrast, noise and an erased square, encoder 64-128-128 with batch norm, head of
one layer to 64 with batch norm, Adam at 1e-3, weight decay 1e-4, batch 128 with its other samples as negatives, 400 steps, alpha
0.08: the pilot's recipe. Adam, because the loss is not rescaled by the temperature.

Three statements, all of which decide: from a temperature of 0.07 to 0.5 uniformity gets worse and tolerance rises; the simple
loss is worse than the ordinary one, and picking the hardest negatives mends it; at temperature 1 the hard loss beats the ordinary
one. By uniformity and tolerance of head outputs of test digits; by logistic regression on encoder outputs with five labels per
class, the mean over five draws of these labels; the nearest neighbour by head outputs, with the same labels, is reported.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from contralto.claims.digits import batches, digit_views, digits, features_of, few_labels, mlp_encoder, pretrain
from contralto.evaluation.representation import knn_right, probe_right, tolerance, uniformity
from contralto.losses.behaviour import separation
from contralto.systems.selfsup.contrastive_behaviour import ContrastiveBehaviour

__all__ = ["run"]

LABELS, DRAWS = 5, 5


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
        Arguments of the system; `steps` goes before the budget's.
    seed : int
    data : {"digits"}
    budget : mapping
        `steps`, `batch_size`.
    device : str
    progress : function, optional

    Returns
    -------
    dict
        `probe` and `nearest` (N,) per test digit; `uniformity` and `tolerance` of head outputs, `gap` between positives and the
        ten closest negatives, `penalty_entropy` at temperature 0.3.

    Examples
    --------
    >>> found = run({"loss": "simple"}, seed=100, data="digits", budget={"steps": 2, "batch_size": 32})
    >>> sorted(found)
    ['gap', 'nearest', 'penalty_entropy', 'probe', 'tolerance', 'uniformity']
    """
    split = digits(seed)
    given = {k: v for k, v in arm.items() if k != "steps"}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = mlp_encoder((64, 128, 128))
    system = ContrastiveBehaviour(
        encoder, num_features=128, seed=seed, epochs=int(arm.get("steps", budget["steps"])), dim=64, negatives="batch",
        alpha=0.08, batch_size=int(budget["batch_size"]), optimizer="adam", lr=1e-3, weight_decay=1e-4, **given,
    )  # fmt: skip
    view = partial(digit_views, degrees=0.0, scale=0.0, noise=0.15, contrast=(0.6, 1.4), erase=3)
    pretrain(system, batches(split, seed=seed, batch_size=system.batch_size, view=view), device=device)
    if progress is not None:
        progress(0.9)
    train, test = features_of(system, split.train), features_of(system, split.test)
    outputs = [_outputs(system, x).numpy() for x in (split.train, split.test)]
    labels, right = split.train_labels.numpy(), split.test_labels.numpy()
    probe, nearest = [], []
    for draw in range(DRAWS):
        rows = few_labels(split.train_labels, LABELS, 1000 * seed + draw)
        probe.append(probe_right(train[rows], labels[rows], test, right))
        nearest.append(knn_right(outputs[0][rows], labels[rows], outputs[1], right, k=1))
    generator = torch.Generator().manual_seed(seed)
    views = [_outputs(system, view(split.test, generator)) for _ in range(2)]
    told = separation(*views, temperature=0.3)
    return {
        "uniformity": uniformity(outputs[1]),
        "tolerance": tolerance(outputs[1], right),
        "gap": float(told["gap"]),
        "penalty_entropy": float(told["penalty_entropy"]),
        "probe": _mean(probe),
        "nearest": _mean(nearest),
    }


@torch.inference_mode()
def _outputs(system: ContrastiveBehaviour, x: Tensor) -> Tensor:
    """Head outputs (N, 64)."""
    found: Tensor = system.projector(system.encoder(x.to(system.steps.device))).cpu()
    return found


def _mean(draws: list[npt.NDArray[np.float64]]) -> npt.NDArray[np.float64]:
    return np.asarray(np.mean(draws, 0))
