"""Rows in their principal directions: where there are few, clusters are found faster, and seldom of a single row."""

from typing import Any

import numpy as np
import numpy.typing as npt

from contralto.errors import UsageError
from contralto.neighbors.knn import unit_rows

__all__ = ["principal_rows"]


def principal_rows(features: npt.NDArray[np.floating[Any]], count: int) -> npt.NDArray[np.float32]:
    """Unit rows in the directions in which they differ most, scaled to length one again.

    Parameters
    ----------
    features : array (N, D)
        Scaled to length one first.
    count : int
        Directions; where there are no more than that, or fewer rows, rows stay as they are.

    Returns
    -------
    array (N, count)
        The sign of a direction is that of its largest entry, so that equal features give equal rows.

    Examples
    --------
    >>> x = np.random.default_rng(0).normal(size=(50, 8)) * [9, 9, 1, 1, 1, 1, 1, 1]
    >>> principal_rows(x, 2).shape
    (50, 2)
    """
    if count < 1:
        raise UsageError(f"count must be at least 1, got {count}")
    rows = unit_rows(features)
    if count >= min(rows.shape):
        return rows
    middle = rows.mean(0)
    covariance = (rows - middle).T.astype(np.float64) @ (rows - middle)
    vectors = np.linalg.eigh(covariance)[1][:, ::-1][:, :count]
    vectors = vectors * np.sign(np.take_along_axis(vectors, np.abs(vectors).argmax(0)[None], 0))
    return unit_rows(((rows - middle) @ vectors).astype(np.float32))
