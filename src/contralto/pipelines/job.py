"""One job over one run folder: what the jobs for noisy web images (`capro`, `fopro`) share.

A job is a class whose stages can be called one by one; each keeps its result in the folder, so that an interrupted job
goes on where it stopped. A subclass names its system and its stages, and says what each stage learns from.

Nothing that learns sees the clean labels: `_fields` is the only door between the manifest and a training.
"""

import hashlib
import inspect
import json
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar

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

from contralto.cluster import map_blocks
from contralto.data.canvas import as_it_is
from contralto.data.dataset import Batch, EpochSampler, FeatureDataset, ImageDataset
from contralto.data.definitions import fill_definitions, load_definitions
from contralto.data.images import decode_image
from contralto.data.ingest import ingest
from contralto.data.manifest import Manifest
from contralto.data.verified import UNKNOWN, read_reviewed
from contralto.encoders.features import EncodePictures, cached_array, device_of
from contralto.encoders.image import ImageEncoder, image_encoder
from contralto.encoders.pictures import PictureBlock, PictureReader, picture_blocks
from contralto.errors import ContraltoError, DataError, UsageError
from contralto.evaluation.classification import accuracy_interval, calibration_error
from contralto.evaluation.noise import anchor_metrics, noise_metrics
from contralto.evaluation.openset import open_set_curve
from contralto.files import naming, save_array, write_atomically, write_json
from contralto.pipelines.outputs import FREE, claim_run, model_card, peak_memory_gib, write_cleaned_csv
from contralto.prototypes.correction import Correction, Verdict, flagged, probability_wrong
from contralto.systems.classifier import Classifier
from contralto.systems.registry import SYSTEMS
from contralto.systems.webly.base import WeblySystem, scale_rule
from contralto.training.fit import fit_stage
from contralto.views.image import EvalView, View, strong_view, weak_view

__all__ = ["Job", "load_preset", "presets_of"]

Array = npt.NDArray[Any]


def presets_of(system: str) -> list[str]:
    """Names of the presets of a system.

    Examples
    --------
    >>> presets_of("capro")
    ['google500', 'small', 'webvision1k']
    """
    return sorted({f.stem for f in _presets(system)})


def load_preset(name: str, system: str = "capro") -> dict[str, Any]:
    """Arguments of a preset: what the systems of one group share under this name, and those of the system itself.

    Examples
    --------
    >>> load_preset("google500")["epochs"]
    120
    >>> load_preset("small", "moco")["image_size"], load_preset("small", "moco")["queue_size"]
    (32, 4096)
    """
    files = [f for f in _presets(system) if f.stem == name]
    if not files:
        raise UsageError(
            f"no preset of {system} is called {name!r}: there are {', '.join(presets_of(system)) or 'none'}"
        )
    found: dict[str, Any] = {}
    for file in files:
        found |= yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    return found


def _presets(system: str) -> list[Path]:
    """The files of presets beside that of the system: the shared ones first."""
    if system not in SYSTEMS:
        return []
    with resources.as_file(resources.files(SYSTEMS[system].path.rpartition(".")[0])) as group:
        folder = group / "presets"
        return sorted(folder.glob("*.yaml")) + sorted((folder / system).glob("*.yaml"))


