"""Classes for all unlabelled pictures at once, from a few labels, or from names or attributes of classes (`systems.zeroshot`).

The run folder holds `manifest/`, `features/`, `labels.parquet` (id, given, found, confidence, seen), `labels.png` (a row per
class: what was labelled, the surest and the least sure), `metrics.json`, and `model/` where the first view is that of an encoder.
"""

import inspect
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from sklearn.decomposition import PCA

from contralto.cluster import map_blocks
from contralto.data.definitions import ClassText, class_text, fill_definitions, load_definitions
from contralto.data.images import decode_image
from contralto.data.ingest import ingest
from contralto.data.manifest import ClassInfo
from contralto.data.tables import ClassVectors, read_class_vectors
from contralto.encoders.described import DESCRIPTIONS, describe
from contralto.encoders.features import EncodePictures, cached_array, device_of
from contralto.encoders.image import image_encoder
from contralto.encoders.pictures import picture_blocks
from contralto.encoders.text import text_encoder
from contralto.errors import DataError, UsageError
from contralto.evaluation.classification import accuracy_interval
from contralto.files import naming, write_atomically, write_json
from contralto.pipelines.outputs import claim_run, peak_memory_gib, read_once
from contralto.systems.classifier import Classifier
from contralto.systems.zeroshot.semantics import (
    attribute_probabilities,
    direct_attribute_prediction,
    imagenet_prototypes,
    imagenet_words,
    nearest_prototype,
    predicted_words,
)
from contralto.systems.zeroshot.tmv_hlp import TMVHLP
from contralto.views.image import EvalView

__all__ = ["Transductive"]

Array = npt.NDArray[Any]
LITE0 = "efficientnet-lite0"


