"""Plain descriptions of grey pictures that need no training: pixels, frequencies, directions of edges."""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from contralto.errors import UsageError

__all__ = ["DESCRIPTIONS", "describe", "fourier_magnitudes", "gradient_histograms", "pixels"]

Array = npt.NDArray[np.float64]


def describe(pictures: npt.ArrayLike, name: str) -> Array:
    """A description (N, p) of grey pictures (N, H, W) by its name: one of `DESCRIPTIONS`.

    Examples
    --------
    >>> [describe(np.zeros((2, 8, 8)), name).shape for name in ("pixels", "fourier", "gradients")]
    [(2, 64), (2, 40), (2, 128)]
    """
    if name not in DESCRIPTIONS:
        raise UsageError(f"no description is called {name!r}: there are {', '.join(DESCRIPTIONS)}")
    return DESCRIPTIONS[name](pictures)


def pixels(pictures: npt.ArrayLike) -> Array:
    """Grey values, row by row."""
    found = _grey(pictures)
    return found.reshape(len(found), -1)


def fourier_magnitudes(pictures: npt.ArrayLike) -> Array:
    """Magnitudes of the two-dimensional Fourier transform, without the half that mirrors the other; places do not count.

    Examples
    --------
    >>> x = np.random.default_rng(0).random((1, 8, 8))
    >>> bool(np.allclose(fourier_magnitudes(x), fourier_magnitudes(np.roll(x, 3, axis=2))))
    True
    """
    found = np.abs(np.fft.rfft2(_grey(pictures)))
    return np.asarray(found.reshape(len(found), -1))


def gradient_histograms(pictures: npt.ArrayLike, *, cells: int = 4, bins: int = 8) -> Array:
    """How much of every direction the edges have, in a grid of cells.

    Parameters
    ----------
    pictures : array (N, H, W)
    cells : int
        Along each side; pixels that do not divide evenly belong to the nearest cell.
    bins : int
        Directions.

    Returns
    -------
    array (N, cells * cells * bins)

    Examples
    --------
    >>> edge = np.repeat([[0.0, 0.0, 1.0, 1.0]], 4, axis=0)  # brighter to the right
    >>> gradient_histograms(edge[None], cells=1, bins=4).round(6).tolist()
    [[4.0, 0.0, 0.0, 0.0]]
    """
    x = _grey(pictures)
    n, height, width = x.shape
    down, across = np.gradient(x, axis=(1, 2))
    turn = (np.arctan2(down, across) / (2 * np.pi)) % 1.0
    place = (turn * bins + 0.5).astype(np.int64) % bins  # a bin lies around its direction
    row = (np.arange(height) * cells // height)[None, :, None]
    column = (np.arange(width) * cells // width)[None, None, :]
    cell = ((np.arange(n)[:, None, None] * cells + row) * cells + column) * bins + place
    total = np.bincount(cell.ravel(), np.hypot(down, across).ravel(), minlength=n * cells * cells * bins)
    return np.asarray(total.reshape(n, -1))


DESCRIPTIONS: dict[str, Callable[[Any], Array]] = {
    "pixels": pixels,
    "fourier": fourier_magnitudes,
    "gradients": gradient_histograms,
}
"""Name -> function from grey pictures (N, H, W) to rows (N, p)."""


def _grey(pictures: npt.ArrayLike) -> Array:
    found = np.asarray(pictures, dtype=np.float64)
    if found.ndim != 3 or min(found.shape[1:]) < 2:
        raise UsageError(f"grey pictures must be of shape (N, H, W) with sides of at least 2, got {found.shape}")
    return found