@dataclass
class Job:
    """The stages of one job over its run folder, for those who want to call them one by one.

    Parameters
    ----------
    data : str
    out : Path
    arguments : dict
        All arguments of the job's function and of its system.
    progress : bool

    Attributes
    ----------
    name : str
        Of the system, as in the registry.
    system : type
    fit : function
        The whole job; its signature has the defaults.
    extensions : tuple of str
        Arguments that go beyond the paper.
    before : dict
        Stage -> the stage whose weights it starts with.
    judging : str
        Stage whose scores judge the labels.
    multilabel : bool
        Whether pictures may have several labels.
    """

    data: str
    out: Path
    arguments: dict[str, Any]
    progress: bool = True
    seconds: dict[str, float] = field(default_factory=dict)
    modules: dict[str, Any] = field(default_factory=dict)

    name: ClassVar[str]
    system: ClassVar[type[WeblySystem]]
    fit: ClassVar[Callable[..., Path]]
    extensions: ClassVar[tuple[str, ...]] = ()
    before: ClassVar[dict[str, str]]
    judging: ClassVar[str]
    multilabel: ClassVar[bool] = False

    def __post_init__(self) -> None:
        parameters = self.parameters()
        unknown = sorted(set(self.arguments) - set(parameters))
        if unknown:
            raise UsageError(f"there is no argument {unknown[0]!r}")
        defaults = {k: p.default for k, p in parameters.items() if p.default is not p.empty and k != "progress"}
        self.arguments = defaults | self.arguments
        if self.arguments["devices"] != 1:
            raise UsageError("this job trains on one device; the system runs on several under a Trainer of your own")
        self.console = Console(stderr=True, quiet=not self.progress)

    @classmethod
    def parameters(cls) -> dict[str, inspect.Parameter]:
        """All arguments of system and job by name; those of the job win."""
        every = dict(inspect.signature(cls.system).parameters) | dict(inspect.signature(cls.fit).parameters)
        return {k: p for k, p in every.items() if k not in ("self", "encoder", "num_classes", "num_features", "stage")}

    @property
    def cache(self) -> Path:
        """Where features are kept."""
        return Path(self.arguments["cache"] or self.out / "features")

    def run(self) -> Path:
        """All stages from the data to the report; those that are done are read."""
        self.claim()
        self.ingest()
        if self.arguments["baseline"] and self.has_test:
            self.train("plain")
        self.learn()
        self.clean()
        self.train("finetune")
        self.save_model()
        self.evaluate()
        self.report()
        return self.out

    def learn(self) -> None:
        """The stages before the labels are judged."""
        raise NotImplementedError

    # The run folder.

    def claim(self) -> None:
        """Make the folder, or make sure that it holds the same job."""
        arguments = {k: str(v) if isinstance(v, Path) else v for k, v in sorted(self.arguments.items())}
        claim_run(self.out, self.name, self.data, arguments, extensions=self._extensions())
        if (self.out / "seconds.json").exists():
            with naming(self.out / "seconds.json"):
                self.seconds = dict(json.loads((self.out / "seconds.json").read_text(encoding="utf-8")))

    def _extensions(self) -> list[str]:
        return [e for e in self.extensions if self.arguments[e] != self.parameters()[e].default]

    @contextmanager
    def _timed(self, name: str, told: str) -> Iterator[None]:
        self.console.print(f"[bold]{name}[/bold]  {told}", highlight=False, soft_wrap=True)
        started = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + round(time.perf_counter() - started, 2)
        write_json(self.out / "seconds.json", self.seconds)

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
                        multilabel=self.multilabel,
                        on=a["on"],
                        progress=lambda n: status.update(f"{n} pictures read"),
                    )
                filled, _ = fill_definitions(manifest.classes)
                part = folder.with_name(".manifest.part")
                replace(manifest, classes=tuple(filled)).save(part)
                part.rename(folder)
        self.manifest = Manifest.load(folder)
        labels, trusted = self._trusted()
        train = (self.manifest.column("split") == "train") & (labels >= 0)
        test = (self.manifest.column("split") == "test") & self._has_clean_label()
        if not train.any():
            raise DataError("no picture has a given label and belongs to the split 'train'", file=self.data)
        self.train_rows, self.test_rows = np.flatnonzero(train), np.flatnonzero(test)
        self.labels, self.verified = labels[self.train_rows], trusted[self.train_rows]
        self.anchors = self.verified
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
            if self.arguments.get(key, value) is None:
                self.arguments[key] = value
        queue = self.arguments["queue_size"]
        if queue < self.arguments["batch_size"] * self.arguments["devices"]:
            raise UsageError(f"queue_size {queue} is smaller than a batch of {self.arguments['batch_size']}")
        arguments = {k: v for k, v in self.arguments.items() if k not in FREE}
        self._fingerprint = hashlib.sha256(
            json.dumps([self.manifest.fingerprint(), arguments | {"cache": None}], sort_keys=True, default=str).encode()
            + self.labels.tobytes()
            + self.anchors.tobytes()
        ).hexdigest()[:16]
        return self.manifest

    def _has_clean_label(self) -> npt.NDArray[np.bool_]:
        return np.asarray(self.manifest.column("clean_label") >= 0)

    def _trusted(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        """The labels to learn from, of all rows of the manifest, and which of them hold for good: those by people."""
        labels, verified = self.manifest.labels.astype(np.int64), self._verified()
        known = verified != UNKNOWN
        outside = known & (self.manifest.column("split") != "train")
        if outside.any():
            first = self.manifest.column("id")[np.flatnonzero(outside)[0]]
            raise DataError(
                f"{first!r} is no training picture: testing on what was learnt would say nothing",
                file=str(self.arguments.get("shots") or self.arguments["reviewed"]),
            )
        return np.where(known, verified, labels), known & (verified >= 0)

    def _verified(self) -> npt.NDArray[np.int64]:
        """The class of every row of the manifest by people; `UNKNOWN` where nobody looked."""
        reviewed = self.arguments.get("reviewed")
        if reviewed is None:
            return np.full(len(self.manifest), UNKNOWN, np.int64)
        return read_reviewed(reviewed, self.manifest)

    @property
    def has_test(self) -> bool:
        """Whether there are pictures with clean labels to test on."""
        return len(self.test_rows) > 0

    def read_image(self, row: int) -> npt.NDArray[np.uint8]:
        """Decode the picture of one row of the manifest."""
        return decode_image(self.read_bytes(row))

    def read_bytes(self, row: int) -> bytes:
        """The encoded picture of one row of the manifest."""
        return self.manifest.read_bytes(row)

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

        def compute() -> Iterable[Array]:
            blocks = picture_blocks(self.manifest, rows)
            setup = (encoder, self._device(), self.manifest.root, view, variant)
            gpu = self._device() == "cuda"
            return track(
                map_blocks(EncodePictures, blocks, on=self.arguments["on"], setup=setup, gpu=gpu),
                f"  {told}",
                console=self.console,
                transient=True,
                disable=not (self.progress and self.console.is_terminal),
                total=len(blocks),
            )

        return cached_array(self.cache, "image", key, compute, rows=len(rows))

    def _device(self) -> str:
        return device_of(self.arguments["accelerator"], self.arguments["on"])

    # Training.

    def _fields(self, stage: str, rows: Array | None = None, labels: Array | None = None) -> dict[str, Tensor]:
        """All that a training learns from, besides pixels; `rows` and `labels` choose and replace."""
        n = len(self.labels)
        rows = np.arange(n) if rows is None else rows
        labels = self.targets if labels is None else labels
        fields = {
            "label": torch.from_numpy(labels[rows]),
            "anchor": torch.from_numpy(self.anchors[rows]),
            "weight": torch.from_numpy(self._weights()[rows]),
        }
        return {k: torch.from_numpy(np.ascontiguousarray(v[rows])) for k, v in self._more(stage).items()} | fields

    @property
    def targets(self) -> Array:
        """Given labels of the training pictures, as a stage learns them."""
        return self.labels

    def _more(self, stage: str) -> dict[str, Array]:
        """More of what a stage learns from, a row for every training picture."""
        return {}

    def _weights(self) -> npt.NDArray[np.float32]:
        return np.ones(len(self.labels), np.float32)

    def _lesson(self, stage: str) -> tuple[Array | None, Array | None]:
        """Rows that a stage learns from, and other labels for all rows; None is all and the given ones."""
        if stage == "finetune":
            if (self.new_labels < 0).all():
                raise ContraltoError(
                    f"every picture was judged off-topic, so nothing is left to fine-tune on: see {self.out / 'cleaned.csv'}; "
                    f"a lower threshold, or more trusted pictures, may help"
                )
            return np.flatnonzero(self.new_labels >= 0), np.maximum(self.new_labels, 0)
        return None, None

    def _draws(self, stage: str, rows: Array, labels: Array) -> dict[str, Array]:
        """How an epoch is drawn from some rows: arguments of `EpochSampler`."""
        return {"labels": labels} if self.arguments["class_balanced"] else {}

    def _prototype_rows(self) -> Array:
        """Rows whose embeddings set the prototypes."""
        return np.flatnonzero(self.anchors)

    def train(self, stage: str) -> Any:
        """Train one stage, or load it if the run folder has it."""
        a = self.arguments
        epochs = self.system.stage_epochs(a, stage)
        done = (self.out / "stages" / stage / "done.json").exists()
        with self._timed(stage, "done before" if done else f"{epochs} epochs"):
            encoder = self.encoder()
            body: nn.Module = nn.Identity() if a["frozen_features"] else encoder
            given = {k: v for k, v in a.items() if k in inspect.signature(self.system).parameters}
            module = self.system(body, self.num_classes, encoder.num_features, stage=stage, **given)
            if stage in self.before:
                module.load_state_dict(self.modules[self.before[stage]].state_dict())
            loader = None if done else self._loader(encoder, stage, *self._lesson(stage))
            module.anchor_batches = lambda: self._eval_batches(encoder, self._prototype_rows())
            self._complete(module)
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

    def _complete(self, module: Any) -> None:
        """What a module knows of the data besides its arguments."""

    def _loader(self, encoder: ImageEncoder, stage: str, rows: Array | None, labels: Array | None) -> DataLoader[Any]:
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
        sampler = EpochSampler(len(chosen), seed=seed, **self._draws(stage, chosen, fields["label"].numpy()))
        return DataLoader(
            dataset,
            batch_size=min(a["batch_size"], len(sampler)),
            sampler=sampler,
            num_workers=0 if a["frozen_features"] else a["workers"],
            collate_fn=as_it_is if a["frozen_features"] else None,
            drop_last=True,
        )

    def _eval_batches(self, encoder: ImageEncoder, rows: Array) -> Iterator[Batch]:
        """Evaluation view (or its features) and given labels of some training rows."""
        view, frozen = self._views(encoder)[0], self.arguments["frozen_features"]
        features = self.features(encoder, self.train_rows, view, 0, "eval view") if frozen else None
        pictures = PictureReader(self.manifest.root, view)
        for start in range(0, len(rows), 256):
            part = rows[start : start + 256]
            if features is not None:
                x = torch.from_numpy(features[part].astype(np.float32))
            else:
                block = PictureBlock(self.train_rows[part], self.manifest.places(self.train_rows[part]))
                x = next(pictures.batches(block, len(part)))
            more = {k: torch.from_numpy(np.ascontiguousarray(v[part])) for k, v in self._more(self.judging).items()}
            yield more | {"views": [x], "label": torch.from_numpy(self.targets[part]), "index": torch.from_numpy(part)}

    # What comes out.

    def scores(self) -> dict[str, Array]:
        """Scores of the training pictures: `classifier`, `auxiliary`, `prototype`, `fused` (N, C), `embedding` (N, dim)."""
        module, encoder = self.modules[self.judging].eval().cpu(), self.encoder()
        if not self.arguments["frozen_features"]:
            more = self._more(self.judging).get("text_scores")
            return self._ask("score", module, encoder, self.train_rows, more)
        parts: dict[str, list[Tensor]] = {}
        for batch in self._eval_batches(encoder, np.arange(len(self.labels))):
            for key, value in module.score(batch["views"][0], batch.get("text_scores")).items():
                parts.setdefault(key, []).append(value)
        return {k: torch.cat(v).numpy() for k, v in parts.items()}

    def _ask(
        self, method: str, module: Any, encoder: ImageEncoder, rows: Array, more: Array | None = None
    ) -> dict[str, Array]:
        """What a method of a module says of some pictures of the manifest, here or on a cluster; `more` is its second input."""
        module.anchor_batches = None  # needed in training only, and no worker can have it
        blocks = picture_blocks(self.manifest, rows)
        starts = np.cumsum([0, *map(len, blocks)])
        inputs = [(b, None if more is None else more[s : s + len(b)]) for b, s in zip(blocks, starts, strict=False)]
        device = self._device()
        setup = (module, method, device, self.manifest.root, self._views(encoder)[0])
        answers = map_blocks(_Ask, inputs, on=self.arguments["on"], setup=setup, gpu=device == "cuda")
        parts: dict[str, list[Array]] = {}
        for answer in answers:
            for key, value in answer.items():
                parts.setdefault(key, []).append(value)
        return {k: np.concatenate(v) for k, v in parts.items()}

    def judge(self, scores: dict[str, Array]) -> Correction:
        """The verdict on every label, and the new labels, from `scores`."""
        raise NotImplementedError

    def clean(self) -> pa.Table:
        """The cleaned list: a verdict, a new label and all scores for every training picture."""
        with self._timed("cleaning", "judging every label"):
            s = self.scores()
            result = self.judge(s)
            verdict = result.verdict.numpy()
            self.new_labels = np.where(verdict == Verdict.OFF_TOPIC, -1, result.labels.numpy())
            table = self._cleaned_table(s, verdict)
            write_atomically(self.out / "cleaned.parquet", lambda path: pq.write_table(table, path))
            write_cleaned_csv(table, self.out / "cleaned.csv")
            save_array(s["embedding"].astype(np.float16), self.out / "embedding.npy")
            self.cleaned, self.embedding = table, s["embedding"]
        return table

    def _cleaned_table(self, s: dict[str, Array], verdict: Array) -> pa.Table:
        names = np.array(self.manifest.class_names, dtype=object)
        rows, given = np.arange(len(self.labels)), self.labels
        best = s["fused"].argmax(1)
        similarity = s["embedding"] @ self.modules[self.judging].prototypes.cpu().numpy().T
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
                **self._text_columns(),
                "nearest_prototypes": [names[n].tolist() for n in nearest],
                "nearest_similarities": [
                    similarity[i, n].astype(float).round(4).tolist() for i, n in enumerate(nearest)
                ],
                "p_wrong": self._p_wrong(s["fused"][rows, given]).astype(np.float32),
                "p_off_topic": self._p_off_topic(),
            }
        )

    def _text_columns(self) -> dict[str, Any]:
        """How well each text fits its label, and its rank in the class; null where texts have no part."""
        n = len(self.labels)
        return {"text_match": pa.nulls(n, pa.float32()), "text_rank": pa.nulls(n, pa.int64())}

    def _p_wrong(self, given: Array) -> Array:
        """Probability that labels are wrong, from the fused scores of the given classes.

        Labels by people are right; they say nothing about how the scores of the others spread.
        """
        out = np.zeros(len(given))
        out[~self.verified] = probability_wrong(given[~self.verified])
        return out

    def _p_off_topic(self) -> pa.Array:
        """Probability that pictures show none of the classes; null where nothing says so."""
        return pa.nulls(len(self.labels), pa.float32())

    def draw_map(self) -> None:
        """Two-dimensional map of at most 3,000 pictures and the prototypes, by t-SNE."""
        from sklearn.manifold import TSNE

        embedding = self.embedding
        rng = np.random.default_rng([self.arguments["seed"], 2])
        rows = np.sort(rng.permutation(len(embedding))[:3000])
        points = np.concatenate([embedding[rows], self.modules[self.judging].prototypes.cpu().numpy()])
        perplexity = min(30.0, (len(points) - 1) / 3)
        xy = TSNE(perplexity=perplexity, init="pca", max_iter=500, random_state=0, method="barnes_hut").fit_transform(
            points
        )
        index = np.concatenate([self.train_rows[rows], -1 - np.arange(self.num_classes)])
        table = pa.table({"index": index, "x": xy[:, 0].astype(np.float32), "y": xy[:, 1].astype(np.float32)})
        write_atomically(self.out / "map.parquet", lambda path: pq.write_table(table, path))

    def save_model(self) -> Classifier:
        """Write `model/`: weights, configuration and a model card, for `contralto.load`."""
        a, final, encoder = self.arguments, self.modules["finetune"], self.encoder()
        if not a["frozen_features"]:
            encoder.load_state_dict(final.encoder.state_dict())
        size = a["image_size"] or encoder.size
        config = {
            "encoder": a["image_encoder"], "num_features": encoder.num_features, "size": size, "crop": a["crop"],
            "mean": list(encoder.mean), "std": list(encoder.std), "classes": self.manifest.class_names,
            "hidden": a["hidden"], "dim": a["dim"], "temperature": a["temperature"],
        } | ({"multilabel": True} if self.multilabel else {})  # fmt: skip
        model = Classifier(config, encoder)
        model.classifier.load_state_dict(final.classifier.state_dict())
        model.projector.load_state_dict(final.projector.state_dict())
        model.prototypes.copy_(final.prototypes)
        self.model = model.eval()
        model.save(self.out / "model")
        return model

    def evaluate(self) -> dict[str, Any]:
        """Compare with plain training on the clean test part, judge the noise list and the anchors; write `metrics.json`."""
        with self._timed("evaluation", "on the clean labels" if self.has_test else "no clean test labels"):
            verdicts = self.cleaned.column("verdict").to_pylist()
            metrics: dict[str, Any] = {"counts": {v.word: verdicts.count(v.word) for v in Verdict}}
            if self.has_test:
                metrics["test"] = self._test_metrics()
            clean = self.manifest.column("clean_label")[self.train_rows].astype(np.int64)
            if (clean != -2).any():
                metrics["noise"] = self.noise()
                metrics["anchors"] = anchor_metrics(self.labels, clean, self.anchors)
        return self._keep_metrics(metrics)

    def _keep_metrics(self, metrics: dict[str, Any]) -> dict[str, Any]:
        """Write `metrics.json` and the model card."""
        metrics["time"] = self.seconds
        metrics["memory_gib"] = peak_memory_gib()
        write_json(self.out / "metrics.json", metrics)
        self.metrics = metrics
        card = model_card(
            SYSTEMS[self.name].title,
            self.manifest.class_names,
            self.arguments,
            self._extensions(),
            metrics,
            len(self.labels),
            self.model.config["size"],
        )
        write_atomically(self.out / "model" / "README.md", lambda path: path.write_text(card, encoding="utf-8"))
        return metrics

    def noise(self) -> dict[str, float]:
        """How good the cleaned list is, by the clean labels."""
        clean = self.manifest.column("clean_label")[self.train_rows].astype(np.int64)
        marked, p_wrong = flagged(self.cleaned.column("verdict").to_pylist()), self.cleaned.column("p_wrong").to_numpy()
        return noise_metrics(self.labels, clean, self.new_labels, marked, p_wrong)

    def _test_metrics(self) -> dict[str, Any]:
        labels = self.manifest.column("clean_label")[self.test_rows].astype(np.int64)
        groups = self.manifest.column("group")[self.test_rows]
        encoder = self.encoder()
        probabilities = {"model": self.predict_rows("finetune", encoder, self.test_rows)}
        foreign = np.flatnonzero(
            (self.manifest.column("split") == "test") & (self.manifest.column("clean_label") == -1)
        )
        unknown = self.predict_rows("finetune", encoder, foreign) if len(foreign) else probabilities["model"][:0]
        if "plain" in self.modules:
            probabilities["plain"] = self.predict_rows("plain", encoder, self.test_rows)
        predictions = {k: p.argmax(1) for k, p in probabilities.items()}
        every = np.concatenate([probabilities["model"], unknown]), np.append(labels, np.full(len(foreign), -1))
        out: dict[str, Any] = {"n": len(labels), "open_set": _open_set(*every, foreign=len(foreign))}
        for name, predicted in predictions.items():
            out[name] = _intervals((predicted == labels).astype(float), labels, groups)
            confidence = probabilities[name].max(1)
            out[name]["calibration_error"] = calibration_error(predicted == labels, confidence)
        columns = {
            "index": self.test_rows, "id": self.manifest.column("id")[self.test_rows].tolist(), "group": groups.tolist(),
            "label": labels, "predicted": predictions["model"], "confidence": probabilities["model"].max(1),
        }  # fmt: skip
        if "plain" in predictions:
            both = (predictions["model"] == labels).astype(float) - (predictions["plain"] == labels).astype(float)
            out["difference"] = _intervals(both, labels, groups)
            columns["plain"] = predictions["plain"]
        table = pa.table(columns)
        write_atomically(self.out / "test_predictions.parquet", lambda path: pq.write_table(table, path))
        best, sure = every[0].argmax(1), every[0].max(1)
        seen = pa.table(
            {
                "index": np.append(self.test_rows, foreign), "confidence": sure, "predicted": best,
                "right": best == every[1], "known": every[1] >= 0,
            }
        )  # fmt: skip
        write_atomically(self.out / "open_set.parquet", lambda path: pq.write_table(seen, path))
        return out

    def predict_rows(self, stage: str, encoder: ImageEncoder, rows: Array) -> Array:
        """Class probabilities (N, C) of some rows of the manifest by the classifier of a stage."""
        module = self.modules[stage].eval().cpu()
        view = self._views(encoder)[0]
        if self.arguments["frozen_features"]:
            features = self.features(encoder, rows, view, 0, "test view")
            with torch.inference_mode():
                return np.asarray(module(torch.from_numpy(features.astype(np.float32))).numpy())
        return self._ask("forward", module, encoder, rows)["forward"]

    def report(self) -> Path:
        """Write `report.html`."""
        from contralto.review.report import write_report

        with self._timed("report", "map and page"):
            if not self.multilabel and not (self.out / "map.parquet").exists():
                self.draw_map()
            return write_report(self.out, read_image=self.read_image)


