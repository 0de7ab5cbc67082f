"""A stream of tasks over a run folder: learn one after the other, and see after each what is still known of those before.

    contralto fit prd PICTURES --tasks 5 --out RUN

The run folder holds `manifest/`, `tasks/task1`, ... (a training each, and `answers.parquet`: what the learner said of the test
pictures of all tasks so far), `model/` (all classes, for `contralto predict`), `encoder/`, `metrics.json` (the accuracy matrices,
and what is read off them) and `report.html`. An interrupted stream goes on where it stopped, within a task too, with the same
result.
"""

import copy
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from contralto.cluster import map_blocks
from contralto.data.canvas import CanvasDataset, as_it_is
from contralto.data.dataset import FeatureDataset
from contralto.data.ingest import ingest
from contralto.data.manifest import Manifest
from contralto.data.tasks import Task, TaskSampler, split_by_class, split_by_domain, split_by_drift, task_of_samples
from contralto.encoders.features import EncodePictures, cached_array, device_of
from contralto.encoders.image import ImageEncoder, adapted, save_encoder
from contralto.encoders.pictures import PictureReader, picture_blocks
from contralto.errors import DataError, UsageError
from contralto.evaluation.classification import accuracy_interval, group_numbers
from contralto.evaluation.continual import accuracy_matrix, continual_scores, right_answers
from contralto.files import load_weights, naming, save_weights, write_atomically, write_json
from contralto.pipelines.embedding import CROP
from contralto.pipelines.frozen import BLOCK, check_frozen, features_of_view, layers_behind
from contralto.pipelines.outputs import peak_memory_gib
from contralto.pipelines.pretrain import Pretraining
from contralto.review.continual import PROTOCOLS, write_continual_report
from contralto.systems.base import EncoderSystem
from contralto.systems.classifier import Classifier, load
from contralto.systems.continual.base import ContinualSystem
from contralto.systems.registry import SYSTEMS
from contralto.views.batched import BatchView
from contralto.views.image import EvalView

__all__ = ["Continual", "held_out"]

Array = npt.NDArray[Any]
FEATURES = 8192
"""Rows at a time through layers that take features."""
SCALE = (0.5, 1.0)
"""Of crops for a frozen encoder, which cannot learn to overlook what strong views change."""
SCORES = {
    "average": "accuracy, mean over tasks", "incremental": "accuracy, mean over the stream", "forgetting": "forgetting",
    "backward": "backward transfer",
}  # fmt: skip


def held_out(
    kinds: npt.ArrayLike, share: float, *, groups: Array | None = None, seed: int = 0
) -> npt.NDArray[np.bool_]:
    """Which samples are kept for testing: a share of every kind, drawn by the seed.

    Parameters
    ----------
    kinds : array (N,) of integers
        Class of every sample, or class and domain in one number.
    share : float
    groups : array (N,), optional
        Samples of one group stay together, and the share then holds for groups; "" and None stand alone.
    seed : int

    Examples
    --------
    >>> held = held_out([0] * 10 + [1] * 20, 0.2)
    >>> int(held[:10].sum()), int(held[10:].sum())
    (2, 4)
    """
    kind = np.asarray(kinds)
    number = group_numbers(len(kind), groups)
    drawn = np.random.default_rng([seed, 24]).random(int(number.max()) + 1)[number]
    if len(np.unique(number)) < len(number):
        return drawn < share
    order = np.lexsort((drawn, kind))
    _, first, count = np.unique(kind[order], return_index=True, return_counts=True)
    place = np.arange(len(kind)) - np.repeat(first, count)
    held = np.empty(len(kind), bool)
    held[order] = place < np.repeat(np.round(share * count), count)
    return held


class Stream(NamedTuple):
    """The tasks of a finished run, with its classes by name, whose places are the numbers in `tasks`, and its arguments."""

    tasks: list[Task]
    names: list[str]
    arguments: dict[str, Any]

    def task_of(self, labels: Array, domains: Array) -> Array:
        """Task (N,) of samples by class, and by domain where that is what the run was cut by; -1 for none."""
        return task_of_samples(self.tasks, labels, domains if self.arguments["split_by"] == "domain" else None)


class Answers(NamedTuple):
    """Whether a finished model is right on other samples: by the name of a score, with further scores, and on which samples."""

    right: dict[str, Array]
    labels: Array
    tasks: Array
    groups: Array
    split: str | None
    more: dict[str, Any]


