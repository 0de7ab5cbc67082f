"""Spherical k-means on FAISS."""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from contralto.errors import UsageError
from contralto.neighbors.knn import unit_rows

__all__ = ["Clusters", "spherical_kmeans"]


class Clusters(NamedTuple):
    """`centroids` (K, D), unit rows, and the `labels` (N,) of the rows that were clustered."""

    centroids: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64]


def spherical_kmeans(
    x: npt.NDArray[Any], clusters: int, *, iterations: int = 10, restarts: int = 1, seed: int = 0
) -> Clusters:
    """Cluster rows by their direction: assignment by the largest dot product, centroids scaled to length one.

    Parameters
    ----------
    x : array (N, D)
        Scaled to length one here.
    clusters : int
        K, at most N.
    iterations : int
    restarts : int
        The best of so many runs is taken.
    seed : int
        Of the rows that begin as centroids.

    Returns
    -------
    Clusters

    Raises
    ------
    UsageError
        If there are fewer rows than clusters.

    Notes
    -----
    FAISS splits a large cluster where one runs empty.

    Examples
    --------
    >>> x = np.array([[2.0, 0.0], [0.0, 1.0], [3.0, 0.1], [0.1, 1.0]])
    >>> labels = spherical_kmeans(x, 2).labels
    >>> bool(labels[0] == labels[2] != labels[1] == labels[3])
    True
    """
    import faiss

    if x.ndim != 2 or not 0 < clusters <= len(x):
        raise UsageError(f"{clusters} clusters cannot be made of {len(x)} rows: lower their number, or take more rows")
    unit = np.ascontiguousarray(unit_rows(x), dtype=np.float32)
    machine: Any = faiss.Kmeans(
        unit.shape[1], clusters, niter=iterations, nredo=restarts, seed=seed, spherical=True, min_points_per_centroid=1,
        max_points_per_centroid=len(unit),
    )  # fmt: skip
    machine.train(unit)
    centroids = np.array(machine.centroids, dtype=np.float32).reshape(clusters, -1)
    labels = np.asarray(machine.index.search(unit, 1)[1][:, 0], dtype=np.int64)
    return Clusters(centroids, labels)
