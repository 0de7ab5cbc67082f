"""Fine-tuning of an encoder on labelled pictures, over a run folder: a classifier, and how right it is on pictures kept aside.

    contralto fit core_tuning PICTURES --image_encoder PRETRAINED/encoder --out RUN

The run folder holds `manifest/`, `training/` (and `baseline/`, plain cross-entropy from the same start, with `--baseline`),
`model/` (for `contralto predict`, `contralto evaluate` and `contralto.load`), `encoder/` (a name for `--image_encoder`),
`predictions.parquet` (what is said of every test picture), `answers.png` (some of them, sorted to the classes that they are taken
for), `metrics.json` and `report.html`. It goes on where it stopped.
"""

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from contralto.data.images import decode_image
from contralto.data.manifest import Manifest
from contralto.encoders.features import device_of
from contralto.encoders.image import ImageEncoder, save_encoder
from contralto.encoders.pictures import PictureReader, picture_blocks
from contralto.errors import DataError, UsageError
from contralto.evaluation.classification import accuracy_interval
from contralto.files import write_atomically, write_json
from contralto.pipelines.continual import held_out
from contralto.pipelines.embedding import CROP
from contralto.pipelines.outputs import peak_memory_gib
from contralto.pipelines.pretrain import Pretraining
from contralto.review.episodes import episode_sheet
from contralto.review.tuned import write_tuned_report
from contralto.systems.base import EncoderSystem
from contralto.systems.classifier import Classifier, load
from contralto.systems.finetuning.base import FineTuning

__all__ = ["FineTuningJob"]

Integers = npt.NDArray[np.int64]
SHOWN = 600
"""Pictures on the page."""
ROWS, EACH = 12, 8
"""Classes of the sheet of answers, and test pictures of each."""


