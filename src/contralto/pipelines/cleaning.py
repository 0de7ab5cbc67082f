"""The list of wrong images for people who have a model already: their features, no training.

`clean_with_model` takes probabilities, embeddings or both for the pictures of a collection, and judges every web label by
the same witnesses as the main job: the text against the definitions of the classes, the web label, and the looks
(`contralto.systems.webly.reconcile`). What it knows of the looks is the mean of up to three opinions:

- *classifier*: a logistic regression on the logarithms of the probabilities (without them, on the embeddings) that learnt from
  text and web label and is asked about pictures that it did not see. Probabilities are evidence and not the answer, because a
  model that was trained on web labels has learnt their noise: it predicts what the search returns, not what is shown.
- *prototype*: similarity to the mean embedding of the surest pictures of every class, the anchors; an anchor is left out of
  the mean that it is compared with.
- *neighbours*: what is known of the most similar pictures, weighted by similarity. Near-identical copies have no vote.

posterior = sqrt(text x web label) x mean of the opinions. Texts that say nothing about the labels are left out, and the fused
score of CAPro 5.6 holds: alpha x classifier + (1 - alpha) x prototypes, with the most central pictures of every class as
anchors. This is no part of the CAPro paper.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from rich.console import Console

from contralto.data.definitions import ClassText, fill_definitions, load_definitions
from contralto.data.definitions import class_text as text_of_class
from contralto.data.ingest import ingest
from contralto.data.manifest import Manifest
from contralto.encoders.text import encode_distinct, encode_texts
from contralto.encoders.text import text_encoder as make_text_encoder
from contralto.errors import DataError, UsageError
from contralto.evaluation.noise import anchor_metrics, noise_metrics
from contralto.files import write_atomically, write_json
from contralto.neighbors.graph import adjacency, smooth
from contralto.neighbors.knn import unit_rows
from contralto.neighbors.matching import Matching, class_probabilities, match_texts, within_class_rank
from contralto.neighbors.rerank import neighbour_graph
from contralto.neighbors.vote import neighbour_vote
from contralto.pipelines.methods import by_confidence, by_neighbours
from contralto.pipelines.outputs import write_cleaned_csv
from contralto.prototypes.bank import class_means
from contralto.prototypes.correction import Verdict, correct_labels, flagged, probability_wrong
from contralto.systems.webly.base import scale_rule
from contralto.systems.webly.reconcile import Reconciled, reconcile, sure_anchors, unseen_probabilities

__all__ = ["clean_with_model"]

Array = npt.NDArray[Any]
Given = str | Path | npt.NDArray[Any]
Method = Literal["witnesses", "confident", "knn"]


def clean_with_model(
    data: str | Path,
    out: str | Path,
    *,
    probs: Given | None = None,
    embeddings: Given | None = None,
    method: Method = "witnesses",
    definitions: str | Path | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    text_column: str | None = None,
    id_column: str | None = None,
    split_column: str | None = None,
    clean_column: str | None = None,
    group_column: str | None = None,
    blank_share: float | None = 0.98,
    min_side: int = 32,
    allow_outside: bool = False,
    text_encoder: str = "minilm",
    class_text: ClassText = "name+definition",
    anchors: int | None = None,
    threshold: float = 0.6,
    keep_threshold: float = 0.3,
    alpha: float = 0.5,
    neighbours: int = 20,
    kept_neighbours: int = 5,
    seed: int = 0,
    on: str | None = None,
    progress: bool = True,
) -> pa.Table:
    """Say which web labels are wrong, from the outputs of a model that you have.

    Parameters
    ----------
    data : str
        Path or fsspec address of the images with their texts, in any form of `contralto.data.sources`.
    out : path
        Folder for `cleaned.parquet`, `cleaned.csv` and `metrics.json`; not that of a run.
    probs : path or array (N, C), optional
        Class probabilities by your model, as a .npy file or array. **They must be predictions for pictures that the model was not
        trained on**, as of cross-validation: a model finds the labels right that it has learnt. Columns in the order of the
        classes: as in the definitions, without them the sorted names of the given labels.
    embeddings : path or array (N, D), optional
        Visual features of any model. One of the two must be given; both are better.
        Rows of either belong to the pictures in the order of reading (rows of a table, sorted names in folders and tars), in
        one of three forms: a row for everything read, also what is skipped as broken or blank; a row for every usable picture;
        or a row for every usable picture of the split "train" that has a web label, which is what is judged.
    method : {"witnesses", "confident", "knn"}
        "witnesses" is described above. "confident" is confident learning by cleanlab, on `probs` or else on out-of-fold
        probabilities of a logistic regression on `embeddings`; what it flags gets the label that they name. "knn" is the vote
        of the `neighbours` most similar pictures, by `embeddings`: a label that has `threshold` of it corrects. Neither of
        the two looks at texts, has anchors, or says what is off-topic. When to use which: docs/noisy_labels.md.
    definitions : path, optional
        Definitions file (`contralto.data.definitions`); missing definitions come from dictionaries at hand.
    image_column, label_column, text_column, id_column, split_column, clean_column, group_column : str, optional
        Columns, where their names are not common ones.
    blank_share, min_side, allow_outside
        See `contralto.data.ingest.ingest`.
    text_encoder : str
        "minilm", "tfidf", or a sentence-transformers name.
    class_text : {"name+definition", "definition", "name"}
        What stands for a class.
    anchors : int, optional
        Pictures per class that stand for it and keep their label; default: a fifth of a class, at least 10, at most 50.
    threshold, keep_threshold : float
        See `contralto.prototypes.correction.correct_labels`.
    alpha : float
        Share of the classifier in the fused score when the texts say nothing.
    neighbours, kept_neighbours : int
        Similar pictures that vote, and how many of them, after re-ranking, lend each other their texts for `text_match`.
    seed : int
        Deals pictures to folds.
    on : str, optional
        Where pictures are read and texts encoded: see `contralto.cluster.map_blocks`.
    progress : bool
        Say what is going on, on the standard error.

    Returns
    -------
    pyarrow.Table
        What `cleaned.parquet` holds: a row for every judged picture, in the columns of a run's list, and two more,
        `given_neighbours` and `new_neighbours`. `index` counts usable pictures. `..._auxiliary` is null, as there is no such
        head; `..._prototype` and `..._neighbours` are null and `nearest_...` empty without embeddings; `p_off_topic` is null
        where the texts say nothing, `..._classifier` where there are no probabilities either.
        `new_...` are scores of the class that scores best.

    Raises
    ------
    UsageError
        If arguments do not fit.
    DataError
        If data or arrays cannot be used.

    Notes
    -----
    Clean labels, where the data have them, are looked at by `metrics.json` alone: the quality of the list under `noise`, and
    under `alone` the average precision of every witness for itself.

    Examples
    --------
    >>> import io, tempfile
    >>> from PIL import Image
    >>> folder, files = Path(tempfile.mkdtemp()), []
    >>> for i in range(40):
    ...     buffer = io.BytesIO()
    ...     Image.fromarray(np.random.default_rng(i).integers(0, 255, (32, 32, 3), np.uint8)).save(buffer, "PNG")
    ...     files.append(buffer.getvalue())
    >>> shown = ["ox", "fox"] * 20
    >>> rows = {"image": files, "query": ["fox", *shown[1:]], "text": [f"a wild {name}" for name in shown]}
    >>> pq.write_table(pa.table(rows), folder / "web.parquet")
    >>> probs = np.where(np.arange(40)[:, None] % 2 == np.array([[1, 0]]), 0.8, 0.2)  # columns: fox, ox
    >>> table = clean_with_model(
    ...     folder / "web.parquet", folder / "list", probs=probs, text_encoder="tfidf", progress=False
    ... )
    >>> table.column_names[:5], [r["index"] for r in table.to_pylist() if r["verdict"] == "corrected"]
    (['index', 'id', 'given', 'verdict', 'new'], [0])
    """
    out, console = Path(out), Console(stderr=True, quiet=not progress, markup=False, highlight=False, soft_wrap=True)
    if method not in get_args(Method):
        raise UsageError(f"method must be one of {', '.join(get_args(Method))}; got {method!r}")
    if method == "knn" and (embeddings is None or probs is not None):
        raise UsageError("the method knn needs --embeddings, and --probs have no part in it")
    if method == "confident" and probs is not None and embeddings is not None:
        raise UsageError("the method confident takes --probs or --embeddings, not both")
    if probs is None and embeddings is None:
        raise UsageError("give --probs, --embeddings or both: .npy files with a row for every picture")
    if neighbours < 1 or kept_neighbours < 1 or (anchors is not None and anchors < 1):
        raise UsageError(
            f"neighbours, kept_neighbours and anchors must be at least 1, got {neighbours}, {kept_neighbours}, {anchors}"
        )
    if not 0 <= alpha <= 1:
        raise UsageError(f"alpha must be in [0, 1], got {alpha}")
    if (out / "config.json").exists():
        raise UsageError(f"{out} holds a run, whose list would be lost: choose another --out")
    columns: dict[str, Any] = {
        "image_column": image_column, "label_column": label_column, "text_column": text_column, "id_column": id_column,
        "split_column": split_column, "clean_column": clean_column, "group_column": group_column,
    }  # fmt: skip
    options: dict[str, Any] = {
        "blank_share": blank_share,
        "min_side": min_side,
        "allow_outside": allow_outside,
        "on": on,
    }
    pictures = _read(str(data), definitions, columns, options)
    names = pictures.manifest.class_names
    console.print(
        f"{len(pictures.manifest)} pictures, {len(pictures.left_out)} skipped; {len(pictures.rows)} have a web label and are "
        f"judged; {len(names)} classes, in this order: {', '.join(names)}"
    )
    given_probs = None if probs is None else _probabilities(probs, pictures)
    features = None if embeddings is None else _embeddings(embeddings, pictures)
    if given_probs is not None and _agreement(given_probs, pictures.labels) > 0.99:
        console.print(
            "warning: the probabilities name the given label of nearly every picture. Was the model trained on them? Then it "
            "cannot tell which are wrong: give predictions of cross-validation."
        )
    matching: Matching | None = None
    if method == "witnesses":
        texts = _Texts.encoded(pictures, text_encoder, class_text, on)
        count = scale_rule(len(pictures.rows), len(names))["anchors"] if anchors is None else anchors
        matching = _matching(texts, features, pictures.labels, neighbours, kept_neighbours)
        judged = _judge(pictures, texts, matching, given_probs, features, count, alpha, neighbours, seed)
        if judged.off_topic is None:
            console.print("the texts say too little about the labels and are left out")
        verdict, new = _verdicts(judged, pictures.labels, threshold, keep_threshold)
    else:
        judged, new = _judge_by(method, pictures, given_probs, features, threshold, neighbours, seed)
        verdict = np.where(new != pictures.labels, Verdict.CORRECTED, Verdict.KEPT)
    table = _table(pictures, judged, matching, verdict, new)
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "cleaned.parquet", lambda path: pq.write_table(table, path))
    write_cleaned_csv(table, out / "cleaned.csv")
    write_json(out / "metrics.json", _metrics(pictures, judged, matching, given_probs, table, new))
    return table


# What is read.


@dataclass(frozen=True)
class _Pictures:
    """A manifest, the rows that are judged with their given labels, and where among all that was read something is missing."""

    manifest: Manifest
    rows: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    left_out: list[int]

    @property
    def copies(self) -> Array:
        """A number for every judged picture; near-identical ones have the same."""
        return self.manifest.column("duplicate_group")[self.rows]

    def sizes(self) -> dict[int, tuple[str, Array]]:
        """Lengths that an array may have: what they mean, and which of its rows are judged."""
        read = len(self.manifest) + len(self.left_out)
        usable = np.setdiff1d(np.arange(read), np.array(self.left_out, dtype=np.int64))
        return {
            len(self.rows): ("usable training pictures with a web label", np.arange(len(self.rows))),
            len(self.manifest): ("usable pictures", self.rows),
            read: ("pictures read, with the skipped ones", usable[self.rows]),
        }


def _read(data: str, definitions: str | Path | None, columns: dict[str, Any], options: dict[str, Any]) -> _Pictures:
    left_out: list[int] = []
    classes = None if definitions is None else load_definitions(definitions)
    read = ingest(data, classes=classes, left_out=left_out.append, **columns, **options)
    filled, _ = fill_definitions(read.classes)
    manifest = Manifest(read.table, filled, read.root, read.skipped)
    if len(filled) < 2:
        raise DataError(f"at least two classes are needed, found {manifest.class_names}", file=data)
    rows = np.flatnonzero((manifest.column("split") == "train") & (manifest.labels >= 0))
    if len(rows) < 2:
        raise DataError("hardly a picture has a given label and belongs to the split 'train'", file=data)
    return _Pictures(manifest, rows, manifest.labels[rows], left_out)


def _probabilities(given: Given, pictures: _Pictures) -> npt.NDArray[np.float64]:
    """Checked and scaled to sum 1 (N, C)."""
    names = pictures.manifest.class_names
    p, place, name = _judged_rows(given, "probs", pictures)
    if p.shape[1] != len(names):
        raise DataError(
            f"has {p.shape[1]} columns, expected {len(names)}, one per class in this order: {', '.join(names)}",
            file=name,
        )
    p = p.astype(np.float64)
    _refuse(p.min(1) < 0, place, "holds a negative number: probabilities are expected (softmax of logits)", name)
    _refuse(
        np.abs(p.sum(1) - 1) > 1e-2, place, "does not sum to 1: probabilities are expected (softmax of logits)", name
    )
    return np.asarray(p / p.sum(1, keepdims=True))


def _embeddings(given: Given, pictures: _Pictures) -> npt.NDArray[np.float32]:
    """Checked, centred, unit rows (N, D): cosines of features that share a large mean all look alike."""
    x, _, name = _judged_rows(given, "embeddings", pictures)
    x = x.astype(np.float32)
    x -= x.mean(0)
    if not np.isfinite(x).all() or not x.any():
        raise DataError("all rows are the same, or their numbers are too large for single precision", file=name)
    return unit_rows(x)


def _judged_rows(given: Given, role: str, pictures: _Pictures) -> tuple[Array, Array, str]:
    """Rows of an array that belong to the judged pictures, their places in it, and its name."""
    name = role if isinstance(given, np.ndarray) else str(given)
    array = given if isinstance(given, np.ndarray) else _load(Path(given))
    if array.ndim != 2 or array.shape[1] < 1 or array.dtype.kind not in "fiu":
        raise DataError(
            f"holds {array.dtype} of the shape {array.shape}; expected numbers of the shape "
            f"{'(pictures, classes)' if role == 'probs' else '(pictures, width)'}",
            file=name,
        )
    sizes = pictures.sizes()
    if len(array) not in sizes:
        told = " or ".join(f"{n} ({what})" for n, (what, _) in sorted(sizes.items(), reverse=True))
        raise DataError(f"has {len(array)} rows, expected {told}", file=name)
    place = sizes[len(array)][1]
    rows = np.asarray(array[place])
    _refuse(~np.isfinite(rows).all(1), place, "holds NaN or infinity", name)
    return rows, place, name


def _load(path: Path) -> Array:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror or error}", file=str(path)) from error
    except Exception as error:  # damaged headers raise many kinds
        told = str(error).partition("\n")[0][:200]
        raise DataError(f"is no .npy file of numbers ({told}): write it with numpy.save", file=str(path)) from error
    if not isinstance(array, np.ndarray):
        raise DataError("is a .npz archive: write one array with numpy.save", file=str(path))
    return array


def _refuse(bad: Array, place: Array, told: str, name: str) -> None:
    if bad.any():
        raise DataError(told, file=name, row=int(place[int(np.argmax(bad))]))


def _agreement(probs: Array, labels: Array) -> float:
    return float((probs.argmax(1) == labels).mean())


@dataclass(frozen=True)
class _Texts:
    """Texts of the judged pictures with their embeddings (N, E), and those of the classes (C, E)."""

    texts: list[str]
    rows: npt.NDArray[np.float32]
    classes: npt.NDArray[np.float32]

    @classmethod
    def encoded(cls, pictures: _Pictures, name: str, form: ClassText, on: str | None) -> "_Texts":
        all_texts = pictures.manifest.texts
        texts = [all_texts[i] for i in pictures.rows]
        classes = [text_of_class(c, form) for c in pictures.manifest.classes]
        different = sorted({t for t in texts if t.strip()})
        if not different:
            return cls(texts, np.zeros((len(texts), 1), np.float32), np.zeros((len(classes), 1), np.float32))
        encoder = make_text_encoder(name).fit([*different, *classes])
        rows = encode_distinct(texts, lambda different: encode_texts(encoder, different, on=on))
        return cls(texts, rows, encoder.encode(classes))


# How it is judged.


@dataclass(frozen=True)
class _Judged:
    """Scores (N, C) of the opinions that there are and of all together, the anchors, and P(wrong) of the given labels."""

    opinions: dict[str, Array]
    fused: Array
    anchors: npt.NDArray[np.bool_]
    p_wrong: Array
    off_topic: Array | None = None
    similarity: Array | None = None  # to the prototypes


def _judge(
    pictures: _Pictures,
    texts: _Texts,
    matching: Matching,
    probs: Array | None,
    features: Array | None,
    count: int,
    alpha: float,
    neighbours: int,
    seed: int,
) -> _Judged:
    looks = features if probs is None else np.log(probs + 1e-4)
    assert looks is not None
    found = reconcile(
        looks, texts.texts, texts.rows, texts.classes, pictures.manifest.class_names, pictures.labels, seed=seed
    )
    if found is None:
        return _judge_without_texts(pictures, probs, features, count, alpha, neighbours)
    return _judge_with_texts(pictures, found, matching, features, count, neighbours)


def _judge_with_texts(
    pictures: _Pictures, found: Reconciled, matching: Matching, features: Array | None, count: int, neighbours: int
) -> _Judged:
    labels, n = pictures.labels, np.arange(len(pictures.labels))
    classifier = found.looks.astype(np.float64)
    opinions = {"classifier": classifier / classifier.sum(1, keepdims=True)}
    posterior = np.concatenate([found.posterior, found.off_topic[:, None]], 1).astype(np.float64)
    own = posterior[n, labels]
    anchors = sure_anchors(own, labels, count, score=own * matching.probability[n, labels])
    if features is None:
        return _Judged(opinions, posterior[:, :-1], anchors, 1 - own, posterior[:, -1])
    similarity = _prototype_similarity(features, labels, anchors, found.posterior.shape[1])
    opinions["prototype"] = class_probabilities(similarity, found.posterior.argmax(1), np.zeros(len(labels), bool))
    vote = neighbour_vote(features, posterior, neighbours, copies=pictures.copies)
    opinions["neighbours"] = vote[:, :-1]
    outside = 1 - classifier.sum(1, keepdims=True)  # prototypes only know which class, not whether any
    before = np.concatenate([classifier, outside], 1)
    nearest = np.concatenate([opinions["prototype"] * (1 - outside), outside], 1)
    mean = (before + nearest + vote) / 3
    posterior *= (mean + 1e-6) / (before + 1e-6)  # takes the place of the classifier
    posterior /= posterior.sum(1, keepdims=True)
    return _Judged(opinions, posterior[:, :-1], anchors, 1 - posterior[n, labels], posterior[:, -1], similarity)


def _judge_without_texts(
    pictures: _Pictures, probs: Array | None, features: Array | None, count: int, alpha: float, neighbours: int
) -> _Judged:
    labels, n = pictures.labels, np.arange(len(pictures.labels))
    classes = len(pictures.manifest.classes)
    opinions = {} if probs is None else {"classifier": probs}
    if features is None:
        assert probs is not None
        rank = within_class_rank(-probs[n, labels], labels)
        return _Judged(opinions, probs, rank < count, probability_wrong(probs[n, labels]))
    centres = _prototype_similarity(features, labels, np.ones(len(labels), bool), classes)
    anchors = within_class_rank(-centres[n, labels], labels) < count
    similarity = _prototype_similarity(features, labels, anchors, classes)
    opinions["prototype"] = class_probabilities(similarity, labels, np.zeros(len(labels), bool))
    opinions["neighbours"] = neighbour_vote(features, np.eye(classes)[labels], neighbours, copies=pictures.copies)
    first = opinions["neighbours" if probs is None else "classifier"]
    fused = alpha * first + (1 - alpha) * opinions["prototype"]
    return _Judged(opinions, fused, anchors, probability_wrong(fused[n, labels]), None, similarity)


def _judge_by(
    method: Method,
    pictures: _Pictures,
    probs: Array | None,
    features: Array | None,
    threshold: float,
    neighbours: int,
    seed: int,
) -> tuple[_Judged, Array]:
    """What other methods than the witnesses say, and the new labels."""
    labels, classes = pictures.labels, len(pictures.manifest.classes)
    if method == "knn":
        assert features is not None
        name = "neighbours"
        scores = neighbour_vote(features, np.eye(classes)[labels], neighbours, copies=pictures.copies)
        p_wrong, new = by_neighbours(scores, labels, threshold)
    else:
        if probs is None:
            assert features is not None
            texts = pictures.manifest.texts
            probs = unseen_probabilities(features, labels, [texts[i] for i in pictures.rows], classes, seed=seed)
        name, scores = "classifier", probs
        p_wrong, new = by_confidence(scores, labels)
    return _Judged({name: scores}, scores, np.zeros(len(labels), bool), p_wrong), new


def _prototype_similarity(features: Array, labels: Array, members: Array, classes: int) -> npt.NDArray[np.float32]:
    """Cosine of every picture to the mean of the members of every class (N, C); members are left out of their own mean."""
    rows = np.flatnonzero(members)
    prototypes = class_means(torch.from_numpy(features[rows]), torch.from_numpy(labels[rows]), classes).numpy()
    similarity = features @ prototypes.T
    total = np.zeros((classes, features.shape[1]), np.float32)
    np.add.at(total, labels[rows], features[rows])
    rest = total[labels[rows]] - features[rows]
    length = np.linalg.norm(rest, axis=1)
    similarity[rows, labels[rows]] = np.where(
        length > 1e-4, (rest * features[rows]).sum(1) / np.maximum(length, 1e-4), 0
    )
    return np.asarray(similarity)


def _verdicts(judged: _Judged, labels: Array, threshold: float, keep_threshold: float) -> tuple[Array, Array]:
    """Verdicts, and labels after correction, -1 = off-topic."""
    result = correct_labels(
        torch.from_numpy(judged.fused.astype(np.float32)), torch.from_numpy(labels), torch.from_numpy(judged.anchors),
        threshold=threshold, keep_threshold=keep_threshold,
    )  # fmt: skip
    verdict = result.verdict.numpy()
    return verdict, np.where(verdict == Verdict.OFF_TOPIC, -1, result.labels.numpy())


def _matching(texts: _Texts, features: Array | None, labels: Array, neighbours: int, kept: int) -> Matching:
    """Texts against definitions; with embeddings, texts smoothed over similar pictures as in the job."""
    rows = texts.rows
    if features is not None and rows.any():
        index, distance = neighbour_graph(features, candidates=neighbours, k=kept, search="auto")
        rows = smooth(rows, adjacency(index, distance))
    return match_texts(rows, texts.classes, labels, method="discriminative")


# What comes out.


def _table(pictures: _Pictures, judged: _Judged, matching: Matching | None, verdict: Array, new: Array) -> pa.Table:
    names = np.array(pictures.manifest.class_names, dtype=object)
    given, n = pictures.labels, np.arange(len(pictures.labels))
    columns: dict[str, Any] = {
        "index": pictures.rows,
        "id": pictures.manifest.column("id")[pictures.rows].tolist(),
        "given": names[given].tolist(),
        "verdict": [Verdict(int(v)).word for v in verdict],
        "new": [names[c] if c >= 0 else "" for c in new],
    }
    scores = judged.opinions | {"fused": judged.fused}
    nothing = pa.nulls(len(n), pa.float32())
    chosen = (("given", given), ("new", judged.fused.argmax(1)))
    for prefix, labels in chosen:
        for score in ("classifier", "auxiliary", "prototype", "fused"):
            columns[f"{prefix}_{score}"] = scores[score][n, labels].astype(np.float32) if score in scores else nothing
    columns |= {
        "text_match": nothing if matching is None else matching.probability[n, given],
        "text_rank": pa.nulls(len(n), pa.int64()) if matching is None else matching.rank,
    }
    columns |= _nearest(judged.similarity, names, len(n))
    columns |= {
        "p_wrong": judged.p_wrong.astype(np.float32),
        "p_off_topic": nothing if judged.off_topic is None else judged.off_topic.astype(np.float32),
    }
    for prefix, labels in chosen:
        columns[f"{prefix}_neighbours"] = (
            scores["neighbours"][n, labels].astype(np.float32) if "neighbours" in scores else nothing
        )
    return pa.table(columns)


def _nearest(similarity: Array | None, names: Array, n: int) -> dict[str, pa.Array]:
    """The three nearest prototypes."""
    if similarity is None:
        found: list[list[str]] = [[]] * n
        near: list[list[float]] = [[]] * n
    else:
        order = np.argsort(-similarity, axis=1, kind="stable")[:, :3]
        found = [names[o].tolist() for o in order]
        near = np.take_along_axis(similarity, order, 1).astype(float).round(4).tolist()
    return {
        "nearest_prototypes": pa.array(found, pa.list_(pa.string())),
        "nearest_similarities": pa.array(near, pa.list_(pa.float64())),
    }


def _metrics(
    pictures: _Pictures, judged: _Judged, matching: Matching | None, probs: Array | None, table: pa.Table, new: Array
) -> dict[str, Any]:
    """Counts and, where there are clean labels, how good the list is and how good every witness is alone."""
    verdicts: Sequence[str] = table.column("verdict").to_pylist()
    counted = Counter(verdicts)
    metrics: dict[str, Any] = {
        "counts": {v.word: counted[v.word] for v in Verdict},
        "classes": pictures.manifest.class_names,
        "skipped": len(pictures.left_out),
        "texts": judged.off_topic is not None,
    }
    clean = pictures.manifest.column("clean_label")[pictures.rows].astype(np.int64)
    if (clean == -2).all():
        return metrics
    given, n, marked = pictures.labels, np.arange(len(pictures.labels)), flagged(verdicts)
    metrics["noise"] = noise_metrics(given, clean, new, marked, judged.p_wrong)
    if judged.anchors.any():
        metrics["anchors"] = anchor_metrics(given, clean, judged.anchors)
    witnesses = {} if matching is None else {"text": matching.probability}
    witnesses |= ({} if probs is None else {"probs as given": probs}) | judged.opinions
    metrics["alone"] = {
        name: noise_metrics(given, clean, given, marked, 1 - p[n, given])["average_precision"]
        for name, p in witnesses.items()
    }
    return metrics