def _open_set(probabilities: Array, labels: Array, *, foreign: int) -> dict[str, Any]:
    """The curve of `evaluation.openset` as JSON; where there is nothing to count, None."""
    curve = open_set_curve(probabilities, labels)
    lists = {
        k: [None if np.isnan(v) else round(float(v), 4) for v in getattr(curve, k)]
        for k in ("thresholds", "f1", "rejected_known", "rejected_unknown", "accepted_right")
    }
    return {"unknown": foreign, "best": curve.best, "mean_f1": curve.mean_f1, "area": curve.area} | lists


def _intervals(correct: Array, labels: Array, groups: Array) -> dict[str, float]:
    out: dict[str, float] = {}
    for name, macro in (("accuracy", False), ("macro", True)):
        value, low, high = accuracy_interval(correct, labels, groups=groups, macro=macro)
        out |= {name: value, f"{name}_low": low, f"{name}_high": high}
    return out


class _Ask:
    """What a method of a module says of the pictures of a block; the work for `map_blocks`."""

    def __init__(self, module: Any, method: str, device: str, root: str, view: EvalView) -> None:
        self.module, self.method, self.device = module.eval().to(device), method, device
        self.pictures = PictureReader(root, view)

    def __call__(self, item: tuple[PictureBlock, Array | None]) -> dict[str, Array]:
        block, more = item
        parts: dict[str, list[Array]] = {}
        start = 0
        with torch.inference_mode():
            for x in self.pictures.batches(block, 256):
                rows = () if more is None else (torch.from_numpy(more[start : start + len(x)]).to(self.device),)
                answer = getattr(self.module, self.method)(x.to(self.device), *rows)
                for key, value in (answer if isinstance(answer, dict) else {self.method: answer}).items():
                    parts.setdefault(key, []).append(value.cpu().numpy())
                start += len(x)
        return {k: np.concatenate(v) for k, v in parts.items()}
