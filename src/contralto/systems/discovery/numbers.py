"""How many classes there are, by training with several numbers of prototypes: approximate.

ProtoGCD (arXiv 2504.03755) chooses the number whose prototypes have the best score, but neither its score nor its search is in
the released code. This is a score of the kind that the paper describes, samples near their prototype and prototypes far from
each other, and the bounded search that is usual in the field. `contralto.neighbors.how_many` needs no training and is the
cheaper choice.

On handwritten digits, of which there are ten classes, the score was best at 8 of the numbers tried (8: 0.746, 10: 0.736, 12:
0.671; one seed, 25 epochs): take the result as a rough guide.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from contralto.errors import UsageError
from contralto.neighbors.how_many import Estimate
from contralto.prototypes.bank import assign
from contralto.systems.discovery.base import Discovered, Floats, Labels

__all__ = ["Trial", "prototype_number", "prototype_score"]


@dataclass(frozen=True)
class Trial:
    """A training with a number of prototypes.

    Attributes
    ----------
    features : array (N, F)
        Of all samples, after it.
    found : Discovered
    """

    features: Floats
    found: Discovered


def prototype_score(features: npt.ArrayLike, prototypes: npt.ArrayLike) -> float:
    """How near samples are to their prototypes, and how far prototypes from one another.

    ``mean_i max_k cos(u_i, mu_k) - mean_k max_{j != k} cos(mu_k, mu_j)``, over prototypes that have at least one sample.

    Parameters
    ----------
    features : array (N, F)
    prototypes : array (K, F)

    Returns
    -------
    float
        From -1 to 2; -1 where all samples are of one prototype.

    Examples
    --------
    >>> prototype_score(np.eye(3), np.eye(3)), prototype_score(np.eye(3), np.eye(3)[[0, 0, 1, 2]])
    (1.0, 1.0)
    """
    u, mu = (torch.from_numpy(np.ascontiguousarray(x, np.float32)) for x in (features, prototypes))
    if u.ndim != 2 or mu.ndim != 2 or u.shape[1] != mu.shape[1] or not len(u):
        raise UsageError(f"features (N, F) and prototypes (K, F) do not fit: {tuple(u.shape)} and {tuple(mu.shape)}")
    labels, near = assign(u, mu)
    used = torch.nn.functional.normalize(mu[labels.unique()], dim=1)
    if len(used) < 2:
        return -1.0
    return float(near.mean()) - float((used @ used.T).fill_diagonal_(-torch.inf).amax(1).mean())


def prototype_number(
    train: Callable[[int, int], Trial],
    labels: Labels,
    *,
    low: int,
    high: int,
    repeats: int = 1,
    seed: int = 0,
    loss: float = 0.01,
) -> Estimate:
    """Train with several numbers of classes and take the one with the best `prototype_score`.

    A number at which more labelled samples go wrong than at the best one tried, by more than `loss`, is not taken. The
    interval is that of the repetitions; with one, there is none.

    Parameters
    ----------
    train : function
        Number of all classes and a seed -> `Trial`.
    labels : array (N,)
        -1 = unlabelled.
    low, high : int
        Bounds of the number, which counts old and new classes.
    repeats : int
        Searches, each with a seed of its own.
    seed : int
    loss : float
        Of accuracy on labelled samples, as a share.

    Returns
    -------
    Estimate
        `tried` holds the mean score of every number.

    Raises
    ------
    UsageError
        If the bounds leave no number.

    Examples
    --------
    >>> x, y = np.eye(6)[np.arange(60) % 6], np.where(np.arange(60) % 6 < 2, np.arange(60) % 6, -1)
    >>> def train(k, seed):  # prototypes that are right but for the number
    ...     mu = np.concatenate([np.eye(6), np.eye(6)[::-1] + 0.5])[:k]
    ...     return Trial(x, Discovered((x @ mu.T).argmax(1), np.ones(60), mu, 0.1, [k]))
    >>> prototype_number(train, y, low=2, high=12).number
    6
    """
    from scipy.optimize import minimize_scalar

    if not 2 <= low <= high or repeats < 1:
        raise UsageError(f"2 <= low <= high and repeats >= 1 must hold, got {low}, {high} and {repeats}")
    known, numbers, scores = np.asarray(labels) >= 0, [], []
    for turn in range(repeats):
        tried: dict[int, tuple[float, float]] = {}

        def poor(number: float, turn: int = turn, tried: dict[int, tuple[float, float]] = tried) -> float:
            k = round(number)
            if k not in tried:
                trial = train(k, seed + turn)
                right = (trial.found.assigned[known] == labels[known]).mean() if known.any() else 1.0
                tried[k] = prototype_score(trial.features, trial.found.prototypes), float(right)
            return -tried[k][0]

        minimize_scalar(poor, bounds=(low, high), method="bounded", options={"xatol": 0.5, "maxiter": 20})
        enough = max(right for _, right in tried.values()) - loss
        numbers.append(max((score, -k) for k, (score, right) in tried.items() if right >= enough)[1] * -1)
        scores.append(tried)
    every = sorted({k for tried in scores for k in tried})
    mean = {k: float(np.mean([tried[k][0] for tried in scores if k in tried])) for k in every}
    lower, middle, upper = np.percentile(numbers, [10, 50, 90])
    return Estimate(round(middle), int(np.floor(lower)), int(np.ceil(upper)), mean)