@dataclass
class Transductive:
    """The job behind ``contralto fit tmv_hlp``; its methods can be called one by one.

    Parameters
    ----------
    name : str
        Of the system.
    """

    name: str
    seconds: dict[str, float] = field(default_factory=dict)
    multilabel = False

    @property
    def system(self) -> type[TMVHLP]:
        """The class of the system."""
        return TMVHLP

    def fit(
        self,
        data: str,
        out: str | Path,
        *,
        image_column: str | None = None,
        label_column: str | None = None,
        id_column: str | None = None,
        split_column: str | None = None,
        group_column: str | None = None,
        allow_outside: bool = False,
        min_side: int = 8,
        views: Sequence[str] = ("pixels", "fourier", "gradients"),
        side: int = 16,
        standardise: bool = True,
        reduce: int | None = None,
        shots: int | None = None,
        definitions: str | None = None,
        attributes: str | None = None,
        text_encoder: str = "minilm",
        class_text: ClassText = "name",
        image_size: int | None = None,
        workers: int = 2,
        accelerator: str = "auto",
        seed: int = 0,
        on: str | None = None,
        progress: bool = True,
        **system: Any,
    ) -> Path:
        """Find the class of every picture without a label, all at once.

        Parameters
        ----------
        data : str
            Path or fsspec address of the pictures, in any form of `contralto.data.sources`: some with a label, others without.
            Pictures of a split `test` count as unlabelled; their labels only serve to measure.
        out : path
            Run folder.
        image_column, label_column, id_column, split_column, group_column : str, optional
            Columns, where their names are not common ones.
        allow_outside : bool
            Let tables name files outside their folder.
        min_side : int
            Smallest side in pixels.
        views : sequence of str
            What a picture is described by: "pixels", "fourier" and "gradients" of the grey picture, or names of image encoders
            with their pretrained weights; also RUN/encoder of a pretraining.
        side : int
            Grey pictures are scaled to this side first.
        standardise : bool
            Bring every column of these views to mean 0 and standard deviation 1.
        reduce : int, optional
            Principal components that are kept of each of these views; not in the paper, but where columns are not far fewer than
            pictures, views agree by chance.
        shots : int, optional
            Look at so many labels per class, drawn by the seed, and measure on the others; default: at all of them.
        definitions : str, optional
            Zero-shot: a definitions file that names the classes to find. Labelled pictures of other classes are what the meaning
            of pictures is learnt from; without any, it is told by the 1,000 ImageNet classes that "efficientnet-lite0" knows,
            which must then be the first view.
        attributes : str, optional
            Zero-shot: a table with a row per class, its name and numbers that describe it (`data.tables.read_class_vectors`). A
            ridge regression learns them from labelled pictures of other classes, and they are one more view. Without
            `definitions`, the classes to find are those of the table that no labelled picture shows.
        text_encoder : str
            Of the names and definitions.
        class_text : {"name+definition", "definition", "name"}
            What stands for a class. ImageNet's classes are known by their names, so names fit best where these tell the meaning.
        image_size : int, optional
            Side of the input of encoders; default: their own.
        workers, accelerator
            Of reading, and of encoders.
        seed : int
            Of the shots.
        on : str, optional
            "ray" or "ray://host:port": read pictures and compute their features on a cluster.
        progress : bool
            Show what is going on.
        **system
            Arguments of the system.

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
        given = {k: v for k, v in locals().items() if k not in ("self", "data", "out", "system", "progress")} | system
        self.begin(str(data), Path(out), given, progress)
        self.ingest()
        self.learn()
        self.finish()
        return self.out

    def parameters(self) -> dict[str, inspect.Parameter]:
        """All arguments of system and job by name; those of the job win."""
        every = dict(inspect.signature(TMVHLP.__init__).parameters) | dict(inspect.signature(self.fit).parameters)
        return {k: p for k, p in every.items() if k not in ("self", "widths", "data", "out", "progress", "system")}

    # The steps.

    def begin(self, data: str, out: Path, arguments: dict[str, Any], progress: bool) -> None:
        """Complete the arguments and claim the run folder."""
        known = self.parameters()
        given = {k: v for k, v in arguments.items() if k != "widths" or v is not None}  # views come as a list here
        unknown = sorted(set(given) - set(known))
        if unknown:
            raise UsageError(f"{self.name} has no argument {unknown[0]!r}")
        self.arguments = {k: p.default for k, p in known.items()} | given
        a = self.arguments
        a["views"] = list(a["views"])
        if not a["views"] or len(set(a["views"])) < len(a["views"]):
            raise UsageError(f"views must be one or more different names, got {a['views']}")
        if a["reduce"] is not None and a["reduce"] < 1:
            raise UsageError(f"reduce must be at least 1, got {a['reduce']}")
        if a["side"] < 4:
            raise UsageError(f"side must be at least 4 pixels, got {a['side']}")
        self.described = a["definitions"] is not None or a["attributes"] is not None
        if a["shots"] is not None and a["shots"] < (0 if self.described else 1):
            raise UsageError(f"shots must be at least 1 (0 with definitions or attributes), got {a['shots']}")
        self.data, self.out, self.progress = data, out, progress
        self.console = Console(stderr=True, quiet=not progress)
        claim_run(out, self.name, data, dict(sorted(a.items())))

    def ingest(self) -> None:
        """Read the pictures; find out which classes there are, whose labels may be seen, and which pictures are asked for."""
        a = self.arguments
        self.attributes = None if a["attributes"] is None else read_class_vectors(a["attributes"])
        self.manifest = read_once(self.data, self.out / "manifest", a, self.console)
        names, truth = np.array(self.manifest.class_names, dtype=object), self.manifest.right_labels
        if a["definitions"] is not None:
            self.classes = list(fill_definitions(load_definitions(a["definitions"]))[0])
        elif self.attributes is not None:
            shown = set(names[truth[(truth >= 0) & (self.manifest.column("split") != "test")]])
            self.classes = [ClassInfo(n) for n in self.attributes.names if n not in shown]
        else:
            self.classes = [ClassInfo(n) for n in names]
        number = {c.name: i for i, c in enumerate(self.classes)}
        ours = np.array([number.get(n, -1) for n in names] + [-1], np.int64)  # the last one for what has no label
        auxiliary = (truth >= 0) & (ours[truth] < 0)
        self.auxiliary = np.flatnonzero(auxiliary)
        self.rows = np.flatnonzero(~auxiliary)
        self.truth = ours[truth[self.rows]]
        self.seen = self._seen()
        asked = int((self.seen < 0).sum())
        if len(self.classes) < 2 or not asked or len(self.rows) < 2:
            raise DataError(
                f"there are {len(self.classes)} classes and {asked} pictures without a label: at least two and one are needed "
                f"(name the column of labels with --label_column, hide labels with --shots, or name the classes to find with "
                f"--definitions)",
                file=self.data,
            )
        without = [c.name for i, c in enumerate(self.classes) if i not in self.seen]
        if not self.described and without:
            raise DataError(f"no picture of {without[0]!r} has a label that may be seen; give one", file=self.data)
        told = f", {len(self.auxiliary)} pictures of other classes" if len(self.auxiliary) else ""
        self.console.print(
            f"  {len(self.rows)} pictures, {len(self.rows) - asked} of them labelled, {len(self.classes)} classes{told}, "
            f"{self.manifest.skipped.num_rows} skipped",
            highlight=False,
            soft_wrap=True,
        )

    def _seen(self) -> npt.NDArray[np.int64]:
        """The labels (n,) that may be looked at, -1 elsewhere."""
        open_ = (self.truth >= 0) & (self.manifest.column("split")[self.rows] != "test")
        shots = self.arguments["shots"]
        if shots is not None:
            order = np.random.default_rng([self.arguments["seed"], 1]).permutation(len(self.truth))
            drawn = [order[(self.truth[order] == c) & open_[order]][:shots] for c in range(len(self.classes))]
            open_ = np.isin(np.arange(len(self.truth)), np.concatenate(drawn))
        return np.where(open_, self.truth, -1)

    def learn(self) -> None:
        """The views of all pictures, and the class of every one."""
        started = time.perf_counter()
        views: list[Array] = []
        for name in self.arguments["views"]:
            self.console.print(f"[bold]view[/bold]  {name}", highlight=False)
            views.append(self._standardised(self.view(name)))
        prototypes: list[Array | None] = [None] * len(views)
        self.baselines: dict[str, npt.NDArray[np.int64]] = {}
        words = [] if self.arguments["definitions"] is None else [self._words(views, prototypes)]
        if self.attributes is not None:
            words.append(self._attributes(self.attributes, views[0], prototypes))
        views = [x[self.rows] for x in views]
        most = self.arguments["reduce"]
        for i, x in enumerate(views):
            if most is not None and most < min(x.shape):
                components = PCA(most, random_state=0).fit(x)
                views[i] = components.transform(x)
                prototypes[i] = None if prototypes[i] is None else components.transform(prototypes[i])
        views += words
        self.seconds["views"] = round(time.perf_counter() - started, 2)
        started = time.perf_counter()
        names = set(inspect.signature(TMVHLP.__init__).parameters) - {"self", "widths", "standardise"}
        settings = {k: v for k, v in self.arguments.items() if k in names}
        self.console.print(f"[bold]graph[/bold]  {len(self.rows)} pictures in {len(views)} views", highlight=False)
        self.model = TMVHLP(standardise="none", **settings)
        some = None if all(p is None for p in prototypes) else prototypes
        self.model.fit(views, self.seen, prototypes=some)
        self.baselines |= self._nearest(views, prototypes)
        self.seconds["graph"] = round(time.perf_counter() - started, 2)

    def view(self, name: str) -> npt.NDArray[np.float64]:
        """One view (N, p) of all pictures, kept under `features/`."""
        a, manifest = self.arguments, self.manifest
        key: dict[str, Any] = {"data": manifest.fingerprint(), "view": name}
        if name in DESCRIPTIONS:
            key["side"] = a["side"]
            read = (decode_image(manifest.read_bytes(row)) for row in range(len(manifest)))

            def compute() -> Array:
                size = (a["side"], a["side"])
                grey = [np.asarray(Image.fromarray(p).convert("L").resize(size, Image.Resampling.BOX)) for p in read]
                return describe(np.stack(grey) / 255, name)

            return np.asarray(cached_array(self.out / "features", name, key, compute), np.float64)
        encoder = image_encoder(name, pretrained=True, size=a["image_size"])
        drawn, device = EvalView(encoder.size, 1.0, encoder.mean, encoder.std), device_of(a["accelerator"], a["on"])
        key |= {"encoder": encoder.fingerprint(), "drawn": repr(drawn)}
        blocks = picture_blocks(manifest, np.arange(len(manifest)))
        setup = (encoder, device, manifest.root, drawn)
        found = cached_array(
            self.out / "features", "encoder", key,
            lambda: map_blocks(EncodePictures, blocks, on=a["on"], setup=setup, gpu=device == "cuda"),
            rows=len(manifest),
        )  # fmt: skip
        return np.asarray(found, np.float64)

    def _standardised(self, x: Array) -> Array:
        """By mean and deviation of the pictures that are asked for."""
        if not self.arguments["standardise"]:
            return x
        own = x[self.rows]
        spread = own.std(0, ddof=1)
        return np.asarray((x - own.mean(0)) / np.where(spread > 1e-12, spread, 1.0))

    def _words(self, views: list[Array], prototypes: list[Array | None]) -> Array:
        """The semantic view: what pictures mean, as vectors (n, S) among those of the class texts, which join the prototypes."""
        a = self.arguments
        encoder = text_encoder(a["text_encoder"])
        texts = [class_text(c, a["class_text"]) for c in self.classes]
        if len(self.auxiliary):
            infos = fill_definitions(self.manifest.classes)[0]
            others = [class_text(c, a["class_text"]) for c in infos]
            encoder = encoder.fit([*texts, *others])
            labels = self.manifest.right_labels[self.auxiliary]
            found = predicted_words(views[0][self.auxiliary], labels, encoder.encode(others), views[0][self.rows])
        else:
            if a["views"][0] != LITE0:
                raise UsageError(
                    f"definitions need labelled pictures of other classes, to learn what pictures mean; without any, the first "
                    f"of the views must be {LITE0!r}"
                )
            raw = self.view(LITE0)
            encoder = encoder.fit(texts)
            found = imagenet_words(raw[self.rows], encoder)
            own = imagenet_prototypes(encoder.encode(texts), encoder)
            prototypes[0] = own if not a["standardise"] else own / np.maximum(raw[self.rows].std(0, ddof=1), 1e-12)
        prototypes.append(encoder.encode(texts).astype(np.float64))
        return found

    def _attributes(self, table: ClassVectors, features: Array, prototypes: list[Array | None]) -> Array:
        """The view of attributes (n, A), learnt on pictures of other classes; the rows of the table join the prototypes."""
        place = {name: i for i, name in enumerate(table.names)}
        file = str(self.arguments["attributes"])
        missing = next((c.name for c in self.classes if c.name not in place), None)
        if missing is not None:
            raise DataError(f"has no row for the class {missing!r}", file=file)
        numbers = np.array([place.get(n, -1) for n in self.manifest.class_names] + [-1], np.int64)
        labels = numbers[self.manifest.right_labels[self.auxiliary]]
        known, asked = features[self.auxiliary][labels >= 0], features[self.rows]
        labels = labels[labels >= 0]
        if not len(labels):
            raise DataError(
                "attributes are learnt on labelled pictures of other classes that have a row, and there is none",
                file=file,
            )
        own = table.values[[place[c.name] for c in self.classes]]
        probabilities = attribute_probabilities(known, labels, table.values, asked)
        share = (table.values > 0.5)[labels].mean(0)
        direct = direct_attribute_prediction(probabilities, own, share)
        self.baselines["direct attribute prediction"] = np.asarray(direct.argmax(1), np.int64)
        mean = table.values[labels].mean(0)  # to which the regression shrinks: cosines are taken from there
        prototypes.append(own - mean)
        return np.asarray(predicted_words(known, labels, table.values, asked) - mean)

    def _nearest(self, views: list[Array], prototypes: list[Array | None]) -> dict[str, npt.NDArray[np.int64]]:
        """What one gets without looking at all pictures at once, and by one view: its name, and the classes."""
        described = [(x, p) for x, p in zip(views, prototypes, strict=True) if p is not None]
        if not described:
            together = np.hstack(views)
            means = np.stack([together[self.seen == c].mean(0) for c in range(len(self.classes))])
            return {"nearest class mean": nearest_prototype(together, means)}
        found = (
            {} if self.arguments["definitions"] is None else {"nearest class text": nearest_prototype(*described[0])}
        )
        return found if self.attributes is None else found | {"nearest attributes": nearest_prototype(*described[-1])}

    def finish(self) -> None:
        """Write the labels, a picture of them, a classifier where there is an encoder, and what was measured."""
        found = np.asarray(self.model.transduction_, np.int64)
        known = self.seen >= 0
        found[known] = self.seen[known]  # what a person said stays
        self.found = found
        self.confidence = np.where(known, 1.0, self.model.label_distributions_[np.arange(len(found)), found])
        names = [c.name for c in self.classes]
        table = pa.table(
            {
                "id": self.manifest.column("id")[self.rows].tolist(),
                "given": [names[c] if c >= 0 else "" for c in self.seen],
                "found": [names[c] for c in found],
                "confidence": self.confidence.astype(np.float32),
                "seen": known,
                "sha256": self.manifest.column("sha256")[self.rows].tolist(),
            }
        )
        write_atomically(self.out / "labels.parquet", lambda path: pq.write_table(table, path))
        write_atomically(self.out / "labels.png", lambda path: self.picture().save(path, format="PNG"))
        files = {"class of every picture": "labels.parquet", "picture of the classes": "labels.png"}
        if self.arguments["views"][0] not in DESCRIPTIONS:
            self._save_model(names)
            files["model"] = "model"
        asked = ~known & (self.truth >= 0)
        correct = {"": found == self.truth} | {f"{k}: ": v == self.truth for k, v in self.baselines.items()}
        groups = self.manifest.column("group")[self.rows][asked]
        scores: dict[str, Any] = {}
        for prefix, right in correct.items() if asked.any() else ():
            scores |= _scores(right[asked], self.truth[asked], groups, prefix)
        agreement = [round(float(w), 4) for w in self.model.view_weights_]
        write_json(
            self.out / "metrics.json",
            {
                "pictures": len(found), "labelled": int(known.sum()), "found": int((~known).sum()), "classes": len(names),
                "skipped": self.manifest.skipped.num_rows,
                "agreement_of_views": agreement, "seconds": self.seconds,
                "memory_gib": peak_memory_gib(),
                "scores": scores, "files": files,
            },
        )  # fmt: skip

    def _save_model(self, names: list[str]) -> None:
        """A classifier of other pictures by the means of what was found."""
        encoder = image_encoder(self.arguments["views"][0], pretrained=True, size=self.arguments["image_size"])
        features = self.view(self.arguments["views"][0])[self.rows]
        features /= np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
        means = np.stack([features[self.found == c].sum(0) for c in range(len(names))])
        model = Classifier.of(
            encoder,
            self.arguments["views"][0],
            names,
            torch.from_numpy(means).float(),
            rule="cosine",
            temperature=0.05,
            crop=1.0,
        )
        card = (
            f"# Classifier of {len(names)} classes\n\nClasses: {', '.join(names)}\n\nBy the cosine to class means of "
            f"{len(self.found)} pictures, {int((self.seen >= 0).sum())} of them labelled, the others by TMV-HLP.\n"
        )
        model.save(self.out / "model", card)

    def picture(self, *, most: int = 20, tile: int = 48) -> Image.Image:
        """A row per class, at most so many: three labelled pictures (framed), the surest and the least sure of those found."""
        order = np.lexsort((-self.confidence, self.found))
        shown = range(min(len(self.classes), most))
        sheet = Image.new("RGB", (150 + 16 * (tile + 4), 24 + len(shown) * (tile + 6)), "white")
        draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
        for x, told in (
            (150, "labelled"),
            (150 + 3 * (tile + 4) + 8, "surest"),
            (150 + 10 * (tile + 4) + 8, "least sure"),
        ):
            draw.text((x, 4), told, fill="black", font=font)
        for line, c in enumerate(shown):
            y = 24 + line * (tile + 6)
            draw.text((6, y + tile // 2 - 8), self.classes[c].name[:20], fill="black", font=font)
            mine = order[self.found[order] == c]
            known, found = mine[self.seen[mine] >= 0][:3], mine[self.seen[mine] < 0]
            for place, row in [*enumerate(known), *enumerate(found[:7], 3), *enumerate(found[7:][-6:], 10)]:
                x = 150 + place * (tile + 4) + (8 if place >= 3 else 0)
                pixels = decode_image(self.manifest.read_bytes(int(self.rows[row])))
                small = Image.fromarray(pixels)
                small = small.resize(
                    (tile, tile), Image.Resampling.NEAREST if max(small.size) < tile else Image.Resampling.BOX
                )
                sheet.paste(small, (x, y))
                if place < 3:
                    draw.rectangle((x - 1, y - 1, x + tile, y + tile), outline="#0b62a4", width=2)
        return sheet

    def evaluate(
        self,
        run: Path,
        data: str,
        *,
        label_column: str | None = None,
        image_column: str | None = None,
        group_column: str | None = None,
        split: str | None = None,
    ) -> dict[str, Any]:
        """Accuracy of the classes that were found, by right labels of the same pictures, which are known by their content.

        Parameters
        ----------
        run : path
            Finished run.
        data : str
            The pictures of the run, or some of them, with labels that are right.
        label_column, image_column, group_column, split : str, optional
            As in ``contralto evaluate``.

        Returns
        -------
        dict
            `scores`, and how many pictures they are of.
        """
        if not (run / "labels.parquet").is_file():
            raise DataError("there is no labels.parquet: the run is not finished", file=str(run))
        with naming(run / "labels.parquet"):
            table = pq.read_table(run / "labels.parquet")
            found = dict(zip(table["sha256"].to_pylist(), table["found"].to_pylist(), strict=True))
            seen = {s for s, k in zip(table["sha256"].to_pylist(), table["seen"].to_pylist(), strict=True) if k}
        manifest = ingest(
            data, label_column=label_column, image_column=image_column, group_column=group_column, image_filter=False
        )
        truth, (wanted, inside) = manifest.right_labels, manifest.split_of(split)
        content = manifest.column("sha256")
        there = np.array([s in found and s not in seen for s in content.tolist()])
        rows = np.flatnonzero(there & inside & (truth >= 0))
        if not len(rows):
            raise DataError("none of these pictures was found a class for in the run, and has a label here", file=data)
        names = manifest.class_names
        right = np.array([found[content[r]] == names[truth[r]] for r in rows])
        return {
            "n": len(rows),
            "split": wanted,
            "scores": _scores(right, truth[rows], manifest.column("group")[rows], ""),
        }


def _scores(right: Array, labels: Array, groups: Array, prefix: str) -> dict[str, Any]:
    out = {}
    for told, macro in (("accuracy", False), ("mean over classes", True)):
        out[prefix + told] = accuracy_interval(right.astype(float), labels, groups=groups, macro=macro).score()
    return out
