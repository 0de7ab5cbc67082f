"""How good a list of suspected wrong labels is."""

from typing import Any

import numpy as np
import numpy.typing as npt

from contralto.evaluation.classification import calibration_error

__all__ = ["anchor_metrics", "noise_metrics", "risk_coverage"]


def noise_metrics(
    given: npt.NDArray[Any],
    clean: npt.NDArray[Any],
    new: npt.NDArray[Any],
    flagged: npt.NDArray[np.bool_],
    p_wrong: npt.NDArray[Any],
) -> dict[str, float]:
    """Judge a noise list by clean labels.

    Parameters
    ----------
    given : array (N,)
        Given labels.
    clean : array (N,)
        Right labels; -1 = out of set, -2 = not known (left out).
    new : array (N,)
        Labels after correction, -1 = dropped.
    flagged : array (N,) bool
        On the list.
    p_wrong : array (N,)
        Probability that the given label is wrong.

    Returns
    -------
    dict
        `n`, `flagged` (share), `precision`, `recall`, `f1`, `average_precision`, `calibration_error`, `rate_given` and
        `rate_cleaned` (share of wrong labels before, and after among those that stay), `corrected_accuracy` (of changed
        labels), `off_topic_precision`, `off_topic_recall`. NaN where there is nothing to count.

    Examples
    --------
    >>> m = noise_metrics(np.array([0, 0, 1, 1]), np.array([0, 1, 1, -1]), np.array([0, 1, 1, -1]),
    ...                   np.array([False, True, False, True]), np.array([0.1, 0.9, 0.2, 0.8]))
    >>> m["precision"], m["recall"], m["rate_given"], m["rate_cleaned"]
    (1.0, 1.0, 0.5, 0.0)
    """
    from sklearn.metrics import average_precision_score

    known = clean != -2
    given, clean, new, flagged, p_wrong = (a[known] for a in (given, clean, new, flagged, p_wrong))
    wrong = given != clean
    stays, changed, dropped, outside = new >= 0, (new >= 0) & (new != given), new < 0, clean == -1
    precision, recall = _share(wrong[flagged]), _share(flagged[wrong])
    return {
        "n": float(len(given)),
        "flagged": _share(flagged),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / max(precision + recall, 1e-12),
        "average_precision": float(average_precision_score(wrong, p_wrong)) if wrong.any() else float("nan"),
        "calibration_error": calibration_error(wrong, p_wrong),
        "rate_given": _share(wrong),
        "rate_cleaned": _share((new != clean)[stays]),
        "corrected_accuracy": _share((new == clean)[changed]),
        "off_topic_precision": _share(outside[dropped]),
        "off_topic_recall": _share(dropped[outside]),
    }


def anchor_metrics(
    given: npt.NDArray[Any], clean: npt.NDArray[Any], anchors: npt.NDArray[np.bool_]
) -> dict[str, float]:
    """How many pictures are trusted, and how many of their labels are right.

    Parameters
    ----------
    given, clean : array (N,)
        As in `noise_metrics`.
    anchors : array (N,) bool

    Returns
    -------
    dict
        `count`, and `precision` among those whose right label is known: NaN if there is none.

    Examples
    --------
    >>> anchor_metrics(np.array([0, 1, 1]), np.array([0, 0, -2]), np.array([True, True, True]))
    {'count': 3, 'precision': 0.5}
    """
    return {"count": int(anchors.sum()), "precision": _share((given == clean)[anchors & (clean != -2)])}


def risk_coverage(
    p_wrong: npt.NDArray[Any], wrong: npt.NDArray[Any] | None = None
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """How clean the labels are after a person has looked at the most suspicious ones and set them right.

    Parameters
    ----------
    p_wrong : array (N,)
    wrong : array (N,), optional
        Truth; without it the curve is an estimate from `p_wrong` itself.

    Returns
    -------
    looked_at : array (N + 1,)
        Share of images inspected, from 0 to 1.
    clean : array (N + 1,)
        Share of right labels then.

    Examples
    --------
    >>> risk_coverage(np.array([0.1, 0.9]), np.array([False, True]))[1].tolist()
    [0.5, 1.0, 1.0]
    """
    mass = np.asarray(p_wrong if wrong is None else wrong, dtype=np.float64)
    ordered = mass[np.argsort(-np.asarray(p_wrong), kind="stable")]
    left = ordered.sum() - np.concatenate([[0.0], ordered.cumsum()])
    n = len(ordered)
    return np.arange(n + 1) / n, 1 - left.clip(0) / n


def _share(x: npt.NDArray[Any]) -> float:
    return float(x.mean()) if len(x) else float("nan")