class Continual(Pretraining):
    """The job behind ``contralto fit`` for one system that learns task by task.

    A job for something else than pictures says differently how to `ingest`, `loader`, `embed`, `ask`, `finish` and `answer`.
    """

    things: ClassVar[str] = "pictures"
    use: ClassVar[str] = 'predict(["a.jpg", "b.jpg"])'
    limits: ClassVar[str] = "It names one of its classes for any picture."
    protocols: ClassVar[dict[str, str]] = PROTOCOLS
    shown: ClassVar[dict[str, str]] = SCORES

    def fit(
        self,
        data: str,
        out: str | Path,
        *,
        tasks: int = 5,
        split_by: Literal["class", "domain", "drift"] = "class",
        shuffle_classes: bool = True,
        drift_width: float = 0.5,
        test_share: float = 0.2,
        frozen: bool = False,
        variants: int = 2,
        cache: str | None = None,
        **rest: Any,
    ) -> Path:
        """Learn labelled pictures in a stream of tasks, and measure after each what is known of all so far.

        Parameters
        ----------
        data : str
            Labelled pictures. Those of the split `test` are for testing; without any, a share of every class is kept for it.
        out : path
            Run folder. Called again with the same arguments, the job continues where it stopped.
        tasks : int
            How many; "domain" has one for every domain.
        split_by : {"class", "domain", "drift"}
            New classes in every task; the same classes in another domain, which is what `group_column` says; or classes that come
            and go gradually, without a boundary that the learner could see.
        shuffle_classes : bool
            Draw the order of classes or domains by the seed; else that of their numbers or names.
        drift_width : float
            Of "drift": deviation of the time at which a picture comes, in lengths of a task.
        test_share : float
            Share that is kept for testing where the data has no split `test`.
        frozen : bool
            Beyond the papers: the encoder stays as it is, its features of a few views of each picture (large crops and flips) are
            computed once, and two layers learn on them, which begin by centring those of the first task.
        variants : int
            With `frozen`: how many draws of each view are kept.
        cache : str, optional
            Where features of the frozen encoder are kept; default: in the run folder. Runs that share it compute them once.
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
            If pictures lack labels, or a task has too few.
        """
        own = {k: v for k, v in locals().items() if k in self.own_parameters()}
        return super().fit(data, out, **own, **rest)

    # Data.

    def ingest(self) -> None:
        """Read the pictures, keep those for testing apart, and cut the others into tasks.

        Raises
        ------
        UsageError
            If the pictures cannot be cut so.
        DataError
            If a task has too few pictures to learn from or to test.
        """
        check_frozen(self.arguments)
        super().ingest()
        self.divide(self.manifest.right_labels, self.manifest.column("group").astype(str), *self.manifest.split_of())

    def divide(self, labels: Array, groups: Array, wanted: str | None, tested: Array) -> None:
        """Cut what there is into tasks, and keep some of it for testing.

        Parameters
        ----------
        labels, groups : array (M,)
            Right labels and groups of all samples; `self.rows` are those to learn from, `self.labels` their labels.
        wanted : str, optional
            Name of the split that is for testing; None: a share of those to learn from is kept for it.
        tested : array (M,) of bool
            Which samples are in it.

        Raises
        ------
        UsageError
            If the samples cannot be cut so.
        DataError
            If a task has too few samples to learn from or to test.
        """
        a = self.arguments
        if not 0 < a["test_share"] < 1:
            raise UsageError(f"test_share must be between 0 and 1, got {a['test_share']}")
        domains = groups if a["split_by"] == "domain" else None
        if domains is not None and np.isin(domains[self.rows], ["", "None"]).any():
            raise DataError(f"{self.things} without a domain: name its column with --group_column", file=self.data)
        if wanted is None:
            kinds = np.unique(np.stack([groups, labels.astype(str)]), axis=1, return_inverse=True)[1].reshape(-1)
            held = held_out(
                kinds if domains is not None else labels, a["test_share"],
                groups=None if domains is not None else groups, seed=a["seed"],
            )  # fmt: skip
            tested, kept = held & np.isin(np.arange(len(held)), self.rows), ~held[self.rows]
            self.rows, self.labels = self.rows[kept], self.labels[kept]
        self.tasks = self.cut(None if domains is None else domains[self.rows])
        self.test_rows = np.flatnonzero(tested & (labels >= 0))
        of_task = task_of_samples(self.tasks, labels, domains)[self.test_rows]
        self.test_rows, self.test_tasks = self.test_rows[of_task >= 0], of_task[of_task >= 0]
        self.test_labels, self.test_groups = labels[self.test_rows], groups[self.test_rows]
        for number, task in enumerate(self.tasks):
            learnt, test = len(task.rows), int((self.test_tasks == number).sum())
            if learnt < 2 or not test:
                raise DataError(
                    f"{task.name} has {learnt} {self.things} to learn from and {test} to test, and needs 2 and 1: fewer "
                    f"--tasks, or another --test_share",
                    file=self.data,
                )
        sizes = [len(t.rows) for t in self.tasks]
        self.console.print(
            f"  {len(self.tasks)} tasks of {min(sizes)} to {max(sizes)} {self.things}, {len(self.test_rows)} to test",
            highlight=False,
            soft_wrap=True,
        )

    def cut(self, domains: Array | None) -> list[Task]:
        """The tasks, from the pictures to learn from and their domains."""
        a = self.arguments
        if a["split_by"] not in ("class", "domain", "drift"):
            raise UsageError(f'split_by must be "class", "domain" or "drift", got {a["split_by"]!r}')
        seed = a["seed"] if a["shuffle_classes"] else None
        if domains is not None:
            return split_by_domain(self.labels, domains, seed=seed)
        if a["split_by"] == "drift":
            return split_by_drift(self.labels, a["tasks"], width=a["drift_width"], seed=a["seed"])
        return split_by_class(self.labels, a["tasks"], seed=seed)

    # Features of a frozen encoder.

    @property
    def plain(self) -> Array:
        """Its features (M, F) of all pictures of the manifest as they are, float16, from the disk."""
        if not hasattr(self, "_plain"):
            encoder, rows = self.begun, np.arange(len(self.manifest))
            view = EvalView(encoder.size, CROP, encoder.mean, encoder.std)
            setup = copy.deepcopy(encoder), device_of(self.arguments["accelerator"]), self.manifest.root, view
            blocks = picture_blocks(self.manifest, rows)
            self._plain = self.cached(
                "plain", {"view": repr(view)},
                lambda: self.bar(map_blocks(EncodePictures, blocks, setup=setup), "features", len(blocks)), len(rows),
            )  # fmt: skip
        return self._plain

    def drawn(self, view: BatchView, variant: int) -> Array:
        """Its features (N, F) of one drawing of a view of all pictures to learn from, likewise."""
        encoder, seed = self.begun, self.arguments["seed"]
        device = device_of(self.arguments["accelerator"])
        key = {
            "view": repr(view), "variant": variant, "seed": seed, "side": self.canvas(view.size), "rows": self.rows.tolist()
        }  # fmt: skip

        def compute() -> Iterable[Array]:
            blocks = features_of_view(encoder, self.dataset(view.size), view, variant, seed=seed, device=device)
            return self.bar(blocks, f"view {variant + 1}", -(-len(self.rows) // BLOCK))

        return self.cached("view", key, compute, len(self.rows))

    def cached(self, name: str, key: dict[str, Any], compute: Callable[[], Iterable[Array]], count: int) -> Array:
        """Features that are computed once, and the time that took."""
        started = time.perf_counter()
        key |= {"encoder": self.begun.fingerprint(), "pictures": self.manifest.fingerprint()}
        found = cached_array(self.arguments["cache"] or self.out / "features", name, key, compute, rows=count)
        self.seconds["features"] = round(self.seconds.get("features", 0.0) + time.perf_counter() - started, 2)
        return found

    def encoder(self, seed: int | None = None) -> ImageEncoder:
        """What learns: the encoder, or with `frozen` the layers behind it, for which features are the input."""
        if not self.arguments["frozen"]:
            return super().encoder(seed)
        return layers_behind(self.begun, self.plain[self.rows[self.tasks[0].rows]])

    def whole(self) -> ImageEncoder:
        """The encoder that is used afterwards: with what was learnt behind it."""
        learnt = super().whole()
        return adapted(self.begun.cpu(), learnt.backbone).eval() if self.arguments["frozen"] else learnt

    # Training.

    def learn(self) -> ContinualSystem:
        """All tasks, one after the other; those that are done are not done again."""
        module = self.build()
        assert isinstance(module, ContinualSystem)
        self._of_data = self.fingerprint
        for number in range(self._go_on(module), len(self.tasks)):
            self.learn_task(module, number)
        return module

    def learn_task(self, module: ContinualSystem, number: int) -> None:
        """Train on a task, end it, and ask for what is known of all tasks so far."""
        task, folder = self.tasks[number], self.folder(number)
        rows = np.concatenate([t.rows for t in self.tasks[: number + 1]]) if module.keeps_all else task.rows
        memory: Array = np.zeros(0, np.int64) if module.memory is None else module.memory.index.cpu().numpy()
        self.sampler = TaskSampler(
            rows, self.arguments["batch_size"], seed=self.arguments["seed"], memory=memory, replayed=module.replayed,
            first_epoch=number * self.arguments["epochs"] + bool(number) * module.extra_epochs,
        )  # fmt: skip
        module.begin_task(np.unique(self.labels[task.rows]).tolist(), steps_per_epoch=len(self.sampler))
        self.replayed = torch.zeros(len(self.labels), dtype=torch.bool)
        self.replayed[torch.from_numpy(memory)] = True
        text = f"{self._of_data} {number}"
        self.fingerprint = hashlib.sha256(text.encode()).hexdigest()[:16]
        self.train(module, folder)
        started = time.perf_counter()
        index, labels = torch.from_numpy(task.rows), torch.from_numpy(self.labels[task.rows])
        features = self.embed(module, self.rows[task.rows]) if module.wants_features else None
        module.end_task(index, labels, features)
        save_weights(module, folder / "state.safetensors")
        answers = self.ask(module, number)
        write_atomically(folder / "answers.parquet", lambda path: pq.write_table(answers, path))
        (folder / "weights.safetensors").unlink(missing_ok=True)  # the state is what goes on
        if number:
            (self.folder(number - 1) / "state.safetensors").unlink(missing_ok=True)
        self.seconds["answers"] = round(self.seconds.get("answers", 0.0) + time.perf_counter() - started, 2)
        write_json(self.out / "seconds.json", self.seconds)

    def folder(self, number: int) -> Path:
        """Of a task, whose number is from 0."""
        return self.out / "tasks" / f"task{number + 1}"

    def _go_on(self, module: ContinualSystem) -> int:
        """How many tasks are done; the module is as it was after the last of them."""
        done = 0
        while done < len(self.tasks) and (self.folder(done) / "answers.parquet").exists():
            done += 1
        if done:
            load_weights(module, self.folder(done - 1) / "state.safetensors")
            self.console.print(f"  {done} tasks done before", highlight=False)
        return done

    def order(self, module: EncoderSystem) -> dict[str, Any]:
        """Batches of the task, and of what is kept of earlier ones."""
        return {"batch_sampler": self.sampler}

    def loader(self, module: EncoderSystem) -> DataLoader[Any]:
        """Pictures, or with `frozen` the features of their views."""
        if not self.arguments["frozen"]:
            return super().loader(module)
        variants, base = self.arguments["variants"], self.begun
        mild = BatchView(base.size, SCALE, mean=base.mean, std=base.std)
        views = [  # each has drawings of its own, so that the two of a picture are never the same one
            np.stack([self.drawn(mild, number * variants + v) for v in range(variants)])
            for number in range(len(module.views(base.size, base.mean, base.std)))
        ]
        fields = {"label": torch.from_numpy(self.labels), "replayed": self.replayed}
        return DataLoader(
            FeatureDataset(views, fields, seed=self.arguments["seed"]), collate_fn=as_it_is, **self.order(module)
        )

    def dataset(self, size: int) -> CanvasDataset:
        """The pictures, with a field that says which of them are replayed."""
        dataset = super().dataset(size)
        dataset.fields["replayed"] = self.replayed
        return dataset

    def inputs(self, module: ContinualSystem, rows: Array) -> Iterator[Tensor]:
        """What the encoder takes of pictures of the manifest, without augmentation, in batches on the device."""
        if self.arguments["frozen"]:
            for part in np.array_split(rows, -(-len(rows) // FEATURES)):
                yield torch.from_numpy(self.plain[part].astype(np.float32)).to(module.device)
            return
        encoder: Any = module.encoder
        reader = PictureReader(self.manifest.root, EvalView(encoder.size, CROP, encoder.mean, encoder.std))
        for block in picture_blocks(self.manifest, rows):
            yield from (x.to(module.device) for x in reader.batches(block))

    def embed(self, module: ContinualSystem, rows: Array) -> Tensor:
        """Features (N, F) of pictures of the manifest by the encoder as it is."""
        module.eval().to(device_of(self.arguments["accelerator"]))
        with torch.inference_mode():
            found = torch.cat([module.embed(x).float().cpu() for x in self.inputs(module, rows)])
        module.cpu()
        return found

    def ask(self, module: ContinualSystem, number: int) -> pa.Table:
        """What is said of the test pictures of all tasks so far, not knowing the task of a picture, and knowing it."""
        asked = np.flatnonzero(self.test_tasks <= number)
        rows, labels, tasks = self.test_rows[asked], self.test_labels[asked], self.test_tasks[asked]
        module.eval().to(device_of(self.arguments["accelerator"]))
        with torch.inference_mode():
            logits = torch.cat([module.predict_logits(x).float().cpu() for x in self.inputs(module, rows)])
        module.cpu()
        classes = [t.classes for t in self.tasks]
        right = right_answers(logits.numpy(), labels, tasks, classes)
        names = np.array(self.manifest.class_names, dtype=object)
        return pa.table(
            {
                "index": rows, "id": self.manifest.column("id")[rows].tolist(), "task": tasks,
                "label": names[labels].tolist(), "predicted": names[logits.argmax(1).numpy()].tolist(),
                "right": right.class_incremental, "right_in_task": right.task_incremental,
            }
        )  # fmt: skip

    # What comes out.

    def finish(self) -> None:
        """Keep encoder, model, measures and page."""
        module = self.module.cpu()
        assert isinstance(module, ContinualSystem)
        encoder = self.whole()
        save_encoder(encoder, self.out / "encoder")
        seen = module.seen.nonzero().squeeze(1)
        names = [self.manifest.class_names[c] for c in seen.tolist()]
        temperature = float(getattr(module, "temperature", 1.0)) if module.rule == "cosine" else 1.0
        model = Classifier.of(
            encoder, encoder.name, names, module.class_weights()[seen], rule=module.rule,
            temperature=temperature, crop=CROP,
        )  # fmt: skip
        metrics = self.measures()
        model.save(self.out / "model", self.card(names, metrics))
        memory = peak_memory_gib()
        told = {
            "pictures": len(self.rows), "tested": len(self.test_rows), "seconds": self.seconds, "memory_gib": memory,
            "kept": 0 if module.memory is None else len(module.memory),
            "files": {"accuracy matrix": "report.html", "answers": f"tasks/task{len(self.tasks)}/answers.parquet"},
        }  # fmt: skip
        write_json(self.out / "metrics.json", told | metrics)
        self.report(self.out)

    def measures(self) -> dict[str, Any]:
        """Accuracy matrices by both protocols, what is read off them, and the tasks."""
        found: dict[str, Any] = {"scores": {}, "matrix": {}}
        tables = []
        for number in range(len(self.tasks)):
            with naming(self.folder(number) / "answers.parquet"):
                tables.append(
                    pq.read_table(self.folder(number) / "answers.parquet", columns=["index", *self.protocols])
                )
        for column, told in self.protocols.items():
            right = np.zeros((len(tables), len(self.test_rows)))
            for number, table in enumerate(tables):
                place = np.searchsorted(self.test_rows, table.column("index").to_numpy())
                right[number, place] = table.column(column).to_numpy(zero_copy_only=False)
            matrix = accuracy_matrix(right, self.test_tasks)
            found["matrix"][told] = [[None if math.isnan(x) else round(x, 4) for x in row] for row in matrix]
            scores = continual_scores(right, self.test_tasks, groups=self._test_groups())
            found["scores"] |= {f"{told}: {words}": scores[name].score() for name, words in self.shown.items()}
        names = self.class_names
        counted = np.bincount(self.test_tasks, minlength=len(self.tasks)).tolist()
        found["tasks"] = [
            {"name": t.name, "classes": [names[c] for c in t.classes], "pictures": len(t.rows), "tested": tested}
            for t, tested in zip(self.tasks, counted, strict=True)
        ]
        return found

    @property
    def class_names(self) -> list[str]:
        """In the order of their numbers."""
        return self.manifest.class_names

    def _test_groups(self) -> Array | None:
        return None if self.arguments["split_by"] == "domain" else self.test_groups

    def report(self, run: str | Path, *, out: str | Path | None = None) -> Path:
        """The page of accuracy after every task."""
        return write_continual_report(run, out=out)

    def card(self, names: list[str], metrics: dict[str, Any]) -> str:
        """The README of the model."""
        lines = [
            f"# {self.headline(names)}, learnt in {len(self.tasks)} tasks",
            "",
            *self.origin(names),
            "",
            "    import contralto",
            f'    contralto.load("path/to/this/folder").{self.use}',
            "",
            f"## After the last task, on {len(self.test_rows)} test {self.things}",
            "",
            "| | value | 95 % interval |",
            "|---|---|---|",
            *(f"| {n} | {s['value']:.1%} | {s['low']:.1%} to {s['high']:.1%} |" for n, s in metrics["scores"].items()),
            "",
            "## Limits",
            "",
            f"What was learnt first is known worst. {self.limits}",
        ]
        return "\n".join(lines) + "\n"

    def headline(self, names: list[str]) -> str:
        """What the model is, in a few words."""
        return f"Classifier of {len(names)} classes"

    def origin(self, names: list[str]) -> list[str]:
        """Lines on what it knows and what it was learnt from."""
        return [
            f"Classes: {', '.join(names)}",
            "",
            f"Learnt by {SYSTEMS[self.name].title} from {len(self.rows)} labelled pictures, one task after another; encoder "
            f"{self.arguments['image_encoder']}, input {self.module.encoder.size} px.",
        ]

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
        """Measure the finished model on other samples: what is right, of all and by task.

        Of pictures, not knowing the task and knowing it; of recordings, what is recognised, and how many words are wrong.

        Parameters
        ----------
        run : path
        data : str
            Samples with labels, of the classes of the run; or recordings with what is said.
        label_column, image_column, group_column : str, optional
            Columns (of recordings: `image_column`), where their names are not common ones; of a run by domains, `group_column`
            says the domain.
        split : str, optional
            Default: `test` if there is one, else all.

        Returns
        -------
        dict
            `scores`, `n` and `split`.

        Raises
        ------
        DataError
            If there is nothing to measure.
        """
        run = Path(run)
        with naming(run / "metrics.json"):
            told = json.loads((run / "metrics.json").read_text(encoding="utf-8"))["tasks"]
        with naming(run / "config.json"):
            arguments = json.loads((run / "config.json").read_text(encoding="utf-8"))["arguments"]
        names = list(dict.fromkeys(name for t in told for name in t["classes"]))
        tasks = [Task(t["name"], tuple(names.index(c) for c in t["classes"]), np.zeros(0, np.int64)) for t in told]
        columns: dict[str, Any] = {
            "label_column": label_column,
            "image_column": image_column,
            "group_column": group_column,
        }
        said = self.answer(run, data, split, columns, Stream(tasks, names, arguments))
        scores, groups = {}, None if arguments["split_by"] == "domain" else said.groups
        labels = np.maximum(said.labels, 0)
        for name, right in said.right.items():
            scores[name] = accuracy_interval(right, labels, groups=groups).score()
            for place, task in enumerate(tasks):
                mine = said.tasks == place
                if mine.any():
                    scores[f"{name}, {task.name}"] = accuracy_interval(right[mine], labels[mine]).score()
        return {"scores": scores | said.more, "n": len(labels), "split": said.split}

    def answer(self, run: Path, data: str, split: str | None, columns: dict[str, Any], stream: "Stream") -> "Answers":
        """What a finished model says of other pictures, and whether that is right.

        Parameters
        ----------
        run, data, split
            See `evaluate`.
        columns : dict
            Those that were named.
        stream : Stream
            Of the run.

        Raises
        ------
        DataError
            If no picture has a label of a class that the run knows.
        """
        model = load(run)
        manifest: Manifest = ingest(data, image_filter=False, **columns)
        number = {name: c for c, name in enumerate(stream.names)}
        labels = np.array([*(number.get(n, -1) for n in manifest.class_names), -1], np.int64)[manifest.right_labels]
        groups = manifest.column("group").astype(str)
        of_task = stream.task_of(labels, groups)
        wanted, tested = manifest.split_of(split)
        rows = np.flatnonzero(tested & (of_task >= 0))
        if not len(rows):
            known = ", ".join(model.classes[:5])
            raise DataError(f"no picture has a label of a class that the run knows ({known}, ...)", file=data)
        probabilities = model.predict([manifest.read_bytes(int(r)) for r in rows]).probabilities
        probabilities = probabilities[:, [model.classes.index(name) for name in stream.names]]
        right = right_answers(probabilities, labels[rows], of_task[rows], [t.classes for t in stream.tasks])
        told = {f"{name}: accuracy": r for name, r in zip(PROTOCOLS.values(), right, strict=True)}
        return Answers(told, labels[rows], of_task[rows], groups[rows], wanted, {})
