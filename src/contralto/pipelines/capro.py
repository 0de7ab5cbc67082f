"""The main job: from noisy web images with texts to a clean classifier, the list of wrong images, and corrected labels.

`fit_capro` is the whole job, `CAProJob` its stages:

    ingest -> [plain] -> vanilla -> features, neighbours, texts, matching -> capro -> cleaned list -> finetune
           -> model -> evaluation -> report
"""

import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import nn

from contralto.data.definitions import ClassText, class_text
from contralto.data.text import clean_texts, drop_even_words, words_of
from contralto.encoders.features import cached_array
from contralto.encoders.image import ImageEncoder, image_encoder
from contralto.encoders.text import encode_distinct, encode_texts, text_encoder
from contralto.files import write_atomically
from contralto.neighbors.graph import Edge, Normalisation, adjacency, smooth
from contralto.neighbors.matching import Match, Matching, match_texts, select_anchors
from contralto.neighbors.rerank import neighbour_graph
from contralto.neighbors.streamed import fits_memory
from contralto.pipelines.job import Array, Job, load_preset
from contralto.prototypes.correction import Correction, correct_labels
from contralto.systems.webly.base import WeblySystem
from contralto.systems.webly.capro import EXTENSIONS, CAPro
from contralto.systems.webly.reconcile import MIN_WORTH, Reconciled, reconcile, soft_targets, sure_anchors
from contralto.views.image import strong_view, view_generator

__all__ = ["CAProJob", "estimate_cost", "fit_capro"]


