"""How good a representation is: nearest neighbours, a linear probe, clustering, and what can be said without labels."""

from typing import Any

import numpy as np
import numpy.typing as npt

from contralto.errors import UsageError
from contralto.neighbors.knn import knn, unit_rows

__all__ = [
    "alignment", "analyse", "clustering_nmi", "effective_rank", "knn_right", "probe_right", "tolerance", "uniformity",
]  # fmt: skip

Array = npt.NDArray[Any]
PAIRS = 10_000
"""Rows from which pairs are a random part: 50 million of them say enough."""


def knn_right(
    train: Array,
    train_labels: Array,
    test: Array,
    test_labels: Array,
    *,
    k: int = 20,
    temperature: float | None = 0.07,
) -> npt.NDArray[np.float64]:
    """Which test samples their nearest neighbours name rightly (Wu et al. 2018).

    Parameters
    ----------
    train, test : array (N, D), (M, D)
        Scaled to length one here.
    train_labels, test_labels : array (N,), (M,)
        Classes in [0, C).
    k : int
        Neighbours, at most N.
    temperature : float, optional
        A neighbour's vote weighs ``exp(cosine / temperature)``; None: all alike.

    Returns
    -------
    array (M,)
        1 where right, else 0; of classes with equally many votes, the one with the lowest number is taken.

    Examples
    --------
    >>> knn_right(np.eye(2), np.array([0, 1]), np.array([[0.9, 0.1], [0.8, 0.1]]), np.array([0, 1]), k=1).tolist()
    [1.0, 0.0]
    """
    _fit(train, train_labels)
    _fit(test, test_labels)
    similarity, index = knn(train, min(k, len(train)), queries=test, search="auto")
    weight = np.ones_like(similarity) if temperature is None else np.exp((similarity - 1) / temperature)
    classes = int(max(train_labels.max(), test_labels.max())) + 1
    votes = np.zeros((len(test), classes))
    np.add.at(votes, (np.arange(len(test))[:, None], np.asarray(train_labels)[index]), weight)
    return np.asarray((votes.argmax(1) == test_labels).astype(np.float64))


def probe_right(
    train: Array,
    train_labels: Array,
    test: Array,
    test_labels: Array,
    *,
    C: float = 1.0,
    per_class: int | None = None,
    seed: int = 0,
) -> npt.NDArray[np.float64]:
    """Which test samples a linear probe names rightly: logistic regression on standardised, frozen features.

    Parameters
    ----------
    train, train_labels, test, test_labels
        See `knn_right`.
    C : float
        Inverse strength of the L2 penalty, as in scikit-learn.
    per_class : int, optional
        Labels per class that the probe sees, drawn by `seed`; default: all.
    seed : int

    Returns
    -------
    array (M,)
        1 where right, else 0.

    Examples
    --------
    >>> x = np.array([[0.0], [0.1], [1.0], [1.1]])
    >>> probe_right(x, np.array([0, 0, 1, 1]), np.array([[0.05], [2.0]]), np.array([0, 1])).tolist()
    [1.0, 1.0]
    """
    from sklearn.linear_model import LogisticRegression

    _fit(train, train_labels)
    _fit(test, test_labels)
    if per_class is not None:
        order = np.random.default_rng(seed).permutation(len(train_labels))
        keep = np.concatenate([order[train_labels[order] == c][:per_class] for c in np.unique(train_labels)])
        train, train_labels = train[keep], train_labels[keep]
    mean, scale = train.mean(0), train.std(0)
    scale = np.where(scale > 1e-12, scale, 1.0)
    probe = LogisticRegression(C=C, max_iter=1000).fit((train - mean) / scale, train_labels)
    return np.asarray((probe.predict((test - mean) / scale) == test_labels).astype(np.float64))


def clustering_nmi(features: Array, labels: Array, *, seed: int = 0, restarts: int = 4) -> float:
    """Normalised mutual information of labels and spherical k-means with as many clusters as classes, in [0, 1].

    Examples
    --------
    >>> x = np.repeat(np.eye(2), 5, axis=0)
    >>> round(clustering_nmi(x, np.repeat([0, 1], 5)), 3)
    1.0
    """
    from sklearn.cluster import KMeans
    from sklearn.metrics import normalized_mutual_info_score

    _fit(features, labels)
    clusters = KMeans(len(np.unique(labels)), n_init=restarts, random_state=seed).fit_predict(unit_rows(features))
    return float(normalized_mutual_info_score(labels, clusters))


