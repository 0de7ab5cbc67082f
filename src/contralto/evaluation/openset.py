"""Saying "unknown": what happens to accuracy when answers below a threshold are withheld."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from contralto.errors import UsageError

__all__ = ["OpenSetCurve", "open_set_curve"]

_TINY = 1e-4
"""Where counts of false and missed answers start (CAPro's code)."""


@dataclass(frozen=True)
class OpenSetCurve:
    """What every threshold gives.

    Attributes
    ----------
    thresholds : array (T,)
    precision, recall, f1 : array (T,)
        Means over the C classes and "unknown"; `f1` is the harmonic mean of the two (C-F1).
    rejected_known, rejected_unknown : array (T,)
        Share of known and of unknown pictures of which is said that they are unknown; NaN where there are none.
    accepted_right : array (T,)
        Share of the accepted answers that are right; NaN where none is accepted.
    mean_f1 : float
        Mean of `f1` over the thresholds.
    area : float
        Under precision over recall, by trapezoids.
    """

    thresholds: npt.NDArray[np.float64]
    precision: npt.NDArray[np.float64]
    recall: npt.NDArray[np.float64]
    f1: npt.NDArray[np.float64]
    rejected_known: npt.NDArray[np.float64]
    rejected_unknown: npt.NDArray[np.float64]
    accepted_right: npt.NDArray[np.float64]
    mean_f1: float
    area: float

    @property
    def best(self) -> float:
        """Threshold with the highest `f1`."""
        return float(self.thresholds[int(self.f1.argmax())])


def open_set_curve(
    probabilities: npt.ArrayLike, labels: npt.ArrayLike, *, thresholds: npt.ArrayLike | None = None
) -> OpenSetCurve:
    """Sweep a threshold on the highest probability, below or at which the answer is "unknown" (CAPro, open-set metrics).

    A known picture that is rejected is a false answer for "unknown" and a missed one for its class; an unknown picture that is
    accepted is a false answer for the class it was taken for and a missed one for "unknown".

    Parameters
    ----------
    probabilities : array (N, C)
    labels : array (N,)
        In [0, C), or -1 for a picture of none of the classes.
    thresholds : array (T,), optional
        Default: 100 from 0.01 to 0.99.

    Returns
    -------
    OpenSetCurve

    Raises
    ------
    UsageError
        If the shapes do not fit.

    Examples
    --------
    >>> curve = open_set_curve([[0.9, 0.1], [0.2, 0.8], [0.55, 0.45]], [0, 1, -1], thresholds=[0.5, 0.6, 0.95])
    >>> curve.f1.round(2).tolist(), curve.best
    ([0.57, 1.0, 0.17], 0.6)
    """
    p, y = np.asarray(probabilities, dtype=np.float64), np.asarray(labels, dtype=np.int64)
    if p.ndim != 2 or y.shape != p.shape[:1] or len(p) == 0:
        raise UsageError(f"probabilities (N, C) and labels (N,) do not fit: {p.shape}, {y.shape}")
    t = np.linspace(0.01, 0.99, 100) if thresholds is None else np.asarray(thresholds, dtype=np.float64)
    classes, unknown = p.shape[1], p.shape[1]
    truth = np.where(y < 0, unknown, y)
    best, sure = p.argmax(1), p.max(1)
    there = np.bincount(truth, minlength=classes + 1).astype(np.float64)
    # Counts of accepted answers for every threshold at once: of those sorted by confidence, the ones above it.
    order = np.argsort(-sure, kind="stable")
    taken = np.searchsorted(-sure[order], -t, side="left")  # accepted: confidence above the threshold
    said, hit = np.zeros((len(t), classes + 1)), np.zeros((len(t), classes + 1))
    for row, n in enumerate(taken):
        first, rest = order[:n], order[n:]
        said[row, :classes] = np.bincount(best[first], minlength=classes)
        hit[row, :classes] = np.bincount(best[first][best[first] == truth[first]], minlength=classes)
        said[row, unknown], hit[row, unknown] = len(rest), (truth[rest] == unknown).sum()
    precision, recall = (hit / (said + _TINY)).mean(1), (hit / (there + _TINY)).mean(1)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    known = len(y) - there[unknown]
    with np.errstate(invalid="ignore", divide="ignore"):
        away = (said[:, unknown] - hit[:, unknown]) / known, hit[:, unknown] / there[unknown]
        accepted = hit[:, :classes].sum(1) / taken
    by_recall = np.argsort(recall, kind="stable")
    area = float(np.trapezoid(precision[by_recall], recall[by_recall]))
    return OpenSetCurve(t, precision, recall, f1, *away, accepted, float(f1.mean()), area)
