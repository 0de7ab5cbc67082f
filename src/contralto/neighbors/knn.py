"""Exact nearest neighbours on FAISS."""

import numpy as np
import numpy.typing as npt

from contralto.errors import UsageError

__all__ = ["knn"]

Array = npt.NDArray[np.float32]


def knn(
    features: npt.ArrayLike, k: int, *, queries: npt.ArrayLike | None = None
) -> tuple[Array, npt.NDArray[np.int64]]:
    """Exact k nearest neighbours by cosine (CAPro 3.1).

    Parameters
    ----------
    features : array (N, D)
        Scaled to length one here.
    k : int
        Neighbours per query, at most N.
    queries : array (Q, D), optional
        Default: the features themselves; then every row has itself at rank 0.

    Returns
    -------
    similarity : array (Q, k) float32
        Descending cosines.
    index : array (Q, k) int64

    Examples
    --------
    >>> similarity, index = knn([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]], 2)
    >>> index.tolist()
    [[0, 1], [1, 0], [2, 1]]
    """
    import faiss

    data = _unit(features)
    if not 1 <= k <= len(data):
        raise UsageError(f"k must be between 1 and the number of rows, {len(data)}; got {k}")
    points = data if queries is None else _unit(queries)
    engine = faiss.IndexFlatIP(data.shape[1])
    engine.add(data)
    similarity = np.empty((len(points), k), np.float32)
    index = np.empty((len(points), k), np.int64)
    for start in range(0, len(points), 4096):  # bounds the memory of the result heap
        part = slice(start, start + 4096)
        similarity[part], index[part] = engine.search(points[part], k)
    if queries is None:
        _self_first(similarity, index)
    return similarity, index


def _unit(features: npt.ArrayLike) -> Array:
    data = np.array(features, dtype=np.float32, order="C")  # a copy: it is scaled in place
    if data.ndim != 2 or len(data) == 0:
        raise UsageError(f"features must be of shape (N, D) with at least one row, got {data.shape}")
    data /= np.maximum(np.linalg.norm(data, axis=1, keepdims=True), 1e-12)
    return data


def _self_first(similarity: Array, index: npt.NDArray[np.int64]) -> None:
    """Exact duplicates tie with the sample itself: put it in front, or in place of the last if it was crowded out."""
    own = np.arange(len(index))[:, None]
    is_own = index == own
    position = np.where(is_own.any(1), is_own.argmax(1), index.shape[1] - 1)
    columns = np.arange(index.shape[1])[None]
    # Entries before the sample's position move one place back, the rest stay.
    source = np.where(columns == 0, position[:, None], np.where(columns <= position[:, None], columns - 1, columns))
    similarity[:] = np.take_along_axis(similarity, source, 1)
    index[:] = np.take_along_axis(index, source, 1)
    index[:, 0] = own[:, 0]
