"""Multistage contrastive learning: each stage is asked to tell apart what the stages before found alike.

Contrast learns the easiest thing that tells samples apart and then has no reason to learn another. So the samples are
clustered by what one stage has learnt, a new encoder is trained on batches that hold one cluster each, where the learnt
features are nearly constant and cannot help, and so on; what is used in the end is the features of all stages side by side.

Learning the Unlearned: Mitigating Feature Suppression in Contrastive Learning, Zhang, Li, Li et al., ECCV 2024,
arXiv 2402.11816. The official code has the arm for CLIP only; the one for SimCLR follows the paper. Where they leave a choice:

- Every stage of the unimodal form starts from a new network, drawn from another seed (`init`: "fresh"); those of the CLIP form
  from the pretrained weights ("base"); "previous" goes on with the last stage.
- In the code every rank draws a permutation of its own, so that a sample may come twice in a batch; here they share one.
- Short batches are dropped as there, or kept whole (`smallest`), and never filled from another cluster.
- Stages after the first have as many steps as it, however few samples are left in full batches.
"""

import copy
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from contralto.data.dataset import Batch
from contralto.distributed import gather_with_gradient
from contralto.encoders.image import freeze
from contralto.errors import UsageError
from contralto.files import naming, save_array, write_json
from contralto.losses.pairs import clip
from contralto.neighbors.kmeans import kmeans
from contralto.neighbors.knn import unit_rows
from contralto.systems.base import EncoderSystem, Optimizer
from contralto.systems.selfsup.wrapped import Base, Wrapped

__all__ = [
    "DualStage",
    "DualStages",
    "Init",
    "MultiStage",
    "Stage",
    "extend_codes",
    "first_weights",
    "integrate",
    "pool_report",
    "stage_seed",
    "train_in_stages",
    "zero_shot",
]

Integers = npt.NDArray[np.int64]
Init = Literal["fresh", "base", "previous"]
Learnt = TypeVar("Learnt")


class MultiStage(Wrapped):
    """The learner of one stage; `train_in_stages` is the method, and `contralto fit mcl_multistage` the job.

    Parameters
    ----------
    encoder, num_features, ..., warmup_epochs
        See `EncoderSystem`; epochs are those of one stage.
    base : {"simclr", "moco", "byol"}
        Whose loss every stage has.
    hidden, dim, temperature, queue_size, decay
        Of the base, see `Wrapped`.
    stages : int
        Encoders in all.
    clusters : int
        Of every stage, K; codes of K^s clusters are told apart in stage s.
    init : {"fresh", "base", "previous"}
        Weights that a stage starts with: new ones, those of the first stage before its training, or of the stage before.
    smallest : int, optional
        Smallest batch that is taken from what is left of a cluster; default: full batches only.
    unit_stages : bool
        Scale the features of every stage to length one before they are put side by side.
    cluster_on : {"features", "projections"}
        What is clustered.
    stage : int
        Number of this stage; the encoders of so many stages before are part of the module, copies of `encoder` at first.

    Attributes
    ----------
    earlier : nn.ModuleList
        Encoders of the stages before. They learn nothing; with them, what the last stage learnt is the whole.

    Examples
    --------
    >>> system = MultiStage(nn.Linear(8, 4), num_features=4, hidden=8, dim=4)
    >>> batch = {"views": [torch.randn(6, 8), torch.randn(6, 8)], "index": torch.arange(6)}
    >>> sorted(system.step(batch))
    ['features', 'loss']
    """

    def __init__(
        self,
        encoder: nn.Module,
        *,
        num_features: int,
        num_samples: int = 0,
        steps_per_epoch: int = 1,
        seed: int = 0,
        epochs: int = 100,
        batch_size: int = 256,
        optimizer: Optimizer = "lars",
        lr: float = 0.3,
        weight_decay: float = 1e-6,
        momentum: float = 0.9,
        warmup_epochs: float = 10,
        base: Base = "simclr",
        hidden: int = 2048,
        dim: int = 128,
        temperature: float = 0.5,
        queue_size: int = 65536,
        decay: float = 0.999,
        stages: int = 3,
        clusters: int = 10,
        init: Init = "fresh",
        smallest: int | None = None,
        unit_stages: bool = False,
        cluster_on: Literal["features", "projections"] = "features",
        stage: int = 0,
    ) -> None:
        super().__init__(
            encoder, num_features=num_features, num_samples=num_samples, steps_per_epoch=steps_per_epoch, seed=seed,
            epochs=epochs, batch_size=batch_size, optimizer=optimizer, lr=lr, weight_decay=weight_decay, momentum=momentum,
            warmup_epochs=warmup_epochs, base=base, hidden=hidden, dim=dim, temperature=temperature,
            queue_size=queue_size, decay=decay,
        )  # fmt: skip
        check_stages(stages, clusters, init)
        if not 0 <= stage < stages:
            raise UsageError(f"stage must be from 0 to {stages - 1}, got {stage}")
        if cluster_on not in ("features", "projections"):
            raise UsageError(f"cluster_on must be features or projections, got {cluster_on!r}")
        self.stages, self.clusters, self.init, self.smallest = stages, clusters, init, smallest
        self.unit_stages, self.cluster_on, self.stage = unit_stages, cluster_on, stage
        self.earlier = nn.ModuleList(copy.deepcopy(encoder) for _ in range(stage))
        freeze(self.earlier)

    def embed(self, x: Tensor) -> Tensor:
        """The features of all stages so far, side by side (N, stages * F)."""
        parts = [encoder(x) for encoder in self.earlier]
        return integrate([*parts, self.learner.embed(x)], unit_stages=self.unit_stages)

    def to_cluster(self) -> nn.Module:
        """What gives the rows by which samples are clustered: the encoder of this stage alone, or with its projector."""
        if self.cluster_on == "features":
            return nn.Sequential(self.encoder)
        assert isinstance(self.learner.projector, nn.Module)
        return nn.Sequential(self.encoder, self.learner.projector)


