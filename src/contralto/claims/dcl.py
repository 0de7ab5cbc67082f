"""The claim of DCL: the positive in the denominator of NT-Xent scales every gradient by q, and q hurts where it is small.

    contralto reproduce dcl

The digits of scikit-learn in weak views (shifts of up to half a pixel, noise 0.05), encoder 64-256-128 with batch norm, head
128-128-32, tau 0.07, SGD with momentum 0.9, 600 steps, batches of 8 and 32, rates 0.01 and 0.05: the pilot's recipe.

What decides is certain to hold if the theory does: on a network that is being trained, grad L(NT-Xent) = q grad L(DCL) with
q = 1 - exp(-L(NT-Xent)) for every anchor and weight; q falls during a training with NT-Xent; and it is smaller for smaller
batches. Whether features get better, at equal steps and rates, is reported: by 5 nearest neighbours and by logistic regression,
both with ten labels per class, the mean over five draws of these labels.
"""

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from contralto.claims.digits import batches, digit_views, digits, features_of, few_labels, mlp_encoder, pretrain
from contralto.data.dataset import Batch
from contralto.evaluation.representation import knn_right, probe_right
from contralto.losses.decoupled import coupling
from contralto.losses.pairs import dcl, nt_xent
from contralto.systems.selfsup.dcl import DecoupledContrast

__all__ = ["Coupled", "identity_error", "run"]

NEIGHBOURS, LABELS, DRAWS = 5, 10, 5
ENDS = 30
"""Steps at the beginning and at the end over which q is averaged."""
ANCHORS = 4
"""Anchors whose gradients are looked at."""


class Coupled(DecoupledContrast):
    """The same network with NT-Xent; it looks at the identity at the first step, halfway, and at the last."""

    def step(self, batch: Batch) -> dict[str, Tensor]:
        """Loss of a batch, and the factor q."""
        views = self.checked(batch, 2)
        error = 0.0
        if self.done in (0, self.total_steps // 2, self.total_steps - 1):
            error = identity_error(self, views)
        features = self.encoder(torch.cat(views))
        each = nt_xent(*self.projector(features).chunk(2), temperature=self.temperature, reduction="none")
        told = {"coupling": coupling(each.detach()).mean(), "identity_error": torch.tensor(error)}
        return {"loss": each.mean(), "features": features[: len(views[0])].detach(), **told}


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
        `loss` ("nt_xent" or "dcl"), `batch_size`, `lr`; `sigma`; `steps` goes before the budget's.
    seed : int
    data : {"digits"}
    budget : mapping
        `steps`.
    device : str
    progress : function, optional

    Returns
    -------
    dict
        `knn` and `probe` (N,) per test digit; of trained arms `q_first` and `q_last`, means over the first and last 30 steps,
        and `q_fall`, their difference; for NT-Xent `identity_error`, the largest relative error of the identity.

    Examples
    --------
    >>> found = run({"loss": "nt_xent", "batch_size": 8, "lr": 0.05}, seed=100, data="digits", budget={"steps": 2})
    >>> found["identity_error"] < 1e-9
    True
    """
    split, steps = digits(seed), int(arm.get("steps", budget["steps"]))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = mlp_encoder()
    kind = Coupled if arm["loss"] == "nt_xent" else DecoupledContrast
    system = kind(
        encoder, num_features=128, seed=seed, epochs=steps, hidden=128, dim=32, temperature=0.07, lr=arm["lr"],
        weight_decay=0.0, batch_size=arm["batch_size"], sigma=arm.get("sigma"),
    )  # fmt: skip
    view = partial(digit_views, degrees=0.0, scale=0.0, shift=0.5, noise=0.05)
    make = batches(split, seed=seed, batch_size=system.batch_size, view=view)
    told = pretrain(system, make, device=device, log=True)
    if progress is not None:
        progress(0.9)
    found: dict[str, Any] = {}
    if told:
        q = np.array([t["coupling"] for t in told])
        found = {"q_first": q[:ENDS].mean(), "q_last": q[-ENDS:].mean()}
        found["q_fall"] = found["q_first"] - found["q_last"]
        if arm["loss"] == "nt_xent":
            found["identity_error"] = max(t["identity_error"] for t in told)
    train, test = features_of(system, split.train), features_of(system, split.test)
    labels, right = split.train_labels.numpy(), split.test_labels.numpy()
    knn, probe = [], []
    for draw in range(DRAWS):
        rows = few_labels(split.train_labels, LABELS, 1000 * seed + draw)
        knn.append(knn_right(train[rows], labels[rows], test, right, k=NEIGHBOURS, temperature=None))
        probe.append(probe_right(train[rows], labels[rows], test, right))
    return found | {"knn": np.mean(knn, 0), "probe": np.mean(probe, 0)}


def identity_error(system: DecoupledContrast, views: list[Tensor]) -> float:
    """Largest relative error, over some anchors, of ``L(DCL) = L + log q`` and ``grad L = q grad L(DCL)`` for all weights.

    Everything is computed by a copy of the system in double precision.
    """
    double = copy.deepcopy(system).double()
    z = double.projector(double.encoder(torch.cat(views).double())).chunk(2)
    coupled, decoupled = (loss(*z, temperature=system.temperature, reduction="none") for loss in (nt_xent, dcl))
    q = coupling(coupled.detach())
    weights = [p for p in double.parameters() if p.requires_grad]
    errors = [float(((decoupled - coupled - q.log()) / decoupled.abs().clamp_min(1)).abs().max().detach())]
    for i in np.linspace(0, len(coupled) - 1, ANCHORS).astype(int):
        ours = torch.autograd.grad(decoupled[i], weights, retain_graph=True)
        theirs = torch.autograd.grad(coupled[i], weights, retain_graph=True)
        whole = torch.stack([b.norm() for b in theirs]).norm()  # of weights before a batch norm, some gradients are 0
        errors += [float((q[i] * a - b).norm() / whole) for a, b in zip(ours, theirs, strict=True)]
    return max(errors)
