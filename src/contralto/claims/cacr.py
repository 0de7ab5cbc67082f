"""The claim of CACR: weighing far positives and close negatives more beats weighing all alike, on classes of unequal size.

    contralto reproduce cacr

The digits of scikit-learn, 11, 22, ..., 110 training images of a class in an order drawn by the seed, three views of each with
rotations, scalings, shifts and noise, encoder 64-256-128 with batch norm, head 128-128-32 without, batch 64, 300 Adam steps at
1e-3: the pilot's recipe. Arms: CACR at two inverse temperatures; with uniform weights for both sides or either, and with weights
that carry no gradient; NT-Xent and decoupled contrast over the three pairs of views. All see the same views.

What decides is 10 nearest neighbours with all training labels: CACR (tau_neg 0.9, the default) against uniform weights, by at
least a point. A class-balanced logistic probe (mean recall), and CACR against the other losses, are reported.
"""

from collections.abc import Callable, Mapping
from itertools import combinations
from typing import Any, Literal

import torch
from torch import Tensor, nn

from contralto.claims.digits import batches, digit_views, digits, mlp_encoder, pretrain, split_features, thinned
from contralto.data.dataset import Batch
from contralto.encoders.heads import mlp
from contralto.evaluation.representation import knn_right, probe_right
from contralto.losses.pairs import dcl, nt_xent
from contralto.systems.base import EncoderSystem
from contralto.systems.selfsup.cacr import CACR

__all__ = ["PairsOfViews", "build", "run"]

SIZES = [11 * (k + 1) for k in range(10)]
VIEWS, NEIGHBOURS = 3, 10


class PairsOfViews(EncoderSystem):
    """NT-Xent or decoupled contrast, averaged over all pairs of views: what CACR is compared with.

    Parameters
    ----------
    encoder, num_features, ..., weight_decay
        See `EncoderSystem`.
    loss : {"nt_xent", "dcl"}
    temperature : float

    Attributes
    ----------
    projector : nn.Module
        To be set.
    """

    def __init__(
        self,
        encoder: nn.Module,
        *,
        loss: Literal["nt_xent", "dcl"],
        temperature: float,
        **arguments: Any,
    ) -> None:
        super().__init__(encoder, **arguments)
        self.pairwise: Callable[..., Tensor] = {"nt_xent": nt_xent, "dcl": dcl}[loss]
        self.temperature = temperature
        self.projector: nn.Module = nn.Identity()

    def step(self, batch: Batch) -> dict[str, Tensor]:
        """Loss of a batch of views."""
        views = self.checked(batch)
        features = self.encoder(torch.cat(views))
        z = self.projector(features).chunk(len(views))
        losses = [self.pairwise(a, b, temperature=self.temperature) for a, b in combinations(z, 2)]
        return {"loss": torch.stack(losses).mean(), "features": features[: len(views[0])].detach()}


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
        `loss` ("cacr", "nt_xent" or "dcl") and arguments of the system; `steps` goes before the budget's.
    seed : int
    data : {"digits"}
    budget : mapping
        `steps`, `batch_size`.
    device : str
    progress : function, optional

    Returns
    -------
    dict
        `knn` and `probe` (N,) per test digit, `labels`.

    Examples
    --------
    >>> found = run({"loss": "cacr", "tau_neg": 2.0}, seed=100, data="digits", budget={"steps": 2, "batch_size": 16})
    >>> sorted(found)
    ['knn', 'labels', 'probe']
    """
    split = thinned(digits(seed), SIZES, seed)
    system = build(arm, seed, int(arm.get("steps", budget["steps"])), int(budget["batch_size"]))
    make = batches(split, seed=seed, batch_size=system.batch_size, view=digit_views, views=VIEWS)
    pretrain(system, make, device=device)
    if progress is not None:
        progress(0.9)
    parts = split_features(system, split)
    return {
        "knn": knn_right(*parts, k=NEIGHBOURS, temperature=None),
        "probe": probe_right(*parts),
        "labels": parts[3],
    }


def build(arm: Mapping[str, Any], seed: int, steps: int, batch_size: int) -> EncoderSystem:
    """The system of an arm, not yet trained: encoder and head are the same in all arms of a seed."""
    given = {k: v for k, v in arm.items() if k not in ("loss", "steps")}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder, head = mlp_encoder(), mlp([128, 128, 32])
    common: dict[str, Any] = {
        "num_features": 128, "seed": seed, "epochs": steps, "batch_size": batch_size, "optimizer": "adam", "lr": 1e-3,
        "weight_decay": 0.0,
    }  # fmt: skip
    system: EncoderSystem
    if arm["loss"] == "cacr":
        system = CACR(encoder, num_views=VIEWS, hidden=128, dim=32, **common, **given)
    else:
        system = PairsOfViews(encoder, loss=arm["loss"], **common, **given)
    system.projector = head
    return system
