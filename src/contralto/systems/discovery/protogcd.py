"""ProtoGCD: one bank of learnt prototypes for old and new classes, which teaches itself what it is sure of.

Every class is a prototype; the scores of a sample are its cosines to them. Labelled samples say which prototype is whose. All
samples get pseudo-labels from the sharpened prediction for their other view: soft ones, of which a growing share becomes one-hot,
the surest first. That the predictions of a batch must be spread over all classes keeps old ones from swallowing the new, and the
prototypes are pushed apart.

ProtoGCD: Unified and Unbiased Prototype Learning for Generalized Category Discovery, Ma et al., TPAMI 2025, arXiv 2504.03755. The
released code takes the epoch with the best accuracy on the unlabelled samples, for which it needs their labels; here the last one
is taken. The defaults here are those of its published commands. How the paper finds the number of classes is not in its code:
`contralto.systems.discovery.numbers` does it in a way of its own, approximately.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from contralto.data.dataset import Batch
from contralto.distributed import mean_weight
from contralto.errors import UsageError
from contralto.losses.discovery import (
    adaptive_labels,
    entropy_gap,
    linear_ramp,
    prototype_separation,
    swapped_labels,
)
from contralto.neighbors.directions import principal_rows
from contralto.neighbors.knn import unit_rows
from contralto.prototypes.bank import means
from contralto.prototypes.layer import CosineLayer
from contralto.systems.discovery.base import (
    Discovered,
    DiscoverySystem,
    Floats,
    Labels,
    class_clusters,
    nearest_prototypes,
)

DIRECTIONS = 64
"""Principal directions in which first clusters are found: in a thousand, single samples are clusters of their own."""

__all__ = ["ProtoGCD"]


class ProtoGCD(DiscoverySystem):
    """Discovery by prototypes of old and new classes alike.

    Parameters
    ----------
    encoder, **base
        See `DiscoverySystem`; `num_classes` old and `num_new` new classes have a prototype each.
    temperature : float
        Of the predictions.
    teacher_temperature : float
        Of the soft pseudo-labels.
    teacher_start, teacher_epochs : float, int
        The variant of the released code: the temperature of the pseudo-labels goes from `teacher_start` to `teacher_temperature`
        over so many epochs; 0 epochs = it stays.
    ratio_start, ratio_end : float
        Share of the batch with one-hot pseudo-labels, at the start and the end of the ramp.
    ramp_epochs, wait_epochs : int
        Epochs of the ramp (default: half of `epochs`, 100 of 200 in the paper), and those before it, in which all
        pseudo-labels are soft.
    entropy, separation : float
        Weights of the balance of the classes and of the distance of the prototypes; where classes are alike the paper takes 0.05
        for the latter.
    init_prototypes : {"random", "means", "clusters"}
        "means": prototypes of old classes begin as the mean of the labelled samples' unit features. "clusters", beyond the paper,
        for features that tell something from the start: all begin as the centres of k-means that keeps labelled samples in
        their class. The job that trains must then give all features before the first epoch (`asks_features`).

    Notes ----- Samples of none of the classes: `contralto.evaluation.openset.outlier_scores` of the cosines to the prototypes,
    with `temperature`.

    Examples
    --------
    >>> system = ProtoGCD(nn.Linear(8, 4), num_features=4, num_classes=2, num_new=3, hidden=8, dim=4)
    >>> views = [torch.randn(6, 8), torch.randn(6, 8)]
    >>> batch = {"views": views, "index": torch.arange(6), "label": torch.tensor([0, 1, 0, -1, -1, -1])}
    >>> sorted(system.step(batch))
    ['entropy', 'features', 'hard', 'instance', 'loss', 'pseudo', 'separation', 'supervised']
    >>> system.discover(torch.eye(4).numpy(), -torch.ones(4).long().numpy()).prototypes.shape
    (5, 4)
    """

    def __init__(
        self,
        encoder: nn.Module,
        *,
        temperature: float = 0.1,
        teacher_temperature: float = 0.05,
        teacher_start: float = 0.07,
        teacher_epochs: int = 0,
        ratio_start: float = 0.0,
        ratio_end: float = 1.0,
        ramp_epochs: int | None = None,
        wait_epochs: int = 0,
        entropy: float = 2.0,
        separation: float = 0.1,
        init_prototypes: Literal["random", "means", "clusters"] = "random",
        **base: Any,
    ) -> None:
        super().__init__(encoder, **base)
        if self.num_classes + self.num_new < 2:
            raise UsageError(
                f"there must be two classes at least, old and new together: num_classes is {self.num_classes}, "
                f"num_new {self.num_new}"
            )
        if min(temperature, teacher_temperature, teacher_start) <= 0:
            raise UsageError("temperature, teacher_temperature and teacher_start must be above 0")
        if not 0 <= ratio_start <= 1 or not 0 <= ratio_end <= 1:
            raise UsageError(f"ratio_start and ratio_end must be in [0, 1], got {ratio_start} and {ratio_end}")
        ramp_epochs = self.epochs // 2 if ramp_epochs is None else ramp_epochs
        if min(teacher_epochs, ramp_epochs, wait_epochs) < 0:
            raise UsageError("teacher_epochs, ramp_epochs and wait_epochs must be at least 0")
        if init_prototypes not in ("random", "means", "clusters"):
            raise UsageError(f'init_prototypes must be "random", "means" or "clusters", got {init_prototypes!r}')
        self.temperature, self.teacher_temperature = temperature, teacher_temperature
        self.teacher_start, self.teacher_epochs = teacher_start, teacher_epochs
        self.ratio_start, self.ratio_end = ratio_start, ratio_end
        self.ramp_epochs, self.wait_epochs = ramp_epochs, wait_epochs
        self.entropy, self.separation, self.init_prototypes = entropy, separation, init_prototypes
        with self.seeded():
            self.prototypes = CosineLayer(self.num_features, self.num_classes + self.num_new)

    # What goes with the epochs.

    @property
    def ratio(self) -> float:
        """Share of a batch with one-hot pseudo-labels, now."""
        return linear_ramp(self.epoch, self.ratio_start, self.ratio_end, length=self.ramp_epochs, wait=self.wait_epochs)

    @property
    def sharpness(self) -> float:
        """Temperature of the soft pseudo-labels, now."""
        return linear_ramp(self.epoch, self.teacher_start, self.teacher_temperature, length=self.teacher_epochs)

    # A step.

    def step(self, batch: Batch) -> dict[str, Tensor]:
        """Losses of a batch of two views; `hard` is the share of one-hot pseudo-labels."""
        views, labels = self.checked(batch, 2), self.labels(batch)
        features = self.encoder(torch.cat(views))
        scores = self.prototypes(features)  # (2B, K): of unit features, with gradient to the encoder
        h1, h2 = self.projector(features).chunk(2)  # of the features as they are
        by_view = scores.unflatten(0, (2, -1))
        targets, hard = adaptive_labels(by_view, ratio=self.ratio, temperature=self.sharpness, gather="all")
        pseudo = swapped_labels(by_view, targets, temperature=self.temperature, gather="all")
        balance = entropy_gap(scores, temperature=self.temperature, gather="all")
        apart = prototype_separation(self.prototypes.weight, temperature=self.temperature)
        supervised = self.supervised_loss(scores, labels.repeat(2))
        instance = self.instance_loss(h1, h2, labels)
        w = self.supervised_weight
        unsupervised = pseudo + self.entropy * balance + self.separation * apart
        return {
            "loss": (1 - w) * unsupervised + w * supervised + instance, "features": features[: len(labels)].detach(),
            "pseudo": pseudo, "entropy": balance, "separation": apart, "supervised": supervised, "instance": instance,
            "hard": hard.float().mean(),
        }  # fmt: skip

    def supervised_loss(self, scores: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of the labelled rows: class c is prototype c. 0 where nothing is labelled."""
        labelled = labels >= 0
        logits = scores[labelled].to(torch.promote_types(scores.dtype, torch.float32)) / self.temperature
        total = F.cross_entropy(logits, labels[labelled], reduction="sum")
        return total / labelled.sum().clamp_min(1) * mean_weight(labelled.sum())

    # What is asked of all samples.

    def asks_features(self, epoch: int) -> bool:
        """Once, before the first epoch, where prototypes begin as means."""
        return self.init_prototypes != "random" and epoch == 0 and int(self.heard) < 0

    @torch.no_grad()
    def at_epoch_start(self, features: Floats, labels: Labels) -> None:
        """Where asked for, put prototypes of old classes to the means of their labelled samples, or all to centres."""
        super().at_epoch_start(features, labels)
        if self.init_prototypes == "random":
            return
        number = self.num_classes
        if self.init_prototypes == "clusters":
            number = min(len(self.prototypes.weight), number + int((labels < 0).sum()))
            labels = class_clusters(principal_rows(features, DIRECTIONS), labels, number, seed=self.seed).labels
        weight = self.prototypes.weight[:number]
        rows = torch.from_numpy(unit_rows(features)).to(weight)
        weight.copy_(means(rows, torch.from_numpy(labels).to(weight.device), number, before=weight))

    def discover(self, features: Floats, labels: Labels) -> Discovered:
        """Every sample goes to the prototype of the largest cosine; the labels are not asked."""
        prototypes = self.prototypes.unit().detach().float().cpu().numpy()
        best, confidence = nearest_prototypes(features, prototypes, temperature=self.temperature)
        return Discovered(best, confidence, prototypes, self.temperature, [len(prototypes)])