def uniformity(z: Array, *, t: float = 2.0, seed: int = 0) -> float:
    """``log mean exp(-t |z_i - z_j|^2)`` over pairs i < j of unit rows (Wang and Isola 2020); lower is more uniform.

    Of more than 10,000 rows, as many drawn at random are taken.

    Examples
    --------
    >>> round(uniformity(np.array([[1.0, 0.0], [-1.0, 0.0]])), 4)
    -8.0
    """
    unit = _some(unit_rows(z), seed).astype(np.float64)
    if len(unit) < 2:
        raise UsageError("uniformity needs at least two rows")
    total, count = 0.0, len(unit) * (len(unit) - 1) / 2
    for start in range(0, len(unit), 1024):
        part = unit[start : start + 1024]
        kernel = np.exp(-t * (2 - 2 * part @ unit[start:].T).clip(0))
        total += float(np.triu(kernel, 1).sum())
    return float(np.log(total / count))


def alignment(z0: Array, z1: Array) -> float:
    """Mean squared distance between unit rows of two views of the same samples (Wang and Isola 2020); 0 = all agree.

    Examples
    --------
    >>> alignment(np.eye(2), np.eye(2)[::-1])
    2.0
    """
    if z0.shape != z1.shape:
        raise UsageError(f"both views must be of one shape, got {z0.shape} and {z1.shape}")
    return float((2 - 2 * (unit_rows(z0) * unit_rows(z1)).sum(1)).mean())


def tolerance(z: Array, labels: Array, *, joint: bool = False) -> float:
    """Mean cosine of samples of the same class, without self pairs (Wang and Liu 2021).

    Parameters
    ----------
    z : array (N, D)
    labels : array (N,)
        Classes with one sample have no pairs.
    joint : bool
        The formula as written: the sum over same-class pairs over the number of all pairs, self pairs among both.

    Examples
    --------
    >>> tolerance(np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]), np.array([0, 0, 1]))
    1.0
    """
    _fit(z, labels)
    unit = unit_rows(z).astype(np.float64)
    _, kind = np.unique(labels, return_inverse=True)
    sums = np.zeros((kind.max() + 1, unit.shape[1]))
    np.add.at(sums, kind, unit)
    size = np.bincount(kind)
    total = float((sums**2).sum())  # all ordered pairs of a class, self pairs with 1 each
    if joint:
        return total / len(unit) ** 2
    pairs = float((size * (size - 1)).sum())
    if not pairs:
        raise UsageError("tolerance needs a class with at least two samples")
    return (total - len(unit)) / pairs


def effective_rank(z: Array) -> float:
    """``exp`` of the entropy of the normalised singular values of centred features (Roy and Vetterli 2007).

    Examples
    --------
    >>> round(effective_rank(np.array([[1.0, 0], [-1, 0], [0, 1], [0, -1]])), 3)
    2.0
    """
    values = np.linalg.svd(z - z.mean(0), compute_uv=False)
    share = values / max(float(values.sum()), 1e-12)
    share = share[share > 0]
    return float(np.exp(-(share * np.log(share)).sum()))


def analyse(z: Array, labels: Array | None = None, *, z1: Array | None = None, t: float = 2.0) -> dict[str, float]:
    """What the embeddings of any system look like.

    Parameters
    ----------
    z : array (N, D)
    labels : array (N,), optional
        For tolerance and clustering.
    z1 : array (N, D), optional
        Another view of the same samples, for alignment.
    t : float
        Of the uniformity.

    Returns
    -------
    dict
        `uniformity`, `effective_rank`, and `alignment`, `tolerance`, `nmi` where their input is there.

    Examples
    --------
    >>> sorted(analyse(np.eye(4), np.array([0, 0, 1, 1]), z1=np.eye(4)))
    ['alignment', 'effective_rank', 'nmi', 'tolerance', 'uniformity']
    """
    found = {"uniformity": uniformity(z, t=t), "effective_rank": effective_rank(z)}
    if z1 is not None:
        found["alignment"] = alignment(z, z1)
    if labels is not None:
        found |= {"tolerance": tolerance(z, labels), "nmi": clustering_nmi(z, labels)}
    return found


def _some(rows: Array, seed: int) -> Array:
    if len(rows) <= PAIRS:
        return rows
    return np.asarray(rows[np.random.default_rng(seed).choice(len(rows), PAIRS, replace=False)])


def _fit(features: Array, labels: Array) -> None:
    if features.ndim != 2 or len(features) != len(labels) or len(features) == 0:
        raise UsageError(f"features (N, D) and labels (N,) do not fit: {features.shape} and {np.shape(labels)}")
