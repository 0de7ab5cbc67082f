"""How well numbers are told: errors, correlations, common and rare numbers apart, with intervals; and linear probes."""

from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import stats

from contralto.errors import UsageError
from contralto.evaluation.classification import Interval, group_numbers

__all__ = ["Probe", "fit_probe", "paired_errors", "regression_scores", "shots"]

Array = npt.NDArray[Any]
FLOOR = 1e-10
"""The geometric mean of errors takes none below this: one exact answer would make it 0."""


class Probe(NamedTuple):
    """A linear function of features: ``features @ weight + bias``."""

    weight: npt.NDArray[np.float64]
    bias: float

    def tell(self, features: Array) -> npt.NDArray[np.float64]:
        """Numbers (N,) of features (N, D)."""
        return np.asarray(features @ self.weight + self.bias, np.float64)


def fit_probe(features: Array, numbers: Array, *, kind: Literal["ridge", "l1"] = "ridge", seed: int = 0) -> Probe:
    """A linear probe on standardised, frozen features.

    Parameters
    ----------
    features : array (N, D)
    numbers : array (N,)
    kind : {"ridge", "l1"}
        Least squares with a penalty that leave-one-out errors choose; or least absolute error by averaged stochastic gradient, as
        the papers train theirs.
    seed : int
        Of the order in which "l1" sees the samples.

    Examples
    --------
    >>> x = np.random.default_rng(0).normal(size=(50, 3))
    >>> probe = fit_probe(x, x @ [1.0, 2.0, 0.0] + 5)
    >>> probe.weight.round(2).tolist(), round(probe.bias, 2)
    ([1.0, 2.0, 0.0], 5.0)
    """
    x, y = np.asarray(features, np.float64), np.asarray(numbers, np.float64)
    if x.ndim != 2 or y.shape != x.shape[:1] or len(y) < 2:
        raise UsageError(
            f"a probe needs features (N, D) and numbers (N,), at least two of them; got {x.shape} and {y.shape}"
        )
    if kind not in ("ridge", "l1"):
        raise UsageError(f'kind must be "ridge" or "l1", got {kind!r}')
    center, spread = x.mean(0), x.std(0)
    spread = np.where(spread > 1e-12, spread, 1.0)
    middle, width = y.mean(), y.std() or 1.0
    unit, wanted = (x - center) / spread, (y - middle) / width
    if kind == "ridge":
        from sklearn.linear_model import RidgeCV

        found = RidgeCV(alphas=np.logspace(-4, 4, 17)).fit(unit, wanted)
        weight, bias = found.coef_, float(found.intercept_)
    else:
        from sklearn.linear_model import SGDRegressor

        found = SGDRegressor(
            loss="epsilon_insensitive",
            epsilon=0.0,
            alpha=1e-5,
            average=True,
            max_iter=1000,
            tol=1e-5,
            random_state=seed,
        ).fit(unit, wanted)
        weight, bias = found.coef_, float(found.intercept_[0])
    scaled = width * weight / spread
    return Probe(scaled, float(width * bias + middle - center @ scaled))