class FineTuningJob(Pretraining):
    """The job behind ``contralto fit`` for one system that turns an encoder into a classifier."""

    def fit(
        self,
        data: str,
        out: str | Path,
        *,
        image_encoder: str = "efficientnet-lite0",
        pretrained: bool = True,
        shots: int | None = None,
        held: float = 0.2,
        baseline: bool = False,
        **rest: Any,
    ) -> Path:
        """Fine-tune an encoder on pictures with labels; pictures without one are left out.

        Parameters
        ----------
        image_encoder : str
            Name of the encoder, or the folder of a pretraining or of its `encoder`.
        pretrained : bool
            Start with the weights that belong to the name.
        shots : int, optional
            Learn from so many labelled pictures of each class, drawn by the seed; default: from all.
        held : float
            Share of every class that is kept for testing where the data have no split `test`; pictures of one group stay
            together.
        baseline : bool
            Train plain cross-entropy from the same start as well, and tell the difference.
        """
        return super().fit(
            data, out, image_encoder=image_encoder, pretrained=pretrained, shots=shots, held=held, baseline=baseline, **rest
        )  # fmt: skip

    def check_labels(self) -> None:
        """Keep pictures with a label, set some aside where none are, and draw the shots."""
        a = self.arguments
        if not 0 <= a["held"] < 1 or (a["shots"] is not None and a["shots"] < 1):
            raise UsageError(
                f"held is a share in [0, 1) and shots at least 1 per class, got {a['held']} and {a['shots']}"
            )
        right, (wanted, inside) = self.manifest.right_labels, self.manifest.split_of()
        known = self.labels >= 0
        self.left_out = int((~known).sum())
        self.rows, self.labels = self.rows[known], self.labels[known]
        if not len(self.rows):
            raise DataError("no picture has a label: name their column with --label_column", file=self.data)
        if wanted is not None:
            self.rows, self.labels = self.rows[~inside[self.rows]], self.labels[~inside[self.rows]]
            self.test_rows = np.flatnonzero(inside & (right >= 0))
        else:
            groups = self.manifest.column("group")[self.rows]
            aside = held_out(self.labels, a["held"], groups=groups, seed=a["seed"])
            self.test_rows = self.rows[aside]
            self.rows, self.labels = self.rows[~aside], self.labels[~aside]
        if a["shots"] is not None:
            chosen = _shots(self.labels, a["shots"], a["seed"])
            self.rows, self.labels = self.rows[chosen], self.labels[chosen]
        classes = self.manifest.class_names
        empty = np.setdiff1d(np.arange(len(classes)), self.labels)
        if len(classes) < 2 or len(empty) == len(classes):
            raise DataError(f"a classifier needs two classes at least, found {', '.join(classes)}", file=self.data)
        if len(empty):
            told = ", ".join(classes[c] for c in empty[:5]) + (", ..." if len(empty) > 5 else "")
            self.console.print(f"  nothing to learn from for {len(empty)} classes: {told}", soft_wrap=True)
        self.console.print(
            f"  {len(self.rows)} labelled pictures, {len(self.test_rows)} kept for testing, {self.left_out} without a label",
            soft_wrap=True,
        )

    def encoder(self, seed: int | None = None) -> ImageEncoder:
        """The encoder to start with: of a name, or what a pretraining left in its run folder."""
        inner = Path(self.arguments["image_encoder"]) / "encoder"
        if not (inner / "encoder.json").is_file():
            return super().encoder(seed)
        given = self.arguments
        self.arguments = given | {"image_encoder": str(inner)}
        try:
            return super().encoder(seed)
        finally:
            self.arguments = given

    def learn(self) -> EncoderSystem:
        """Train the system, and the baseline where it is wanted."""
        self.plain: FineTuning | None = None
        if self.arguments["baseline"]:
            encoder = self.encoder()
            names = inspect.signature(FineTuning).parameters
            given = {k: v for k, v in (self.arguments | self.facts(encoder)).items() if k in names}
            self.plain = FineTuning(encoder, **given | {"eta": 0.0})
            self.train(self.plain, self.out / "baseline")
        return super().learn()

    def finish(self) -> None:
        """Keep the classifier, say how right it is, and write the page."""
        model = self.classifier(self.module)
        save_encoder(self.whole(), self.out / "encoder")
        scores = self.measure(model)
        model.save(self.out / "model", self.card(model, scores))
        files = {
            "classifier (contralto predict)": "model",
            "encoder (--image_encoder)": "encoder",
            **({"what is said of every test picture": "predictions.parquet"} if len(self.test_rows) else {}),
            **({"some of them, sorted": "answers.png"} if (self.out / "answers.png").exists() else {}),
        }
        memory = peak_memory_gib()
        told: dict[str, Any] = {"pictures": len(self.rows), "tested": len(self.test_rows), "unlabelled": self.left_out}
        told |= {"seconds": self.seconds, "memory_gib": memory, "scores": scores, "files": files}
        write_json(self.out / "metrics.json", self.last_metrics() | told)
        self.report(self.out)

    def classifier(self, module: EncoderSystem) -> Classifier:
        """What a trained system leaves for use."""
        encoder, head = module.encoder, getattr(module, "classifier", None)
        assert isinstance(encoder, ImageEncoder)
        assert isinstance(head, torch.nn.Linear)
        return Classifier.of(encoder, encoder.name, self.manifest.class_names, head.weight.detach(), crop=CROP)

    def measure(self, model: Classifier) -> dict[str, Any]:
        """Accuracies on the test pictures, with intervals over pictures or groups; writes `predictions.parquet`."""
        if not len(self.test_rows):
            return {}
        labels = self.manifest.right_labels[self.test_rows]
        groups = self.manifest.column("group")[self.test_rows]
        found = self.probabilities(model)
        predicted, right = found.argmax(1), (found.argmax(1) == labels).astype(float)
        names = np.array(self.manifest.class_names, dtype=object)
        columns: dict[str, Any] = {
            "id": self.manifest.column("id")[self.test_rows].tolist(), "label": names[labels].tolist(),
            "predicted": names[predicted].tolist(), "confidence": found.max(1).astype(np.float32),
        }  # fmt: skip
        scores, answers = _accuracies(right, labels, groups, "accuracy"), [(self.name, found)]
        if self.plain is not None:
            of_plain = self.probabilities(self.classifier(self.plain))
            answers.insert(0, ("cross-entropy", of_plain))
            columns["baseline"] = names[of_plain.argmax(1)].tolist()
            right_plain = (of_plain.argmax(1) == labels).astype(float)
            scores |= _accuracies(right_plain, labels, groups, "accuracy of cross-entropy")
            scores |= _accuracies(right - right_plain, labels, groups, "difference")
        write_atomically(self.out / "predictions.parquet", lambda path: pq.write_table(pa.table(columns), path))
        self.draw_answers(labels, answers)
        return scores

    def draw_answers(self, labels: Integers, answers: list[tuple[str, npt.NDArray[np.float32]]]) -> None:
        """Write `answers.png`: which of some classes each of their test pictures is taken for, by probabilities (N, C)."""
        seed = self.arguments["seed"]
        classes = np.intersect1d(self.labels, labels)  # those of which there is a picture to learn from as well
        shown = np.sort(np.random.default_rng([seed, 26]).permutation(classes)[:ROWS])
        asked = _shots(labels, EACH, seed)
        asked = asked[np.isin(labels[asked], shown)]
        if not len(asked):
            return
        known = [int(self.rows[self.labels == c][0]) for c in shown]
        pictures = [decode_image(self.manifest.read_bytes(row)) for row in (*known, *self.test_rows[asked].tolist())]
        taken = [(title, found[asked][:, shown].argmax(1)) for title, found in answers]
        sheet = episode_sheet(
            pictures[: len(shown)], pictures[len(shown) :], np.searchsorted(shown, labels[asked]), taken
        )
        write_atomically(self.out / "answers.png", lambda path: sheet.save(path, "PNG"))

    @torch.inference_mode()
    def probabilities(self, model: Classifier) -> npt.NDArray[np.float32]:
        """What a classifier says of the test pictures (N, C)."""
        device = device_of(self.arguments["accelerator"])
        model = model.to(device).eval()
        reader = PictureReader(self.manifest.root, model.view)
        blocks = picture_blocks(self.manifest, self.test_rows)
        parts = [model(x.to(device)).float().cpu().numpy() for block in blocks for x in reader.batches(block)]
        model.to("cpu")
        return np.concatenate(parts)

    def report(self, run: str | Path, *, out: str | Path | None = None) -> Path:
        """The page: what is said of test pictures, what the encoder now finds alike, a map, the course of the training."""
        run, model, manifest = Path(run), load(run), Manifest.load(Path(run) / "manifest")
        ids, rows = manifest.column("id").astype(str), np.arange(len(manifest))
        if (run / "predictions.parquet").exists():
            tested = np.flatnonzero(np.isin(ids, pq.read_table(run / "predictions.parquet").column("id").to_pylist()))
            rows = tested if len(tested) >= 3 else rows
        rows = np.sort(np.random.default_rng(0).permutation(rows)[:SHOWN])
        pictures = [decode_image(manifest.read_bytes(int(row))) for row in rows]
        given = [manifest.class_names[c] if c >= 0 else "" for c in manifest.right_labels[rows]]
        return write_tuned_report(run, model.embed(pictures), pictures, ids[rows].tolist(), given, out=out)

    def card(self, model: Classifier, scores: dict[str, Any]) -> str:
        """The README of the classifier."""
        a = self.arguments
        told = [f"{name}: {_told(s)}" for name, s in scores.items()] or [
            "Not measured: no pictures were kept for testing."
        ]
        return "\n".join(
            [
                f"# Classifier of {len(model.classes)} classes, fine-tuned with {self.name}",
                "",
                f"Classes: {', '.join(model.classes)}",
                "",
                f"Learnt from {len(self.rows)} labelled pictures, starting from {Path(str(a['image_encoder'])).name}.",
                "",
                *(f"- {line}" for line in told),
                "",
                "    import contralto",
                '    contralto.load("path/to/this/folder").predict(["a.jpg", "b.jpg"])',
                "",
                "It names one of its classes for any picture; a low probability is the only sign of a picture of something else.",
                "",
            ]
        )


def _shots(labels: Integers, count: int, seed: int) -> Integers:
    """Places of so many samples of every class, or all that there are; drawn by the seed, ascending."""
    order = np.random.default_rng([seed, 25]).permutation(len(labels))
    by_class = order[np.argsort(labels[order], kind="stable")]
    sorted_labels = labels[by_class]
    place = np.arange(len(labels)) - np.searchsorted(sorted_labels, sorted_labels)
    return np.sort(by_class[place < count])


def _accuracies(right: npt.NDArray[np.float64], labels: Integers, groups: Any, name: str) -> dict[str, Any]:
    out = {}
    for key, macro in ((name, False), (f"{name}, mean over classes", True)):
        out[key] = accuracy_interval(right, labels, groups=groups, macro=macro).score()
    return out


def _told(score: dict[str, Any]) -> str:
    return f"{score['value']:.1%} ({score['low']:.1%} to {score['high']:.1%})"