class DualStage(EncoderSystem):
    """One stage of the CLIP form: image and text find each other in the batch, at a constant rate after a warm-up.

    Its two `views` are an image and a text as `encode_image` and `encode_text` take them. The factor of the cosines is learnt
    as a logarithm in [0, ln 100]; it is the `logit_scale` of the dual encoder, if it has one.

    Parameters
    ----------
    encoder : nn.Module
        Dual encoder with `encode_image` and `encode_text`, whose parameters that must not learn require no gradient.
    num_features : int
        Width of the joint space.
    num_samples, steps_per_epoch, seed, epochs, batch_size, optimizer, lr, weight_decay
        See `EncoderSystem`.
    warmup : int
        Steps.

    Examples
    --------
    >>> class Dual(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.encode_image, self.encode_text = nn.Linear(8, 4), nn.Linear(6, 4)
    >>> stage = DualStage(Dual(), num_features=4)
    >>> sorted(stage.step({"views": [torch.randn(5, 8), torch.randn(5, 6)], "index": torch.arange(5)}))
    ['features', 'loss', 'scale']
    """

    def __init__(
        self,
        encoder: nn.Module,
        *,
        num_features: int,
        num_samples: int = 0,
        steps_per_epoch: int = 1,
        seed: int = 0,
        epochs: int = 20,
        batch_size: int = 1000,
        optimizer: Optimizer = "adamw",
        lr: float = 5e-4,
        weight_decay: float = 0.2,
        warmup: int = 600,
    ) -> None:
        super().__init__(
            encoder, num_features=num_features, num_samples=num_samples, steps_per_epoch=steps_per_epoch, seed=seed,
            epochs=epochs, batch_size=batch_size, optimizer=optimizer, lr=lr, weight_decay=weight_decay,
            warmup_epochs=warmup / steps_per_epoch, final_lr=lr,
        )  # fmt: skip
        given = getattr(encoder, "logit_scale", None)
        self.own_scale = None if isinstance(given, nn.Parameter) else nn.Parameter(torch.tensor(1 / 0.07).log())

    @property
    def log_scale(self) -> Tensor:
        """Logarithm of the factor of the cosines."""
        scale = self.encoder.logit_scale if self.own_scale is None else self.own_scale
        assert isinstance(scale, Tensor)
        return scale

    def step(self, batch: Batch) -> dict[str, Tensor]:
        """Half the sum of both directions, over the pairs of all ranks."""
        images, texts = self.checked(batch, 2)
        encoder: Any = self.encoder
        image, text = encoder.encode_image(images), encoder.encode_text(texts)
        scale = self.log_scale.exp()
        loss = clip(gather_with_gradient(image), gather_with_gradient(text), temperature=1 / scale)
        return {"loss": loss, "features": image.detach(), "scale": scale.detach()}

    def at_step_end(self) -> None:
        """Keep the logarithm of the scale in its range."""
        with torch.no_grad():
            self.log_scale.clamp_(0, math.log(100))
        super().at_step_end()

    def embed(self, x: Tensor) -> Tensor:
        """Raw image embeddings (N, D)."""
        encoder: Any = self.encoder
        embeddings: Tensor = encoder.encode_image(x)
        return embeddings


