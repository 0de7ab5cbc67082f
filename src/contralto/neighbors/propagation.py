"""Labels that spread over a graph from the few nodes that have one (local and global consistency; TMV-HLP, step 10)."""

from typing import Any

import numpy as np
import numpy.typing as npt

from contralto.errors import ContraltoError, UsageError

__all__ = ["propagate", "seed_labels"]

Array = npt.NDArray[np.float64]


def propagate(graph: Any, seeds: npt.ArrayLike, *, alpha: float = 0.5, tolerance: float = 1e-10) -> Array:
    """Spread labels: ``F = (1 - alpha) (I - alpha L)^-1 Y`` with ``L = Deg^-1/2 G Deg^-1/2``.

    Solved by conjugate gradients for all classes at once, with products of the graph alone: no inverse, no N x N matrix.

    Parameters
    ----------
    graph : sparse array, LinearOperator or array (N, N)
        Symmetric, nothing below zero.
    seeds : array (N, C)
        What is known of every node: 1 for its class, 0 or -1 for others, rows of 0 for unknown ones.
    alpha : float
        Share of the neighbours in [0, 1), against what is known.
    tolerance : float
        Of the residual, relative to the seeds.

    Returns
    -------
    array (N, C)
        The class of a node is that of the largest value. A node without neighbours keeps ``(1 - alpha)`` of its seeds.

    Raises
    ------
    UsageError
        If the arguments do not fit.
    ContraltoError
        If the solver does not get there: the graph is not symmetric, or has entries below zero.

    Examples
    --------
    >>> path = np.array([[0.0, 1, 0, 0], [1, 0, 0.5, 0], [0, 0.5, 0, 1], [0, 0, 1, 0]])
    >>> propagate(path, [[1, 0], [0, 0], [0, 0], [0, 1]]).argmax(1).tolist()
    [0, 0, 1, 1]
    """
    from scipy.sparse.linalg import LinearOperator, aslinearoperator, cg

    Y = np.asarray(seeds, dtype=np.float64)
    operator = aslinearoperator(graph)
    n = operator.shape[0]
    if operator.shape != (n, n) or Y.ndim != 2 or len(Y) != n:
        raise UsageError(f"graph must be (N, N) and seeds (N, C), got {operator.shape} and {Y.shape}")
    if not 0 <= alpha < 1:
        raise UsageError(f"alpha must be in [0, 1), got {alpha}")
    if not np.isfinite(Y).all():
        raise UsageError(f"seeds must be finite; row {np.flatnonzero(~np.isfinite(Y).all(1))[0]} is not")
    degree = np.asarray(operator.matvec(np.ones(n))).ravel()
    if not np.isfinite(degree).all() or (degree < -1e-9).any():
        raise UsageError("no node of the graph may have a negative or infinite degree")
    scale = np.where(degree > 1e-12, 1 / np.sqrt(np.where(degree > 1e-12, degree, 1)), 0.0)[:, None]

    def apply(flat: Array) -> Array:
        x = flat.reshape(Y.shape)
        return np.asarray((x - alpha * scale * operator.matmat(scale * x)).ravel())

    if not Y.any():
        return np.zeros_like(Y)
    system = LinearOperator((Y.size, Y.size), matvec=apply, dtype=np.float64)
    found, told = cg(system, Y.ravel(), rtol=tolerance, atol=0.0, maxiter=1000)
    if told != 0 or not np.isfinite(found).all():
        raise ContraltoError(
            f"labels did not settle on the graph after 1000 steps with alpha = {alpha}: is it symmetric, with no entry below 0? "
            f"A smaller alpha settles sooner"
        )
    return np.asarray((1 - alpha) * found.reshape(Y.shape))


def seed_labels(labels: npt.ArrayLike, num_classes: int, *, others: float = -1.0) -> Array:
    """Seeds (N, C) of labels (N,): 1 for the class, `others` for the rest, rows of 0 for what has no label, -1 (step 10).

    With -1 for others, F is ``2 A - A.sum(1)`` of the A that 0 gives: the classes are the same.

    Examples
    --------
    >>> seed_labels([1, -1], 2).tolist()
    [[-1.0, 1.0], [0.0, 0.0]]
    """
    y = np.asarray(labels)
    if y.ndim != 1 or not np.issubdtype(y.dtype, np.integer) or (y >= num_classes).any():
        raise UsageError(f"labels must be whole numbers (N,) below {num_classes}, or -1")
    known = y >= 0
    out = np.where(known[:, None], others, 0.0) * np.ones((1, num_classes))
    out[np.flatnonzero(known), y[known]] = 1.0
    return out
