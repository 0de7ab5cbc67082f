"""Which new kinds are in there? Pictures of which some have labels: known classes are told apart, new ones are found.

    contralto fit protogcd PICTURES --unlabelled MORE --preset frozen --out RUN

ingest -> number of classes -> training -> assignment -> page. The run folder holds `discovered.parquet` (the class of every
picture), `classes.parquet`, `names.json` (for names that people give), `model/` (old and new classes, for `contralto predict`),
`encoder/`, `metrics.json` and `report.html`.
"""

import copy
import hashlib
import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from lightning import Callback, LightningModule, Trainer
from torch.utils.data import DataLoader

from contralto.cluster import map_blocks
from contralto.data.canvas import as_it_is
from contralto.data.dataset import FeatureDataset
from contralto.data.ingest import ingest
from contralto.data.manifest import Manifest
from contralto.data.names import NAMES, called, new_names, read_names, save_names
from contralto.data.partial import HalfLabelledSampler
from contralto.encoders.features import EncodePictures, cached_array, device_of
from contralto.encoders.image import ImageEncoder, adapted, save_encoder
from contralto.encoders.pictures import picture_blocks
from contralto.errors import DataError, UsageError
from contralto.evaluation.classification import accuracy_interval
from contralto.evaluation.discovery import cluster_accuracy
from contralto.files import naming, write_atomically, write_json
from contralto.neighbors.directions import principal_rows
from contralto.neighbors.how_many import estimate_number
from contralto.neighbors.knn import unit_rows
from contralto.pipelines.embedding import CROP
from contralto.pipelines.frozen import BLOCK, check_frozen, features_of_view, has_learnt, layers_behind
from contralto.pipelines.outputs import peak_memory_gib
from contralto.pipelines.pretrain import Pretraining
from contralto.review.discovered import CLASSES, FOUND, MAP, Discoveries, write_discovery_report
from contralto.systems.base import EncoderSystem
from contralto.systems.classifier import Classifier, load
from contralto.systems.discovery.base import Discovered, DiscoverySystem, nearest_prototypes
from contralto.systems.registry import SYSTEMS
from contralto.training.probes import OnlineProbe
from contralto.views.batched import BatchView
from contralto.views.image import EvalView

__all__ = ["Discovery"]

Array = npt.NDArray[Any]
DIRECTIONS = 64
"""Principal directions in which classes are counted."""
MAPPED = 1500
NEAREST = 3


