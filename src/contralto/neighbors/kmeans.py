"""k-means on FAISS: the same seed gives the same centres."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from contralto.errors import UsageError
from contralto.neighbors.knn import unit_rows

__all__ = ["KMeans", "kmeans"]

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
        return _nearest(self.centroids, _rows(features, self.normalize))[0]


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
    data = _rows(features, normalize)
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


def _rows(features: npt.ArrayLike, normalize: bool) -> Array:
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
