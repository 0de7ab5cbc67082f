"""Few-shot learning over a run folder: base classes are learnt from, new ones are tested in drawn episodes, a few pictures do.

Beside what `Pretraining` leaves, the folder holds `classes.json` (which classes are base, which new), `novel.parquet` (accuracy
of every new class), `episodes.png` (one episode before and after the training) and `model/`, a classifier by nearest prototype:
of the classes in `--support`, a few labelled pictures of whatever is to be told apart; else of all classes of the data.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from contralto.data.episodes import EpisodeSampler, draw_episodes
from contralto.data.images import decode_image
from contralto.data.ingest import ingest
from contralto.data.manifest import Manifest
from contralto.encoders.image import ImageEncoder
from contralto.encoders.pictures import PictureReader, picture_blocks
from contralto.errors import DataError, UsageError
from contralto.evaluation.episodes import EpisodeClassifier, classify_episodes, few_shot_accuracy
from contralto.files import naming, write_atomically, write_json
from contralto.losses.icnn import icnn_score
from contralto.pipelines.embedding import Embedder, load_embedder
from contralto.pipelines.pretrain import Pretraining
from contralto.prototypes.bank import means
from contralto.review.episodes import episode_sheet
from contralto.systems.base import EncoderSystem
from contralto.systems.classifier import Classifier
from contralto.systems.fewshot.base import EpisodicSystem

__all__ = ["FewShotJob", "classifier_from", "novel_classes"]

Integers = npt.NDArray[np.int64]
Features = npt.NDArray[np.float32]
SHOWN = 2000
"""Pictures of new classes on which the ICNN score stands: it compares all with all."""


class FewShotJob(Pretraining):
    """The job behind ``contralto fit`` for few-shot systems."""

    def fit(
        self,
        data: str,
        out: str | Path,
        *,
        novel: str | None = None,
        novel_share: float = 0.3,
        novel_groups: bool = False,
        test_way: int = 5,
        test_shots: list[int] | tuple[int, ...] = (1, 5),
        test_queries: int = 15,
        test_episodes: int = 600,
        support: str | None = None,
        **rest: Any,
    ) -> Path:
        """Learn from the base classes of labelled pictures, and test on the new ones.

        Parameters
        ----------
        novel : str, optional
            The new classes: their names, joined by commas, or a text file with one per line. Default: classes that have no
            picture in the split `train`, if there are such; else drawn by the seed.
        novel_share : float
            Share of the classes that are drawn.
        novel_groups : bool
            Draw whole groups of classes (alphabets, families), by the column of groups; a class is in the group of its first
            picture.
        test_way, test_queries, test_episodes : int
            Classes of a test episode, queries of each, number of episodes.
        test_shots : list of int
            Labelled pictures of each class: an evaluation for each number.
        support : str, optional
            A few labelled pictures of the classes that are wanted in the end: their prototypes are the classifier of the run.
        """
        return super().fit(
            data,
            out,
            novel=novel,
            novel_share=novel_share,
            novel_groups=novel_groups,
            test_way=test_way,
            test_shots=list(test_shots),
            test_queries=test_queries,
            test_episodes=test_episodes,
            support=support,
            **rest,
        )

    def ingest(self) -> None:
        """Read the pictures; those of base classes are learnt from.

        Raises
        ------
        DataError
            If base or new classes do not have enough pictures for an episode: known before anything is trained.
        """
        super().ingest()
        a, names = self.arguments, self.manifest.class_names
        chosen = novel_classes(
            self.manifest, self.rows, named=a["novel"], share=a["novel_share"], groups=a["novel_groups"], seed=a["seed"]
        )
        right = self.manifest.right_labels
        self.base = np.setdiff1d(np.unique(self.labels), chosen)
        self.novel_rows = np.flatnonzero(np.isin(right, chosen))
        self.novel_labels = right[self.novel_rows]
        kept = np.isin(self.labels, self.base) & ~np.isin(right[self.rows], chosen)  # a wrong label does not let it in
        self.rows, self.labels = self.rows[kept], np.searchsorted(self.base, self.labels[kept])
        told = {"base": [names[c] for c in self.base], "novel": [names[c] for c in chosen]}
        text = json.dumps([self.fingerprint, told["novel"]])
        self.fingerprint = hashlib.sha256(text.encode()).hexdigest()[:16]
        write_json(self.out / "classes.json", told)
        self.console.print(
            f"  {len(self.base)} base classes with {len(self.rows)} pictures, {len(chosen)} new ones with "
            f"{len(self.novel_rows)}",
            highlight=False,
        )
        if not a["test_shots"]:
            raise UsageError("test_shots must hold a number of known pictures of a class at least")
        if "episodes" in a:
            _demand(self.labels, a["way"], a["shot"], a["queries"], f"{self.data} (base classes)")
        for shot in a["test_shots"]:
            _demand_test(self.novel_labels, a, shot, self.data)

    def facts(self, encoder: ImageEncoder) -> dict[str, Any]:
        """Only base classes count; an epoch is so many episodes."""
        a = self.arguments
        size = None if "episodes" in a else min(a["batch_size"], len(self.rows))
        steps = a["episodes"] // a["episodes_per_step"] if size is None else len(self.rows) // size
        return {
            "num_features": encoder.num_features,
            "num_samples": len(self.labels),
            "steps_per_epoch": steps,
            "num_classes": len(self.base),
        }

    def order(self, module: EncoderSystem) -> dict[str, Any]:
        """Episodes, for systems that learn from them."""
        if not isinstance(module, EpisodicSystem):
            return super().order(module)
        sampler = EpisodeSampler(
            self.labels,
            way=module.way,
            shot=module.shot,
            queries=module.queries,
            seed=module.seed,
            episodes=module.episodes,
            per_batch=module.episodes_per_step,
        )
        return {"batch_sampler": sampler}

    def finish(self) -> None:
        """Test on the new classes before and after; keep the classifier, the tables and the picture."""
        before, after = (_features(Embedder(m), self.manifest, self.novel_rows) for m in (self.build(), self.module))
        self.scores = _scores(before, self.novel_labels, self.arguments, ("prototype",), "before training")
        self.scores |= _scores(after, self.novel_labels, self.arguments)
        for told, features in (("before training", before), ("after", after)):
            self.scores[f"ICNN score of the new classes, {told}"] = {"value": _icnn(features, self.novel_labels)}
        self._write_classes(after)
        self._draw_episode(before, after)
        super().finish()
        model, count = self._classifier()
        model.save(self.out / "model", _card(model, self.name, count))

    def last_metrics(self) -> dict[str, Any]:
        """The last line of the log, the scores, and where things are."""
        files = {
            "accuracy of every new class": "novel.parquet",
            "an episode before and after": "episodes.png",
            "classifier (contralto predict)": "model",
        }
        return super().last_metrics() | {"scores": self.scores, "files": files}

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
        """Episodes of whatever classes the data have; those that the run learnt from are left out.

        Parameters
        ----------
        run : path
        data : str
            Labelled pictures.
        label_column, image_column, group_column : str, optional
        split : str, optional
            Only pictures of this split; default: all, as no class of them was learnt from.

        Returns
        -------
        dict
            `scores`; `n` pictures and `classes` that were tested.
        """
        arguments, base = _of_run(run)
        manifest = ingest(
            data, label_column=label_column, image_column=image_column, group_column=group_column, image_filter=False
        )
        known = [c for c, name in enumerate(manifest.class_names) if name in base]
        labels = manifest.right_labels
        inside = manifest.column("split").astype(str) == split if split is not None else np.ones(len(labels), bool)
        rows = np.flatnonzero((labels >= 0) & ~np.isin(labels, known) & inside)
        for shot in arguments["test_shots"]:
            _demand_test(labels[rows], arguments, shot, data)
        features = _features(load_embedder(run), manifest, rows)
        scores = _scores(features, labels[rows], arguments)
        scores["ICNN score"] = {"value": _icnn(features, labels[rows])}
        return {"scores": scores, "n": len(rows), "classes": len(np.unique(labels[rows]))}

    def _write_classes(self, features: Features) -> None:
        """Accuracy of every new class, for each number of shots."""
        a, names = self.arguments, self.manifest.class_names
        chosen, count = np.unique(self.novel_labels, return_counts=True)
        columns: dict[str, Any] = {"class": [names[c] for c in chosen], "pictures": count}
        for shot in a["test_shots"]:
            found = few_shot_accuracy(features, self.novel_labels, shot=shot, **_protocol(a)).classes
            columns[f"accuracy_{shot}"] = pa.array(found[chosen], from_pandas=True)  # null where it was never drawn
        table = pa.table(columns).sort_by(f"accuracy_{a['test_shots'][0]}")
        write_atomically(self.out / "novel.parquet", lambda path: pq.write_table(table, path))

    def _draw_episode(self, before: Features, after: Features) -> None:
        """One episode of new classes with one shot: what goes where, before and after."""
        a = self.arguments
        queries = min(a["test_queries"], 10)
        rng = np.random.default_rng([a["seed"], 9])
        [rows] = draw_episodes(self.novel_labels, way=a["test_way"], shot=1, queries=queries, episodes=1, rng=rng)
        shown, asked = rows[: a["test_way"]], rows[a["test_way"] :]
        answers = []
        for title, features in (("before training", before), ("after", after)):
            x = torch.from_numpy(features)
            found = classify_episodes(x[shown].view(1, a["test_way"], 1, -1), x[asked].unsqueeze(0))
            answers.append((title, found[0].numpy()))
        pictures = [decode_image(self.manifest.read_bytes(int(self.novel_rows[r]))) for r in rows]
        truth = np.arange(a["test_way"]).repeat(queries)
        sheet = episode_sheet(pictures[: a["test_way"]], pictures[a["test_way"] :], truth, answers)
        write_atomically(self.out / "episodes.png", lambda path: sheet.save(path, "PNG"))

    def _classifier(self) -> tuple[Classifier, int]:
        """The classifier of the run, and on how many pictures its prototypes stand."""
        a = self.arguments
        model = Embedder(self.module)
        if a["support"] is not None:
            manifest = self._read(a["support"], self.out / "support", columns=False)
            return _from_manifest(model, manifest, np.arange(len(manifest)), a["support"])
        rows = np.union1d(self.rows, self.novel_rows)
        return _from_manifest(model, self.manifest, rows, self.data)


def novel_classes(
    manifest: Manifest, rows: Integers, *, named: str | None, share: float, groups: bool, seed: int
) -> Integers:
    """Which classes are new: named ones; or those without a picture for training; or some that are drawn.

    Parameters
    ----------
    manifest : Manifest
    rows : (N,) integers
        Those of its pictures that are for training.
    named : str, optional
        Names joined by commas, or a text file with one per line.
    share : float
        Of the classes (or groups), if they must be drawn.
    groups : bool
        Draw whole groups.
    seed : int

    Returns
    -------
    (K,) integers
        Ascending.

    Raises
    ------
    UsageError
        If a name is not that of a class, or the share is none.
    DataError
        If there are no groups to draw, or no class would be left to learn from.
    """
    names, labels = manifest.class_names, manifest.right_labels
    there = np.unique(labels[labels >= 0])
    learnt = np.unique(manifest.labels[rows])
    if named is not None:
        number = {name: c for c, name in enumerate(names)}
        wanted = _names(named)
        unknown = [name for name in wanted if name not in number]
        if unknown or not wanted:
            raise UsageError(
                f"novel: no class is called {unknown[0]!r}; there are {', '.join(names[:10])}"
                + (", ..." if len(names) > 10 else "")
                if unknown
                else "novel names no class"
            )
        chosen = np.unique([number[name] for name in wanted])
    else:
        chosen = np.setdiff1d(there, learnt)
        if not len(chosen):
            chosen = _drawn(manifest, there, share, groups, seed)
    if len(np.setdiff1d(learnt, chosen)) < 2:
        raise DataError(
            f"{len(chosen)} of {len(there)} classes are new: fewer than two are left to learn from", file=manifest.root
        )
    return chosen.astype(np.int64)


def classifier_from(
    run: str | Path, data: str, *, label_column: str | None = None, image_column: str | None = None
) -> Classifier:
    """A classifier of other classes from a few labelled pictures of each, without training: one prototype per class.

    Parameters
    ----------
    run : path
        Folder of a finished few-shot run.
    data : str
        The few labelled pictures, in any form of `contralto.data.sources`.
    label_column, image_column : str, optional
        Columns, where their names are not common ones.

    Returns
    -------
    Classifier
        `predict(pictures)` names the class of the nearest prototype; `save(folder)` keeps it.

    Raises
    ------
    DataError
        If the run is not finished, or fewer than two classes have a picture.

    Examples
    --------
    >>> classifier_from("nowhere", "few")
    Traceback (most recent call last):
    ...
    contralto.errors.DataError: nowhere: there is no pretrained encoder here (built.json); is the run finished?
    """
    model = load_embedder(run)
    manifest = ingest(data, label_column=label_column, image_column=image_column, image_filter=False)
    return _from_manifest(model, manifest, np.arange(len(manifest)), data)[0]


def _from_manifest(model: Embedder, manifest: Manifest, rows: Integers, data: str) -> tuple[Classifier, int]:
    """The nearest-prototype classifier of the labelled pictures among some rows, and how many they are."""
    labels = manifest.right_labels
    rows = rows[labels[rows] >= 0]
    chosen, places = np.unique(labels[rows], return_inverse=True)
    if len(chosen) < 2:
        raise DataError(f"a classifier needs labelled pictures of two classes, found {len(chosen)}", file=data)
    encoder = model.system.encoder
    assert isinstance(encoder, ImageEncoder)
    features = torch.from_numpy(_features(model, manifest, rows))
    prototypes = means(features, torch.from_numpy(places), len(chosen))
    names = [manifest.class_names[c] for c in chosen]
    temperature = float(getattr(model.system, "temperature", 1.0))
    return Classifier.of(encoder, encoder.name, names, prototypes, rule="distance", temperature=temperature), len(rows)


def _of_run(run: str | Path) -> tuple[dict[str, Any], set[str]]:
    """Arguments of a run, and the names of its base classes."""
    found = []
    for name in ("config.json", "classes.json"):
        path = Path(run) / name
        if not path.is_file():
            raise DataError("is missing: is the run finished?", file=str(path))
        with naming(path):
            found.append(json.loads(path.read_text(encoding="utf-8")))
    return found[0]["arguments"], set(found[1]["base"])


def _names(named: str) -> list[str]:
    """Names from a list joined by commas, or from a text file."""
    path = Path(named)
    try:
        there = path.is_file()
    except OSError:  # a list longer than a file name may be
        there = False
    if there:
        with naming(path):
            return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return [name.strip() for name in named.split(",") if name.strip()]


def _drawn(manifest: Manifest, there: Integers, share: float, groups: bool, seed: int) -> Integers:
    """A share of the classes, or of their groups, drawn by the seed; at least one."""
    if not 0 < share < 1:
        raise UsageError(f"novel_share must be between 0 and 1, got {share}")
    rng = np.random.default_rng([seed, 8])
    kinds: npt.NDArray[Any] = there
    if groups:
        labels = manifest.right_labels
        of_rows = manifest.column("group").astype(str)
        kinds = np.array([of_rows[labels == c][0] for c in there])
        if (kinds == "").any():
            raise DataError(
                "novel_groups needs a group for every class: name its column with --group_column", file=manifest.root
            )
    names = np.unique(kinds)
    taken = rng.permutation(names)[: max(1, round(share * len(names)))]
    return there[np.isin(kinds, taken)]


def _demand(labels: Integers, way: int, shot: int, queries: int, what: str, *, episodes: int = 1) -> None:
    """Say that there is not enough for an episode, with the name of the data."""
    try:
        draw_episodes(labels, way=way, shot=shot, queries=queries, episodes=episodes, rng=np.random.default_rng(0))
    except DataError as error:
        raise DataError(str(error), file=what) from error


def _demand_test(labels: Integers, arguments: dict[str, Any], shot: int, data: str) -> None:
    """The same for the episodes of the test."""
    a = arguments
    few = min(a["test_episodes"], 1)
    _demand(labels, a["test_way"], shot, a["test_queries"], f"{data} (new classes)", episodes=few)


def _features(model: Embedder, manifest: Manifest, rows: Integers) -> Features:
    """Embeddings of some pictures (N, F), without augmentation."""
    reader = PictureReader(manifest.root, model.view)
    return model.embed_pixels(x for block in picture_blocks(manifest, rows) for x in reader.batches(block))


def _protocol(arguments: dict[str, Any]) -> dict[str, Any]:
    """What test episodes are like."""
    a = arguments
    return {"way": a["test_way"], "queries": a["test_queries"], "episodes": a["test_episodes"], "seed": a["seed"]}


def _scores(
    features: Features,
    labels: Integers,
    arguments: dict[str, Any],
    classifiers: tuple[EpisodeClassifier, ...] = ("prototype", "probe"),
    more: str = "",
) -> dict[str, dict[str, Any]]:
    """Accuracy with its interval for every number of shots and every classifier."""
    told = {"prototype": "nearest prototype", "probe": "linear probe", "nearest": "nearest picture"}
    scores = {}
    for shot in arguments["test_shots"]:
        for classifier in classifiers:
            found = few_shot_accuracy(features, labels, shot=shot, classifier=classifier, **_protocol(arguments))
            words = [f"{arguments['test_way']} classes, {shot} shot{'s' * (shot > 1)}", told[classifier], more]
            name = ", ".join(w for w in words if w)
            scores[name] = found.accuracy.score()
    return scores


def _icnn(features: Features, labels: Integers, *, seed: int = 0) -> float:
    """ICNN score of features of length one, of at most so many pictures."""
    keep = np.random.default_rng(seed).permutation(len(features))[:SHOWN]
    x = torch.nn.functional.normalize(torch.from_numpy(features[keep]), dim=1)
    return float(icnn_score(x, torch.from_numpy(labels[keep]), window=20))


def _card(model: Classifier, name: str, count: int) -> str:
    """The README of the classifier."""
    return "\n".join(
        [
            f"# Classifier of {len(model.classes)} classes by nearest prototype",
            "",
            f"Classes: {', '.join(model.classes)}",
            "",
            f"The encoder was trained with {name}; a class is the mean embedding of its labelled pictures, {count} in all.",
            "",
            "    import contralto",
            '    contralto.load("path/to/this/folder").predict(["a.jpg", "b.jpg"])',
            "",
            "It names one of its classes for any picture; how right it is on new classes says `metrics.json` of the run.",
            "",
        ]
    )
