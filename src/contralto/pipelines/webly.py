"""The main job: from noisy web images to a clean classifier, the list of wrong images, and corrected labels.

`fit_capro` is the whole job. Its stages are functions over a run folder that can be called one by one; each keeps its
result there, so an interrupted job continues where it stopped:

    ingest -> [plain] -> vanilla -> features, neighbours, texts, matching -> capro -> cleaned list -> finetune
           -> model -> evaluation -> report

Nothing that learns sees the clean labels: `_fields` is the only door between the manifest and a training.
"""

import hashlib
import inspect
import json
import resource
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata, resources
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.utils.data import DataLoader

from contralto.data.dataset import Batch, EpochSampler, FeatureDataset, ImageDataset
from contralto.data.definitions import ClassText, class_text, fill_definitions, load_definitions
from contralto.data.images import decode_image
from contralto.data.ingest import ingest
from contralto.data.manifest import Manifest
from contralto.data.sources import ByteReader
from contralto.data.text import clean_texts, drop_even_words, words_of
from contralto.encoders.features import cached_array, encode_batches
from contralto.encoders.image import ImageEncoder, image_encoder
from contralto.encoders.text import encode_distinct, text_encoder
from contralto.errors import DataError, UsageError
from contralto.evaluation.classification import accuracy_interval, calibration_error
from contralto.evaluation.noise import noise_metrics
from contralto.files import naming, remove_leftovers, write_atomically
from contralto.neighbors.graph import Edge, Normalisation, adjacency, smooth
from contralto.neighbors.matching import Match, Matching, match_texts, select_anchors
from contralto.neighbors.rerank import neighbour_graph
from contralto.pipelines.outputs import environment, model_card, write_cleaned_csv
from contralto.prototypes.correction import Verdict, correct_labels, flagged, probability_wrong
from contralto.systems.webly.base import scale_rule
from contralto.systems.webly.capro import EXTENSIONS, CAPro, Stage, stage_epochs
from contralto.systems.webly.model import WebClassifier
from contralto.systems.webly.reconcile import MIN_WORTH, Reconciled, reconcile, soft_targets, sure_anchors
from contralto.training.fit import fit_stage
from contralto.views.image import EvalView, View, draw_views, strong_view, view_generator, weak_view

__all__ = ["PRESETS", "Job", "estimate_cost", "fit_capro", "load_preset"]

PRESETS = ("webvision1k", "google500", "small")
FREE = ("checkpoint_every",)
"""Arguments on which no result depends: a run may go on with other ones."""
Array = npt.NDArray[Any]


def load_preset(name: str) -> dict[str, Any]:
    """Arguments of a preset.

    Examples
    --------
    >>> load_preset("google500")["epochs"]
    120
    """
    if name not in PRESETS:
        raise UsageError(f"no preset is called {name!r}: there are {', '.join(PRESETS)}")
    text = resources.files("contralto.systems.webly").joinpath(f"presets/{name}.yaml").read_text(encoding="utf-8")
    return dict(yaml.safe_load(text))


