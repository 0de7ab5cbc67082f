"""The claim of cMIM: of one trained model, the hidden activations of the decoder are the better representation, for nothing.

    contralto reproduce cmim

The digits of scikit-learn (8 x 8), 60 % for training, no augmentation; encoder 64-256-256, decoder d-256-256-64 with Bernoulli
pixels, Adam at 1e-3, batch 128, 2,000 steps: the pilot's recipe. A model is measured by its informative embedding ("h") or by the
mean of its code ("mu"), in arms that train the same model. Measures: nearest neighbours (5, cosine, equal votes), and logistic
regression on standardised features with five labels per class, the mean over ten draws of these labels; reconstruction in
nats per digit and mean cosine of the sampled codes of test digits.

Beside the primary claim (h against mu at d = 8) the pilot's secondary ones are reported: MIM and cMIM against a VAE with the same
budget, at batches of 128 and 8; and the contrast against A-MIM, where no difference is expected but in the cosine of codes.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from contralto.claims.digits import Split, batches, digits, pretrain, split_features
from contralto.evaluation.representation import knn_right, probe_right
from contralto.files import load_weights, save_weights
from contralto.systems.selfsup.cmim import CMIM

__all__ = ["run"]

TEST = 719
NEIGHBOURS, SHOTS, DRAWS = 5, 5, 10


def run(
    arm: Mapping[str, Any],
    *,
    seed: int,
    data: str,
    budget: Mapping[str, Any],
    device: str = "cpu",
    progress: Callable[[float], None] | None = None,
    work: Path | None = None,
) -> dict[str, Any]:
    """Train and measure one arm on one seed.

    Parameters
    ----------
    arm : mapping
        `mode`, `dim` and `use` of the system; `batch_size` and `steps` where they are not the budget's.
    seed : int
    data : {"digits"}
    budget : mapping
        `steps`, `batch_size`.
    device : str
    progress : function, optional
    work : path, optional
        Folder in which trained models are left for other arms: "h" and "mu" read the same one.

    Returns
    -------
    dict
        `knn` and `few_shot` (N,) per test digit, `labels`; `nll` in nats, `cosine` of codes.

    Examples
    --------
    >>> found = run({"mode": "cmim", "dim": 8, "use": "mean"}, seed=100, data="digits", budget={"steps": 2, "batch_size": 16})
    >>> sorted(found)
    ['cosine', 'few_shot', 'knn', 'labels', 'nll']
    """
    split = digits(seed, test=TEST)
    system = build(arm, seed, int(arm.get("steps", budget["steps"])), int(arm.get("batch_size", budget["batch_size"])))
    kept = (
        None
        if work is None
        else work / f"{system.mode}-{system.dim}-{system.batch_size}-{system.epochs}-{seed}.safetensors"
    )
    if kept is not None and kept.exists():
        load_weights(system, kept)
        system.eval().to(device)
    else:
        pretrain(
            system, batches(split, seed=seed, batch_size=system.batch_size, view=_as_it_is, views=1), device=device
        )
        if kept is not None:
            save_weights(system, kept)
    if progress is not None:
        progress(0.9)
    parts = split_features(system, split)
    draws = [probe_right(*parts, per_class=SHOTS, seed=1000 * seed + k) for k in range(DRAWS)]
    return {
        "knn": knn_right(*parts, k=NEIGHBOURS, temperature=None),
        "few_shot": np.mean(draws, 0),
        "labels": parts[3],
        **_codes(system, split),
    }


def build(arm: Mapping[str, Any], seed: int, steps: int, batch_size: int) -> CMIM:
    """The model of an arm, not yet trained; a function of the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 256), nn.GELU())
    return CMIM(
        encoder, num_features=256, dim=arm["dim"], hidden=256, vector=64, mode=arm["mode"], use=arm["use"], seed=seed,
        epochs=steps, batch_size=batch_size,
    )  # fmt: skip


@torch.inference_mode()
def _codes(system: CMIM, split: Split) -> dict[str, npt.NDArray[Any] | float]:
    """Reconstruction and mean cosine of the sampled codes of all test digits."""
    x = split.test.to(system.steps.device)
    told = system.step({"views": [x], "index": torch.arange(len(x))})
    return {"nll": float(told["nll"]), "cosine": float(told["cosine"])}


def _as_it_is(x: Tensor, generator: torch.Generator) -> Tensor:
    return x
