"""FoPro's job: from noisy web images and a few labels by people to a clean classifier and corrected labels.

    ingest -> [plain] -> prototypes -> relation -> fopro -> cleaned list -> finetune -> model -> evaluation -> report

The pictures labelled by people, the shots, are pictures of the data, named in a table (`contralto.data.verified`).
"""

from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch

from contralto.data.manifest import Manifest
from contralto.data.verified import UNKNOWN, read_verified
from contralto.errors import DataError
from contralto.pipelines.job import Array, Job
from contralto.prototypes.correction import Correction
from contralto.systems.webly.fopro import FoPro

__all__ = ["FoProJob", "fit_fopro"]


def fit_fopro(
    data: str,
    out: str | Path,
    *,
    shots: str | Path | None = None,
    reviewed: str | Path | None = None,
    definitions: str | Path | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    text_column: str | None = None,
    id_column: str | None = None,
    split_column: str | None = None,
    clean_column: str | None = None,
    group_column: str | None = None,
    allow_outside: bool = False,
    image_filter: bool = True,
    min_side: int = 32,
    blank_share: float | None = 0.8,
    image_encoder: str = "bilinear/vgg16",
    pretrained: bool = False,
    image_size: int | None = 224,
    crop: float = 0.875,
    frozen_features: bool = False,
    feature_views: int = 2,
    batch_size: int = 64,
    hidden: int = 0,
    resample: bool = False,
    class_balanced: bool = False,
    baseline: bool = True,
    workers: int = 2,
    accelerator: Literal["auto", "cpu", "gpu", "cuda", "mps"] = "auto",
    devices: int = 1,
    precision: str = "32-true",
    strategy: str = "auto",
    seed: int = 1024,
    cache: str | Path | None = None,
    checkpoint_every: int = 1000,
    on: str | None = None,
    progress: bool = True,
    **system: Any,
) -> Path:
    """Train a classifier on noisy web images, guided by a few pictures that people labelled.

    Parameters
    ----------
    data : str
        Path or fsspec address of the images, in any form of `contralto.data.sources`.
    out : path
        Run folder. Called again with the same arguments, the job continues where it stopped.
    shots : path, optional
        CSV or Parquet with `id` and `label` of pictures of the data: the label by people takes the place of the web's and holds
        for good; a picture with an empty one is left out of training. Without it, prototypes start from all pictures.
    reviewed : path, optional
        Run whose review (`contralto review`) gave labels by people: they are shots, too; `shots` goes before them.
    definitions : path, optional
        Definitions file; here it only names the classes and what they were searched by.
    image_column, label_column, text_column, id_column, split_column, clean_column, group_column : str, optional
        Columns, where their names are not common ones.
    allow_outside, image_filter, min_side, blank_share
        See `contralto.data.ingest.ingest`.
    image_encoder : str
        Name of the encoder; `pretrained` loads its weights; `image_size` and `crop` are the side of the input and the
        share of it that the test view shows. The default is the paper's for fine-grained classes.
    frozen_features : bool
        Never train the encoder: its features of `feature_views` weak and strong views are computed once.
    batch_size : int
    hidden : int
        Hidden width of projector and reconstructor; 0 = one linear layer, as the paper has it for bilinear features.
    resample : bool
        Each epoch takes, per class, half of the web pictures at random and all shots (FoPro 1, large sets).
    class_balanced : bool
        Extension: draw all classes equally often, in every stage and in the baseline.
    baseline : bool
        Train the plain baseline on web pictures and shots too when there are clean test labels.
    workers, accelerator, devices, precision, strategy
        Of loaders and Lightning's Trainer; `devices` must be 1 yet.
    seed : int
        Of everything that is drawn, but for the views of `frozen_features`, which are the same for all seeds.
    cache : path, optional
        Folder for features, shared between runs; default: `features` in the run folder.
    checkpoint_every : int
        Steps between checkpoints, and so the most that a killed run trains again; it may change when a run goes on.
    on : str, optional
        Where the passes over all pictures run, as of `fit_capro`.
    progress : bool
        Show what is going on.
    **system
        Arguments of `FoPro`: epochs, rates, thresholds.

    Returns
    -------
    Path
        The run folder.

    Raises
    ------
    UsageError
        If arguments do not fit, or the folder belongs to another job.
    DataError
        If the data or the shots cannot be used.
    """
    arguments = {k: v for k, v in locals().items() if k not in ("data", "out", "system", "progress")} | system
    return FoProJob(str(data), Path(out), arguments, progress).run()


class FoProJob(Job):
    """The stages of `fit_fopro`; see `Job`."""

    name = "fopro"
    system = FoPro
    fit = staticmethod(fit_fopro)
    extensions = ("class_balanced", "keep_threshold")
    before: ClassVar = {"relation": "prototypes", "fopro": "relation", "finetune": "fopro"}
    judging = "fopro"

    def claim(self) -> None:
        """Make the folder, once the file of shots is known to be there."""
        shots = self.arguments["shots"]
        if shots is not None and not Path(shots).is_file():
            raise DataError("there is no such file", file=str(shots))
        super().claim()

    def ingest(self) -> Manifest:
        """Read the data and the shots."""
        manifest = super().ingest()
        per_class = np.bincount(self.labels[self.anchors], minlength=self.num_classes)
        self.console.print(
            f"  {int(self.anchors.sum())} shots, {per_class.min()} to {per_class.max()} per class", highlight=False
        )
        return manifest

    def learn(self) -> None:
        """Prototypes, the relation alone, and both together."""
        for stage in ("prototypes", "relation", "fopro"):
            self.train(stage)

    def _verified(self) -> npt.NDArray[np.int64]:
        """Decisions of a review, and the table of shots, which goes before them."""
        decided, shots = super()._verified(), self.arguments["shots"]
        if shots is None:
            return decided
        verified = read_verified(shots, self.manifest)
        return np.where(verified != UNKNOWN, verified, decided)

    def _draws(self, stage: str, rows: Array, labels: Array) -> dict[str, Array]:
        if self.arguments["resample"] and stage != "finetune":
            return {"halves": np.where(self.anchors[rows], -1, labels)}
        return super()._draws(stage, rows, labels)

    def _prototype_rows(self) -> Array:
        """Shots; all pictures of the classes that have none."""
        have = np.bincount(self.labels[self.anchors], minlength=self.num_classes) > 0
        return np.flatnonzero(self.anchors | ~have[self.labels])

    def _complete(self, module: FoPro) -> None:
        if self.arguments["class_weighted"]:
            count = np.maximum(np.bincount(self.labels, minlength=self.num_classes), 1)
            module.class_weights.copy_(torch.from_numpy(count.mean() / count))

    def scores(self) -> dict[str, Array]:
        """Scores of the training pictures; a shot's label has the fused score 1 (FoPro 5)."""
        out = super().scores()
        shot = np.flatnonzero(self.anchors)
        out["fused"][shot] = 0
        out["fused"][shot, self.labels[shot]] = 1
        return out

    def judge(self, scores: dict[str, Array]) -> Correction:
        """Verdicts by FoPro 7, as in the last epoch."""
        module = self.modules[self.judging]
        correction: Correction = module.judge(
            torch.from_numpy(scores["fused"]),
            torch.from_numpy(scores["embedding"]),
            torch.from_numpy(self.labels),
            torch.from_numpy(self.anchors),
            module.prototypes,
            with_relation=True,
        )[0]
        return correction
