"""What the systems of category discovery share: some samples of some classes have labels, and all classes are looked for.

A labelled sample has a label in [0, num_classes), an old class; all others have -1, and are of old or new classes. Batches come
from a `HalfLabelledSampler`. All systems learn by the two losses of instances of the plain method (Vaze et al., Generalized
Category Discovery, CVPR 2022, arXiv 2201.02609), on a projection h of two views of each sample::

    (1 - w) NT-Xent(all)  +  w SupCon(labelled)

and at the end assign every sample to a prototype: those of the old classes come first.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from contralto.data.dataset import Batch
from contralto.distributed import reduce_over_ranks
from contralto.encoders.heads import dino_head
from contralto.encoders.image import learn_last_blocks
from contralto.errors import UsageError
from contralto.losses.pairs import nt_xent, sup_con
from contralto.neighbors.kmeans import KMeans, semi_supervised_kmeans
from contralto.neighbors.knn import unit_rows
from contralto.systems.base import EncoderSystem
from contralto.views.batched import BatchView

__all__ = ["Discovered", "DiscoverySystem", "class_clusters", "nearest_prototypes"]

Floats = npt.NDArray[np.floating[Any]]
Labels = npt.NDArray[np.int64]
TEMPERATURE = 0.1
"""Of the confidence where a system has none of its own."""


@dataclass(frozen=True)
class Discovered:
    """What was found.

    Attributes
    ----------
    assigned : array (N,) int64
        Class of every sample: below `num_classes` an old one, from there on a new one. Labelled samples are treated as others.
    confidence : array (N,)
        In [0, 1].
    prototypes : array (K, F)
        Unit rows in the space of the features; those of the old classes first.
    temperature : float
        Logits are ``cosine / temperature``.
    numbers : list of int
        K over the epochs, as far as it was looked for.
    """

    assigned: Labels
    confidence: npt.NDArray[np.float64]
    prototypes: npt.NDArray[np.float32]
    temperature: float
    numbers: list[int]


def nearest_prototypes(
    features: Floats, prototypes: Floats, *, temperature: float, rows: int = 8192
) -> tuple[Labels, npt.NDArray[np.float64]]:
    """The prototype of the largest cosine, and how sure that is; blocks of rows at a time.

    Parameters
    ----------
    features : array (N, F)
        Scaled to length one here.
    prototypes : array (K, F)
        Unit rows.
    temperature : float
    rows : int
        Of a block.

    Returns
    -------
    tuple of array (N,)
        Numbers of the prototypes, and the softmax of the cosines over the temperature there.

    Examples
    --------
    >>> best, sure = nearest_prototypes(np.eye(2), np.eye(2), temperature=0.5)
    >>> best.tolist(), sure.round(2).tolist()
    ([0, 1], [0.88, 0.88])
    """
    best, sure = np.empty(len(features), np.int64), np.empty(len(features))
    for start in range(0, len(features), rows):
        part = slice(start, start + rows)
        cosines = unit_rows(features[part]) @ prototypes.T
        best[part] = cosines.argmax(1)
        sure[part] = 1 / np.exp((cosines - cosines.max(1, keepdims=True)) / temperature).sum(1)
    return best, sure


def class_clusters(features: Floats, labels: Labels, count: int, *, seed: int, spherical: bool = False) -> KMeans:
    """k-means that knows some labels, with the cluster of class c at place c, also where other classes have no label.

    Parameters
    ----------
    features : array (N, F)
    labels : array (N,)
        Below `count`, -1 = unknown.
    count : int
        Clusters.
    seed, spherical
        See `semi_supervised_kmeans`.

    Examples
    --------
    >>> class_clusters(np.eye(3), np.array([2, -1, 0]), 3, seed=0).labels.tolist()
    [2, 1, 0]
    """
    given = np.asarray(labels)
    known = np.unique(given[given >= 0])
    found = semi_supervised_kmeans(features, given, count, seed=seed, spherical=spherical)
    place = np.concatenate([known, np.setdiff1d(np.arange(count), known)])  # clusters of known classes come first
    return replace(found, centroids=found.centroids[np.argsort(place)], labels=place[found.labels])


class DiscoverySystem(EncoderSystem):
    """Base of the systems that discover classes; by itself the plain method (GCD), which all others are compared with.

    It learns by the losses of instances alone, and clusters what it learnt by k-means that knows the labels.

    Parameters
    ----------
    encoder, **base
        See `EncoderSystem`. Tensors of one dimension take no weight decay.
    num_classes : int
        Old classes.
    num_new : int
        New classes.
    hidden, dim : int
        Widths of the projector.
    supervised_weight : float
        w above, in [0, 1].
    temperature_instance, temperature_supervised : float
        Of NT-Xent and of SupCon.
    crop : tuple of float
        Smallest and largest share of the picture that a view shows. The released code cuts squares of 7/8 of the side.
    colours : float
        Strength of the changes of colour. The papers name some, but those of the released code change nothing: 0.
    trained_blocks : int
        Of a vision transformer, let only so many last blocks learn, 1 in the papers; 0 = the whole encoder.

    Examples
    --------
    >>> system = DiscoverySystem(nn.Linear(8, 4), num_features=4, num_classes=2, hidden=8, dim=4)
    >>> views = [torch.randn(6, 8), torch.randn(6, 8)]
    >>> batch = {"views": views, "index": torch.arange(6), "label": torch.tensor([0, 1, 0, -1, -1, -1])}
    >>> sorted(system.step(batch))
    ['features', 'loss']
    """

    needs: ClassVar[tuple[str, ...]] = ("label",)
    spares_flat: ClassVar[bool] = True
    heard: Tensor

    def __init__(
        self,
        encoder: nn.Module,
        *,
        num_classes: int = 0,
        num_new: int = 0,
        epochs: int = 200,
        batch_size: int = 128,
        lr: float = 0.1,
        weight_decay: float = 5e-5,
        final_lr: float = 1e-4,
        hidden: int = 2048,
        dim: int = 256,
        supervised_weight: float = 0.35,
        temperature_instance: float = 1.0,
        temperature_supervised: float = 0.07,
        crop: tuple[float, float] = (0.766, 0.766),
        colours: float = 0.0,
        trained_blocks: int = 0,
        **base: Any,
    ) -> None:
        super().__init__(
            encoder, epochs=epochs, batch_size=batch_size, lr=lr, weight_decay=weight_decay, final_lr=final_lr, **base
        )
        if num_classes < 0 or num_new < 0:
            raise UsageError(f"num_classes and num_new must be at least 0, got {num_classes} and {num_new}")
        if not 0 <= supervised_weight <= 1:
            raise UsageError(f"supervised_weight must be in [0, 1], got {supervised_weight}")
        if min(temperature_instance, temperature_supervised) <= 0:
            raise UsageError("temperature_instance and temperature_supervised must be above 0")
        self.num_classes, self.num_new, self.supervised_weight = num_classes, num_new, supervised_weight
        self.temperature_instance, self.temperature_supervised = temperature_instance, temperature_supervised
        self.crop, self.colours = crop, colours
        if trained_blocks:
            learn_last_blocks(encoder, trained_blocks)
        self.register_buffer("heard", torch.tensor(-1))
        with self.seeded():
            self.projector = self.head(hidden, dim)

    def head(self, hidden: int, dim: int) -> nn.Module:
        """The projector: features to what the losses of instances compare."""
        return dino_head(self.num_features, hidden, dim)

    def views(
        self, size: int, mean: tuple[float, float, float], std: tuple[float, float, float]
    ) -> Sequence[BatchView]:
        """Two views of one kind: a crop, perhaps mirrored, with changed colours where asked for."""
        s = self.colours
        jitter, ratio = (0.4 * s, 0.4 * s, 0.4 * s, 0.1 * s), (1.0, 1.0) if self.crop[0] > 0.5 else (3 / 4, 4 / 3)
        return [BatchView(size, self.crop, ratio, jitter=jitter, interpolation="bicubic", mean=mean, std=std)] * 2

    @property
    def epoch(self) -> int:
        """The epoch of the next step."""
        return self.done // self.steps_per_epoch

    # What a step is made of.

    def labels(self, batch: Batch) -> Tensor:
        """The labels (B,) of a batch, after a look at them.

        Raises
        ------
        UsageError
            If a label is no old class.
        """
        labels: Tensor = batch["label"].long()
        if len(labels) and int(labels.max()) >= self.num_classes:
            raise UsageError(
                f"label {int(labels.max())} is no old class: labels are in [0, {self.num_classes}), -1 where there is none"
            )
        return labels

    def instance_loss(self, h1: Tensor, h2: Tensor, labels: Tensor) -> Tensor:
        """Losses of instances, over the samples of all processes.

        Parameters
        ----------
        h1, h2 : Tensor (B, D)
            Projections of the two views.
        labels : Tensor (B,)
            -1 = unlabelled.

        Returns
        -------
        Tensor ()
            ``(1 - w) L_con + w L_sup``; where nothing is labelled, the second is 0.
        """
        w = self.supervised_weight
        loss = (1 - w) * nt_xent(h1, h2, temperature=self.temperature_instance, gather="all")
        labelled = labels >= 0
        if int(reduce_over_ranks(labelled.sum())):
            own = torch.cat([h1[labelled], h2[labelled]])
            loss = loss + w * sup_con(
                own, labels[labelled].repeat(2), temperature=self.temperature_supervised, gather="all"
            )
        return loss

    def step(self, batch: Batch) -> dict[str, Tensor]:
        """Losses of instances of a batch of two views."""
        views, labels = self.checked(batch, 2), self.labels(batch)
        features = self.encoder(torch.cat(views))
        h1, h2 = self.projector(features).chunk(2)
        return {"loss": self.instance_loss(h1, h2, labels), "features": features[: len(labels)].detach()}

    # What is asked of all samples.

    def asks_features(self, epoch: int) -> bool:
        """Whether `at_epoch_start` is to be called before the first step of this epoch; False once it was, also on resume."""
        return False

    def at_epoch_start(self, features: Floats, labels: Labels) -> None:
        """Look at all samples: features (N, F) of the encoder in evaluation mode and labels (N,), -1 = none."""
        self.heard.fill_(self.epoch)

    def discover(self, features: Floats, labels: Labels) -> Discovered:
        """Which classes there are, and of which every sample is; after training. Here by k-means that knows the labels.

        Parameters
        ----------
        features : array (N, F)
            Of the encoder in evaluation mode, as it gives them.
        labels : array (N,)
            -1 = unlabelled.

        Returns
        -------
        Discovered
            Of the plain method: centres of length one, `num_classes + num_new` of them, those of classes with labels in their
            place.

        Raises
        ------
        UsageError
            If there are fewer samples than classes.
        """
        count = self.num_classes + self.num_new
        prototypes = class_clusters(features, labels, count, seed=self.seed, spherical=True).centroids
        best, confidence = nearest_prototypes(features, prototypes, temperature=TEMPERATURE)
        return Discovered(best, confidence, prototypes, TEMPERATURE, [count])
