"""Canonical correlation of several views: one space in which what views say of the same sample agrees."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from sklearn.base import BaseEstimator

from contralto.errors import UsageError

__all__ = ["MultiViewCCA", "check_views"]

Array = npt.NDArray[np.float64]


class MultiViewCCA(BaseEstimator):  # type: ignore[misc]
    """Multi-view canonical correlation analysis (TMV-HLP, step 2).

    The covariance C of all columns side by side, and B, its blocks of single views: ``C w = lambda B w``. With m views,
    lambda is m where all say the same, 1 where they are unrelated.

    Parameters
    ----------
    regulariser : float
        Added to the diagonals of B and of C alike, so that directions without variance have lambda 1 and no more.
    power : float
        Embedded coordinates are multiplied by ``lambda ** power``: strongly correlated directions dominate.
    components : int, optional
        Only so many directions, those of the largest lambda; default: all of them.

    Attributes
    ----------
    eigenvalues_ : array (P,)
        Descending; their sum is P where all are kept, the number of all columns.
    weights_ : list of array (p_i, P)
        Per view; ``W^T B W = I`` for all of them on top of each other.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> shared = rng.normal(size=(100, 1))
    >>> views = [np.hstack([shared, rng.normal(size=(100, 2))]), np.hstack([rng.normal(size=(100, 1)), -shared])]
    >>> cca = MultiViewCCA().fit(views)
    >>> cca.eigenvalues_.round(1)[:2], [x.shape for x in cca.transform(views)]
    (array([2. , 1.4]), [(100, 5), (100, 5)])
    """

    def __init__(self, regulariser: float = 1e-4, power: float = 4.0, components: int | None = None) -> None:
        self.regulariser = regulariser
        self.power = power
        self.components = components

    def fit(self, views: Sequence[npt.ArrayLike], y: Any = None) -> Self:
        """Learn the directions from views of the same samples.

        Parameters
        ----------
        views : sequence of array (N, p_i)
        y
            Not used.

        Raises
        ------
        UsageError
            If views do not fit together, or hold what is no finite number.
        """
        from scipy.linalg import eigh

        if self.regulariser <= 0:
            raise UsageError(f"regulariser must be above 0, got {self.regulariser}")
        found = check_views(views)
        if len(found[0]) < 2:
            raise UsageError(f"at least two samples are needed to see what varies, got n_samples = {len(found[0])}")
        widths = [x.shape[1] for x in found]
        total = sum(widths)
        if self.components is not None and not 1 <= self.components <= total:
            raise UsageError(f"components must be between 1 and the number of columns, {total}; got {self.components}")
        together = np.hstack(found)
        together = together - together.mean(0)
        C = together.T @ together / (len(together) - 1)
        C[np.diag_indices(total)] += self.regulariser
        edges = np.cumsum([0, *widths])
        B = np.zeros_like(C)
        for low, high in pairwise(edges):
            B[low:high, low:high] = C[low:high, low:high]
        kept = None if self.components is None else [total - self.components, total - 1]
        values, vectors = eigh(C, B, subset_by_index=kept, overwrite_a=True, overwrite_b=True)
        self.eigenvalues_: Array = values[::-1].copy()
        self.weights_: list[Array] = np.split(vectors[:, ::-1], edges[1:-1])
        return self

    def transform(self, views: Sequence[npt.ArrayLike]) -> list[Array]:
        """Every view in the common space (N, P); nothing is centred here.

        Examples
        --------
        >>> x = np.random.default_rng(0).normal(size=(50, 2))
        >>> a, b = MultiViewCCA().fit([x, x]).transform([x, x])
        >>> bool(np.allclose(a, b, atol=1e-3))
        True
        """
        return [self.project(x, i) for i, x in enumerate(views)]

    def project(self, x: npt.ArrayLike, view: int) -> Array:
        """Rows (N, p_i) of one view in the common space (N, P)."""
        from sklearn.utils.validation import check_is_fitted

        check_is_fitted(self)
        rows, weight = np.asarray(x, dtype=np.float64), self.weights_[view]
        if rows.ndim != 2 or rows.shape[1] != len(weight):
            raise UsageError(f"view {view} was learnt with {len(weight)} columns, got an array of shape {rows.shape}")
        return np.asarray(rows @ (weight * np.abs(self.eigenvalues_) ** self.power))


def check_views(views: Sequence[npt.ArrayLike]) -> list[Array]:
    """Views as float64 matrices of the same number of rows.

    Raises
    ------
    UsageError
        Names the view and what is wrong with it.

    Examples
    --------
    >>> [x.shape for x in check_views([[[1, 2]], [[3]]])]
    [(1, 2), (1, 1)]
    """
    found: list[Array] = []
    for i, view in enumerate(views):
        try:
            x = np.asarray(view, dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise UsageError(f"view {i} must be a matrix of numbers: {error}") from error
        if x.ndim != 2 or 0 in x.shape:
            raise UsageError(f"view {i} must be of shape (N, p) with at least one row and column, got {x.shape}")
        if len(x) != len(found[0] if found else x):
            raise UsageError(
                f"views must be of the same samples: view 0 has {len(found[0])} rows, view {i} has {len(x)}"
            )
        wrong = np.flatnonzero(~np.isfinite(x).all(1))
        if len(wrong):
            raise UsageError(f"row {wrong[0]} of view {i} holds NaN or infinity; leave such samples out")
        found.append(x)
    if not found:
        raise UsageError("at least one view is needed")
    return found