class DualStages(nn.Module):
    """Dual encoders of several stages as one.

    Parameters
    ----------
    encoders : sequence of nn.Module
        With `encode_image` and `encode_text`.

    Examples
    --------
    >>> class Dual(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.encode_image, self.encode_text = nn.Linear(8, 4), nn.Linear(6, 4)
    >>> dual = DualStages([Dual(), Dual()])
    >>> dual.encode_image(torch.randn(5, 8)).shape, dual.zero_shot(torch.randn(5, 8), torch.randn(3, 6)).shape
    (torch.Size([5, 8]), torch.Size([5, 3]))
    """

    def __init__(self, encoders: Sequence[nn.Module]) -> None:
        super().__init__()
        self.encoders = nn.ModuleList(encoders)

    def encode_image(self, images: Tensor) -> Tensor:
        """Raw embeddings of all stages side by side (N, sum of D_s)."""
        parts: list[Any] = list(self.encoders)
        return integrate([e.encode_image(images) for e in parts])

    def encode_text(self, texts: Tensor) -> Tensor:
        """Raw embeddings of all stages side by side (N, sum of D_s)."""
        parts: list[Any] = list(self.encoders)
        return integrate([e.encode_text(texts) for e in parts])

    def zero_shot(self, images: Tensor, texts: Tensor, *, scale: float = 100.0) -> Tensor:
        """Probabilities (N, C) of the texts for every image, see `zero_shot`."""
        return zero_shot([self.encode_image(images)], [self.encode_text(texts)], scale=scale)


def check_stages(stages: int, clusters: int, init: str = "fresh") -> None:
    """Whether there can be such stages.

    Raises
    ------
    UsageError
        If not, or if codes would not fit into 64 bits.
    """
    if stages < 1 or clusters < 2:
        raise UsageError(f"stages must be at least 1 and clusters at least 2, got {stages} and {clusters}")
    if clusters ** (stages - 1) >= 2**62:
        raise UsageError(f"{clusters} clusters in {stages} stages give more codes than a 64-bit integer has values")
    if init not in ("fresh", "base", "previous"):
        raise UsageError(f"init must be fresh, base or previous; got {init!r}")


def extend_codes(codes: npt.ArrayLike | None, labels: npt.ArrayLike, clusters: int) -> Integers:
    """Pseudo labels after one more stage: ``code * K + label``, so that the first stage is the highest digit.

    Two samples with the same code were found alike by every stage so far.

    Parameters
    ----------
    codes : (N,) integers, optional
        After the stages before; None for the first.
    labels : (N,) integers
        Clusters of this stage, in [0, K).
    clusters : int
        K.

    Examples
    --------
    >>> first = extend_codes(None, [2, 0, 1], clusters=4)
    >>> extend_codes(first, [1, 3, 0], clusters=4).tolist()
    [9, 3, 4]
    """
    new = np.asarray(labels, np.int64)
    if len(new) and not 0 <= new.min() <= new.max() < clusters:
        raise UsageError(f"labels must be in [0, {clusters}), got {new.min()} to {new.max()}")
    if codes is None:
        return new
    old = np.asarray(codes, np.int64)
    if old.shape != new.shape:
        raise UsageError(f"codes and labels must be of one shape, got {old.shape} and {new.shape}")
    if len(old) and old.max() > (2**63 - 1 - clusters) // clusters:
        raise UsageError(f"codes up to {old.max()} times {clusters} clusters do not fit into a 64-bit integer")
    return np.asarray(old * clusters + new)


