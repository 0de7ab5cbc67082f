"""Matching texts to class definitions, and the anchors that come of it (CAPro 4)."""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from contralto.errors import UsageError
from contralto.neighbors.rerank import rerank

__all__ = ["Match", "Matching", "class_probabilities", "match_texts", "select_anchors", "within_class_rank"]

Match = Literal["rerank", "cosine", "discriminative"]


@dataclass(frozen=True)
class Matching:
    """How well each text fits the classes.

    Attributes
    ----------
    distance : array (N,)
        To the definition of the given class, small is near; infinite without a given label.
    probability : array (N, C) float32
        P(class | text): softmax over all classes of centred similarities; uniform for an empty text.
    cosine : array (N,)
        Similarity to the own class; -1 without a given label.
    rank : array (N,) int32
        Place within the own class by distance, 0 is the nearest; -1 without a given label.
    """

    distance: npt.NDArray[np.float32]
    probability: npt.NDArray[np.float32]
    cosine: npt.NDArray[np.float32]
    rank: npt.NDArray[np.int32]


def match_texts(
    texts: npt.NDArray[Any],
    class_texts: npt.NDArray[Any],
    labels: npt.NDArray[np.int64],
    *,
    method: Match = "rerank",
    k1: int = 20,
    k2: int = 6,
    weight: float = 0.3,
) -> Matching:
    """Compare every text with the definition of its given class, and with all others.

    Parameters
    ----------
    texts : array (N, D)
        Embeddings, enhanced or not; scaled to length one here. A zero row is an empty text.
    class_texts : array (C, D)
        Embeddings of the class texts.
    labels : array (N,)
        Given labels, -1 = none.
    method : {"rerank", "cosine", "discriminative"}
        How `distance` is measured. "rerank" (CAPro 4.1): k-reciprocal distance of the definition to the texts of its class.
        "cosine": 1 - cosine. "discriminative": 1 - P(given class | text), which asks whether the text fits this class
        better than the others; far better on short titles, where all texts are far from all definitions.
    k1, k2, weight : int, int, float
        Of the re-ranking.

    Returns
    -------
    Matching

    Notes
    -----
    The temperature of the softmax is the one under which the given labels are likeliest. It is large when texts and labels
    agree little, so `probability` then says little: no clean label is needed to know how much a text is worth.

    Examples
    --------
    >>> m = match_texts(np.eye(3), np.eye(3), np.array([0, 1, 0]), method="discriminative")
    >>> m.probability.argmax(1).tolist(), m.rank.tolist()
    ([0, 1, 2], [0, 0, 1])
    """
    if method not in ("rerank", "cosine", "discriminative"):
        raise UsageError(f'match must be "rerank", "cosine" or "discriminative", got {method!r}')
    T, K = _unit(texts), _unit(class_texts)
    similarity = T @ K.T  # (N, C)
    probability = class_probabilities(similarity, labels, empty=np.asarray(~T.any(1)))
    valid = labels >= 0
    own = np.where(valid, labels, 0)
    rows = np.arange(len(labels))
    cosine = np.where(valid, similarity[rows, own], -1).astype(np.float32)
    if method == "discriminative":
        distance = 1 - probability[rows, own]
    else:
        distance = 1 - cosine
        if method == "rerank":
            for c in range(len(K)):  # one set per class: a class is what is re-ranked
                members = np.flatnonzero(valid & (labels == c))
                if len(members):
                    distance[members] = rerank(K[c : c + 1], T[members], k1=k1, k2=k2, weight=weight)[0]
    distance = np.where(valid, distance, np.inf).astype(np.float32)
    return Matching(distance, probability, cosine, within_class_rank(distance, labels))


def select_anchors(
    matching: Matching, labels: npt.NDArray[np.int64], k: int, *, generator: np.random.Generator | None = None
) -> npt.NDArray[np.bool_]:
    """The anchors of every class (CAPro 4.3).

    Parameters
    ----------
    matching : Matching
    labels : array (N,)
    k : int
        Images with the smallest distance per class, at least 1, all of a smaller class. Negative: as many random ones, the
        paper's ablation of text selection.
    generator : numpy Generator
        For random anchors.

    Returns
    -------
    array (N,) bool

    Examples
    --------
    >>> m = match_texts(np.eye(3), np.eye(3), np.array([0, 1, 0]))
    >>> select_anchors(m, np.array([0, 1, 0]), 1).tolist()
    [True, True, False]
    """
    if k >= 0:
        return (matching.rank >= 0) & (matching.rank < max(k, 1))
    if generator is None:
        raise UsageError("random anchors need a generator")
    rank = within_class_rank(generator.random(len(labels)).astype(np.float32), labels)
    return (rank >= 0) & (rank < -k)


def _unit(x: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    x = np.asarray(x, dtype=np.float32)
    norm = np.linalg.norm(x, axis=1, keepdims=True)
    return np.asarray(np.divide(x, norm, out=np.zeros_like(x), where=norm > 1e-12))


def within_class_rank(distance: npt.NDArray[Any], labels: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
    """Place of every row among those of its label, 0 is the smallest; -1 without a label.

    Examples
    --------
    >>> within_class_rank(np.array([0.3, 0.1, 0.2]), np.array([0, 0, 1])).tolist()
    [1, 0, 0]
    """
    order = np.lexsort((np.arange(len(labels)), distance, labels))
    sorted_labels = labels[order]
    start = np.searchsorted(sorted_labels, sorted_labels, side="left")
    rank = np.empty(len(labels), np.int32)
    rank[order] = np.arange(len(labels)) - start
    rank[labels < 0] = -1
    return rank


def class_probabilities(
    similarity: npt.NDArray[np.float32], labels: npt.NDArray[np.int64], empty: npt.NDArray[np.bool_]
) -> npt.NDArray[np.float32]:
    """Softmax of similarities, centred per class, at the temperature that makes the given labels likeliest.

    Parameters
    ----------
    similarity : array (N, C)
    labels : array (N,)
        Given labels, -1 = none.
    empty : array (N,) bool
        Rows that say nothing: they come out uniform.

    Returns
    -------
    array (N, C) float32

    Examples
    --------
    >>> class_probabilities(np.eye(2), np.array([0, 1]), np.array([False, False])).round(2).tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """
    from scipy.optimize import minimize_scalar
    from scipy.special import logsumexp

    n, classes = similarity.shape
    used = np.flatnonzero(~empty & (labels >= 0))
    if len(used) == 0:
        return np.full((n, classes), 1 / classes, np.float32)
    centred = similarity - similarity[~empty].mean(0)
    sample = used[:: max(1, len(used) // 20_000)].copy()
    scores, given = centred[sample].astype(np.float64), labels[sample]

    def cost(log_temperature: float) -> float:
        logits = scores / np.exp(log_temperature)
        return float((logsumexp(logits, axis=1) - logits[np.arange(len(given)), given]).mean())

    temperature = float(np.exp(minimize_scalar(cost, bounds=(-6.0, 3.0), method="bounded").x))
    logits = centred / temperature
    logits -= logits.max(1, keepdims=True)
    probability = np.exp(logits)
    probability /= probability.sum(1, keepdims=True)
    probability[empty] = 1 / classes
    return np.asarray(probability, dtype=np.float32)