class Discovery(Pretraining):
    """The job behind ``contralto fit`` for one system of category discovery.

    It learns from the split `train`, where there is one; labels of other splits serve to measure what came out.
    """

    def fit(
        self,
        data: str,
        out: str | Path,
        *,
        unlabelled: str | None = None,
        new_classes: int | None = None,
        most_classes: int | None = None,
        frozen: bool = False,
        variants: int = 2,
        cache: str | None = None,
        **rest: Any,
    ) -> Path:
        """Find out which new classes there are among pictures of which only some have labels.

        Parameters
        ----------
        data : str
            Pictures of which at least two classes have labels; those without a label may be among them.
        out : path
            Run folder. Called again with the same arguments, the job continues where it stopped.
        unlabelled : str, optional
            More pictures, all without labels; whatever folders or columns they have, no label is read. Those that are in `data`
            too are left out.
        new_classes : int, optional
            How many new classes to look for; default: estimated from how finely the labelled classes are cut.
        most_classes : int, optional
            Upper bound of the estimate, old and new together; default: 20 more than three times the labelled ones.
        frozen : bool
            Beyond the papers: the encoder stays as it is, its features of a few augmented views of each picture are computed
            once, and two layers learn on them, which begin by centring them. Tens of thousands of pictures take minutes on a
            CPU.
        variants : int
            With `frozen`: how many draws of each of the two views are kept.
        cache : str, optional
            Where features of the encoder as it begins are kept; default: in the run folder. Runs that share it compute them
            once.
        **rest
            Arguments of `Pretraining.fit` and of the system.

        Returns
        -------
        Path
            The run folder.

        Raises
        ------
        UsageError
            If arguments do not fit, or the folder belongs to another job.
        DataError
            If fewer than two classes have labels, or nothing is without one.
        """
        own = {k: v for k, v in locals().items() if k in self.own_parameters()}
        return super().fit(data, out, **own, **rest)

    def begin(self, data: str, out: Path, arguments: dict[str, Any], progress: bool) -> None:
        """Look at the arguments, then claim the run folder."""
        a = {k: p.default for k, p in self.own_parameters().items()} | arguments
        if a["new_classes"] is not None and a["new_classes"] < 1:
            raise UsageError(
                f"new_classes must be at least 1, got {a['new_classes']}: leave it out to have it estimated"
            )
        self.knows = has_learnt(a)
        check_frozen(a)
        super().begin(data, out, arguments, progress)

    # Data.

    def check_labels(self) -> None:
        """All kinds of missing labels are welcome here; `ingest` looks at them once all pictures are known."""

    def ingest(self) -> None:
        """Read the pictures, and the unlabelled ones after them.

        Raises
        ------
        DataError
            If fewer than two classes have labels, or no picture is without one.
        """
        super().ingest()
        a = self.arguments
        numbers = np.unique(self.labels[self.labels >= 0])
        self.old = [self.manifest.class_names[c] for c in numbers]
        of_class = np.full(len(self.manifest.classes) + 1, -1, np.int64)
        of_class[numbers] = np.arange(len(numbers))
        self.labels = of_class[self.labels]
        self.more, self.more_rows = None, np.zeros(0, np.int64)
        if a["unlabelled"] is not None:
            self.more = self._read(a["unlabelled"], self.out / "unlabelled", columns=False)
            there = np.isin(self.more.column("sha256"), self.manifest.column("sha256"))
            self.more_rows = np.flatnonzero(~there)
            self.console.print(
                f"  {len(self.more_rows)} more without labels, {int(there.sum())} left out that are among the others, "
                f"{self.more.skipped.num_rows} skipped",
                soft_wrap=True,
            )
            self.labels = np.concatenate([self.labels, np.full(len(self.more_rows), -1)])
            self.fingerprint = hashlib.sha256(f"{self.fingerprint} {self.more.fingerprint()}".encode()).hexdigest()[:16]
        told = [*(manifest.fingerprint() for manifest, _ in self.parts()), *(rows.tolist() for _, rows in self.parts())]
        self.shown = hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]
        if len(self.old) < 2:
            found = f"only {self.old[0]!r} has" if self.old else "none has"
            raise DataError(
                f"what makes a class is learnt from labelled pictures of two classes at least, and {found} labels: name their "
                f"column with --label_column, or put labelled pictures into a folder per class",
                file=self.data,
            )
        if not (self.labels < 0).any():
            raise DataError(
                f"all {len(self.labels)} pictures have a label, so there is nothing to discover: leave labels empty, or name "
                f"more pictures with --unlabelled",
                file=self.data,
            )

    @property
    def labelled(self) -> int:
        """How many pictures have a label."""
        return int((self.labels >= 0).sum())

    def parts(self) -> list[tuple[Manifest, Array]]:
        """Manifests and the rows of them that are learnt from, in the order of the samples."""
        return [(self.manifest, self.rows), *([] if self.more is None else [(self.more, self.more_rows)])]

    def source(self, row: int) -> tuple[Manifest, int]:
        """Pictures of `data` come first."""
        if row < len(self.rows):
            return super().source(row)
        assert self.more is not None
        return self.more, int(self.more_rows[row - len(self.rows)])

    def order(self, module: EncoderSystem) -> dict[str, Any]:
        """Half of what is drawn is labelled."""
        sampler = HalfLabelledSampler(self.labels, seed=self.arguments["seed"])
        return {"batch_size": min(self.arguments["batch_size"], len(sampler)), "sampler": sampler, "drop_last": True}

    def canvas(self, size: int) -> int:
        """No larger than the largest picture is."""
        sides = [max(manifest.column(k).max() for k in ("width", "height")) for manifest, _ in self.parts()]
        return int(min(super().canvas(size), max(sides)))

    # How many classes.

    def count(self) -> None:
        """How many new classes to look for: as asked for, or estimated, once."""
        a = self.arguments
        self.estimate: dict[str, Any] | None = None
        self.new = a["new_classes"]
        if self.new is None and not self.knows:
            if not a.get("estimate"):  # the system does not look for the number itself
                raise UsageError(
                    f"the number of new classes cannot be estimated from {a['image_encoder']}, which has not learnt anything "
                    f"yet: say --new_classes, or take an encoder with weights (--preset frozen)"
                )
            self.new = len(self.old)
        if self.new is not None:
            return
        path = self.out / "number.json"
        if not path.exists():
            told = f"estimating it from {self.labelled} labelled pictures of {len(self.old)} classes"
            self.console.print(f"[bold]number of classes[/bold]  {told}", highlight=False)
            started = time.perf_counter()
            write_json(path, self._estimate())
            self._took("number", started)
        with naming(path):
            self.estimate = dict(json.loads(path.read_text(encoding="utf-8")))
            self.new = max(int(self.estimate["number"]) - len(self.old), 1)
        low, high = self.estimate["low"] - len(self.old), self.estimate["high"] - len(self.old)
        self.console.print(f"  {self.new} new classes; 95 % interval {max(low, 0)} to {max(high, 0)}", highlight=False)

    def _estimate(self) -> dict[str, Any]:
        x = self.counted
        method: Literal["search", "whole"] = "search" if len(self.old) >= 4 else "whole"
        most = self.arguments["most_classes"]
        if most is not None and most <= len(self.old):
            raise UsageError(f"most_classes must be above the number of labelled classes, {len(self.old)}; got {most}")
        seed = self.arguments["seed"]
        found = estimate_number(x, self.labels, high=most, seed=seed, restarts=1, method=method)
        tried = {str(k): v for k, v in found.tried.items()}
        return {"number": found.number, "low": found.low, "high": found.high, "method": method, "tried": tried}

    # Features.

    @property
    def plain(self) -> Array:
        """Features (N, F) of all pictures by the encoder as it was before the training; float16, from the disk."""
        return self.features(self.begun, "features")

    @property
    def counted(self) -> Array:
        """These features, centred, in their principal directions (N, at most `DIRECTIONS`): in which classes are counted."""
        x = self.plain.astype(np.float32)
        return principal_rows(x - x.mean(0), DIRECTIONS)

    def features(self, encoder: ImageEncoder, told: str, *, keep: bool = True) -> Array:
        """Features (N, F) float16 of all pictures by an encoder; kept on the disk, or for this one use."""
        view = EvalView(encoder.size, CROP, encoder.mean, encoder.std)
        device = device_of(self.arguments["accelerator"])
        found = []
        for number, (manifest, rows) in enumerate(self.parts()):
            key = self._key(encoder, view) | {"part": number}

            def compute(manifest: Manifest = manifest, rows: Array = rows) -> Iterable[Array]:
                blocks = picture_blocks(manifest, rows)
                setup = (copy.deepcopy(encoder), device, manifest.root, view)
                return self.bar(map_blocks(EncodePictures, blocks, setup=setup), told, len(blocks))

            if len(rows) and keep:
                found.append(cached_array(self.cache, "plain", key, compute, rows=len(rows)))
            elif len(rows):
                found.append(np.concatenate(list(compute())))
        return found[0] if len(found) == 1 else np.concatenate(found)

    def drawn(self, encoder: ImageEncoder, view: BatchView, variant: int) -> Array:
        """Features (N, F) of one drawing of a view of all pictures, computed once."""
        key = self._key(encoder, view) | {
            "variant": variant,
            "seed": self.arguments["seed"],
            "side": self.canvas(view.size),
        }

        def compute() -> Iterable[Array]:
            pictures, device = self.dataset(view.size), device_of(self.arguments["accelerator"])
            blocks = features_of_view(encoder, pictures, view, variant, seed=self.arguments["seed"], device=device)
            return self.bar(blocks, f"view {variant + 1}", -(-len(pictures) // BLOCK))

        return cached_array(self.cache, "view", key, compute, rows=len(self.labels))

    @property
    def cache(self) -> Path:
        """Where features are kept."""
        return Path(self.arguments["cache"] or self.out / "features")

    def _key(self, encoder: ImageEncoder, view: BatchView | EvalView) -> dict[str, Any]:
        return {"encoder": encoder.fingerprint(), "view": repr(view), "pictures": self.shown}

    def _took(self, name: str, started: float) -> None:
        self.seconds[name] = round(self.seconds.get(name, 0.0) + time.perf_counter() - started, 2)
        write_json(self.out / "seconds.json", self.seconds)

    # Training.

    def learn(self) -> EncoderSystem:
        """The system, trained on as many classes as there seem to be."""
        if self.arguments["frozen"]:
            started = time.perf_counter()
            self.console.print(f"[bold]features[/bold]  of {len(self.labels)} pictures, once", highlight=False)
            self.plain  # noqa: B018 (computed, and kept on the disk)
            self._took("features", started)
        self.count()
        return super().learn()

    def encoder(self, seed: int | None = None) -> ImageEncoder:
        """What learns: the encoder, or with `frozen` the layers behind it, for which features are the input."""
        if not self.arguments["frozen"]:
            return super().encoder(seed)
        return layers_behind(self.begun, self.plain)

    def facts(self, encoder: ImageEncoder) -> dict[str, Any]:
        """Old classes are those with labels; new ones as many as were counted."""
        steps = len(self.labels) // min(self.arguments["batch_size"], len(self.labels))
        return super().facts(encoder) | {"steps_per_epoch": steps, "num_classes": len(self.old), "num_new": self.new}

    def loader(self, module: EncoderSystem) -> DataLoader[Any]:
        """Pictures, or with `frozen` the features of their views."""
        if not self.arguments["frozen"]:
            return super().loader(module)
        base, variants = self.begun, self.arguments["variants"]
        views = module.views(base.size, base.mean, base.std)
        started = time.perf_counter()
        kept = [  # each view has drawings of its own, so that the two of a picture are never the same one
            np.stack([self.drawn(base, view, number * variants + v) for v in range(variants)])
            for number, view in enumerate(views)
        ]
        self._took("features", started)
        dataset = FeatureDataset(kept, {"label": torch.from_numpy(self.labels)}, seed=self.arguments["seed"])
        return DataLoader(dataset, collate_fn=as_it_is, **self.order(module))

    def callbacks(self, module: EncoderSystem) -> list[Callback]:
        """A classifier beside, and what tells the system the features of all samples when it asks for them.

        No neighbours: with half of the draws labelled and with replacement, a sample would find itself.
        """
        beside = [c for c in super().callbacks(module) if isinstance(c, OnlineProbe)]
        return [*beside, _Telling(self)]

    def embedded(self, module: EncoderSystem, *, keep: bool = False) -> Array:
        """Features (N, F) of all pictures by the encoder as it is now, in evaluation mode."""
        encoder: Any = module.encoder
        if not self.arguments["frozen"]:
            return self.features(encoder, "features", keep=keep).astype(np.float32)
        adapter = copy.deepcopy(encoder).eval()
        with torch.inference_mode():
            parts = torch.from_numpy(self.plain.astype(np.float32)).split(8192)
            return torch.cat([adapter(x.to(module.device)).float().cpu() for x in parts]).numpy()

    # What comes out.

    def finish(self) -> None:
        """Assign every picture, and keep model, tables, map and page."""
        started = time.perf_counter()
        self.console.print("[bold]discovery[/bold]  a class for every picture")
        module = self.module.cpu()
        assert isinstance(module, DiscoverySystem)
        features = self.embedded(module, keep=True)
        found, classes = self.tidy(module.discover(features, self.labels), features)
        encoder = self.whole()
        save_encoder(encoder, self.out / "encoder")
        weight = torch.from_numpy(found.prototypes)
        model = Classifier.of(
            encoder, encoder.name, classes, weight, rule="cosine", temperature=found.temperature, crop=CROP
        )
        model.save(self.out / "model", self.card(classes))
        self._write_tables(found, classes)
        if not (self.out / NAMES).exists():  # people may have written into it
            save_names(self.out, dict.fromkeys(classes[len(self.old) :], ""))
        if not (self.out / MAP).exists():
            self._draw_map(features, found.prototypes)
        scores = self.scores(found, model)
        if not (self.out / "metrics.json").exists():  # called again, it is read from the disk
            self._took("discovery", started)
        unlabelled = self.labels < 0
        metrics = {
            "pictures": len(self.labels), "labelled": self.labelled, "unlabelled": int(unlabelled.sum()),
            "old_classes": len(self.old), "new_classes": len(classes) - len(self.old), "asked": self.new,
            "in_new": int((found.assigned[unlabelled] >= len(self.old)).sum()), "estimate": self.estimate,
            "numbers": found.numbers, "seconds": self.seconds,
            "memory_gib": peak_memory_gib(), "scores": scores,
            "files": {"class of every picture": FOUND, "names for new classes": NAMES, "model": "model"},
        }  # fmt: skip
        write_json(self.out / "metrics.json", self.last_metrics() | metrics)
        self.report(self.out)

    def whole(self) -> ImageEncoder:
        """The encoder that is used afterwards: with what was learnt behind it."""
        learnt: Any = self.module.encoder
        return adapted(self.begun, learnt.backbone).eval() if self.arguments["frozen"] else learnt

    def tidy(self, found: Discovered, features: Array) -> tuple[Discovered, list[str]]:
        """New classes by their size, without those that no unlabelled picture is in; and what all classes are called."""
        old, assigned = len(self.old), found.assigned
        size = np.bincount(assigned[self.labels < 0], minlength=len(found.prototypes))
        size[:old] = len(assigned) + 1  # they stay, and first
        kept = np.argsort(-size, kind="stable")[: int((size > 0).sum())]
        number = np.full(len(size), -1, np.int64)
        number[kept] = np.arange(len(kept))
        assigned = number[assigned]
        lost = assigned < 0  # labelled pictures in a class that no other is in: by their label
        assigned = np.where(lost, self.labels, assigned)
        names = [*self.old, *new_names(len(kept) - old, self.old)]
        prototypes, confidence = found.prototypes[kept], found.confidence
        if len(kept) < len(size):  # how sure it is among those that are left
            confidence = nearest_prototypes(features, prototypes, temperature=found.temperature)[1]
        return Discovered(assigned, confidence, prototypes, found.temperature, found.numbers), names

    def scores(self, found: Discovered, model: Classifier) -> dict[str, Any]:
        """What can be said of the outcome; right labels of a split other than `train` say most."""
        known, old = self.labels >= 0, len(self.old)
        value = {"value": float((found.assigned[~known] >= old).mean()), "percent": True}
        number: dict[str, Any] = {"value": len(found.prototypes) - old}
        if self.estimate is not None:
            number |= {"low": max(self.estimate["low"] - old, 0), "high": max(self.estimate["high"] - old, 0)}
        right = (found.assigned[known] == self.labels[known]).astype(float)
        own = accuracy_interval(right, self.labels[known])
        scores = {
            "new classes": number,
            "unlabelled images in new classes": value,
            "labelled images in their own class": own.score(),
        }
        tested = np.setdiff1d(np.flatnonzero(self.manifest.right_labels >= 0), self.rows)
        if len(tested):
            predicted = model.predict([self.manifest.read_bytes(int(r)) for r in tested]).probabilities.argmax(1)
            names = [self.manifest.class_names[c] for c in self.manifest.right_labels[tested]]
            groups = self.manifest.column("group")[tested]
            scores |= _accuracies(names, predicted, self.old, groups, "held-out images")
        return scores

    def report(self, run: str | Path, *, out: str | Path | None = None) -> Path:
        """The page of discovered classes."""
        return write_discovery_report(run, out=out)

    def card(self, classes: list[str]) -> str:
        """The README of the model."""
        a, old = self.arguments, len(self.old)
        return (
            f"# Classifier of {old} known and {len(classes) - old} discovered classes\n\n"
            f"Known: {', '.join(self.old)}\n\nDiscovered: {', '.join(classes[old:]) or 'none'}. What people call them "
            f"stands in `{NAMES}` of the run.\n\nTrained with {SYSTEMS[self.name].title} on {self.labelled} labelled and "
            f"{len(self.labels) - self.labelled} unlabelled images; encoder {a['image_encoder']}"
            f"{' (frozen, with two layers behind it)' if a['frozen'] else ''}.\n\n"
            "    import contralto\n"
            '    contralto.load("path/to/the/run").predict(["a.jpg", "b.jpg"])\n\n## Limits\n\n'
            "It names one of its classes for any picture. Discovered classes are groups of pictures that look alike; whether "
            "they are kinds of things, a person must say.\n"
        )

    def _write_tables(self, found: Discovered, classes: list[str]) -> None:
        old = len(self.old)
        parts, rows, ids = [], [], []
        for number, (manifest, taken) in enumerate(self.parts()):
            parts += [number] * len(taken)
            rows += taken.tolist()
            ids += manifest.column("id")[taken].tolist()
        table = pa.table(
            {
                "id": pa.array(ids, pa.string()),
                "given": pa.array([self.old[c] if c >= 0 else None for c in self.labels], pa.string()),
                "found": pa.array([classes[k] for k in found.assigned], pa.string()),
                "confidence": found.confidence.astype(np.float32),
                "is_new": found.assigned >= old,
                "part": pa.array(parts, pa.int8()),
                "index": pa.array(rows, pa.int64()),
            }
        )
        cosines = found.prototypes @ found.prototypes[:old].T
        cosines[np.arange(old), np.arange(old)] = -2
        nearest = np.argsort(-cosines, axis=1, kind="stable")[:, : min(NEAREST, old - 1)]
        about = pa.table(
            {
                "class": pa.array(classes, pa.string()),
                "is_new": np.arange(len(classes)) >= old,
                "nearest": pa.array([[self.old[c] for c in row] for row in nearest], pa.list_(pa.string())),
                "similarity": pa.array(
                    [cosines[k, row].tolist() for k, row in enumerate(nearest)], pa.list_(pa.float32())
                ),
            }
        )
        write_atomically(self.out / CLASSES, lambda path: pq.write_table(about, path))
        write_atomically(self.out / FOUND, lambda path: pq.write_table(table, path))

    def _draw_map(self, features: Array, prototypes: Array) -> None:
        """A map of some pictures and all prototypes, by t-SNE."""
        from sklearn.manifold import TSNE

        rng = np.random.default_rng([self.arguments["seed"], 2])
        rows = np.sort(rng.permutation(len(features))[:MAPPED])
        points = np.concatenate([unit_rows(features[rows]), prototypes]).astype(np.float32)
        perplexity = min(30.0, (len(points) - 1) / 3)
        xy = TSNE(perplexity=perplexity, init="pca", max_iter=500, random_state=0).fit_transform(points)
        index = np.concatenate([rows, -1 - np.arange(len(prototypes))])
        table = pa.table({"row": index, "x": xy[:, 0].astype(np.float32), "y": xy[:, 1].astype(np.float32)})
        write_atomically(self.out / MAP, lambda path: pq.write_table(table, path))

    # The protocol.

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
        """Accuracy on all, old and new classes, by both protocols in use.

        Pictures that had a label in the training are left out. Those that were there without one count as they were assigned; all
        others are predicted, and counted apart. A class is an old one if the run had labels of it.

        Parameters
        ----------
        run : path
        data : str
            Pictures with right labels.
        label_column, image_column, group_column : str, optional
            Columns, where their names are not common ones.
        split : str, optional
            Only pictures of this split; default: all.

        Returns
        -------
        dict
            `scores`; `n`, how many pictures of the run and others; `labelled`, how many were left out.

        Raises
        ------
        DataError
            If there is nothing to measure by.
        """
        found = Discoveries(run)
        manifest = ingest(
            data, label_column=label_column, image_column=image_column, group_column=group_column, image_filter=False
        )
        labels, wanted = manifest.right_labels, np.ones(len(manifest), bool)
        if split is not None:
            wanted = manifest.split_of(split)[1]
        rows = np.flatnonzero((labels >= 0) & wanted)
        place = found.places(manifest.column("sha256")[rows])
        labelled = np.array([p >= 0 and bool(found.given[p]) for p in place], bool)
        inside, outside = (place >= 0) & ~labelled, place < 0
        if not (inside | outside).any():
            raise DataError(
                f"there is no picture with a label to measure by ({len(rows)} have one, {int(labelled.sum())} of them had it in "
                f"the training)",
                file=data,
            )
        clusters = found.found[place]
        if outside.any():
            pictures = [manifest.read_bytes(int(r)) for r in rows[outside]]
            clusters[outside] = load(run).predict(pictures).probabilities.argmax(1)
        names = np.array([manifest.class_names[c] for c in labels[rows]], object)
        groups, old = manifest.column("group")[rows], [c for c in found.classes if c not in set(found.new_classes)]
        told = np.array(called(found.classes, read_names(run)), object)
        scores: dict[str, Any] = {}
        for part, where in ((inside, "images of the run"), (outside, "other images")):
            if not part.any():
                continue
            scores |= _accuracies(names[part].tolist(), clusters[part], old, groups[part], where)
            if found.names:
                right = (told[clusters[part]] == names[part]).astype(float)
                value = accuracy_interval(right, np.zeros(len(right), np.int64), groups=groups[part])
                scores[f"right by the names that people gave, {where}"] = value.score()
        return {"scores": scores, "n": [int(inside.sum()), int(outside.sum())], "labelled": int(labelled.sum())}


def _accuracies(names: list[str], clusters: Array, old: list[str], groups: Array, where: str) -> dict[str, Any]:
    """Scores of both protocols; classes are numbered in the order of the run, new ones after the old."""
    known = {name: c for c, name in enumerate(old)}
    number = known | {name: len(old) + i for i, name in enumerate(sorted(set(names) - set(known)))}
    truth = np.array([number[name] for name in names], np.int64)
    together, apart = (
        cluster_accuracy(truth, clusters, range(len(old)), protocol=p, groups=groups).scores()
        for p in ("together", "apart")
    )
    scores = {f"{name}, {where}": value for name, value in together.items()}
    # The two differ on old and new classes only; "apart" has no say on all of them at once.
    return scores | {f"{name}, matched apart, {where}": v for name, v in apart.items() if name != "accuracy"}


class _Telling(Callback):
    """Tells a system the features of all samples before the epochs for which it asks."""

    def __init__(self, job: Discovery) -> None:
        self.job = job

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, DiscoverySystem)
        if pl_module.asks_features(trainer.current_epoch):
            pl_module.at_epoch_start(self.job.embedded(pl_module), self.job.labels)
