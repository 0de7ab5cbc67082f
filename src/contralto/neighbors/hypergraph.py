"""Graphs over samples that are seen in several views: a pairwise one, and hyperedges from view to view (TMV-HLP, steps 5 to 9).

Nodes are the same in all views, unit rows in one common space. Every row keeps only its nearest nodes: all is computed block by
block, and what stays in memory is linear in the kept neighbours. Similarities that are products are never multiplied out.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from contralto.errors import UsageError

__all__ = [
    "heterogeneous_hyperedges",
    "hypergraph_similarity",
    "knn_graph",
    "memberships",
    "multigraph",
    "nearest_others",
    "view_agreement",
]

Array = npt.NDArray[np.float64]
BLOCK = 2**22
"""Numbers of one block."""
MEDIAN_ROWS = 4096
"""Up to so many rows the median distance is that of all pairs; of more rows, so many evenly spread ones are compared."""


def knn_graph(nodes: Array, keep: npt.ArrayLike, *, bandwidth: float | None = None) -> Any:
    """Graph of the nearest nodes, weighed by a Gaussian of their distance (step 5).

    Parameters
    ----------
    nodes : array (N, D)
    keep : int or array (N,) of int
        How many others every node grabs.
    bandwidth : float, optional
        Of ``exp(-d / bandwidth)``, d squared distances; default: their median, a node's own 0 included.

    Returns
    -------
    scipy.sparse.csr_array (N, N)
        ``(M + M^T) / 2``, without a node itself.

    Examples
    --------
    >>> knn_graph(np.array([[0.0], [1.0], [3.0]]), 1, bandwidth=1.0).toarray().round(2).tolist()
    [[0.0, 0.37, 0.0], [0.37, 0.0, 0.01], [0.0, 0.01, 0.0]]
    """
    width = _median(nodes, nodes) if bandwidth is None else bandwidth
    similarity = _similarity(nodes, nodes, width)

    def others(rows: npt.NDArray[np.int64]) -> Array:
        found = similarity(rows)
        found[np.arange(len(rows)), rows] = -np.inf
        return found

    return _nearest(others, _keep(keep, len(nodes)), len(nodes), skip=0)


def memberships(seen: Array, nodes: Array, keep: npt.ArrayLike, *, drop_first: bool = True) -> Any:
    """Hyperedges from one view to another: every node as `seen` in one grabs its nearest `nodes` in the other (step 7).

    Parameters
    ----------
    seen, nodes : array (N, D)
        The same nodes in two views.
    keep : int or array (N,) of int
        How many every node grabs.
    drop_first : bool
        Leave out the nearest one, as the released code does; in the same view that is the node itself, in another one it is
        the best match, most often the node itself too.

    Returns
    -------
    scipy.sparse.csr_array (N, N)
        A hyperedge per row, made symmetric: Gaussian similarities whose rows, then columns are standardised.

    Examples
    --------
    >>> x = np.random.default_rng(0).normal(size=(6, 2))
    >>> memberships(x, x, 2).shape
    (6, 6)
    """
    n = len(seen)
    if len(nodes) != n:
        raise UsageError(f"both views must show the same nodes, got {n} and {len(nodes)}")
    similarity = _similarity(seen, nodes, _median(seen, nodes))

    def by_row(rows: npt.NDArray[np.int64]) -> Array:
        s = similarity(rows)
        return _divided(s - s.mean(1, keepdims=True), s.std(1, ddof=1, keepdims=True))

    total, square = np.zeros(n), np.zeros(n)
    for rows in _blocks(np.arange(n), n):
        part = by_row(rows)
        total += part.sum(0)
        square += (part**2).sum(0)
    mean = total / n
    spread = np.sqrt(np.maximum(square - n * mean**2, 0.0) / max(n - 1, 1))
    return _nearest(lambda rows: _divided(by_row(rows) - mean, spread), _keep(keep, n), n, skip=int(drop_first))


def nearest_others(rows: Array, nodes: Array, k: int) -> Any:
    """Other rows tied to their nearest nodes, for samples that come later.

    Parameters
    ----------
    rows : array (M, D)
    nodes : array (N, D)
    k : int

    Returns
    -------
    scipy.sparse.csr_array (M, N)
        Gaussian similarities to the `k` nearest nodes; the bandwidth is the median squared distance of all pairs of nodes, so
        that a row's neighbours do not depend on the other rows.

    Examples
    --------
    >>> nearest_others(np.array([[0.1]]), np.array([[0.0], [1.0]]), 1).nonzero()[1].tolist()
    [0]
    """
    if not 1 <= k <= len(nodes):
        raise UsageError(f"k must be between 1 and the number of nodes, {len(nodes)}; got {k}")
    similarity = _similarity(rows, nodes, _median(nodes, nodes))
    return _largest(similarity, np.full(len(rows), k), (len(rows), len(nodes)))


def view_agreement(views: Sequence[Array], *, outliers: bool = False) -> Array:
    """How much every view agrees with the others, as shares (m,) (step 6).

    Parameters
    ----------
    views : sequence of array (N, D)
        Unit rows, the same nodes in every view.
    outliers : bool
        Count nodes too whose cosine between two views is not positive, as the precursor of the method did.

    Notes
    -----
    A node counts by its inverse distance between two views, and never as more than 1e6, since identical ones are infinitely near.
    Shares are equal where no node counts, and 1 for a single view.

    Examples
    --------
    >>> x = np.eye(3)
    >>> view_agreement([x, x[[0, 2, 1]], x[[0, 2, 1]]]).round(2).tolist()
    [0.2, 0.4, 0.4]
    """
    m = len(views)
    shared = np.zeros((m, m))
    for i in range(m):
        for j in range(i):
            cosine = np.einsum("nd,nd->n", views[i], views[j])
            near = 1 / np.sqrt(np.maximum(2 - 2 * cosine, 1e-12))
            shared[i, j] = shared[j, i] = near.sum() if outliers else near[near > 1 / np.sqrt(2)].sum()
    total = shared.sum()
    return np.asarray(shared.sum(1) / total if total > 0 else np.full(m, 1 / m))


def multigraph(
    views: Sequence[Array],
    keep: npt.ArrayLike,
    *,
    prior: npt.ArrayLike | None = None,
    agreement: Array | None = None,
    by_volume: bool = False,
) -> Any:
    """One graph from those of all views, weighed by how much a view agrees with the others, times a prior (step 6).

    Parameters
    ----------
    views : sequence of array (N, D)
        Unit rows.
    keep : int or array (N,) of int
    prior : array (m,), optional
        Default: 1 for all.
    agreement : array (m,), optional
        Default: `view_agreement`.
    by_volume : bool
        The precursor's mix: every graph is divided by the sum of its entries, and outliers count in the agreement.

    Returns
    -------
    scipy.sparse.csr_array (N, N)
        Symmetric, nothing below zero.

    Examples
    --------
    >>> x = np.eye(4)
    >>> multigraph([x, x], 1).shape
    (4, 4)
    """
    given = np.ones(len(views)) if prior is None else np.asarray(prior, dtype=np.float64)
    if given.shape != (len(views),) or (given < 0).any() or not np.isfinite(given).all():
        raise UsageError(
            f"prior must be {len(views)} numbers not below 0, one per view; got {np.asarray(prior).tolist()}"
        )
    weights = given * (view_agreement(views, outliers=by_volume) if agreement is None else agreement)
    graphs = [knn_graph(x, keep) for x in views]
    volumes = [max(float(g.sum()), 1e-12) if by_volume else 1.0 for g in graphs]
    parts = [g * (w / v) for g, w, v in zip(graphs, weights, volumes, strict=True)]
    return sum(parts[1:], parts[0]).tocsr()


def heterogeneous_hyperedges(
    views: Sequence[Array], keep: npt.ArrayLike, *, drop_first: bool = True, homogeneous: bool = False
) -> Any:
    """The hyperedges of all ordered pairs of views on top of each other (step 7).

    Parameters
    ----------
    views : sequence of array (N, D)
        Unit rows.
    keep : int or array (N,) of int
    drop_first : bool
        See `memberships`.
    homogeneous : bool
        Within every view instead (the paper's ablation).

    Returns
    -------
    scipy.sparse.csr_array (E, N)
        Memberships of nodes; E = m (m - 1) N in the order (0, 1), (1, 0), (0, 2), (2, 0), ..., or m N.

    Examples
    --------
    >>> views = [np.eye(4), np.eye(4)[::-1], np.eye(4)]
    >>> heterogeneous_hyperedges(views, 1).shape, heterogeneous_hyperedges(views, 1, homogeneous=True).shape
    ((24, 4), (12, 4))
    """
    from scipy.sparse import csr_array, vstack

    m = len(views)
    # The last view of a pair varies slowest: (0, 1), (0, 2), (1, 2), ... in both directions.
    pairs = (
        [(i, i) for i in range(m)] if homogeneous else [p for j in range(m) for i in range(j) for p in ((i, j), (j, i))]
    )
    blocks = [memberships(views[i], views[j], keep, drop_first=drop_first) for i, j in pairs]
    return vstack(blocks, format="csr") if blocks else csr_array((0, len(views[0])))


def hypergraph_similarity(hyperedges: Any, *, clip: bool = True) -> Any:
    """Similarity of nodes by the hyperedges that they share, as an operator that is never multiplied out (step 8).

    Parameters
    ----------
    hyperedges : scipy.sparse.csr_array (E, N)
        Memberships; only those above zero bind.
    clip : bool
        Memberships below zero count as none. `False`, the released code: they still lower the weight of their hyperedge.

    Returns
    -------
    scipy.sparse.linalg.LinearOperator (N, N)
        Symmetric; 1 on the diagonal, 0 for a node that no hyperedge binds.

    Examples
    --------
    >>> from scipy.sparse import csr_array
    >>> (hypergraph_similarity(csr_array([[1.0, 1.0, 0.0], [0.0, 0.0, 2.0]])) @ np.eye(3)).round(6).tolist()
    [[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    """
    from scipy.sparse.linalg import LinearOperator

    bound = hyperedges.tocsr(copy=True)  # `maximum` of SciPy 1.14 spoils what it is called on
    np.maximum(bound.data, 0, out=bound.data)
    bound.eliminate_zeros()
    count = np.diff(bound.indptr)
    weight = _divided(np.asarray((bound if clip else hyperedges).sum(1)).ravel(), count)  # delta
    strength = np.sqrt(np.maximum((bound**2).T @ weight, 0.0))  # s
    n = bound.shape[1]

    def apply(x: Array) -> Array:
        flat = np.asarray(x).reshape(n, -1)
        scaled = _divided(flat, strength[:, None])
        out = _divided(bound.T @ (weight[:, None] * (bound @ scaled)), strength[:, None])
        return np.asarray(out.reshape(np.shape(x)))

    return LinearOperator((n, n), matvec=apply, matmat=apply, rmatvec=apply, rmatmat=apply, dtype=np.float64)


def _similarity(a: Array, b: Array, bandwidth: float) -> Callable[[npt.NDArray[np.int64]], Array]:
    """Rows of `a` -> their Gaussian similarity to all of `b`."""
    squared = (b**2).sum(1)

    def of(rows: npt.NDArray[np.int64]) -> Array:
        part = a[rows]
        d = np.maximum((part**2).sum(1)[:, None] + squared - 2 * part @ b.T, 0.0)
        return np.asarray(np.exp(-d / bandwidth))

    return of


def _median(a: Array, b: Array) -> float:
    """Median squared distance of all pairs; above zero."""

    def some(x: Array) -> Array:
        return x if len(x) <= MEDIAN_ROWS else x[np.linspace(0, len(x) - 1, MEDIAN_ROWS).round().astype(int)]

    left, right = some(a), some(b)
    d = (left**2).sum(1)[:, None] + (right**2).sum(1) - 2 * left @ right.T
    return max(float(np.median(np.maximum(d, 0.0, out=d), overwrite_input=True)), 1e-12)


def _keep(keep: npt.ArrayLike, n: int) -> npt.NDArray[np.int64]:
    """How many neighbours every row keeps, at most all others."""
    counts = np.broadcast_to(np.asarray(keep), (n,))
    if not np.issubdtype(counts.dtype, np.integer) or (n and counts.min() < 1):
        raise UsageError(f"every node must keep a whole number of neighbours, at least 1; got {keep!r}")
    return np.asarray(np.minimum(counts, max(n - 1, 1)), np.int64)


def _nearest(
    similarity: Callable[[npt.NDArray[np.int64]], Array], keep: npt.NDArray[np.int64], n: int, *, skip: int
) -> Any:
    """The nearest of every row but the first `skip` ones, symmetrised: the filter F of the paper."""
    M = _largest(similarity, np.minimum(keep, n - skip), (n, n), skip=skip)
    return ((M + M.T) / 2).tocsr()


def _largest(
    similarity: Callable[[npt.NDArray[np.int64]], Array],
    keep: npt.NDArray[np.int64],
    shape: tuple[int, int],
    *,
    skip: int = 0,
) -> Any:
    """A sparse array of the largest entries of every row, as many as `keep` says after the first `skip` ones."""
    from scipy.sparse import coo_array

    values, where = [np.zeros(0)], [np.zeros((2, 0), np.int64)]
    for count in np.unique(keep[keep > 0]):  # rows that keep the same number go together
        for rows in _blocks(np.flatnonzero(keep == count), shape[1]):
            found = similarity(rows)
            place = np.argpartition(-found, skip + count - 1, axis=1)[:, : skip + count]
            value = np.take_along_axis(found, place, 1)
            order = np.argsort(-value, axis=1, kind="stable")[:, skip:]
            values.append(np.take_along_axis(value, order, 1).ravel())
            where.append(np.stack([np.repeat(rows, count), np.take_along_axis(place, order, 1).ravel()]))
    value, (row, column) = np.concatenate(values), np.concatenate(where, 1)
    real = np.isfinite(value)  # a single node has only itself, which does not count
    return coo_array((value[real], (row[real], column[real])), shape=shape).tocsr()


def _blocks(rows: npt.NDArray[np.int64], width: int) -> Iterator[npt.NDArray[np.int64]]:
    size = max(1, BLOCK // max(width, 1))
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def _divided(x: Array, by: npt.NDArray[Any]) -> Array:
    """The quotient, 0 where there is nothing to divide by."""
    out = np.zeros(np.broadcast_shapes(np.shape(x), np.shape(by)))
    np.divide(x, by, out=out, where=np.asarray(by) > 1e-12)
    return out
