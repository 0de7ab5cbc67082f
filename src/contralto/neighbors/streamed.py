"""Nearest neighbours of more rows than fit into memory: a compressed FAISS index, exact cosines of what it finds.

The index keeps a few bytes of every row (IVF-PQ: cells, and a code for each slice of a row). It proposes several times as many
neighbours as are wanted; their rows are read again and ranked by their true cosines, so what comes out is exact but for those
that the index did not propose.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from contralto.errors import UsageError
from contralto.neighbors.knn import unit_rows

__all__ = ["default_index", "fits_memory", "knn_streamed"]

Array = npt.NDArray[Any]


def default_index(n: int, dim: int) -> str:
    """The index for so many rows in FAISS's words: about ``4 sqrt(n)`` cells and a byte for four numbers, where that divides.

    Examples
    --------
    >>> default_index(10_000_000, 1280), default_index(1000, 7)
    ('IVF12649,PQ320', 'IVF25,PQ7')
    """
    cells = max(1, min(round(4 * n**0.5), n // 39))
    slices = next(dim // width for width in (4, 5, 6, 8, 3, 2, 1) if dim % width == 0)
    return f"IVF{cells},PQ{slices}"


def fits_memory(n: int, dim: int) -> bool:
    """Whether neighbours of so many rows can be found with all rows in memory.

    The exact search takes up to three copies in single precision, and half of the memory of the machine (or of its container) is
    for them. What other programs take at the moment does not count: the same machine gives the same answer.

    Examples
    --------
    >>> fits_memory(1000, 1280), fits_memory(10**12, 1280)
    (True, False)
    """
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and (told := limit.read_text().strip()).isdigit():
        memory = min(memory, int(told))
    return 3 * 4 * n * dim <= memory / 2


def knn_streamed(
    features: Any,
    k: int,
    *,
    index: str | None = None,
    probes: int = 64,
    candidates: int = 4,
    sample: int = 200_000,
    block: int = 2048,
    seed: int = 0,
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """Nearest neighbours by cosine of every row, without ever holding all rows.

    Parameters
    ----------
    features : array (N, D)
        Anything that gives rows for slices and for sorted numbers, such as ``numpy.load(path, mmap_mode="r")``. Scaled to
        length one block by block.
    k : int
        Neighbours per row, itself first; at most N.
    index : str, optional
        A string of FAISS's index factory; default: `default_index`.
    probes : int
        Cells of an IVF index that are looked into.
    candidates : int
        So many times `k` rows are proposed by the index and ranked by their true cosines.
    sample : int
        Rows that the index learns from.
    block : int
        Rows that are handled at a time; memory grows with ``block * candidates * k * D`` at worst.
    seed : int
        Of sample and cells.

    Returns
    -------
    similarity : array (N, k) float32
        Descending cosines.
    index : array (N, k) int64

    Raises
    ------
    UsageError
        If an argument does not fit, or FAISS does not know the index.

    Examples
    --------
    >>> x = np.random.default_rng(0).standard_normal((2000, 16), np.float32)
    >>> similarity, index = knn_streamed(x, 3, probes=1000)
    >>> bool((index[:, 0] == np.arange(2000)).all()), similarity.shape
    (True, (2000, 3))
    """
    if len(np.shape(features)) != 2 or len(features) == 0:
        raise UsageError(f"features must be of shape (N, D) with at least one row, got {np.shape(features)}")
    n, dim = np.shape(features)
    if not 1 <= k <= n:
        raise UsageError(f"k must be between 1 and the number of rows, {n}; got {k}")
    for name, value in (("probes", probes), ("candidates", candidates), ("sample", sample), ("block", block)):
        if value < 1:
            raise UsageError(f"{name} must be at least 1, got {value}")
    engine, ivf = _trained(features, default_index(n, dim) if index is None else index, sample, block, seed)
    similarity, found = np.empty((n, k), np.float32), np.empty((n, k), np.int64)
    for start in range(0, n, block):
        own = np.arange(start, min(start + block, n))
        rows = unit_rows(features[start : start + block])
        similarity[own], found[own] = _ranked(features, engine, ivf, own, rows, k, min(candidates * k, n), probes)
    return similarity, found


def _trained(features: Any, form: str, sample: int, block: int, seed: int) -> tuple[Any, Any]:
    """The index with all rows, and its part with cells (None if it has none)."""
    import faiss

    n, dim = np.shape(features)
    try:
        engine: Any = faiss.index_factory(dim, form, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise UsageError(f"index must be a string of FAISS's index factory, got {form!r}") from error
    ivf = faiss.try_extract_index_ivf(engine)
    if ivf is not None:
        ivf.cp.seed, ivf.cp.niter, ivf.cp.min_points_per_centroid = seed, 10, 1
    rows = np.sort(np.random.default_rng(seed).permutation(n)[:sample])
    try:
        engine.train(unit_rows(features[rows]))
    except RuntimeError as error:
        raise UsageError(f"{len(rows)} rows are too few for the index {form!r}: choose a smaller one") from error
    for start in range(0, n, block):
        engine.add(unit_rows(features[start : start + block]))
    return engine, ivf


def _ranked(
    features: Any, engine: Any, ivf: Any, own: Array, rows: Array, k: int, wanted: int, probes: int
) -> tuple[Array, Array]:
    """The best k of what the index proposes for some rows, by true cosines; the rows themselves first."""
    if ivf is not None:
        ivf.nprobe = probes
    proposed = engine.search(rows, wanted)[1]
    short = np.flatnonzero((proposed >= 0).sum(1) < k)
    if ivf is not None and len(short):  # the cells that were looked into hold fewer than k rows: look into all
        ivf.nprobe = ivf.nlist
        proposed[short] = engine.search(rows[short], wanted)[1]
    proposed[proposed == own[:, None]] = -1
    proposed = np.concatenate([own[:, None], proposed], 1)
    needed, place = np.unique(np.maximum(proposed, 0), return_inverse=True)
    read = unit_rows(features[needed])  # sorted: read in the order of the file
    place = place.reshape(proposed.shape)
    cosine = np.empty(proposed.shape, np.float32)
    for start in range(0, len(rows), 256):
        part = slice(start, start + 256)
        cosine[part] = np.einsum("qd,qcd->qc", rows[part], read[place[part]])
    own_cosine = cosine[:, 0].copy()
    cosine[proposed < 0], cosine[:, 0] = -np.inf, np.inf
    order = np.argsort(-cosine, axis=1, kind="stable")[:, :k]
    best = np.take_along_axis(cosine, order, 1)
    best[:, 0] = own_cosine
    return best, np.take_along_axis(proposed, order, 1)
