"""Pretraining of an encoder from unlabelled pictures, by any system of `systems.selfsup`: ingest -> train -> encoder -> report.

The run folder holds `manifest/`, `pictures.npy` (decoded once, where that is small enough), `training/`, `encoder/` (a name for
`image_encoder`, and so for every other command) and `metrics.json`.
"""

import hashlib
import inspect
import json
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import Callback
from rich.console import Console
from rich.progress import track
from torch.utils.data import DataLoader

from contralto.data.canvas import CanvasDataset, as_it_is
from contralto.data.dataset import EpochSampler
from contralto.data.manifest import Manifest
from contralto.encoders.image import ImageEncoder, image_encoder, save_encoder
from contralto.errors import DataError, UsageError
from contralto.files import naming, write_json
from contralto.pipelines.embedding import report_encoder
from contralto.pipelines.outputs import claim_run, peak_memory_gib, read_once
from contralto.systems.base import EncoderSystem
from contralto.systems.registry import get_system
from contralto.training.fit import fit_stage
from contralto.training.probes import OnlineKNN, OnlineProbe

__all__ = ["Pretraining"]

FACTS = ("num_features", "num_samples", "steps_per_epoch", "num_classes", "num_new", "stage")
"""Arguments of a system that the job knows from encoder, data and progress."""