def fit_capro(
    data: str,
    out: str | Path,
    *,
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
    image_encoder: str = "resnet50",
    pretrained: bool = False,
    image_size: int | None = 224,
    crop: float = 0.875,
    frozen_features: bool = False,
    feature_views: int = 2,
    text_encoder: str = "minilm",
    class_text: ClassText = "name+definition",
    text_words: Literal["english", "any", "raw"] = "raw",
    drop_even: bool = False,
    enhance: bool = True,
    use_rerank: bool = True,
    neighbours: int = 20,
    kept_neighbours: int = 5,
    k1: int = 20,
    k2: int = 6,
    rerank_weight: float = 0.3,
    edge: Edge = "similarity",
    self_weight: float | None = None,
    normalisation: Normalisation | None = None,
    degree: int = 1,
    match: Match = "rerank",
    anchors: int | None = 50,
    reconcile: bool = False,
    batch_size: int = 256,
    class_balanced: bool = False,
    sample_weights: Literal["none", "frequency", "text"] = "none",
    baseline: bool = True,
    workers: int = 2,
    accelerator: str = "auto",
    devices: int = 1,
    precision: str = "32-true",
    strategy: str = "auto",
    seed: int = 1024,
    cache: str | Path | None = None,
    checkpoint_every: int = 1000,
    progress: bool = True,
    **system: Any,
) -> Path:
    """Train a classifier on noisy web images, and say which images are wrong.

    Parameters
    ----------
    data : str
        Path or fsspec address of the images with their texts, in any form of `contralto.data.sources`.
    out : path
        Run folder. Called again with the same arguments, the job continues where it stopped.
    definitions : path, optional
        Definitions file (`contralto.data.definitions`); missing definitions come from dictionaries at hand.
    image_column, label_column, text_column, id_column, split_column, clean_column, group_column : str, optional
        Columns, where their names are not common ones.
    allow_outside, image_filter, min_side, blank_share
        See `contralto.data.ingest.ingest`.
    image_encoder : str
        Name of the encoder; `pretrained` loads its weights; `image_size` and `crop` are the side of the input and the
        share of it that the test view shows.
    frozen_features : bool
        Never train the encoder: its features of `feature_views` weak and strong views are computed once.
    text_encoder : str
        "minilm", "tfidf", or a sentence-transformers name.
    class_text : {"name+definition", "definition", "name"}
        What stands for a class.
    text_words : {"raw", "english", "any"}
        Texts as found, or cleaned (CAPro 0.4) of what is not in a list of English words, or of junk only.
    drop_even : bool
        Drop words spread evenly over the classes, such as brands.
    enhance : bool
        Smooth the texts over visual neighbours (CAPro 3), by `use_rerank`, `neighbours`, `kept_neighbours`, `k1`, `k2`,
        `rerank_weight`, `edge`, `self_weight`, `normalisation`, `degree`.
    match : {"rerank", "cosine", "discriminative"}
        How texts and definitions are compared (CAPro 4).
    anchors : int, optional
        K per class; negative = random ones; None = by `scale_rule`.
    reconcile : bool
        Extension: weigh web label, text and looks against each other (`contralto.systems.webly.reconcile`). The posterior
        judges the labels in place of the rule of CAPro 5.6, chooses the anchors, and is learnt from as soft labels. The rule
        judges them where the texts say nothing about the labels.
    batch_size : int
    class_balanced : bool
        Extension: draw all classes equally often, in every stage and in the baseline.
    sample_weights : {"none", "frequency", "text"}
        CAPro 6.3: n_c / median(n), or the text's cosine to its class (images with a negative one are left out).
    baseline : bool
        Train the plain baseline too when there are clean test labels.
    workers, accelerator, devices, precision, strategy
        Of loaders and Lightning's Trainer; `devices` must be 1 yet.
    seed : int
        Of everything that is drawn, but for the views of `frozen_features`, which are the same for all seeds.
    cache : path, optional
        Folder for features, shared between runs; default: `features` in the run folder.
    checkpoint_every : int
        Steps between checkpoints, and so the most that a killed run trains again; it may change when a run goes on.
    progress : bool
        Show what is going on.
    **system
        Arguments of `CAPro`: epochs, rates, thresholds.

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
    job = Job(str(data), Path(out), arguments, progress)
    job.claim()
    job.ingest()
    if baseline and job.has_test:
        job.train("plain")
    job.train("vanilla")
    job.match()
    job.train("capro")
    job.clean()
    job.train("finetune")
    job.save_model()
    job.evaluate()
    job.report()
    return job.out


@dataclass
class Job:
    """The stages of one job over its run folder, for those who want to call them one by one.

    Parameters
    ----------
    data : str
    out : Path
    arguments : dict
        All arguments of `fit_capro` and of `CAPro`.
    progress : bool
    """

    data: str
    out: Path
    arguments: dict[str, Any]
    progress: bool = True
    seconds: dict[str, float] = field(default_factory=dict)
    modules: dict[str, CAPro] = field(default_factory=dict)

    def __post_init__(self) -> None:
        known = set(inspect.signature(fit_capro).parameters) | set(inspect.signature(CAPro.__init__).parameters)
        unknown = sorted(set(self.arguments) - known)
        if unknown:
            raise UsageError(f"there is no argument {unknown[0]!r}")
        defaults = {
            k: p.default
            for f in (CAPro.__init__, fit_capro)
            for k, p in inspect.signature(f).parameters.items()
            if p.default is not p.empty and k not in ("progress", "stage")
        }
        self.arguments = defaults | self.arguments
        if self.arguments["devices"] != 1:
            raise UsageError("this job trains on one device; CAPro itself runs on several under a Trainer of your own")
        self.console = Console(stderr=True, quiet=not self.progress)

    @property
    def cache(self) -> Path:
        """Where features are kept."""
        return Path(self.arguments["cache"] or self.out / "features")

    # The run folder.

    def claim(self) -> None:
        """Make the folder, or make sure that it holds the same job."""
        path = self.out / "config.json"
        config: dict[str, Any] = {
            "system": "capro",
            "version": metadata.version("contralto"),
            "data": self.data,
            "arguments": {k: str(v) if isinstance(v, Path) else v for k, v in sorted(self.arguments.items())},
            "extensions": self._extensions(),
        }
        if path.exists() and (self.out / "manifest").exists():
            with naming(path):
                before = dict(json.loads(path.read_text(encoding="utf-8")))
            ours, theirs = (
                {k: v for k, v in c.get("arguments", {}).items() if k not in FREE} for c in (config, before)
            )
            if before.get("data") != self.data or ours != theirs:
                changed = sorted(k for k in ours.keys() | theirs.keys() if ours.get(k) != theirs.get(k))
                raise UsageError(
                    f"{self.out} holds a run with other arguments ({', '.join(changed) or 'data'}): choose another --out, "
                    f"or delete that folder"
                )
        elif not path.exists() and self.out.exists() and any(self.out.iterdir()):
            raise UsageError(f"{self.out} is not empty and holds no run: choose another --out")
        self.out.mkdir(parents=True, exist_ok=True)
        remove_leftovers(self.out)
        self._write_json("config.json", config)
        self._write_json("environment.json", environment())
        if (self.out / "seconds.json").exists():
            with naming(self.out / "seconds.json"):
                self.seconds = dict(json.loads((self.out / "seconds.json").read_text(encoding="utf-8")))

    def _extensions(self) -> list[str]:
        return [e for e in EXTENSIONS if self.arguments[e] != _default(e)]

    def _write_json(self, name: str, value: Any) -> None:
        text = json.dumps(value, indent=1, ensure_ascii=False)
        write_atomically(self.out / name, lambda path: path.write_text(text + "\n", encoding="utf-8"))

    @contextmanager
    def _timed(self, name: str, told: str) -> Iterator[None]:
        self.console.print(f"[bold]{name}[/bold]  {told}", highlight=False, soft_wrap=True)
        started = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + round(time.perf_counter() - started, 2)
        self._write_json("seconds.json", self.seconds)

    # Data.

    def ingest(self) -> Manifest:
        """Read the data into the manifest of the run, once."""
        a = self.arguments
        folder = self.out / "manifest"
        if not (folder / "manifest.parquet").exists():
            with self._timed("ingest", f"reading {self.data}"):
                classes = None if a["definitions"] is None else load_definitions(a["definitions"])
                columns = {k: a[k] for k in a if k.endswith("_column")}
                with self.console.status("reading") as status:
                    manifest = ingest(
                        self.data,
                        classes=classes,
                        **columns,
                        image_filter=a["image_filter"],
                        min_side=a["min_side"],
                        blank_share=a["blank_share"],
                        workers=a["workers"],
                        allow_outside=a["allow_outside"],
                        progress=lambda n: status.update(f"{n} pictures read") if n % 100 == 0 else None,
                    )
                filled, _ = fill_definitions(manifest.classes)
                part = folder.with_name(".manifest.part")
                Manifest(manifest.table, filled, manifest.root, manifest.skipped).save(part)
                part.rename(folder)
        self.manifest = Manifest.load(folder)
        train = (self.manifest.column("split") == "train") & (self.manifest.labels >= 0)
        test = (self.manifest.column("split") == "test") & (self.manifest.column("clean_label") >= 0)
        if not train.any():
            raise DataError("no picture has a given label and belongs to the split 'train'", file=self.data)
        self.train_rows, self.test_rows = np.flatnonzero(train), np.flatnonzero(test)
        self.labels = self.manifest.labels[self.train_rows]
        self.num_classes = len(self.manifest.classes)
        if self.num_classes < 2:
            raise DataError(f"at least two classes are needed, found {self.manifest.class_names}", file=self.data)
        skipped, texts = self.manifest.skipped.num_rows, sum(bool(t.strip()) for t in self.manifest.texts)
        self.console.print(
            f"  {len(self.manifest)} pictures, {self.num_classes} classes, {texts} with text, {skipped} skipped; "
            f"{len(self.train_rows)} to train on, {len(self.test_rows)} with clean test labels",
            soft_wrap=True,
        )
        for key, value in scale_rule(len(self.train_rows), self.num_classes).items():
            if self.arguments[key] is None:
                self.arguments[key] = value
        queue = self.arguments["queue_size"]
        if queue < self.arguments["batch_size"] * self.arguments["devices"]:
            raise UsageError(f"queue_size {queue} is smaller than a batch of {self.arguments['batch_size']}")
        arguments = {k: v for k, v in self.arguments.items() if k not in FREE}
        self._fingerprint = hashlib.sha256(
            json.dumps([self.manifest.fingerprint(), arguments | {"cache": None}], sort_keys=True, default=str).encode()
        ).hexdigest()[:16]
        return self.manifest

    @property
    def has_test(self) -> bool:
        """Whether there are pictures with clean labels to test on."""
        return len(self.test_rows) > 0

    def read_image(self, row: int) -> npt.NDArray[np.uint8]:
        """Decode the picture of one row of the manifest."""
        return decode_image(self.read_bytes(row))

    def read_bytes(self, row: int) -> bytes:
        """The encoded picture of one row of the manifest."""
        if not hasattr(self, "_reader"):
            self._reader = ByteReader(self.manifest.root)
            names = ("source", "container", "member", "offset", "length")
            self._places = list(zip(*(self.manifest.table.column(n).to_pylist() for n in names), strict=True))
        return self._reader.read(*self._places[row])

    # Encoder, views and features.

    def encoder(self) -> ImageEncoder:
        """The image encoder as it is before any training; a seeded one if it has no weights."""
        a = self.arguments
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(a["seed"])
            return image_encoder(a["image_encoder"], pretrained=a["pretrained"], size=a["image_size"])

    def _views(self, encoder: ImageEncoder) -> tuple[EvalView, View, View]:
        a = self.arguments
        size = a["image_size"] or encoder.size
        normal = (encoder.mean, encoder.std)
        return EvalView(size, a["crop"], *normal), weak_view(size, *normal), strong_view(size, *normal)

    def features(self, encoder: ImageEncoder, rows: Array, view: View | EvalView, variant: int, told: str) -> Array:
        """Features (N, D) of one view of some pictures, from the cache or computed."""
        key = {
            "encoder": encoder.fingerprint(), "view": repr(view), "variant": variant,
            "rows": hashlib.sha256(rows.tobytes()).hexdigest(), "data": self.manifest.fingerprint(),
        }  # fmt: skip

        def compute() -> Array:
            dataset = _Pictures(self.read_bytes, rows, view, 0, variant)
            loader = DataLoader(dataset, batch_size=64, num_workers=0)
            batches = track(
                loader,
                f"  {told}",
                console=self.console,
                transient=True,
                disable=not (self.progress and self.console.is_terminal),
                total=len(loader),
            )
            return encode_batches(encoder, batches, device=self._device())

        return cached_array(self.cache, "image", key, compute)

    def _device(self) -> str:
        wanted = self.arguments["accelerator"]
        if wanted in ("gpu", "cuda") or (wanted == "auto" and torch.cuda.is_available()):
            return "cuda"
        return "mps" if wanted == "mps" else "cpu"

    # Training.

    def _fields(self, stage: Stage, rows: Array | None = None, labels: Array | None = None) -> dict[str, Tensor]:
        """All that a training learns from, besides pixels; `rows` and `labels` choose and replace."""
        n = len(self.labels)
        rows = np.arange(n) if rows is None else rows
        labels = self.labels if labels is None else labels
        fields = {
            "label": torch.from_numpy(labels[rows]),
            "anchor": torch.from_numpy(self.anchors[rows] if hasattr(self, "anchors") else np.zeros(len(rows), bool)),
            "weight": torch.from_numpy(self._weights()[rows]),
        }
        if self.arguments["text_weight"] > 0 and hasattr(self, "matching"):
            fields["text_scores"] = torch.from_numpy(np.ascontiguousarray(self.matching.probability[rows]))
        if self._is_reconciled(stage):
            fields["posterior"] = torch.from_numpy(self.reconciled.posterior[rows])
            fields["target"] = torch.from_numpy(self.soft_labels[rows])
        return fields

    def _is_reconciled(self, stage: Stage) -> bool:
        return stage in ("capro", "finetune") and hasattr(self, "reconciled")

    def _weights(self) -> npt.NDArray[np.float32]:
        form = self.arguments["sample_weights"]
        if form == "frequency":
            count = np.bincount(self.labels, minlength=self.num_classes)
            return (count[self.labels] / np.median(count[count > 0])).astype(np.float32)
        if form == "text" and hasattr(self, "matching"):
            return self.matching.cosine.clip(0).astype(np.float32)
        return np.ones(len(self.labels), np.float32)

    def train(self, stage: Stage) -> CAPro:
        """Train one stage, or load it if the run folder has it."""
        a = self.arguments
        epochs = stage_epochs(a, stage)
        done = (self.out / "stages" / stage / "done.json").exists()
        with self._timed(stage, "done before" if done else f"{epochs} epochs"):
            encoder = self.encoder()
            body: nn.Module = nn.Identity() if a["frozen_features"] else encoder
            module = CAPro(body, self.num_classes, encoder.num_features, stage=stage, **_system_arguments(a))
            before = {"capro": "vanilla", "finetune": "capro"}.get(stage)
            if before is not None:
                module.load_state_dict(self.modules[before].state_dict())
            rows, labels = None, None
            if stage == "finetune" and self._is_reconciled(stage):
                labels = np.where(self.new_labels >= 0, self.new_labels, self.labels)
            elif stage == "finetune":
                rows, labels = np.flatnonzero(self.new_labels >= 0), np.maximum(self.new_labels, 0)
            elif a["sample_weights"] == "text" and hasattr(self, "matching"):
                rows = np.flatnonzero(self.matching.cosine >= 0)
            loader = None if done else self._loader(encoder, stage, rows, labels)
            if stage == "capro":
                module.anchor_batches = lambda: self._eval_batches(encoder, np.flatnonzero(self.anchors))
            fit_stage(
                module,
                loader,
                self.out / "stages" / stage,
                epochs=epochs,
                fingerprint=self._fingerprint,
                checkpoint_every=a["checkpoint_every"],
                progress=self.progress,
                trainer={k: a[k] for k in ("accelerator", "devices", "precision", "strategy")},
            )
        self.modules[stage] = module
        return module

    def _loader(self, encoder: ImageEncoder, stage: Stage, rows: Array | None, labels: Array | None) -> DataLoader[Any]:
        a = self.arguments
        chosen = np.arange(len(self.labels)) if rows is None else rows
        fields = self._fields(stage, chosen, labels)
        _, weak, strong = self._views(encoder)
        views = [weak] if stage == "plain" else [weak, strong]
        seed = a["seed"]
        if a["frozen_features"]:
            arrays = [
                np.stack(
                    [
                        self.features(encoder, self.train_rows, v, i, f"{n} view {i + 1}")[chosen]
                        for i in range(a["feature_views"])
                    ]
                )
                for v, n in zip(views, ("weak", "strong"), strict=False)
            ]
            dataset: Any = FeatureDataset(arrays, fields, seed=seed)
        else:
            dataset = ImageDataset(lambda i: self.read_bytes(int(self.train_rows[chosen[i]])), fields, views, seed=seed)
        draw: dict[str, Array] = {"labels": fields["label"].numpy()} if a["class_balanced"] else {}
        if self._is_reconciled(stage):
            share = self.soft_share[chosen]
            draw = {"share": share / share.sum()}
        return DataLoader(
            dataset,
            batch_size=min(a["batch_size"], len(chosen)),
            sampler=EpochSampler(len(chosen), seed=seed, **draw),
            num_workers=0 if a["frozen_features"] else a["workers"],
            collate_fn=_as_it_is if a["frozen_features"] else None,
            drop_last=True,
        )

    def _eval_batches(self, encoder: ImageEncoder, rows: Array) -> Iterator[Batch]:
        """Evaluation view (or its features) and given labels of some training rows."""
        view, frozen = self._views(encoder)[0], self.arguments["frozen_features"]
        features = self.features(encoder, self.train_rows, view, 0, "eval view") if frozen else None
        for start in range(0, len(rows), 256):
            part = rows[start : start + 256]
            if features is not None:
                x = torch.from_numpy(features[part].astype(np.float32))
            else:
                x = torch.stack([_Pictures(self.read_bytes, self.train_rows, view, 0, 0)[int(i)] for i in part])
            batch = {"views": [x], "label": torch.from_numpy(self.labels[part]), "index": torch.from_numpy(part)}
            if self.arguments["text_weight"] > 0:
                batch["text_scores"] = torch.from_numpy(np.ascontiguousarray(self.matching.probability[part]))
            yield batch

    # Neighbours, texts, matching.

    def match(self) -> Matching:
        """CAPro 3 and 4: enhance the texts over visual neighbours, match them, choose anchors."""
        a = self.arguments
        with self._timed("matching", f"{a['text_encoder']} texts against {self.num_classes} definitions"):
            texts = self._clean_texts()
            encoder = text_encoder(a["text_encoder"])
            classes = [class_text(c, a["class_text"]) for c in self.manifest.classes]
            encoder.fit([*texts, *classes])

            def encode(different: list[str]) -> Array:
                key = {
                    "encoder": encoder.fingerprint(),
                    "texts": hashlib.sha256(json.dumps(different).encode()).hexdigest(),
                }
                return cached_array(self.cache, "text", key, lambda: encoder.encode(different))

            own, class_rows = encode_distinct(texts, encode), encoder.encode(classes)
            rows = own
            if a["enhance"]:
                index, distance = self.neighbour_graph()
                graph = adjacency(index, distance, edge=a["edge"])
                form = {k: a[k] for k in ("edge", "self_weight", "normalisation", "degree")}
                rows = smooth(rows, graph, **form)
            ranking = {"k1": a["k1"], "k2": a["k2"], "weight": a["rerank_weight"]}
            self.matching = match_texts(rows, class_rows, self.labels, method=a["match"], **ranking)
            self.anchors = select_anchors(
                self.matching, self.labels, a["anchors"], generator=np.random.default_rng([a["seed"], 1])
            )
        if a["reconcile"]:
            self._reconcile(texts, own, class_rows)
        self._save_matching()
        return self.matching

    def _reconcile(self, texts: list[str], text_rows: Array, class_rows: Array) -> None:
        """The posterior of all witnesses and, where it has something to say, anchors by it."""
        with self._timed("reconciling", "web labels, texts and looks"):
            encoder = self._vanilla_encoder()
            features = self.features(encoder, self.train_rows, self._views(encoder)[0], 0, "eval view")
            key = {
                "features": encoder.fingerprint(), "data": self.manifest.fingerprint(), "classes": self.manifest.class_names,
                "view": repr(self._views(encoder)[0]), "seed": self.arguments["seed"],
                "texts": hashlib.sha256(text_rows.tobytes() + class_rows.tobytes()).hexdigest(),
            }  # fmt: skip

            def compute() -> Array:
                names = self.manifest.class_names
                found = reconcile(
                    features, texts, text_rows, class_rows, names, self.labels, seed=self.arguments["seed"]
                )
                if found is None:
                    return np.zeros((1, 1))  # an empty array cannot be mapped
                told = np.full((len(texts), 2), [found.worth, found.trust])
                return np.concatenate([found.posterior, found.off_topic[:, None], found.looks, told], 1)

            stored = cached_array(self.cache, "reconciled", key, compute)
            if stored.shape[1] == 1:
                self.console.print(
                    f"  the texts tell less than {MIN_WORTH:.0%} of the labels: nothing to reconcile them with; the rule "
                    f"of CAPro 5.6 judges them",
                    soft_wrap=True,
                )
                return
            c = self.num_classes
            self.reconciled = Reconciled(
                np.ascontiguousarray(stored[:, :c], np.float32),
                np.ascontiguousarray(stored[:, c], np.float32),
                np.ascontiguousarray(stored[:, c + 1 : 2 * c + 1], np.float32),
                *map(float, stored[0, -2:]),
            )
            self.soft_labels, self.soft_share = soft_targets(
                self.reconciled.posterior, balanced=self.arguments["class_balanced"]
            )
            self.console.print(
                f"  {self.reconciled.trust:.0%} of the texts are about their picture, by estimate; "
                f"{self.reconciled.off_topic.mean():.0%} of the pictures are off-topic",
                soft_wrap=True,
            )
            if self.arguments["anchors"] >= 0:
                rows = np.arange(len(self.labels))
                own = self.reconciled.posterior[rows, self.labels]
                # Trusted for good, so both must say so: all witnesses together, and the text alone.
                score = own * self.matching.probability[rows, self.labels]
                self.anchors = sure_anchors(own, self.labels, self.arguments["anchors"], score=score)

    def _clean_texts(self) -> list[str]:
        a = self.arguments
        every = self.manifest.texts
        texts = [every[i] for i in self.train_rows]
        keep = {w for c in self.manifest.classes for s in (c.name, c.definition, *c.queries) for w in words_of(s)}
        if a["text_words"] != "raw":
            texts = clean_texts(texts, keep=keep, words=a["text_words"])
        if a["drop_even"]:
            texts = drop_even_words([" ".join(words_of(t)) for t in texts], self.labels, self.num_classes, keep=keep)
        return texts

    def neighbour_graph(self) -> tuple[Array, Array]:
        """Visual neighbours of the training pictures, by the encoder of the vanilla stage."""
        a = self.arguments
        encoder = self._vanilla_encoder()
        features = self.features(encoder, self.train_rows, self._views(encoder)[0], 0, "eval view")
        key = {
            "encoder": encoder.fingerprint(), "data": self.manifest.fingerprint(),
            "image_size": a["image_size"], "crop": a["crop"],
            **{k: a[k] for k in ("neighbours", "kept_neighbours", "use_rerank", "k1", "k2", "rerank_weight")},
        }  # fmt: skip

        def compute() -> Array:
            index, distance = neighbour_graph(
                features, candidates=a["neighbours"], k=a["kept_neighbours"], use_rerank=a["use_rerank"], k1=a["k1"],
                k2=a["k2"], weight=a["rerank_weight"],
            )  # fmt: skip
            return np.stack([index.astype(np.float64), distance.astype(np.float64)])

        stored = cached_array(self.cache, "graph", key, compute)
        return stored[0].astype(np.int64), stored[1]

    def _vanilla_encoder(self) -> ImageEncoder:
        encoder = self.encoder()
        if not self.arguments["frozen_features"]:
            encoder.load_state_dict(self.modules["vanilla"].encoder.state_dict())
        return encoder.eval()

    def _save_matching(self) -> None:
        m = self.matching
        table = pa.table(
            {
                "index": self.train_rows, "distance": m.distance, "cosine": m.cosine, "rank": m.rank,
                "text_match": m.probability[np.arange(len(m.rank)), self.labels], "anchor": self.anchors,
            }
        )  # fmt: skip
        write_atomically(self.out / "matching.parquet", lambda path: pq.write_table(table, path))

    # What comes out.

    def scores(self, stage: Stage = "capro") -> dict[str, Array]:
        """Scores of the training pictures by CAPro 6.1, `classifier`, `auxiliary`, `prototype`, `fused`, `embedding`."""
        module = self.modules[stage].eval().cpu()
        encoder = self.encoder()
        parts: dict[str, list[Tensor]] = {}
        for batch in self._eval_batches(encoder, np.arange(len(self.labels))):
            for key, value in module.score(batch["views"][0], batch.get("text_scores")).items():
                parts.setdefault(key, []).append(value)
        out = {k: torch.cat(v).numpy() for k, v in parts.items()}
        return out | ({"fused": self.reconciled.posterior} if self._is_reconciled(stage) else {})

    def clean(self) -> pa.Table:
        """The cleaned list (CAPro 6.1): a verdict, a new label and all scores for every training picture."""
        a = self.arguments
        with self._timed("cleaning", "judging every label"):
            s = self.scores()
            result = correct_labels(
                torch.from_numpy(s["fused"]), torch.from_numpy(self.labels), torch.from_numpy(self.anchors),
                threshold=a["threshold"], keep_threshold=a["keep_threshold"],
            )  # fmt: skip
            verdict = result.verdict.numpy()
            self.new_labels = np.where(verdict == Verdict.OFF_TOPIC, -1, result.labels.numpy())
            table = self._cleaned_table(s, verdict)
            write_atomically(self.out / "cleaned.parquet", lambda path: pq.write_table(table, path))
            write_cleaned_csv(table, self.out / "cleaned.csv")
            self.embedding = s["embedding"]
        return table

    def _cleaned_table(self, s: dict[str, Array], verdict: Array) -> pa.Table:
        names = np.array(self.manifest.class_names, dtype=object)
        rows, given = np.arange(len(self.labels)), self.labels
        best = s["fused"].argmax(1)
        m = self.matching
        similarity = s["embedding"] @ self.modules["capro"].prototypes.cpu().numpy().T
        nearest = np.argsort(-similarity, axis=1, kind="stable")[:, :3]
        columns: dict[str, Any] = {
            "index": self.train_rows,
            "id": self.manifest.column("id")[self.train_rows].tolist(),
            "given": names[given].tolist(),
            "verdict": [Verdict(int(v)).word for v in verdict],
            "new": [names[n] if n >= 0 else "" for n in self.new_labels],
        }
        for prefix, labels in (("given", given), ("new", best)):
            for score in ("classifier", "auxiliary", "prototype", "fused"):
                columns[f"{prefix}_{score}"] = s[score][rows, labels].astype(np.float32)
        return pa.table(
            columns
            | {
                "text_match": m.probability[rows, given],
                "text_rank": m.rank,
                "nearest_prototypes": [names[n].tolist() for n in nearest],
                "nearest_similarities": [
                    similarity[i, n].astype(float).round(4).tolist() for i, n in enumerate(nearest)
                ],
                "p_wrong": self._p_wrong(s["fused"][rows, given]),
                "p_off_topic": self._p_off_topic(),
            }
        )

    def _p_wrong(self, given: Array) -> npt.NDArray[np.float32]:
        """A posterior is a probability; a fused score has to be made one."""
        return (1 - given if hasattr(self, "reconciled") else probability_wrong(given)).astype(np.float32)

    def _p_off_topic(self) -> pa.Array:
        """Null where nothing was reconciled."""
        if not hasattr(self, "reconciled"):
            return pa.nulls(len(self.labels), pa.float32())
        return pa.array(self.reconciled.off_topic)

    def draw_map(self) -> None:
        """Two-dimensional map of at most 3,000 pictures and the prototypes, by t-SNE."""
        from sklearn.manifold import TSNE

        embedding = self.embedding
        rng = np.random.default_rng([self.arguments["seed"], 2])
        rows = np.sort(rng.permutation(len(embedding))[:3000])
        points = np.concatenate([embedding[rows], self.modules["capro"].prototypes.cpu().numpy()])
        perplexity = min(30.0, (len(points) - 1) / 3)
        xy = TSNE(perplexity=perplexity, init="pca", max_iter=500, random_state=0, method="barnes_hut").fit_transform(
            points
        )
        index = np.concatenate([self.train_rows[rows], -1 - np.arange(self.num_classes)])
        table = pa.table({"index": index, "x": xy[:, 0].astype(np.float32), "y": xy[:, 1].astype(np.float32)})
        write_atomically(self.out / "map.parquet", lambda path: pq.write_table(table, path))

    def save_model(self) -> WebClassifier:
        """Write `model/`: weights, configuration and a model card, for `contralto.load`."""
        a, final, encoder = self.arguments, self.modules["finetune"], self.encoder()
        if not a["frozen_features"]:
            encoder.load_state_dict(final.encoder.state_dict())
        size = a["image_size"] or encoder.size
        config = {
            "encoder": a["image_encoder"], "num_features": encoder.num_features, "size": size, "crop": a["crop"],
            "mean": list(encoder.mean), "std": list(encoder.std), "classes": self.manifest.class_names,
            "hidden": a["hidden"], "dim": a["dim"], "temperature": a["temperature"],
        }  # fmt: skip
        model = WebClassifier(config, encoder)
        model.classifier.load_state_dict(final.classifier.state_dict())
        model.projector.load_state_dict(final.projector.state_dict())
        model.prototypes.copy_(final.prototypes)
        self.model = model.eval()
        model.save(self.out / "model")
        return model

    def evaluate(self) -> dict[str, Any]:
        """Compare with plain training on the clean test part, judge the noise list and the anchors; write `metrics.json`."""
        with self._timed("evaluation", "on the clean labels" if self.has_test else "no clean test labels"):
            table = pq.read_table(self.out / "cleaned.parquet")
            verdicts = table.column("verdict").to_pylist()
            metrics: dict[str, Any] = {"counts": {v.word: verdicts.count(v.word) for v in Verdict}}
            if self.has_test:
                metrics["test"] = self._test_metrics()
            clean = self.manifest.column("clean_label")[self.train_rows].astype(np.int64)
            if (clean != -2).any():
                metrics["noise"] = noise_metrics(
                    self.labels, clean, self.new_labels, flagged(verdicts), table.column("p_wrong").to_numpy()
                )
                right = (self.labels == clean)[self.anchors & (clean != -2)]
                metrics["anchors"] = {"count": int(self.anchors.sum()), "precision": float(right.mean())}
        metrics["time"] = self.seconds
        metrics["memory_gib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)
        self._write_json("metrics.json", metrics)
        self.metrics = metrics
        card = model_card(
            self.manifest.class_names,
            self.arguments,
            self._extensions(),
            metrics,
            len(self.labels),
            self.model.config["size"],
        )
        write_atomically(self.out / "model" / "README.md", lambda path: path.write_text(card, encoding="utf-8"))
        return metrics

    def _test_metrics(self) -> dict[str, Any]:
        labels = self.manifest.column("clean_label")[self.test_rows].astype(np.int64)
        groups = self.manifest.column("group")[self.test_rows]
        encoder = self.encoder()
        probabilities = {"capro": self.predict_rows("finetune", encoder, self.test_rows)}
        if "plain" in self.modules:
            probabilities["plain"] = self.predict_rows("plain", encoder, self.test_rows)
        predictions = {k: p.argmax(1) for k, p in probabilities.items()}
        out: dict[str, Any] = {"n": len(labels)}
        for name, predicted in predictions.items():
            out[name] = _intervals((predicted == labels).astype(float), labels, groups)
            confidence = probabilities[name].max(1)
            out[name]["calibration_error"] = calibration_error(predicted == labels, confidence)
        columns = {
            "index": self.test_rows, "id": self.manifest.column("id")[self.test_rows].tolist(), "group": groups.tolist(),
            "label": labels, "predicted": predictions["capro"], "confidence": probabilities["capro"].max(1),
        }  # fmt: skip
        if "plain" in predictions:
            both = (predictions["capro"] == labels).astype(float) - (predictions["plain"] == labels).astype(float)
            out["difference"] = _intervals(both, labels, groups)
            columns["plain"] = predictions["plain"]
        table = pa.table(columns)
        write_atomically(self.out / "test_predictions.parquet", lambda path: pq.write_table(table, path))
        return out

    def predict_rows(self, stage: Stage, encoder: ImageEncoder, rows: Array) -> Array:
        """Class probabilities (N, C) of some rows of the manifest by the classifier of a stage."""
        module = self.modules[stage].eval().cpu()
        view = self._views(encoder)[0]
        if self.arguments["frozen_features"]:
            features = self.features(encoder, rows, view, 0, "test view")
            with torch.inference_mode():
                return np.asarray(module(torch.from_numpy(features.astype(np.float32))).numpy())
        dataset = _Pictures(self.read_bytes, rows, view, 0, 0)
        with torch.inference_mode():
            return np.asarray(torch.cat([module(x) for x in DataLoader(dataset, batch_size=64)]).numpy())

    def report(self) -> Path:
        """Write `report.html`."""
        from contralto.review.report import write_report

        with self._timed("report", "map and page"):
            if not (self.out / "map.parquet").exists():
                self.draw_map()
            return write_report(self.out, read_image=self.read_image)


def estimate_cost(n_images: int, num_classes: int) -> dict[str, float]:
    """What the job with the `small` preset takes on this machine, from a few pictures and steps that are timed.

    Parameters
    ----------
    n_images, num_classes : int
        Training pictures and classes.

    Returns
    -------
    dict
        `minutes`, and `disk_mb` of features in the run folder.

    Examples
    --------
    >>> sorted(estimate_cost(1000, 10))
    ['disk_mb', 'minutes']
    """
    a = load_preset("small")
    encoder = image_encoder(a["image_encoder"], pretrained=False, size=a["image_size"]).eval()
    view, pixels = strong_view(a["image_size"], encoder.mean, encoder.std), torch.zeros(3, 200, 200, dtype=torch.uint8)
    with torch.inference_mode():
        encoder(torch.zeros(32, 3, a["image_size"], a["image_size"]))
        started = time.perf_counter()
        encoder(torch.stack([view(pixels, view_generator(0, 0, i, 0)) for i in range(32)]))
        per_view = (time.perf_counter() - started) / 32
    system = CAPro(
        nn.Identity(), num_classes, encoder.num_features, hidden=a["hidden"], queue_size=1024, init_proto_epoch=0,
        start_clean_epoch=0, momentum_prototype=0.99,
    )  # fmt: skip
    b = a["batch_size"]
    batch = {"views": [torch.randn(b, encoder.num_features)] * 2, "label": torch.arange(b) % num_classes,
             "anchor": torch.zeros(b, dtype=torch.bool), "weight": torch.ones(b), "index": torch.arange(b)}  # fmt: skip
    system.step(batch, epoch=1)["loss"].backward()
    started = time.perf_counter()
    for _ in range(5):
        system.step(batch, epoch=1)["loss"].backward()
    per_step = (time.perf_counter() - started) / 5 * 1.5  # the optimiser and the loader take their part
    views = 2 * _default("feature_views") + 1
    epochs = a["vanilla_epochs"] + a["epochs"] + a["finetune_epochs"]
    seconds = n_images * views * per_view + n_images / b * epochs * per_step + n_images * 0.01
    return {"minutes": seconds / 60, "disk_mb": n_images * views * encoder.num_features * 2 / 2**20}


def _intervals(correct: Array, labels: Array, groups: Array) -> dict[str, float]:
    out: dict[str, float] = {}
    for name, macro in (("accuracy", False), ("macro", True)):
        value, low, high = accuracy_interval(correct, labels, groups=groups, macro=macro)
        out |= {name: value, f"{name}_low": low, f"{name}_high": high}
    return out


class _Pictures(torch.utils.data.Dataset[Tensor]):
    """One view of some rows, for encoding; `variant` stands for the epoch in the drawing of views."""

    def __init__(
        self, read: Callable[[int], bytes], rows: Array, view: View | EvalView, seed: int, variant: int
    ) -> None:
        self.read, self.rows, self.view, self.seed, self.variant = read, rows, view, seed, variant

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Tensor:
        row = int(self.rows[i])
        generator = view_generator(self.seed, self.variant, row, int(isinstance(self.view, View)))
        return draw_views(self.read(row), [self.view], [generator])[0]


def _as_it_is(batch: Any) -> Any:
    return batch


def _default(name: str) -> Any:
    for function in (fit_capro, CAPro.__init__):
        parameter = inspect.signature(function).parameters.get(name)
        if parameter is not None:
            return parameter.default
    raise KeyError(name)


def _system_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    names = set(inspect.signature(CAPro.__init__).parameters) - {
        "self",
        "encoder",
        "num_classes",
        "num_features",
        "stage",
    }
    return {k: v for k, v in arguments.items() if k in names}
