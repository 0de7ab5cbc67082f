"""The claims of GroCo: sorting uses the hardest negatives better than a softmax over them; and it is above SimCLR in neighbours.

    contralto reproduce groco

The digits of scikit-learn, 1,200 for training, 10 labels per class for evaluation, 597 for testing. Views: rotations by up to
20 degrees, sizes +- 20 %, shifts of up to a pixel, noise 0.1. Encoder 64-256-128 with batch norm, head 128-128-32, batch 128,
300 steps of Adam at 1e-3 with a cosine: the pilot's recipe, one network and the same views for all arms. Measures on the features
of the encoder: nearest neighbours (5, weighted by similarity) and a linear probe, both from the 100 labels.

The verdict is on *groco* against *hardest*, InfoNCE over the same hardest negatives with the same stopped gradient, at the
temperature of the authors' repository (0.5). Nothing was chosen here: other temperatures of both baselines are arms too.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from contralto.claims.digits import Split, batches, digit_views, digits, features_of, mlp_encoder, pretrain
from contralto.data.dataset import Batch
from contralto.encoders.heads import mlp
from contralto.evaluation.representation import knn_right, probe_right
from contralto.losses.contrast import contrast
from contralto.losses.pairs import nt_xent
from contralto.losses.sorting import groco
from contralto.systems.base import EncoderSystem

__all__ = ["LOSSES", "Learner", "hardest_info_nce", "labelled", "run"]

SHOTS, NEIGHBOURS = 10, 5


def hardest_info_nce(z: Tensor, *, hardest: int = 10, temperature: float = 0.5) -> Tensor:
    """InfoNCE with GroCo's positives and negatives: the hardest of the anchor's own view; gradient to the anchor only.

    Parameters
    ----------
    z : Tensor (2, B, D)
    hardest : int
    temperature : float

    Examples
    --------
    >>> hardest_info_nce(torch.randn(2, 8, 4, generator=torch.Generator().manual_seed(0)), hardest=3)
    tensor(2.5022)
    """
    unit = nn.functional.normalize(z, dim=2)
    n, other = z.shape[1], unit.detach()
    own = torch.arange(n, device=z.device)
    losses = []
    for anchor, same, positive in zip(unit, other, other.flip(0), strict=True):
        near = (anchor.detach() @ same.T).fill_diagonal_(-torch.inf).topk(hardest, dim=1).indices
        weights = torch.zeros(n, 2 * n, device=z.device).scatter(1, near + n, 1.0)
        keys = torch.cat([positive, same])
        losses.append(contrast(anchor, keys, positives=own, weights=weights, temperature=temperature, coupled=True))
    return torch.stack(losses).mean()


LOSSES: dict[str, Callable[..., Tensor]] = {
    "groco": groco,
    "hardest": hardest_info_nce,
    "simclr": lambda z, temperature: nt_xent(z[0], z[1], temperature=temperature),
}
"""Name -> loss of embeddings (2, B, D)."""


class Learner(EncoderSystem):
    """Two views, one head, any loss of `LOSSES`.

    Parameters
    ----------
    encoder, num_features, seed, epochs
        See `EncoderSystem`; every epoch is a step here.
    loss : str
    **options
        Of the loss.

    Examples
    --------
    >>> sorted(Learner(mlp_encoder((64, 16)), num_features=16, loss="simclr", temperature=0.5).LOSSES)
    ['groco', 'hardest', 'simclr']
    """

    LOSSES = LOSSES

    def __init__(
        self,
        encoder: nn.Module,
        *,
        num_features: int,
        seed: int = 0,
        epochs: int = 1,
        loss: str = "groco",
        **options: Any,
    ) -> None:
        super().__init__(
            encoder, num_features=num_features, seed=seed, epochs=epochs, optimizer="adam", lr=1e-3, weight_decay=0.0
        )
        self.loss, self.options = LOSSES[loss], options
        with self.seeded():
            self.projector = mlp([num_features, 128, 32], norm="batch")

    def step(self, batch: Batch) -> dict[str, Tensor]:
        """Loss of a batch of two views."""
        views = self.checked(batch, 2)
        features = self.encoder(torch.cat(views))
        z = self.projector(features).unflatten(0, (2, -1))
        return {"loss": self.loss(z, **self.options), "features": features[: len(views[0])].detach()}


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
        `loss` and its options; `steps` where they are not the budget's.
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
    >>> sorted(run({"loss": "groco"}, seed=100, data="digits", budget={"steps": 2, "batch_size": 16}))
    ['knn', 'labels', 'probe']
    """
    split = digits(seed)
    options = {k: v for k, v in arm.items() if k not in ("loss", "steps")}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = mlp_encoder()
    steps = int(arm.get("steps", budget["steps"]))
    system = Learner(encoder, num_features=128, seed=seed, epochs=steps, loss=arm["loss"], **options)
    pretrain(system, batches(split, seed=seed, batch_size=int(budget["batch_size"]), view=digit_views), device=device)
    if progress is not None:
        progress(0.9)
    return measured(system, split)


def measured(system: EncoderSystem, split: Split) -> dict[str, Any]:
    """Neighbours and probe on the features of a system, from ten labels per class."""
    known = labelled(split.train_labels, SHOTS)
    parts = (
        features_of(system, split.train[known]), split.train_labels[known].numpy(), features_of(system, split.test),
        split.test_labels.numpy(),
    )  # fmt: skip
    return {"knn": knn_right(*parts, k=NEIGHBOURS), "probe": probe_right(*parts), "labels": parts[3]}


def labelled(labels: Tensor, per_class: int) -> Tensor:
    """Rows of the first samples of every class.

    Examples
    --------
    >>> labelled(torch.tensor([0, 1, 0, 1, 0]), 2)
    tensor([0, 1, 2, 3])
    """
    rank = torch.zeros_like(labels)
    for c in labels.unique():
        rank[labels == c] = torch.arange(int((labels == c).sum()))
    return torch.nonzero(rank < per_class).squeeze(1)