def pool_report(codes: npt.ArrayLike, batch_size: int, embeddings: npt.ArrayLike | None = None) -> dict[str, float]:
    """What the next stage has to draw its batches from.

    Parameters
    ----------
    codes : (N,) integers
    batch_size : int
        Over all ranks.
    embeddings : (N, D), optional
        By the stage before; scaled to length one here.

    Returns
    -------
    dict
        `codes`: how many there are; `full_codes`: with at least one batch; `covered`: share of the samples in full batches of
        one pass; and of the embeddings, `cosine`: mean over any two samples; `cosine_within`: over two of a full batch, if there
        is one, which should be higher.

    Examples
    --------
    >>> report = pool_report([0, 0, 1, 1, 1, 2], 2, np.eye(3)[[0, 0, 1, 1, 1, 2]])
    >>> {k: round(v, 2) for k, v in report.items()}
    {'codes': 3, 'full_codes': 2, 'covered': 0.67, 'cosine_within': 1.0, 'cosine': 0.27}
    """
    _, kind, size = np.unique(np.asarray(codes), return_inverse=True, return_counts=True)
    batches = size // batch_size
    report: dict[str, float] = {
        "codes": len(size),
        "full_codes": int((batches > 0).sum()),
        "covered": float(batches.sum() * batch_size / size.sum()),
    }
    if embeddings is not None:
        unit = unit_rows(embeddings).astype(np.float64)
        sums = np.zeros((len(size), unit.shape[1]))
        np.add.at(sums, kind, unit)
        within = ((sums**2).sum(1) - size) / np.maximum(size * (size - 1), 1)  # over ordered pairs of two samples
        some = (batches > 0) & (size > 1)
        if some.any():
            report["cosine_within"] = float(np.average(within[some], weights=batches[some]))
        n = len(unit)
        report["cosine"] = float(((unit.sum(0) ** 2).sum() - n) / max(n * (n - 1), 1))
    return report


def integrate(parts: Sequence[Tensor], *, unit_stages: bool = False, normalize: bool = False) -> Tensor:
    """The embeddings of all stages side by side.

    Parameters
    ----------
    parts : sequence of Tensor (N, D_s)
        Of every stage, in their order, as they come out of the encoders.
    unit_stages : bool
        Scale those of each stage to length one first: every stage has the same say.
    normalize : bool
        Scale the long rows to length one, once.

    Returns
    -------
    Tensor (N, sum of D_s)

    Examples
    --------
    >>> integrate([torch.tensor([[3.0]]), torch.tensor([[0.0, 4.0]])], normalize=True)
    tensor([[0.6000, 0.0000, 0.8000]])
    """
    if not parts:
        raise UsageError("there must be the embeddings of at least one stage")
    rows = torch.cat([F.normalize(p, dim=1) if unit_stages else p for p in parts], 1)
    return F.normalize(rows, dim=1) if normalize else rows


def zero_shot(images: Sequence[Tensor], texts: Sequence[Tensor], *, scale: float = 100.0) -> Tensor:
    """Probabilities (N, C) of texts for images by dual encoders of several stages: raw embeddings side by side, scaled once.

    Parameters
    ----------
    images : sequence of Tensor (N, D_s)
        Of every stage, not normalised.
    texts : sequence of Tensor (C, D_s)
        Likewise.
    scale : float
        Of the cosines.

    Examples
    --------
    >>> zero_shot([torch.eye(2)], [torch.eye(2)], scale=1.0)
    tensor([[0.7311, 0.2689],
            [0.2689, 0.7311]])
    """
    cosine = integrate(images, normalize=True) @ integrate(texts, normalize=True).T
    return (scale * cosine).softmax(1)


