"""The claim about projection heads: the layer before the head keeps what the augmentation destroys, the one behind it loses it.

    contralto reproduce projection_head

Two handwritten digits of scikit-learn side by side, drawn independently: real pictures (8 x 16) with two known features. Views:
each digit shifted by up to a pixel, contrast 0.7 to 1.3, noise 0.1; the *left* digit is blanked with probability p in each view.
1,200 digits for training, 597 for testing, never mixed. Encoder Linear 128 - batch norm - ReLU - Linear 128; heads: mlp
128-128-64, fixed with kappa 1.05, none; NT-Xent at 0.5, Adam at 1e-3, weight decay 1e-6, batch 128, 500 steps: the pilot's
recipe. Measures: logistic probes (C 0.1, 600 standardised pairs) for the left and the right digit, and the effective rank,
at the layer of the arm; the two layers of one model are two arms that train the same model.

A fixed head is invertible, so its features are compared with those of *none*, not with what is behind it. The *untrained* encoder
knows the left digit best: training can only destroy it here, and a head protects it.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from contralto.claims.digits import SIDE, digit_views, digits, pretrain
from contralto.evaluation.representation import effective_rank, probe_right
from contralto.systems.selfsup.projection_head import ProjectionHead

__all__ = ["pair_views", "pairs", "run"]

PROBED = 600


def pairs(left: Tensor, right: Tensor) -> Tensor:
    """Digits (B, 64) side by side, (B, 128).

    Examples
    --------
    >>> pairs(torch.zeros(1, 64), torch.ones(1, 64)).view(8, 16)[0].tolist()
    [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    """
    return torch.cat([left.view(-1, SIDE, SIDE), right.view(-1, SIDE, SIDE)], 2).flatten(1)


def pair_views(left: Tensor, right: Tensor, generator: torch.Generator, blank: float) -> Tensor:
    """One view of every pair; the left digit is blanked with probability `blank`.

    Examples
    --------
    >>> pair_views(torch.rand(5, 64), torch.rand(5, 64), torch.Generator().manual_seed(0), 0.5).shape
    torch.Size([5, 128])
    """
    there = torch.rand(len(left), 1, generator=generator) >= blank
    moved = [digit_views(x, generator, degrees=0.0, scale=0.0, noise=0.0, contrast=(0.7, 1.3)) for x in (left, right)]
    clean = pairs(moved[0] * there, moved[1])
    return clean + 0.1 * torch.randn(clean.shape, generator=generator)


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
        `head`, `blank` (p), `layer` ("pre" or "post"); `steps` where they are not the budget's.
    seed : int
    data : {"digits"}
    budget : mapping
        `steps`, `batch_size`.
    device : str
    progress : function, optional

    Returns
    -------
    dict
        `left` and `right` (N,): where the probe names that digit of a test pair rightly; `rank`, the effective one.

    Examples
    --------
    >>> arm = {"head": "mlp", "blank": 0.5, "layer": "pre"}
    >>> sorted(run(arm, seed=100, data="digits", budget={"steps": 2, "batch_size": 16}))
    ['left', 'rank', 'right']
    """
    split, n = digits(seed), int(budget["batch_size"])

    def make(step: int) -> dict[str, Any]:
        rng = np.random.default_rng([seed, 5, step])
        index = torch.from_numpy(rng.integers(len(split.train), size=(2, n)))
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        left, right = split.train[index[0]], split.train[index[1]]
        return {"views": [pair_views(left, right, generator, arm["blank"]) for _ in range(2)], "index": index[0]}

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = nn.Sequential(nn.Linear(128, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, 128))
    system = ProjectionHead(
        encoder, num_features=128, seed=seed, epochs=int(arm.get("steps", budget["steps"])), head=arm["head"], hidden=128,
        dim=64 if arm["head"] == "mlp" else None,
    )  # fmt: skip
    pretrain(system, make, device=device)
    if progress is not None:
        progress(0.9)

    def drawn(x: Tensor, y: Tensor, count: int, number: int) -> tuple[npt.NDArray[np.float32], ...]:
        """Features of random pairs, and both labels."""
        index = torch.from_numpy(np.random.default_rng([seed, 6, number]).integers(len(x), size=(2, count)))
        with torch.inference_mode():
            shown = pairs(x[index[0]], x[index[1]]).to(device)
            features = system.representation(shown, use_head=arm["layer"] == "post")
        return features.float().cpu().numpy(), y[index[0]].numpy(), y[index[1]].numpy()

    train, train_left, train_right = drawn(split.train, split.train_labels, PROBED, 0)
    test, left, right = drawn(split.test, split.test_labels, len(split.test), 1)
    return {
        "left": probe_right(train, train_left, test, left, C=0.1),
        "right": probe_right(train, train_right, test, right, C=0.1),
        "rank": effective_rank(test),
    }