def regression_scores(
    truth: Array,
    told: Array,
    *,
    learnt: Array | None = None,
    bin: float = 1.0,  # noqa: A002 (the word of the field)
    groups: Array | None = None,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Interval]:
    """Errors and correlations with percentile intervals of a bootstrap over samples, or over groups of them.

    Parameters
    ----------
    truth, told : array (N,)
    learnt : array (M,), optional
        The numbers of the training part: errors of many, medium and few `shots` are then told apart.
    bin : float
        Width in which numbers count as the same for that.
    groups : array (N,), optional
        Samples of one group are drawn together; "" and None stand alone.
    level, resamples, seed
        Of the intervals.

    Returns
    -------
    dict
        `mae`, `rmse`, `gm` (geometric mean of absolute errors), `pearson`, `spearman` (NaN where all are the same), and
        `mae, many`, `mae, medium`, `mae, few` where there are such samples.

    Raises
    ------
    UsageError
        If shapes do not fit, or a value is no number.

    Examples
    --------
    >>> y = np.arange(10.0)
    >>> found = regression_scores(y, y + np.tile([1.0, -1.0], 5))
    >>> found["mae"].value, found["gm"].value, round(found["spearman"].value, 3)
    (1.0, 1.0, 0.939)
    """
    y, t = np.asarray(truth, np.float64), np.asarray(told, np.float64)
    if y.ndim != 1 or y.shape != t.shape or not len(y):
        raise UsageError(f"truth and told must be of one shape (N,), N above 0; got {y.shape} and {t.shape}")
    if not (np.isfinite(y).all() and np.isfinite(t).all()):
        raise UsageError("truth and told must be numbers, and some are NaN or infinite")
    error, rank_y, rank_t = np.abs(y - t), stats.rankdata(y), stats.rankdata(t)
    group = group_numbers(len(y), groups)
    count = int(group.max()) + 1
    rng = np.random.default_rng(seed)
    weights = np.concatenate(  # how often every sample is in a resample: the sample itself comes first
        [np.ones((1, len(y))), rng.multinomial(count, np.full(count, 1 / count), size=resamples)[:, group]]
    ).astype(np.float64)
    values = {
        "mae": _mean(weights, error),
        "rmse": np.sqrt(_mean(weights, error**2)),
        "gm": np.exp(_mean(weights, np.log(np.maximum(error, FLOOR)))),
        "pearson": _correlation(weights, y, t),
        "spearman": _correlation(weights, rank_y, rank_t),  # ranks of all samples, in resamples too
    }
    if learnt is not None:
        kind = shots(y, learnt, bin=bin)
        for name in ("many", "medium", "few"):
            if (kind == name).any():
                values[f"mae, {name}"] = _mean(weights * (kind == name), error)
    return {name: _interval(found, level) for name, found in values.items()}


def _interval(found: Array, level: float) -> Interval:
    """The value that comes first, between the quantiles of the others; what was not defined in a resample is left out."""
    drawn, tail = found[1:][np.isfinite(found[1:])], (1 - level) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail]) if len(drawn) else (np.nan, np.nan)
    return Interval(float(found[0]), float(low), float(high))


def shots(numbers: Array, learnt: Array, *, bin: float = 1.0, many: int = 100, few: int = 20) -> npt.NDArray[np.str_]:  # noqa: A002
    """Whether a number is one of many (more than 100) in the training part, of few (less than 20), or in between.

    Examples
    --------
    >>> shots(np.array([1.2, 7.0, 9.0]), np.repeat([1.0, 7.0], [101, 20])).tolist()
    ['many', 'medium', 'few']
    """
    if not bin > 0:
        raise UsageError(f"bin is a width above 0, got {bin}")
    known, count = np.unique(np.round(np.asarray(learnt) / bin), return_counts=True)
    places = np.round(np.asarray(numbers) / bin)
    at = np.minimum(np.searchsorted(known, places), len(known) - 1)
    there = np.where(known[at] == places, count[at], 0)
    return np.where(there > many, "many", np.where(there < few, "few", "medium"))


def paired_errors(truth: Array, told: Array, baseline: Array) -> npt.NDArray[np.float64]:
    """Absolute errors of the baseline minus those of what is told (N,): above 0 where it is better.

    Examples
    --------
    >>> paired_errors(np.array([1.0, 2.0]), np.array([1.5, 2.0]), np.array([3.0, 2.0])).tolist()
    [1.5, 0.0]
    """
    return np.asarray(np.abs(truth - baseline) - np.abs(truth - told), np.float64)


def _mean(weights: Array, values: Array) -> Array:
    """Weighted means (S,); NaN where nothing of it was drawn."""
    total = weights.sum(1)
    return np.where(total > 0, weights @ values / np.where(total > 0, total, 1), np.nan)


def _correlation(weights: Array, x: Array, y: Array) -> Array:
    x, y = x - x.mean(), y - y.mean()  # far from 0 the squares would lose what matters
    mx, my = _mean(weights, x), _mean(weights, y)
    covariance = _mean(weights, x * y) - mx * my
    variance = np.maximum(_mean(weights, x**2) - mx**2, 0) * np.maximum(_mean(weights, y**2) - my**2, 0)
    defined = variance > 1e-24 * max(float(np.mean(x**2) * np.mean(y**2)), 1e-300)
    return np.where(defined, covariance / np.sqrt(np.where(defined, variance, 1.0)), np.nan)
