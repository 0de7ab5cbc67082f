"""k-means on FAISS, with and without some labels: the same seed gives the same centres."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_array

from contralto.errors import UsageError
from contralto.neighbors.knn import unit_rows

__all__ = ["KMeans", "cluster_sums", "kmeans", "rows_of", "semi_supervised_kmeans"]

Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class KMeans:
    """Centres, and what belongs to them.

    Attributes
    ----------
    centroids : array (K, D)
    labels : array (N,) int64
        Number of the nearest centroid of every row that was clustered.
    inertia : float
        Mean squared distance to it.
    normalize : bool
        Whether rows are scaled to length one.
    """

    centroids: Array
    labels: npt.NDArray[np.int64]
    inertia: float
    normalize: bool = True

    def assign(self, features: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """Number of the nearest centroid (M,) of other rows (M, D)."""
        return _nearest(self.centroids, rows_of(features, self.normalize))[0]


def kmeans(
    features: npt.ArrayLike,
    k: int,
    *,
    seed: int = 0,
    iterations: int = 100,
    restarts: int = 4,
    normalize: bool = True,
    spherical: bool = False,
    max_rows: int = 1_000_000,
) -> KMeans:
    """Cluster rows by their distance, or by their direction.

    Parameters
    ----------
    features : array (N, D)
    k : int
        Clusters, at most N. None is empty where there are as many distinct rows.
    seed : int
        Of the first centres, and of the rows where there are too many.
    iterations : int
    restarts : int
        Of so many beginnings the best result is taken: one alone is often a poor local optimum.
    normalize : bool
        Scale rows to length one first; the centres are means and stay shorter.
    spherical : bool
        Scale the centres to length one after every iteration: with unit rows, the nearest one is that of the largest cosine.
        A large cluster is split where one runs empty.
    max_rows : int
        Of more rows, so many are drawn to learn the centres from; all are assigned.

    Returns
    -------
    KMeans

    Raises
    ------
    UsageError
        If an argument does not fit, or a row is not finite; it is named.

    Examples
    --------
    >>> found = kmeans([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]], 2)
    >>> bool(found.labels[0] == found.labels[1] != found.labels[2] == found.labels[3])
    True
    """
    import faiss

    if spherical and not normalize:
        raise UsageError("spherical=True clusters directions: leave normalize=True")
    if min(iterations, restarts, max_rows) < 1:
        raise UsageError(
            f"iterations, restarts and max_rows must be at least 1, got {iterations}, {restarts} and {max_rows}"
        )
    data = rows_of(features, normalize)
    n, dim = data.shape
    if not 1 <= k <= min(n, max_rows):
        raise UsageError(f"k must be between 1 and the number of rows, {min(n, max_rows)}; got {k}")
    if n > max_rows:
        chosen = np.sort(np.random.default_rng(seed).choice(n, max_rows, replace=False))
        learnt: Any = np.ascontiguousarray(data[chosen])
    else:
        learnt = data
    engine: Any = faiss.Kmeans(
        dim, k, niter=iterations, nredo=restarts, seed=seed, spherical=spherical, min_points_per_centroid=1,
        max_points_per_centroid=-(-len(learnt) // k),
    )  # fmt: skip
    engine.train(learnt)
    centroids = np.array(engine.centroids, np.float32)
    labels, distances = _nearest(centroids, data)
    return KMeans(centroids, labels, float(distances.mean()), normalize)


def semi_supervised_kmeans(
    features: npt.ArrayLike,
    labels: npt.ArrayLike,
    k: int,
    *,
    seed: int = 0,
    iterations: int = 100,
    restarts: int = 10,
    tolerance: float = 1e-4,
    normalize: bool = True,
    spherical: bool = False,
) -> KMeans:
    """Cluster rows of which some have a class: these stay together, the others go to the nearest centre.

    The first centres are the means of the classes, and rows without a label drawn one after the other with a probability in
    proportion to their squared distance from the nearest centre so far (k-means++). Memory is linear in the rows.

    Parameters
    ----------
    features : array (N, D)
    labels : array (N,)
        Class of every row, any integer from 0; -1 = unknown.
    k : int
        Clusters: those of the classes come first, in the order of their labels, whatever the numbers are.
    seed : int
    iterations : int
        At most.
    restarts : int
        Of so many beginnings the one with the smallest inertia is taken.
    tolerance : float
        The end: the square of the summed shifts of all centres is below it.
    normalize, spherical : bool
        As in `kmeans`.

    Returns
    -------
    KMeans
        Its `inertia` is that of all rows, with and without labels.

    Raises
    ------
    UsageError
        If an argument does not fit; it is named.

    Examples
    --------
    >>> x = [[1.0, 0.0], [0.0, 1.0], [0.1, 0.9], [-1.0, 0.0]]
    >>> semi_supervised_kmeans(x, [7, -1, -1, -1], 3).labels[0].item()
    0
    """
    if spherical and not normalize:
        raise UsageError("spherical=True clusters directions: leave normalize=True")
    if min(iterations, restarts) < 1:
        raise UsageError(f"iterations and restarts must be at least 1, got {iterations} and {restarts}")
    data, given = rows_of(features, normalize), np.asarray(labels)
    if given.shape != (len(data),) or given.dtype.kind not in "iu":
        raise UsageError(f"labels must be {len(data)} integers, -1 = unknown; got {given.dtype} of shape {given.shape}")
    known = given >= 0
    classes, of_class = np.unique(given[known], return_inverse=True)
    free = np.ascontiguousarray(data[~known])
    if not max(len(classes), 1) <= k <= len(classes) + len(free):
        raise UsageError(
            f"k must be between the number of classes with labels, {len(classes)}, and that with one cluster for every other "
            f"row, {len(classes) + len(free)}; got {k}"
        )
    sums, counts = cluster_sums(data[known], of_class, k), np.bincount(of_class, minlength=k)
    best: tuple[float, Array, npt.NDArray[np.int64]] | None = None
    for restart in range(restarts if k > len(classes) else 1):
        start = (sums[: len(classes)] / np.maximum(counts[: len(classes), None], 1)).astype(np.float32)
        if spherical and len(start):
            start = unit_rows(start)
        centroids = _spread(start, free, k, np.random.default_rng([seed, restart]))
        for _ in range(iterations if len(free) else 0):
            label, distance = _nearest(centroids, free)
            count = counts + np.bincount(label, minlength=k)
            moved = (sums + cluster_sums(free, label, k)) / np.maximum(count, 1)[:, None]
            empty = np.flatnonzero(count == 0)  # they go where a row is farthest from its centre
            moved[empty] = free[np.argsort(-distance, kind="stable")[: len(empty)]]
            moved = unit_rows(moved) if spherical else moved.astype(np.float32)
            shift = np.linalg.norm(moved - centroids, axis=1).sum()
            centroids = moved
            if shift**2 < tolerance:
                break
        found, distance = np.empty(len(data), np.int64), np.empty(len(data), np.float32)
        found[known], distance[known] = of_class, ((data[known] - centroids[of_class]) ** 2).sum(1)
        if len(free):
            found[~known], distance[~known] = _nearest(centroids, free)
        inertia = float(distance.mean(dtype=np.float64))
        if best is None or inertia < best[0]:
            best = inertia, centroids, found
    assert best is not None
    return KMeans(best[1], best[2], best[0], normalize)


def _spread(centroids: Array, data: Array, k: int, rng: np.random.Generator) -> Array:
    """The centres, and more that are drawn from the rows as k-means++ does, to be k."""
    found = np.empty((k, data.shape[1] if len(data) else centroids.shape[1]), np.float32)
    found[: len(centroids)] = centroids
    if len(centroids) == k:
        return found
    length = (data**2).sum(1)
    distance = _nearest(found[: len(centroids)], data)[1] if len(centroids) else np.ones(len(data), np.float32)
    for place in range(len(centroids), k):
        reach = distance.cumsum(dtype=np.float64)
        if reach[-1] > 0:
            row = min(int(np.searchsorted(reach, rng.random() * reach[-1], side="right")), len(data) - 1)
        else:  # every row has a centre of its own already
            row = int(rng.integers(len(data)))
        found[place] = data[row]
        to_new = np.maximum(length - 2 * (data @ data[row]) + length[row], 0)
        distance = to_new if place == 0 else np.minimum(distance, to_new)
        distance[row] = 0
    return found


def cluster_sums(data: Array, label: npt.NDArray[np.int64], k: int) -> npt.NDArray[np.float64]:
    """Sum of the rows of every cluster (k, D).

    Examples
    --------
    >>> cluster_sums(np.ones((3, 1), np.float32), np.array([0, 2, 2]), 3).ravel().tolist()
    [1.0, 0.0, 2.0]
    """
    n = len(data)
    of = csr_array((np.ones(n), (label, np.arange(n))), shape=(k, n))
    summed: npt.NDArray[np.float64] = of @ data
    return summed


def rows_of(features: npt.ArrayLike, normalize: bool) -> Array:
    """Rows as float32, of length one if wanted; an error where they are no finite matrix.

    Examples
    --------
    >>> rows_of([[3.0, 4.0]], True).tolist()
    [[0.6000000238418579, 0.800000011920929]]
    """
    data = np.ascontiguousarray(features, dtype=np.float32)
    if data.ndim != 2 or not len(data):
        raise UsageError(f"features must be of shape (N, D) with at least one row, got {data.shape}")
    bad = np.flatnonzero(~np.isfinite(data).all(1))
    if len(bad):
        raise UsageError(f"row {bad[0]} of the features is not finite ({len(bad)} of {len(data)} rows are not)")
    return unit_rows(data) if normalize else data


def _nearest(centroids: Array, data: Array) -> tuple[npt.NDArray[np.int64], Array]:
    import faiss

    index: Any = faiss.IndexFlatL2(data.shape[1])
    index.add(centroids)
    distance, label = index.search(data, 1)
    return label[:, 0].astype(np.int64), np.maximum(distance[:, 0], 0)
