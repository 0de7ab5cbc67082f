"""Saying "unknown": what happens to accuracy when unsure answers are withheld, and how well outliers are told apart."""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt

from contralto.errors import UsageError

__all__ = ["OpenSetCurve", "Outliers", "Score", "open_set_curve", "outlier_detection", "outlier_scores"]

Score = Literal["probability", "logit", "energy", "cross_entropy", "ratio", "margin"]

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


class Outliers(NamedTuple):
    """How well outliers are told apart: false alarms where 95 % of them are found; areas under ROC and precision-recall."""

    fpr95: float
    auroc: float
    aupr: float


def outlier_scores(
    logits: npt.ArrayLike, score: Score = "probability", *, temperature: float = 1.0
) -> npt.NDArray[np.float64]:
    """How much every sample looks like none of the classes; higher is more.

    Parameters
    ----------
    logits : array (N, K)
        Cosines, or logits of another kind.
    score : {"probability", "logit", "energy", "cross_entropy", "ratio", "margin"}
        With ``p = softmax(l / T)``: ``-max p`` (the usual one); ``-max l``; ``-T logsumexp(l / T)``; ``mean l / T -
        logsumexp(l / T)``, the cross-entropy of an even prediction with its sign turned; with the two largest of p,
        ``-p1 / (p2 + 1e-6)`` and ``-(p1 - p2)``.
    temperature : float
        T.

    Returns
    -------
    array (N,)

    Examples
    --------
    >>> outlier_scores([[2.0, 0.0], [0.1, 0.0]]).round(2).tolist()
    [-0.88, -0.52]
    """
    from scipy.special import logsumexp, softmax

    values = np.asarray(logits, np.float64)
    if values.ndim != 2 or values.shape[1] < 2:
        raise UsageError(f"logits must be of shape (N, K) with two classes at least, got {values.shape}")
    if score not in get_args(Score):
        raise UsageError(f"score must be one of {', '.join(get_args(Score))}; got {score!r}")
    scaled = values / temperature
    if score == "logit":
        return np.asarray(-values.max(1))
    if score == "energy":
        return np.asarray(-temperature * logsumexp(scaled, axis=1))
    if score == "cross_entropy":
        return np.asarray(scaled.mean(1) - logsumexp(scaled, axis=1))
    p = np.sort(softmax(scaled, axis=1), axis=1)
    first, second = p[:, -1], p[:, -2]
    if score == "ratio":
        return np.asarray(-first / (second + 1e-6))
    return np.asarray(second - first if score == "margin" else -first)


def outlier_detection(
    inside: npt.ArrayLike, outside: npt.ArrayLike, *, share: float | None = 0.2, draws: int = 10, seed: int = 0
) -> Outliers:
    """Outliers, which are what is looked for, against samples of the classes, by a score that is higher for them.

    Parameters
    ----------
    inside, outside : array (N,), (M,)
        Scores of samples of the classes, and of outliers.
    share : float, optional
        Outliers drawn per sample inside, 1 to 5 as is usual; None: all of them, once.
    draws : int
        The results of so many draws are averaged.
    seed : int

    Returns
    -------
    Outliers

    Raises
    ------
    UsageError
        If there are none of one kind.

    Examples
    --------
    >>> outlier_detection([0.1, 0.2, 0.3, 0.6], [0.5, 0.9], share=None)
    Outliers(fpr95=0.25, auroc=0.875, aupr=0.8333333333333333)
    """
    known, strange = np.asarray(inside, np.float64).ravel(), np.asarray(outside, np.float64).ravel()
    if not len(known) or not len(strange):
        raise UsageError(f"there must be samples inside and outside, got {len(known)} and {len(strange)}")
    if share is None:
        return _detection(known, strange)
    count, rng = max(1, min(round(share * len(known)), len(strange))), np.random.default_rng(seed)
    every = [_detection(known, rng.choice(strange, count, replace=False)) for _ in range(draws)]
    return Outliers(*np.mean(every, axis=0).tolist())


def _detection(known: npt.NDArray[Any], strange: npt.NDArray[Any]) -> Outliers:
    from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

    truth = np.repeat([0, 1], [len(known), len(strange)])
    scores = np.concatenate([known, strange])
    false, found, _ = roc_curve(truth, scores, drop_intermediate=False)
    first = int((found >= 0.95).argmax())
    return Outliers(
        float(false[first]), float(roc_auc_score(truth, scores)), float(average_precision_score(truth, scores))
    )
