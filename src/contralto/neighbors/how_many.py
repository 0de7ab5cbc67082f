"""How many classes there are, if some rows of some classes are labelled: three ways, each with its uncertainty.

*search*, the usual baseline of category discovery: half of the labelled classes lose their labels, rows are clustered into K
clusters with the labels that are left, and K is the one that recovers the hidden classes best (Brent's bounded search).
*whole*, where there are too few classes to hide some: no label is told, and K is the number of clusters at which labelled
classes lie in clusters of their own best. *split*: a Gaussian mixture with splits and merges (GPC), from too many clusters; what
it finds depends on its prior. Each is repeated on half of the rows, drawn anew each time, which gives the interval. (Rows drawn
with replacement would not do: two equal rows are a cluster to a mixture.)
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import linear_sum_assignment, minimize_scalar

from contralto.errors import UsageError
from contralto.neighbors.kmeans import cluster_sums, kmeans, rows_of, semi_supervised_kmeans
from contralto.prototypes.gaussian import fitted_psi, niw_prior, split_and_merge

__all__ = ["Estimate", "estimate_number", "rounds_of_splits", "within_variance"]

Array = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Estimate:
    """A number of classes, all of them: labelled and not.

    Attributes
    ----------
    number : int
        Median of the repetitions.
    low, high : int
        Percentiles 10 and 90 of the repetitions, between which the right number mostly lies (see the page on discovery).
    tried : dict of int to float
        What speaks for each number that was tried: the mean accuracy on hidden classes (search), how well labelled classes lie
        in clusters of their own (whole), or the share of the repetitions that ended there (split).
    """

    number: int
    low: int
    high: int
    tried: dict[int, float]


def estimate_number(
    features: npt.ArrayLike,
    labels: npt.ArrayLike,
    *,
    low: int | None = None,
    high: int | None = None,
    seed: int = 0,
    restarts: int = 3,
    repeats: int = 10,
    method: Literal["search", "whole", "split"] = "search",
    psi: float | None = None,
    max_rows: int = 5000,
    normalize: bool = True,
) -> Estimate:
    """Estimate how many classes there are among rows of which some are labelled.

    Parameters
    ----------
    features : array (N, D)
    labels : array (N,)
        Class of every row, -1 = unknown. "search" takes at least four classes, the others two.
    low, high : int, optional
        Bounds of the number; default: the number of labelled classes C, and 3 C + 20.
    seed : int
    restarts : int
        Of every k-means.
    repeats : int
        Drawings of half of the rows, from which the interval comes.
    method : {"search", "whole", "split"}
    psi : float, optional
        Of "split", see `rounds_of_splits`; default: `contralto.prototypes.gaussian.fitted_psi`.
    max_rows : int
        Rows of a drawing.
    normalize : bool
        Scale rows to length one first.

    Returns
    -------
    Estimate

    Raises
    ------
    UsageError
        If an argument does not fit, or too few classes are labelled.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> truth = rng.integers(6, size=300)
    >>> x = 5 * np.eye(6)[truth] + 0.3 * rng.normal(size=(300, 6))
    >>> labels = np.where((truth < 4) & (rng.random(300) < 0.5), truth, -1)
    >>> estimate_number(x, labels, method="split", repeats=3).number
    6
    """
    data, given = rows_of(features, normalize), np.asarray(labels)
    if given.shape != (len(data),) or given.dtype.kind not in "iu":
        raise UsageError(f"labels must be {len(data)} integers, -1 = unknown; got {given.dtype} of shape {given.shape}")
    if min(restarts, repeats, max_rows) < 1:
        raise UsageError(f"restarts, repeats and max_rows must be at least 1, got {restarts}, {repeats} and {max_rows}")
    classes = len(np.unique(given[given >= 0]))
    needed = {"search": 4, "whole": 2, "split": 1 if psi else 2}
    if method not in needed:
        raise UsageError(f"method must be search, whole or split, got {method!r}")
    if classes < needed[method]:
        raise UsageError(f"method={method!r} needs at least {needed[method]} labelled classes, got {classes}")
    low = classes if low is None else low
    high = 3 * classes + 20 if high is None else high
    if not classes <= low <= high:
        raise UsageError(f"low must be at least the number of labelled classes, {classes}, and high at least low")
    if psi is None and method == "split":
        numbered = np.where(given >= 0, np.searchsorted(np.unique(given[given >= 0]), given), -1)
        psi = fitted_psi(torch.from_numpy(data), torch.from_numpy(numbered), seed=seed)
    found, scores = [], []
    for repeat in range(repeats):
        rng = np.random.default_rng([seed, repeat])
        rows = _drawn(given, max_rows, rng)
        bounds = low, max(low, min(high, int((given[rows] < 0).sum())))
        if method == "search":
            number, tried = _search(data[rows], given[rows], *bounds, restarts, rng)
        elif method == "whole":
            number, tried = _whole(data[rows], given[rows], *bounds, restarts, rng)
        else:
            number, tried = _split(data[rows], given[rows], *bounds, restarts, psi or 0.0, rng)
        found.append(number)
        scores.append(tried)
    mean = {k: float(np.mean([s[k] for s in scores if k in s])) for k in sorted({k for s in scores for k in s})}
    if method == "split":
        mean = {k: sum(s.get(k, 0.0) for s in scores) / repeats for k in mean}
    lower, middle, upper = np.percentile(found, [10, 50, 90])
    return Estimate(round(middle), int(np.floor(lower)), int(np.ceil(upper)), mean)


def rounds_of_splits(
    features: npt.ArrayLike,
    labels: npt.ArrayLike,
    start: int,
    *,
    psi: float = 0.005,
    rounds: int = 20,
    coin: float = 0.0,
    alpha: float = 1.0,
    smallest: int = 5,
    seed: int = 0,
    restarts: int = 3,
    normalize: bool = True,
) -> list[int]:
    """Number of clusters after every round of k-means, splits and merges, until nothing is split or merged.

    Parameters
    ----------
    features : array (N, D)
    labels : array (N,)
        Class of every row, -1 = unknown.
    start : int
        Clusters to begin with, rather too many: of too few, one of a labelled class may hold new ones, and is never split.
    psi : float
        Of the prior, see `niw_prior`; 0 takes `within_variance`. The larger, the more clusters.
    rounds : int
        At most.
    coin, alpha, smallest
        See `contralto.prototypes.gaussian.split_and_merge`.
    seed, restarts, normalize
        As in `semi_supervised_kmeans`.

    Returns
    -------
    list of int
        The first is `start`, the last the number that was found.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> x = 5 * np.eye(6)[np.arange(300) % 6] + 0.3 * rng.normal(size=(300, 6))
    >>> rounds_of_splits(x, np.where(np.arange(300) % 6 < 3, np.arange(300) % 6, -1), 10)[-1]
    6
    """
    data, given = rows_of(features, normalize), np.asarray(labels)
    known = given >= 0
    fixed = np.full(len(given), -1, np.int64)
    fixed[known] = np.unique(given[known], return_inverse=True)[1]
    x = torch.from_numpy(data)
    prior = niw_prior(x, psi=psi or within_variance(data, given))
    generator = torch.Generator().manual_seed(seed)
    numbers = [start]
    for turn in range(rounds):
        found = semi_supervised_kmeans(data, fixed, numbers[-1], seed=seed + turn, restarts=restarts, normalize=False)
        after = split_and_merge(
            x, torch.from_numpy(found.labels), numbers[-1], prior, generator=generator, fixed=torch.from_numpy(fixed),
            coin=coin, alpha=alpha, smallest=smallest,
        )  # fmt: skip
        numbers.append(len(after.centres))
        if not after.splits and not after.merges:
            break
    return numbers


def within_variance(features: npt.ArrayLike, labels: npt.ArrayLike) -> float:
    """Mean variance of a feature within the labelled classes, what `niw_prior` takes as Psi.

    Examples
    --------
    >>> within_variance([[0.0], [2.0], [5.0]], [0, 0, -1])
    1.0
    """
    data, given = np.asarray(features, np.float32), np.asarray(labels)
    data, given = data[given >= 0], given[given >= 0]
    if not len(data):
        raise UsageError("no row is labelled, so the variance within classes is not known: say psi")
    of_class = np.unique(given, return_inverse=True)[1]
    k = int(of_class.max()) + 1
    mean = cluster_sums(data, of_class, k) / np.bincount(of_class, minlength=k)[:, None]
    variance = float(((data - mean[of_class]) ** 2).mean())
    return max(variance, 1e-8)


def _drawn(labels: Labels, max_rows: int, rng: np.random.Generator) -> Labels:
    """Half of the rows, and one of every labelled class that is not among them."""
    n = len(labels)
    rows = rng.permutation(n)[: min(-(-n // 2), max_rows)]
    missing = np.setdiff1d(labels[labels >= 0], labels[rows])
    extra = [rng.choice(np.flatnonzero(labels == c)) for c in missing]
    return np.concatenate([rows, np.asarray(extra, np.int64)])


def _search(
    data: Array, labels: Labels, low: int, high: int, restarts: int, rng: np.random.Generator
) -> tuple[int, dict[int, float]]:
    """The number of clusters that recovers hidden classes best, and the accuracy of all that were tried."""
    classes = rng.permutation(np.unique(labels[labels >= 0]))
    hidden = np.isin(labels, classes[len(classes) // 2 :])
    shown = np.where(hidden, -1, labels)
    seed, tried = int(rng.integers(2**31)), {}

    def wrong(number: float) -> float:
        k = round(number)
        if k not in tried:
            found = semi_supervised_kmeans(data, shown, k, seed=seed, restarts=restarts, normalize=False)
            tried[k] = _accuracy(labels[hidden], found.labels[hidden])
        return -tried[k]

    minimize_scalar(wrong, bounds=(low, high), method="bounded", options={"xatol": 0.5, "maxiter": 20})
    best = max(tried.values())
    return min(k for k, v in tried.items() if v == best), tried


def _whole(
    data: Array, labels: Labels, low: int, high: int, restarts: int, rng: np.random.Generator
) -> tuple[int, dict[int, float]]:
    """The number of clusters at which labelled classes are clusters, and their mean F-measure at numbers a tenth apart.

    Of numbers within half a percent the largest is taken: too few clusters mix classes without labels, which no label tells.
    """
    known, k = labels >= 0, low
    classes = np.unique(labels[known], return_inverse=True)[1]
    size, tried = np.bincount(classes), dict[int, float]()
    while k <= high:
        seed = int(rng.integers(2**31))
        found = kmeans(data, k, seed=seed, iterations=50, restarts=restarts, normalize=False).labels[known]
        share = np.zeros((len(size), k))
        np.add.at(share, (classes, found), 1 / size[classes])  # every class counts as one, whatever its size
        tried[k] = float((2 * share / (1 + share.sum(0))).max(1).mean())
        k = max(k + 1, round(1.1 * k))
    best = max(tried.values())
    return max(k for k, v in tried.items() if v >= best - 0.005), tried


def _split(
    data: Array, labels: Labels, low: int, high: int, restarts: int, psi: float, rng: np.random.Generator
) -> tuple[int, dict[int, float]]:
    start, seed = int(rng.integers((low + high) // 2, high + 1)), int(rng.integers(2**31))
    numbers = rounds_of_splits(data, labels, start, psi=psi, seed=seed, restarts=restarts, normalize=False)
    number = min(max(numbers[-1], low), high)
    return number, {number: 1.0}


def _accuracy(truth: Labels, found: Labels) -> float:
    """Share of rows that are right under the best matching of clusters to classes."""
    _, a = np.unique(truth, return_inverse=True)
    _, b = np.unique(found, return_inverse=True)
    table = np.zeros((a.max() + 1, b.max() + 1), np.int64)
    np.add.at(table, (a, b), 1)
    return float(table[linear_sum_assignment(table, maximize=True)].sum() / len(truth))
