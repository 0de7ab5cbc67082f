"""Graphs over samples: a sparse adjacency from neighbour lists, and features smoothed along it."""

from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from contralto.errors import UsageError

__all__ = ["Edge", "Normalisation", "adjacency", "smooth"]

Edge = Literal["similarity", "distance"]
Normalisation = Literal["row", "symmetric"]


def adjacency(index: npt.NDArray[np.int64], distance: npt.NDArray[Any], *, edge: Edge = "similarity") -> Any:
    """Symmetric sparse graph from neighbour lists (CAPro 3.4).

    Parameters
    ----------
    index : array (N, k)
    distance : array (N, k)
        Distances in [0, 1]; NaN counts as 1.
    edge : {"similarity", "distance"}
        What an edge weighs: 1 - d (the paper), or d itself (the released code).

    Returns
    -------
    scipy.sparse.csr_array (N, N)
        Without self-loops; edge values are clipped to [1e-3, 1 - 1e-3]; symmetrised by the larger of the two directions.

    Examples
    --------
    >>> adjacency(np.array([[0, 1], [1, 0]]), np.array([[0.0, 0.25], [0.0, 0.5]])).toarray()
    array([[0.  , 0.75],
           [0.75, 0.  ]])
    """
    from scipy.sparse import coo_array

    if edge not in ("similarity", "distance"):
        raise UsageError(f'edge must be "similarity" or "distance", got {edge!r}')
    n, k = index.shape
    d = np.nan_to_num(np.asarray(distance, dtype=np.float64), nan=1.0)
    value = np.clip(1 - d if edge == "similarity" else d, 1e-3, 1 - 1e-3).ravel()
    row, column = np.repeat(np.arange(n), k), index.ravel()
    loop = row == column
    A = coo_array((value[~loop], (row[~loop], column[~loop])), shape=(n, n)).tocsr()
    return A.maximum(A.T).tocsr()


def smooth(
    features: npt.NDArray[Any],
    graph: Any,
    *,
    edge: Edge = "similarity",
    self_weight: float | None = None,
    normalisation: Normalisation | None = None,
    degree: int = 1,
) -> npt.NDArray[Any]:
    """Simple graph convolution: every row becomes a weighted mean over its neighbours (CAPro 3.4, 3.5).

    Parameters
    ----------
    features : array (N, D)
    graph : sparse array (N, N)
        From `adjacency`.
    edge : {"similarity", "distance"}
        Chooses the defaults of the next two: the paper's (1, "symmetric") or the code's (0, "row").
    self_weight : float, optional
        Weight of a row's own features.
    normalisation : {"row", "symmetric"}, optional
        "row": rows are divided by their sum before and after the self-loop is added. "symmetric": D^-1/2 (A + wI) D^-1/2.
    degree : int
        How often; 0 returns the features.

    Returns
    -------
    array (N, D)

    Notes
    -----
    A row without any neighbour keeps its features; only the code's form (edge "distance" with its defaults) makes it zero.

    Examples
    --------
    >>> graph = adjacency(np.array([[1], [0]]), np.array([[0.5], [0.5]]))
    >>> smooth(np.array([[1.0], [0.0]]), graph, normalisation="row").ravel().tolist()
    [0.5, 0.5]
    """
    from scipy.sparse import diags_array

    as_code = edge == "distance"
    weight = (0.0 if as_code else 1.0) if self_weight is None else float(self_weight)
    form = ("row" if as_code else "symmetric") if normalisation is None else normalisation
    if form not in ("row", "symmetric"):
        raise UsageError(f'normalisation must be "row" or "symmetric", got {form!r}')
    if weight < 0 or degree < 0:
        raise UsageError(f"self_weight and degree must not be negative, got {weight} and {degree}")
    if degree == 0:
        return features
    n = graph.shape[0]
    isolated = np.diff(graph.indptr) == 0
    loops = np.full(n, weight)
    if not (as_code and weight == 0 and form == "row"):
        loops[isolated] = max(weight, 1.0)
    if form == "row":
        A = _divide_rows(_divide_rows(graph) + diags_array(loops))
    else:
        A = graph + diags_array(loops)
        scale = 1 / np.sqrt(np.maximum(A.sum(1), 1e-12))
        A = diags_array(scale) @ A @ diags_array(scale)
    out = features
    for _ in range(degree):
        out = A @ out
    return np.asarray(out, dtype=features.dtype)


def _divide_rows(A: Any) -> Any:
    from scipy.sparse import diags_array

    total = np.asarray(A.sum(1))
    return diags_array(np.where(total > 0, 1 / np.where(total > 0, total, 1), 0)) @ A
