"""Label correction: one rule engine. The order of the rules is part of the method; anchors override all."""

from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from contralto.errors import UsageError

__all__ = ["Correction", "Verdict", "correct_labels", "flagged", "probability_wrong"]


class Verdict(IntEnum):
    """What is said about a given label."""

    KEPT = 0
    CORRECTED = 1
    OFF_TOPIC = 2
    ANCHOR = 3

    @property
    def word(self) -> str:
        """As it stands in tables: "kept", "corrected", "off-topic", "anchor"."""
        return self.name.lower().replace("_", "-")


def flagged(words: Sequence[str]) -> npt.NDArray[np.bool_]:
    """Which verdicts, as they stand in tables, say that the given label is wrong.

    Examples
    --------
    >>> flagged(["kept", "corrected", "off-topic", "anchor"]).tolist()
    [False, True, True, False]
    """
    return np.isin(words, [Verdict.CORRECTED.word, Verdict.OFF_TOPIC.word])


class Correction(NamedTuple):
    """Result of `correct_labels`: `labels` (N,) and `verdict` (N,) in the numbers of `Verdict`."""

    labels: Tensor
    verdict: Tensor

    @property
    def kept(self) -> Tensor:
        """Samples that go on learning (N,), everything but off-topic."""
        return self.verdict != Verdict.OFF_TOPIC


def correct_labels(
    scores: Tensor,
    labels: Tensor,
    anchors: Tensor,
    *,
    threshold: float,
    keep_threshold: float | None = None,
    strict: bool = False,
) -> Correction:
    """Keep, correct or drop every label by a fused score (CAPro 5.6 and, with `strict`, FoPro 6, in their order).

    1. An anchor keeps its label. 2. Else, if the best class scores at least `threshold`, the label becomes that class.
    3. Else, if the given class scores at least `keep_threshold`, it is kept. 4. Else the sample is off-topic.

    Parameters
    ----------
    scores : Tensor (N, C)
        r, in [0, 1].
    labels : Tensor (N,)
        Given labels in [0, C).
    anchors : Tensor (N,) bool
    threshold : float
        gamma; above 1 switches correction off.
    keep_threshold : float, optional
        Default: 1/C, the paper's.
    strict : bool
        A score must be above a threshold (FoPro), not only reach it (CAPro).

    Returns
    -------
    Correction
        Off-topic samples keep their given label in `labels`; `kept` leaves them out.

    Examples
    --------
    >>> r = torch.tensor([[0.9, 0.1, 0.0], [0.2, 0.4, 0.4], [0.5, 0.0, 0.5], [1.0, 0.0, 0.0]])
    >>> given = torch.tensor([1, 1, 1, 1])
    >>> result = correct_labels(r, given, torch.tensor([False, False, False, True]), threshold=0.6)
    >>> result.labels.tolist(), [Verdict(int(v)).name for v in result.verdict]
    ([0, 1, 1, 1], ['CORRECTED', 'KEPT', 'OFF_TOPIC', 'ANCHOR'])
    """
    if scores.ndim != 2 or labels.shape != scores.shape[:1] or anchors.shape != labels.shape:
        raise UsageError(
            f"scores (N, C), labels (N,) and anchors (N,) do not fit: {tuple(scores.shape)}, {tuple(labels.shape)}, "
            f"{tuple(anchors.shape)}"
        )
    keep_threshold = 1 / scores.shape[1] if keep_threshold is None else keep_threshold
    best, arg = scores.max(1)
    given = scores.gather(1, labels.unsqueeze(1)).squeeze(1)
    above = torch.gt if strict else torch.ge
    confident = above(best, threshold) & ~anchors
    new = torch.where(confident, arg, labels)
    verdict = torch.full_like(labels, int(Verdict.OFF_TOPIC))
    verdict[above(given, keep_threshold)] = int(Verdict.KEPT)
    verdict[confident] = int(Verdict.CORRECTED)
    verdict[confident & (arg == labels)] = int(Verdict.KEPT)
    verdict[anchors] = int(Verdict.ANCHOR)
    return Correction(new, verdict)


def probability_wrong(given: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Probability that each given label is wrong, estimated without any clean label.

    The mean of two estimates that err in opposite directions: one minus the fused score of the given class, which is too
    sure of itself where classes are alike, and the posterior of the lower part of a mixture of two normals fitted to the
    logit of that score, which is too timid where few labels are wrong. Made monotone in the score, and tilted a little where
    it then is level, so that a list sorted by it keeps the order of the score.

    Parameters
    ----------
    given : array (N,)
        Fused score of the given class of every sample, in [0, 1].

    Returns
    -------
    array (N,) in [0, 1]

    Examples
    --------
    >>> p = probability_wrong([0.9] * 20 + [0.1] * 20)
    >>> bool(p[0] < 0.2), bool(p[-1] > 0.8)
    (True, True)
    """
    from sklearn.mixture import GaussianMixture

    score = np.asarray(given, dtype=np.float64).clip(1e-4, 1 - 1e-4)
    if len(np.unique(score)) < 2:
        return 1 - score
    logit = np.log(score / (1 - score))[:, None]
    mixture = GaussianMixture(2, means_init=np.quantile(logit, [0.1, 0.9])[:, None], random_state=0).fit(logit)
    posterior = mixture.predict_proba(logit)[:, int(np.argmin(mixture.means_))]
    mean = (1 - score + posterior) / 2
    order = np.argsort(score, kind="stable")
    mean[order] = np.minimum.accumulate(mean[order])
    return np.asarray(0.999 * mean + 0.001 * (1 - score))
