"""Nearest neighbours on FAISS: exact, or by an index that looks at a part of the rows."""

from typing import Any

import numpy as np
import numpy.typing as npt

from contralto.errors import UsageError

__all__ = ["AUTO_EXACT", "knn", "unit_rows"]

Array = npt.NDArray[np.float32]

AUTO_EXACT = 100_000
"""Up to so many rows, "auto" is exact: below, an index with enough probes to find nearly all is hardly faster."""


def knn(
    features: npt.ArrayLike,
    k: int,
    *,
    queries: npt.ArrayLike | None = None,
    search: str = "exact",
    probes: int = 64,
    seed: int = 0,
) -> tuple[Array, npt.NDArray[np.int64]]:
    """Nearest neighbours by cosine (CAPro 3.1).

    Parameters
    ----------
    features : array (N, D)
        Scaled to length one here.
    k : int
        Neighbours per query, at most N.
    queries : array (Q, D), optional
        Default: the features themselves; then every row has itself at rank 0.
    search : str
        "exact"; "ivf": the rows are sorted into about ``4 sqrt(N)`` cells, and a query looks into the nearest `probes` of
        them; "auto": exact up to `AUTO_EXACT` rows, else "ivf"; or any string of FAISS's index factory, such as
        "IVF4096,SQ8", which keeps a quarter of the memory.
    probes : int
        Cells looked into; more find more and take longer. What it costs and finds: ``results/neighbours.json``.
    seed : int
        Of the cells.

    Returns
    -------
    similarity : array (Q, k) float32
        Descending cosines; estimates where the index compresses.
    index : array (Q, k) int64

    Raises
    ------
    UsageError
        If an argument does not fit, or FAISS does not know the index.

    Examples
    --------
    >>> similarity, index = knn([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]], 2)
    >>> index.tolist()
    [[0, 1], [1, 0], [2, 1]]
    """
    data = unit_rows(features)
    if not 1 <= k <= len(data):
        raise UsageError(f"k must be between 1 and the number of rows, {len(data)}; got {k}")
    if probes < 1:
        raise UsageError(f"probes must be at least 1, got {probes}")
    points = data if queries is None else unit_rows(queries)
    engine = _engine(data, search, probes, seed)
    similarity = np.empty((len(points), k), np.float32)
    index = np.empty((len(points), k), np.int64)
    for start in range(0, len(points), 4096):  # bounds the memory of the result heap
        part = slice(start, start + 4096)
        similarity[part], index[part] = engine.search(points[part], k)
    short = np.flatnonzero((index < 0).any(1))  # the cells that were looked into hold fewer than k rows
    if len(short):
        similarity[short], index[short] = _engine(data, "exact", probes, seed).search(points[short], k)
    if queries is None:
        _self_first(data, similarity, index)
    return similarity, index


def _engine(data: Array, search: str, probes: int, seed: int) -> Any:
    import faiss

    n, dim = data.shape
    engine: Any
    if search == "exact" or (search == "auto" and n <= AUTO_EXACT):
        engine = faiss.IndexFlatIP(dim)
    else:
        cells = max(1, min(round(4 * n**0.5), n // 39))  # FAISS wants 39 rows a cell to learn from
        try:
            form = f"IVF{cells},Flat" if search in ("ivf", "auto") else search
            engine = faiss.index_factory(dim, form, faiss.METRIC_INNER_PRODUCT)
        except RuntimeError as error:
            raise UsageError(
                f'search must be "exact", "ivf", "auto" or a string of FAISS\'s index factory, got {search!r}'
            ) from error
        ivf = faiss.try_extract_index_ivf(engine)
        if ivf is not None:
            ivf.nprobe = probes
            ivf.cp.seed, ivf.cp.niter, ivf.cp.max_points_per_centroid = seed, 10, 64  # more changes little here
            ivf.cp.min_points_per_centroid = 1
        engine.train(data)
    engine.add(data)
    return engine


def unit_rows(features: npt.ArrayLike) -> Array:
    """Rows scaled to length one, as a new array (N, D).

    Raises
    ------
    UsageError
        If it is not a matrix with at least one row.
    """
    data = np.array(features, dtype=np.float32, order="C")  # a copy: it is scaled in place
    if data.ndim != 2 or len(data) == 0:
        raise UsageError(f"features must be of shape (N, D) with at least one row, got {data.shape}")
    data /= np.maximum(np.linalg.norm(data, axis=1, keepdims=True), 1e-12)
    return data


def _self_first(data: Array, similarity: Array, index: npt.NDArray[np.int64]) -> None:
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
    similarity[position > 0, 0] = (data[position > 0] ** 2).sum(1)  # what stood there may have been another's