def fit_capro(
    data: str,
    out: str | Path,
    *,
    definitions: str | Path | None = None,
    reviewed: str | Path | None = None,
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
    on: str | None = None,
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
    reviewed : path, optional
        Run whose review (`contralto review`) gave labels by people. They take the place of the web's and are anchors, which no
        rule judges; what people found to be none of the classes is left out of training.
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
    on : str, optional
        Where the passes over all pictures run: None is this process, "ray" or "ray://host:port" a cluster
        (`contralto.cluster.map_blocks`). It changes no result, and may change when a run goes on. Training stays here.
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
    return CAProJob(str(data), Path(out), arguments, progress).run()


class CAProJob(Job):
    """The stages of `fit_capro`; see `Job`."""

    name = "capro"
    system: ClassVar[type[WeblySystem]] = CAPro
    fit: ClassVar[Callable[..., Path]] = staticmethod(fit_capro)
    extensions: ClassVar[tuple[str, ...]] = EXTENSIONS
    before: ClassVar = {"capro": "vanilla", "finetune": "capro"}
    judging = "capro"

    # What the stages learn from.

    def _more(self, stage: str) -> dict[str, Array]:
        more: dict[str, Array] = {}
        if self.arguments["text_weight"] > 0 and hasattr(self, "matching"):
            more["text_scores"] = self.matching.probability
        if self._is_reconciled(stage):
            more |= {"posterior": self.reconciled.posterior, "target": self.soft_labels}
        return more

    def _weights(self) -> Array:
        form = self.arguments["sample_weights"]
        if form == "frequency":
            count = np.bincount(self.labels, minlength=self.num_classes)
            return (count[self.labels] / np.median(count[count > 0])).astype(np.float32)
        if form == "text" and hasattr(self, "matching"):
            return self.matching.cosine.clip(0).astype(np.float32)
        return super()._weights()

    def _lesson(self, stage: str) -> tuple[Array | None, Array | None]:
        if stage == "finetune" and self._is_reconciled(stage):
            return None, np.where(self.new_labels >= 0, self.new_labels, self.labels)
        if stage != "finetune" and self.arguments["sample_weights"] == "text" and hasattr(self, "matching"):
            return np.flatnonzero(self.matching.cosine >= 0), None
        return super()._lesson(stage)

    def _draws(self, stage: str, rows: Array, labels: Array) -> dict[str, Array]:
        if self._is_reconciled(stage):
            share = self.soft_share[rows]
            return {"share": share / share.sum()}
        return super()._draws(stage, rows, labels)

    def _is_reconciled(self, stage: str) -> bool:
        return stage in ("capro", "finetune") and hasattr(self, "reconciled")

    def learn(self) -> None:
        """Vanilla training, matching, and CAPro's own."""
        self.train("vanilla")
        self.match()
        self.train("capro")

    # Neighbours, texts, matching.

    def match(self) -> Matching:
        """CAPro 3 and 4: enhance the texts over visual neighbours, match them, choose anchors."""
        a = self.arguments
        with self._timed("matching", f"{a['text_encoder']} texts against {self.num_classes} definitions"):
            texts = self._clean_texts()
            own, rows, class_rows = self._text_rows(texts)
            ranking = {"k1": a["k1"], "k2": a["k2"], "weight": a["rerank_weight"]}
            self.matching = match_texts(rows, class_rows, self.labels, method=a["match"], **ranking)
            self.anchors = select_anchors(
                self.matching, self.labels, a["anchors"], generator=np.random.default_rng([a["seed"], 1])
            )
            self.anchors |= self.verified
        if a["reconcile"]:
            self._reconcile(texts, own, class_rows)
        self._save_matching()
        return self.matching

    def _text_rows(self, texts: list[str]) -> tuple[Array, Array, Array]:
        """Embeddings of the texts as they are, of the texts smoothed over visual neighbours (CAPro 3), and of the classes."""
        a, encoder = self.arguments, text_encoder(self.arguments["text_encoder"])
        classes = [class_text(c, a["class_text"]) for c in self.manifest.classes]
        encoder.fit([*texts, *classes])

        def encode(different: list[str]) -> Array:
            key = {
                "encoder": encoder.fingerprint(),
                "texts": hashlib.sha256(json.dumps(different).encode()).hexdigest(),
            }
            return cached_array(self.cache, "text", key, lambda: encode_texts(encoder, different, on=a["on"]))

        own, class_rows = encode_distinct(texts, encode), encoder.encode(classes)
        rows = own
        if a["enhance"]:
            index, distance = self.neighbour_graph()
            graph = adjacency(index, distance, edge=a["edge"])
            form = {k: a[k] for k in ("edge", "self_weight", "normalisation", "degree")}
            rows = smooth(rows, graph, **form)
        return own, rows, class_rows

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
            c, sure = self.num_classes, np.flatnonzero(self.verified)
            posterior, off_topic = np.array(stored[:, :c], np.float32), np.array(stored[:, c], np.float32)
            posterior[sure], off_topic[sure] = np.eye(c, dtype=np.float32)[self.labels[sure]], 0
            self.reconciled = Reconciled(
                posterior,
                off_topic,
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
                self.anchors = sure_anchors(own, self.labels, self.arguments["anchors"], score=score) | self.verified

    def _clean_texts(self) -> list[str]:
        a = self.arguments
        every = self.manifest.texts
        texts = [every[i] for i in self.train_rows]
        keep = {w for c in self.manifest.classes for s in (c.name, c.definition, *c.queries) for w in words_of(s)}
        if a["text_words"] != "raw":
            texts = clean_texts(texts, keep=keep, words=a["text_words"])
        if a.get("drop_even"):  # the multi-label job has no such argument
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
        search = "exact" if fits_memory(*features.shape) else "streamed"
        if search == "streamed":
            key["search"] = search
            self.console.print(f"  {len(features)} rows do not fit into memory: neighbours by a compressed index")

        def compute() -> Array:
            index, distance = neighbour_graph(
                features, candidates=a["neighbours"], k=a["kept_neighbours"], use_rerank=a["use_rerank"], k1=a["k1"],
                k2=a["k2"], weight=a["rerank_weight"], search=search,
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

    # Judging.

    def scores(self) -> dict[str, Array]:
        """Scores of CAPro 6.1; reconciled, the posterior is the fused one."""
        out = super().scores()
        return out | ({"fused": self.reconciled.posterior} if self._is_reconciled("capro") else {})

    def judge(self, scores: dict[str, Array]) -> Correction:
        """Verdicts by CAPro 5.6, on what `scores` calls fused."""
        a = self.arguments
        return correct_labels(
            torch.from_numpy(scores["fused"]), torch.from_numpy(self.labels), torch.from_numpy(self.anchors),
            threshold=a["threshold"], keep_threshold=a["keep_threshold"],
        )  # fmt: skip

    def _text_columns(self) -> dict[str, Any]:
        rows = np.arange(len(self.labels))
        return {"text_match": self.matching.probability[rows, self.labels], "text_rank": self.matching.rank}

    def _p_wrong(self, given: Array) -> Array:
        """A posterior is a probability; a fused score has to be made one."""
        return 1 - given if hasattr(self, "reconciled") else super()._p_wrong(given)

    def _p_off_topic(self) -> pa.Array:
        return pa.array(self.reconciled.off_topic) if hasattr(self, "reconciled") else super()._p_off_topic()


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
    views = 2 * CAProJob.parameters()["feature_views"].default + 1
    epochs = a["vanilla_epochs"] + a["epochs"] + a["finetune_epochs"]
    seconds = n_images * views * per_view + n_images / b * epochs * per_step + n_images * 0.01
    return {"minutes": seconds / 60, "disk_mb": n_images * views * encoder.num_features * 2 / 2**20}
