"""CAPro's job for pictures with several labels: tags in, a classifier of every class and corrected sets of labels out.

    ingest -> [plain] -> vanilla -> features, neighbours, texts, matching -> capro -> cleaned list -> finetune
           -> model -> evaluation -> report

The web labels of a picture are the classes that its texts name (`contralto.data.tags`); a picture that names none is left out.
"""

from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from contralto.data.definitions import ClassText
from contralto.data.manifest import Manifest
from contralto.data.tags import tag_labels
from contralto.errors import DataError
from contralto.evaluation.multilabel import average_precisions, entry_metrics, map_interval, multilabel_metrics
from contralto.files import save_array, write_atomically
from contralto.neighbors.graph import Edge, Normalisation
from contralto.neighbors.matching import Match, Matching, match_texts, within_class_rank
from contralto.pipelines.capro import CAProJob
from contralto.pipelines.job import Array
from contralto.pipelines.outputs import write_cleaned_csv
from contralto.systems.webly.capro_multilabel import EXTENSIONS, CAProMultiLabel, correct_entries, positive_weights

__all__ = ["CAProMultiLabelJob", "fit_capro_multilabel"]


def fit_capro_multilabel(
    data: str,
    out: str | Path,
    *,
    definitions: str | Path | None = None,
    image_column: str | None = None,
    text_column: str | None = None,
    id_column: str | None = None,
    split_column: str | None = None,
    clean_column: str | None = None,
    group_column: str | None = None,
    allow_outside: bool = False,
    image_filter: bool = True,
    min_side: int = 32,
    blank_share: float | None = 0.8,
    image_encoder: str = "resnet50",
    pretrained: bool = True,
    image_size: int | None = 224,
    crop: float = 0.875,
    frozen_features: bool = False,
    feature_views: int = 2,
    text_encoder: str = "minilm",
    class_text: ClassText = "name+definition",
    text_words: Literal["english", "any", "raw"] = "raw",
    glued: bool = True,
    specific: bool = False,
    enhance: bool = True,
    use_rerank: bool = True,
    neighbours: int = 40,
    kept_neighbours: int = 10,
    k1: int = 20,
    k2: int = 6,
    rerank_weight: float = 0.3,
    edge: Edge = "similarity",
    self_weight: float | None = None,
    normalisation: Normalisation | None = None,
    degree: int = 1,
    match: Match = "rerank",
    anchors: int | None = 50,
    batch_size: int = 256,
    sample_weights: Literal["none", "frequency"] = "frequency",
    baseline: bool = True,
    workers: int = 2,
    accelerator: str = "auto",
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
    """Train a classifier of several labels on pictures with tags, and say which labels are wrong or missing.

    Parameters
    ----------
    data : str
        Path or fsspec address of the images with their texts, in any form of `contralto.data.sources`.
    out : path
        Run folder. Called again with the same arguments, the job continues where it stopped.
    definitions : path
        Definitions file: names, search words and definitions of the classes.
    image_column, text_column, id_column, split_column, clean_column, group_column : str, optional
        Columns, where their names are not common ones. Several of `text_column` and of `clean_column` are joined by commas;
        a value of the latter counts where it names a class, and they serve evaluation only.
    allow_outside, image_filter, min_side, blank_share
        See `contralto.data.ingest.ingest`.
    image_encoder, pretrained, image_size, crop, frozen_features, feature_views, text_encoder, class_text, text_words
        As of `fit_capro`.
    glued : bool
        Split glued tags into words.
    specific : bool
        Extension: a word that ends a longer name of another class names that class alone ("blue" in "navy blue"), for classes
        that exclude each other.
    enhance, use_rerank, neighbours, kept_neighbours, k1, k2, rerank_weight, edge, self_weight, normalisation, degree, match
        As of `fit_capro`; every pair of picture and label is matched.
    anchors : int, optional
        K per class: as many pairs with the nearest texts are anchors, and as many with the farthest are anchors of the other
        kind, which hold as well; None = by `scale_rule`.
    batch_size : int
    sample_weights : {"frequency", "none"}
        CAPro 5M: the largest n_c / median(n) of a picture's labels.
    baseline, workers, accelerator, devices, precision, strategy, seed, cache, checkpoint_every, on, progress
        As of `fit_capro`.
    **system
        Arguments of `CAProMultiLabel`: epochs, rates, thresholds.

    Returns
    -------
    Path
        The run folder.

    Raises
    ------
    UsageError
        If arguments do not fit, or the folder belongs to another job.
    DataError
        If the data cannot be used.
    """
    arguments = {k: v for k, v in locals().items() if k not in ("data", "out", "system", "progress")} | system
    return CAProMultiLabelJob(str(data), Path(out), arguments, progress).run()


class CAProMultiLabelJob(CAProJob):
    """The stages of `fit_capro_multilabel`; see `Job`."""

    name = "capro-multilabel"
    system: ClassVar = CAProMultiLabel
    fit: ClassVar = staticmethod(fit_capro_multilabel)
    extensions: ClassVar = (*EXTENSIONS, "specific")
    multilabel = True

    # Data.

    def ingest(self) -> Manifest:
        """Read the data; the web labels are what the texts name."""
        manifest = super().ingest()
        self.web = self._named[self.train_rows].astype(np.int64)
        self.entries = np.zeros_like(self.web)  # anchors of pictures and classes: 1, -1, or 0
        self.console.print(f"  {self.web.sum(1).mean():.2f} labels per picture", highlight=False)
        empty = [n for n, count in zip(manifest.class_names, self.web.sum(0), strict=True) if count == 0]
        if empty:
            self.console.print(f"  no text names {', '.join(empty[:10])}", highlight=False, soft_wrap=True)
        return manifest

    def _trusted(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        self._named = tag_labels(
            self.manifest.texts,
            self.manifest.classes,
            glued=self.arguments["glued"],
            specific=self.arguments["specific"],
        )
        if not self._named.any():
            raise DataError(
                "no text names any of the classes: name the columns of the tags with --text_column", file=self.data
            )
        first = np.where(self._named.any(1), self._named.argmax(1), -1)
        return first.astype(np.int64), np.zeros(len(first), bool)

    def _has_clean_label(self) -> npt.NDArray[np.bool_]:
        return np.asarray((self.manifest.clean_matrix() == 1).any(1))

    @property
    def targets(self) -> Array:
        """Web labels (N, C), 0 or 1."""
        return self.web

    # What the stages learn from.

    def _fields(self, stage: str, rows: Array | None = None, labels: Array | None = None) -> dict[str, torch.Tensor]:
        fields = super()._fields(stage, rows, labels)
        fields["anchor"] = torch.from_numpy(self.entries if rows is None else self.entries[rows])
        return fields

    def _more(self, stage: str) -> dict[str, Array]:
        return {}

    def _weights(self) -> npt.NDArray[np.float32]:
        if self.arguments["sample_weights"] == "none":
            return np.ones(len(self.web), np.float32)
        count = self.web.sum(0)
        return np.asarray((self.web * (count / np.median(count[count > 0]))).max(1), np.float32)

    def _lesson(self, stage: str) -> tuple[Array | None, Array | None]:
        if stage == "finetune":
            return np.flatnonzero(self.new_sets.any(1)), self.new_sets
        return None, None

    def _draws(self, stage: str, rows: Array, labels: Array) -> dict[str, Array]:
        return {}

    def _prototype_rows(self) -> Array:
        return np.flatnonzero((self.entries != 0).any(1))

    def _complete(self, module: CAProMultiLabel) -> None:
        module.positive_weight.copy_(positive_weights(torch.from_numpy(self.web)))

    # Matching and judging.

    def match(self) -> Matching:
        """CAPro 3 and 4 for every pair of picture and label; nearest and farthest texts of each class are its anchors."""
        a = self.arguments
        with self._timed("matching", f"{a['text_encoder']} texts against {self.num_classes} definitions"):
            _, rows, class_rows = self._text_rows(self._clean_texts())
            picture, label = np.nonzero(self.web)
            ranking = {"k1": a["k1"], "k2": a["k2"], "weight": a["rerank_weight"]}
            self.matching = match_texts(rows[picture], class_rows, label, method=a["match"], **ranking)
            near, far = self.matching.rank, within_class_rank(-self.matching.distance, label)
            k, count = max(a["anchors"], 1), np.bincount(label, minlength=self.num_classes)[label]
            positive = near < k
            negative = ~positive & (far < np.minimum(k, count - np.minimum(k, count)))
            self.entries[picture, label] = positive.astype(np.int64) - negative
            table = pa.table(
                {
                    "index": self.train_rows[picture], "class": label, "distance": self.matching.distance,
                    "text_match": self.matching.probability[np.arange(len(label)), label], "anchor": self.entries[picture, label],
                }
            )  # fmt: skip
            write_atomically(self.out / "matching.parquet", lambda path: pq.write_table(table, path))
        return self.matching

    def clean(self) -> pa.Table:
        """The cleaned list: for every picture its labels before and after, and what was added, removed and ignored."""
        with self._timed("cleaning", "judging every label"):
            s = self.scores()
            label, valid = correct_entries(
                torch.from_numpy(s["fused"]), torch.from_numpy(self.web), torch.from_numpy(self.entries),
                threshold=self.arguments["threshold"],
            )  # fmt: skip
            self.corrected, self.valid = label.numpy(), valid.numpy()
            self.new_sets = np.where(self.valid, self.corrected, 0)
            given, new = self.web == 1, self.new_sets == 1
            self.changes = {
                "given": given, "added": ~given & new, "removed": given & self.valid & (self.corrected == 0),
            }  # fmt: skip
            self.p_wrong = np.where(given, 1 - s["fused"], s["fused"])  # what the other side scores
            table = self._sets_table()
            write_atomically(self.out / "cleaned.parquet", lambda path: pq.write_table(table, path))
            write_cleaned_csv(table, self.out / "cleaned.csv")
            save_array(s["embedding"].astype(np.float16), self.out / "embedding.npy")
            self.embedding = s["embedding"]
        return table

    def _sets_table(self) -> pa.Table:
        names = self.manifest.class_names

        def lists(matrix: Array) -> pa.Array:
            return pa.array([[names[c] for c in np.flatnonzero(row)] for row in matrix], pa.list_(pa.string()))

        given = self.changes["given"]
        suspect = np.where(given | (self.corrected != self.web), self.p_wrong, 0)
        worst = suspect.argmax(1)
        return pa.table(
            {
                "index": self.train_rows,
                "id": self.manifest.column("id")[self.train_rows].tolist(),
                "given": lists(given),
                "new": lists(self.new_sets == 1),
                "added": lists(self.changes["added"]),
                "removed": lists(self.changes["removed"]),
                "ignored": lists(given & ~self.valid),
                "anchor": lists(self.entries != 0),
                "p_wrong": suspect.max(1).astype(np.float32),
                "worst": [names[c] for c in worst],
            }
        )

    # Evaluation.

    def evaluate(self) -> dict[str, Any]:
        """Compare with plain training on the clean test part, and the label sets before and after with the right ones."""
        with self._timed("evaluation", "on the clean labels" if self.has_test else "no clean test labels"):
            counts = {name: int(entries.sum()) for name, entries in self.changes.items()}
            counts |= {"ignored": int((~self.valid).sum()), "anchors": int((self.entries != 0).sum())}
            metrics: dict[str, Any] = {"counts": counts}
            matrix = self.manifest.clean_matrix()
            if self.has_test:
                metrics["test"] = self._set_metrics(matrix[self.test_rows] == 1)
            clean = matrix[self.train_rows]
            known = (clean >= 0).all(1)
            if known.any():
                metrics["labels"] = {
                    name: _agreement(sets[known] == 1, clean[known] == 1)
                    for name, sets in (("given", self.web), ("new", self.new_sets))
                }
                metrics["list"] = entry_metrics(self.web[known], clean[known], self.p_wrong[known])
        return self._keep_metrics(metrics)

    def _set_metrics(self, truth: Array) -> dict[str, Any]:
        encoder = self.encoder()
        probabilities = {"model": self.predict_rows("finetune", encoder, self.test_rows)}
        if "plain" in self.modules:
            probabilities["plain"] = self.predict_rows("plain", encoder, self.test_rows)
        out: dict[str, Any] = {"n": len(truth)}
        for name, p in probabilities.items():
            out[name] = multilabel_metrics(p, truth)
            out[name]["by_class"] = [None if np.isnan(v) else round(float(v), 4) for v in average_precisions(p, truth)]
        if "plain" in probabilities:
            groups = self.manifest.column("group")[self.test_rows]
            found = map_interval(probabilities["model"], truth, against=probabilities["plain"], groups=groups)
            out["difference"] = {"map_macro": found.value, "map_macro_low": found.low, "map_macro_high": found.high}
        table = pa.table(
            {"index": self.test_rows, **{k: pa.array(list(p.astype(np.float32))) for k, p in probabilities.items()}}
        )
        write_atomically(self.out / "test_predictions.parquet", lambda path: pq.write_table(table, path))
        return out


def _agreement(said: Array, truth: Array) -> dict[str, float]:
    """Precision, recall and F1 over all pairs of picture and class, and the share of pictures whose set is right."""
    hit = float((said & truth).sum())
    precision, recall = hit / max(said.sum(), 1), hit / max(truth.sum(), 1)
    f1 = 2 * precision * recall / max(precision + recall, 1e-12)
    exact = (said == truth).all(1).mean()
    return {"precision": float(precision), "recall": float(recall), "f1": float(f1), "exact": float(exact)}