@dataclass
class Pretraining:
    """The job behind ``contralto fit`` for one self-supervised system; its methods can be called one by one.

    A job of another kind extends it: arguments of its own are keyword arguments of its `fit`, which hands all of them on to this
    one; `check_labels`, `facts`, `order`, `callbacks`, `finish` and `last_metrics` are what it says differently.

    Parameters
    ----------
    name : str
        Of the system.
    """

    name: str
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def system(self) -> type[EncoderSystem]:
        """The class of the system."""
        found: type[EncoderSystem] = get_system(self.name)
        return found

    multilabel = False

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
        image_encoder: str = "resnet18-small",
        pretrained: bool = False,
        image_size: int | None = None,
        canvas: int | None = None,
        cache_gib: float = 4.0,
        probe: bool = True,
        workers: int = 2,
        accelerator: str = "auto",
        devices: int = 1,
        precision: str = "32-true",
        strategy: str = "auto",
        seed: int = 0,
        checkpoint_every: int = 1000,
        on: str | None = None,
        progress: bool = True,
        **system: Any,
    ) -> Path:
        """Pretrain an encoder on pictures; labels, where there are any, only serve to show how it goes.

        Parameters
        ----------
        data : str
            Path or fsspec address of the pictures, in any form of `contralto.data.sources`.
        out : path
            Run folder. Called again with the same arguments, the job continues where it stopped.
        image_column, label_column, id_column, split_column, group_column : str, optional
            Columns, where their names are not common ones.
        allow_outside : bool
            Let tables name files outside their folder.
        min_side : int
            Smallest side in pixels.
        image_encoder : str
            Name of the encoder; `pretrained` begins with its weights.
        image_size : int, optional
            Side of a large view in pixels; default: the encoder's own.
        canvas : int, optional
            Pictures are kept no larger than this side; default: 1.5 times `image_size`, so that crops are not enlarged much.
        cache_gib : float
            Decode all pictures once into a file if that takes no more than this.
        probe : bool
            Where there are labels: train a linear classifier beside, on features that take no gradient from it, and log its
            accuracy and that of nearest neighbours.
        workers, accelerator, devices, precision, strategy
            Of loaders and Lightning's Trainer; `devices` must be 1 yet.
        seed : int
            Of everything that is drawn.
        checkpoint_every : int
            Steps between checkpoints; it may change when a run goes on.
        on : str, optional
            "ray" or "ray://host:port": read the pictures on a cluster.
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
        self.module = self.learn()
        self.finish()
        return self.out

    # The steps.

    def begin(self, data: str, out: Path, arguments: dict[str, Any], progress: bool) -> None:
        """Complete the arguments and claim the run folder."""
        known = self.parameters()
        unknown = sorted(set(arguments) - set(known))
        if unknown:
            raise UsageError(f"{self.name} has no argument {unknown[0]!r}")
        defaults = {k: p.default for k, p in known.items() if p.default is not p.empty}
        self.data, self.out, self.progress = data, out, progress
        self.arguments = defaults | arguments
        if self.arguments["devices"] != 1:
            raise UsageError("this job trains on one device; the system runs on several under a Trainer of your own")
        self.console = Console(stderr=True, quiet=not progress)
        told = {
            k: str(v) if isinstance(v, Path) else list(v) if isinstance(v, tuple) else v  # as JSON gives it back
            for k, v in sorted(self.arguments.items())
        }
        claim_run(out, self.name, data, told)
        if (out / "seconds.json").exists():
            with naming(out / "seconds.json"):
                self.seconds = dict(json.loads((out / "seconds.json").read_text(encoding="utf-8")))

    @classmethod
    def own_parameters(cls) -> dict[str, inspect.Parameter]:
        """Named arguments of the job itself: those of `fit`, and of the `fit` that it extends."""
        methods = [c.__dict__["fit"] for c in reversed(cls.__mro__) if "fit" in c.__dict__]
        every = [p for m in methods for p in inspect.signature(m).parameters.values()]
        return {p.name: p for p in every if p.kind is p.KEYWORD_ONLY and p.name != "progress"}

    def parameters(self) -> dict[str, inspect.Parameter]:
        """All arguments of system and job by name; those of the job win."""
        of_system = dict(inspect.signature(self.system).parameters)
        return {k: p for k, p in of_system.items() if k not in (*FACTS, "self", "encoder")} | self.own_parameters()

    def ingest(self) -> None:
        """Read the pictures into the manifest of the run, once; take those that are to be learnt from."""
        a = self.arguments
        self.manifest = self._read(self.data, self.out / "manifest")
        splits = self.manifest.column("split")
        self.rows = np.flatnonzero(splits == "train") if "train" in splits else np.arange(len(self.manifest))
        self.labels = self.manifest.labels.astype(np.int64)[self.rows]
        self.check_labels()
        if len(self.rows) < 2:
            raise DataError(f"{self.name} compares pictures with each other: at least two are needed", file=self.data)
        self.console.print(
            f"  {len(self.rows)} pictures to learn from, {self.manifest.skipped.num_rows} skipped, "
            f"{len(np.unique(self.labels[self.labels >= 0]))} classes",
            soft_wrap=True,
        )
        told = {k: v for k, v in a.items() if k not in ("checkpoint_every", "on", "workers", "cache_gib", "probe")}
        self.fingerprint = hashlib.sha256(
            json.dumps([self.manifest.fingerprint(), told], sort_keys=True, default=str).encode()
        ).hexdigest()[:16]

    def check_labels(self) -> None:
        """Refuse labels that the system cannot learn from: here, missing ones if it needs them."""
        missing = int((self.labels < 0).sum())
        if "label" in self.system.needs and missing:
            raise DataError(
                f"{self.name} learns from labels, and {missing} pictures have none; name their column with --label_column",
                file=self.data,
            )

    def _read(self, data: str, folder: Path, *, columns: bool = True) -> Manifest:
        """The manifest of some pictures, made once; with the columns that were named, or those of usual names."""
        return read_once(data, folder, self.arguments, self.console, columns=columns)

    def encoder(self, seed: int | None = None) -> ImageEncoder:
        """The encoder as it is before the training; drawn by the seed if it has no weights."""
        a = self.arguments
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(a["seed"] if seed is None else seed)
            return image_encoder(a["image_encoder"], pretrained=a["pretrained"], size=a["image_size"])

    @property
    def begun(self) -> ImageEncoder:
        """The encoder as it was before the training, kept; what learns may be layers behind it (`frozen`)."""
        if not hasattr(self, "_begun"):
            self._begun = Pretraining.encoder(self)
        return self._begun

    def learn(self) -> EncoderSystem:
        """The system, trained."""
        module = self.build()
        self.train(module, self.out / "training")
        return module

    def build(self, **more: Any) -> EncoderSystem:
        """The system, for these pictures; `more` goes before the arguments."""
        encoder = self.encoder(more.get("seed"))
        facts = self.facts(encoder) | {k: v for k, v in more.items() if k in FACTS}
        names = inspect.signature(self.system).parameters
        self.built = {k: v for k, v in facts.items() if k in names}
        given = {k: v for k, v in (self.arguments | more).items() if k in names and k not in FACTS}
        module = self.system(encoder, **self.built, **given)
        module.take_classes([c.name for c in self.manifest.classes])
        return module

    def facts(self, encoder: ImageEncoder) -> dict[str, Any]:
        """Arguments of the system that follow from encoder and data; the system takes those that it has."""
        return {
            "num_features": encoder.num_features,
            "num_samples": len(self.labels),
            "steps_per_epoch": len(self.rows) // min(self.arguments["batch_size"], len(self.rows)),
            "num_classes": len(self.manifest.classes),
        }

    def loader(self, module: EncoderSystem) -> DataLoader[Any]:
        """Batches of pictures; the system draws its views of them. The last incomplete batch of an epoch is left out."""
        dataset = self.dataset(module.encoder.size)  # type: ignore[arg-type]
        settings = {"collate_fn": as_it_is} | self.order(module)
        return DataLoader(
            dataset, num_workers=0 if dataset.cache is not None else self.arguments["workers"], **settings
        )

    def order(self, module: EncoderSystem) -> dict[str, Any]:
        """How batches are drawn, as arguments of a `DataLoader`."""
        sampler = EpochSampler(len(self.labels), seed=self.arguments["seed"])
        return {"batch_size": min(self.arguments["batch_size"], len(sampler)), "sampler": sampler, "drop_last": True}

    def dataset(self, size: int) -> CanvasDataset:
        """The pictures, decoded once where they fit."""
        a = self.arguments
        side = a["canvas"] or self.canvas(size)
        cached = len(self.labels) * 3 * side**2 <= a["cache_gib"] * 2**30
        return CanvasDataset(
            lambda row: self.source(row)[0].read_bytes(self.source(row)[1]),
            {"label": torch.from_numpy(self.labels)},
            side=side,
            cache=self.out / "pictures.npy" if cached else None,
            name=lambda row: str(self.source(row)[0].column("id")[self.source(row)[1]]),
            progress=self.progress,
        )

    def canvas(self, size: int) -> int:
        """The side at which pictures are kept for views of this side, where nobody says it."""
        return round(1.5 * size)

    def bar(self, blocks: Iterable[Any], told: str, total: int) -> Iterable[Any]:
        """The same blocks, with a bar that says how many of them are done."""
        hidden = not (self.progress and self.console.is_terminal)
        return track(blocks, f"  {told}", console=self.console, transient=True, disable=hidden, total=total)

    def source(self, row: int) -> tuple[Manifest, int]:
        """Where a picture that is learnt from stands: a manifest, and the row in it."""
        return self.manifest, int(self.rows[row])

    def train(self, module: EncoderSystem, folder: Path) -> None:
        """Train, or load or continue what the folder holds."""
        a = self.arguments
        done, epochs = (folder / "done.json").exists(), module.total_steps // module.steps_per_epoch
        self.console.print(f"[bold]{folder.name}[/bold]  {'done before' if done else f'{epochs} epochs'}")
        started = time.perf_counter()
        fit_stage(
            module,
            None if done else self.loader(module),
            folder,
            epochs=epochs,
            fingerprint=self.fingerprint,
            checkpoint_every=a["checkpoint_every"],
            progress=self.progress,
            trainer={k: a[k] for k in ("accelerator", "devices", "precision", "strategy")},
            callbacks=self.callbacks(module),
        )
        if not done:
            self.seconds[folder.name] = round(time.perf_counter() - started, 2)
            write_json(self.out / "seconds.json", self.seconds)

    def callbacks(self, module: EncoderSystem) -> list[Callback]:
        """What looks on, or has a say, while it trains: here, classifier and neighbours beside, where there are labels."""
        classes = len(self.manifest.classes)
        if not self.arguments["probe"] or classes < 2:
            return []
        return [OnlineProbe(module.num_features, classes), OnlineKNN()]

    def finish(self) -> None:
        """Keep what is needed to embed pictures, the encoder by itself, and what the training said."""
        encoder = self.whole()
        write_json(
            self.out / "built.json", self.built | {"size": encoder.size, "mean": encoder.mean, "std": encoder.std}
        )
        save_encoder(encoder, self.out / "encoder")
        memory = peak_memory_gib()
        told = {"pictures": len(self.rows), "seconds": self.seconds, "memory_gib": memory}
        write_json(self.out / "metrics.json", told | self.last_metrics())
        self.report(self.out)

    def report(self, run: str | Path, *, out: str | Path | None = None) -> Path:
        """Write the page of a finished run, into its folder if nothing else is said."""
        return report_encoder(run, out=out)

    def whole(self) -> ImageEncoder:
        """The encoder that is kept by itself."""
        assert isinstance(self.module.encoder, ImageEncoder)
        return self.module.encoder

    def last_metrics(self) -> dict[str, Any]:
        """The last line of the log of the training."""
        path = self.out / "training" / "metrics.jsonl"
        if not path.exists():
            return {}
        with naming(path):
            return dict(json.loads(path.read_text(encoding="utf-8").splitlines()[-1]))