def stage_seed(seed: int, stage: int) -> int:
    """Seed of a stage; that of the first is `seed` itself.

    Examples
    --------
    >>> stage_seed(3, 0), stage_seed(3, 1) != stage_seed(3, 2)
    (3, True)
    """
    return seed if stage == 0 else int(np.random.default_rng([seed, stage]).integers(2**31))


def first_weights(fresh: Callable[[int], nn.Module], trained: Sequence[nn.Module], init: Init, seed: int) -> nn.Module:
    """The network that the next stage starts with.

    Parameters
    ----------
    fresh : function
        Seed -> new network.
    trained : sequence of nn.Module
        Of the stages before.
    init : {"fresh", "base", "previous"}
    seed : int
        Of the whole training.

    Examples
    --------
    >>> first_weights(lambda seed: nn.Linear(seed, 1), [nn.Linear(3, 1)], "base", seed=7)
    Linear(in_features=7, out_features=1, bias=True)
    """
    stage = len(trained)
    if init == "previous" and stage:
        return copy.deepcopy(trained[-1])
    return fresh(stage_seed(seed, stage if init == "fresh" else 0))


@dataclass(frozen=True)
class Stage(Generic[Learnt]):
    """What one stage gave.

    Attributes
    ----------
    learnt
        What `train` returned.
    codes : (N,) integers, optional
        From which its batches were taken; None for the first.
    report : dict
        `pool_report` of these codes; empty for the first.
    """

    learnt: Learnt
    codes: Integers | None
    report: dict[str, float]


def train_in_stages(
    train: Callable[[int, Integers | None, list[Learnt]], Learnt],
    embed: Callable[[Learnt], npt.ArrayLike],
    *,
    stages: int,
    clusters: int,
    batch_size: int,
    seed: int = 0,
    keep: Path | None = None,
) -> list[Stage[Learnt]]:
    """The method, for any learner: train, embed all samples, cluster, and train on batches of one code each.

    Parameters
    ----------
    train : function
        ``(stage, codes, learnt) -> learner``: trains the learner of a stage; with `codes` (N,), on batches of one code each, as
        `contralto.data.grouped.GroupBatchSampler` makes them. `learnt` are those of the stages before.
    embed : function
        Learner -> embeddings (N, D) of all training samples, in evaluation mode and without augmentation.
    stages, clusters : int
    batch_size : int
        Of all ranks, for the report.
    seed : int
        Of the clusters.
    keep : Path, optional
        A folder of this training alone: codes are kept in it, and read where they are there, so that an interrupted training
        goes on with the same ones.

    Returns
    -------
    list of Stage

    Raises
    ------
    UsageError
        If a sample has an embedding that is not finite, or no code has as many samples as a batch.

    Examples
    --------
    >>> data = np.array([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]])
    >>> found = train_in_stages(lambda stage, codes, learnt: f"f{stage}", lambda f: data, stages=2, clusters=2, batch_size=2)
    >>> found[1].learnt, found[1].report["full_codes"]
    ('f1', 2)
    """
    check_stages(stages, clusters)
    found: list[Stage[Learnt]] = []
    codes, report = None, dict[str, float]()
    for stage in range(stages):
        found.append(Stage(train(stage, codes, [s.learnt for s in found]), codes, report))
        if stage < stages - 1:
            codes, report = _codes(stage, lambda: embed(found[-1].learnt), codes, clusters, batch_size, seed, keep)
    return found


def _codes(
    stage: int,
    embed: Callable[[], npt.ArrayLike],
    codes: Integers | None,
    clusters: int,
    batch_size: int,
    seed: int,
    keep: Path | None,
) -> tuple[Integers, dict[str, float]]:
    """Codes after a stage and what they leave for the next one, from the folder if they are there."""
    path = None if keep is None else keep / f"codes{stage}.npy"
    if path is not None and path.exists():
        with naming(path):
            return np.load(path, allow_pickle=False), dict(json.loads(path.with_suffix(".json").read_text("utf-8")))
    rows = np.asarray(embed())
    labels = kmeans(rows, clusters, seed=stage_seed(seed, stage)).labels
    codes = extend_codes(codes, labels, clusters)
    report = pool_report(codes, batch_size, rows)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path.with_suffix(".json"), report)
        save_array(codes, path)
    return codes, report
