"""What the measurements of paired arms say about a claim: differences, their intervals, and a verdict by a fixed rule."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import stats

from contralto.claims.plan import ENOUGH_SEEDS, Claim, Comparison
from contralto.errors import ContraltoError, UsageError
from contralto.evaluation.classification import Interval, paired_interval

__all__ = [
    "FEWEST_SEEDS",
    "RULE",
    "check_measured",
    "judge",
    "mean_of",
    "seeds_interval",
    "verdict_of_bound",
    "verdict_of_difference",
]

Array = npt.NDArray[Any]
Found = Mapping[str, Sequence[Mapping[str, Array]]]  # arm -> measurements by seed

FEWEST_SEEDS = 3
_RULE = """
A difference (method minus baseline on the same seed, turned so that positive supports the claim): reproduced if its 95 %
interval lies above 0 (above `smallest`, where that is below 0) and its mean is at least `smallest`; not reproduced if the
interval lies below `smallest`; else inconclusive. A bound: reproduced if it holds in every seed; not reproduced if the
mean breaks it; else inconclusive. Intervals are percentile bootstraps over seeds and groups of test samples; where an arm
has one number per seed, over seeds alone, with the level expanded for their small number (Hesterberg 2015, The American
Statistician 69, 371-386). What is not a finite number is inconclusive. On fewer than 3 seeds nothing is reproduced; on
fewer than 5 the verdict says on how many. The claim: the verdict of its first comparison with a gate; or, where it says
`verdict: all`, reproduced if all with a gate are, not reproduced if one is not, else inconclusive.
"""
RULE = {"version": 1, "text": " ".join(_RULE.split())}
"""How verdicts come about, kept with every result. A change of the rule is a new version."""


def judge(claim: Claim, found: Found, seeds: Sequence[int]) -> dict[str, Any]:
    """Arms, comparisons and verdict on one data set.

    Parameters
    ----------
    claim : Claim
    found : mapping of str to sequence of mapping
        Arm -> measurements of every seed, in the order of `seeds`.
    seeds : sequence of int

    Returns
    -------
    dict
        `arms` with mean, standard deviation and value by seed of everything that is measured or compared; `comparisons` with
        `value`, `low`, `high`, `seeds` and `verdict`; `verdict`, and `test_samples` where there are arrays.

    Raises
    ------
    DataError
        A comparison names what was not measured.
    ContraltoError
        Arms of one seed were not tested on the same samples.
    """
    for arm, runs in found.items():
        for measured in runs:
            check_measured(claim, arm, measured)
    _check_pairs(found, seeds)
    compared = [_compare(c, found, seeds) for c in claim.comparisons]
    gated = [compared[i]["bare"] for i in claim.deciding()]
    verdict = next((v for v in ("not reproduced", "inconclusive") if v in gated), "reproduced")
    result: dict[str, Any] = {"verdict": _marked(verdict, len(seeds))}
    sizes = sorted({len(a) for runs in found.values() for m in runs for a in m.values() if a.ndim})
    if sizes:
        result["test_samples"] = sizes[0] if len(sizes) == 1 else sizes
    result["arms"] = {
        arm: {"settings": dict(claim.arms[arm]), "metrics": _summary(claim, runs)} for arm, runs in found.items()
    }
    result["comparisons"] = [{k: v for k, v in c.items() if k != "bare"} for c in compared]
    return result


def check_measured(claim: Claim, arm: str, measured: Mapping[str, Array]) -> None:
    """Whether an arm measured what the comparisons that name it look at.

    Raises
    ------
    DataError
        Names the claim's file and the key.
    """
    for i, c in enumerate(claim.comparisons):
        wanted = {"metric": c.metric, "part": c.part, "macro": "labels" if c.macro else None}
        for key, name in wanted.items() if arm in (*c.method, *c.baseline) else ():
            if name is not None and name not in measured:
                told = f"{name!r} is not among the measurements of arm {arm!r}; there are: {', '.join(measured)}"
                raise claim.wrong(f"comparisons[{i}].{key}", told)
            if name is not None and (c.macro or c.part) and not measured[name].ndim:
                told = f"{name!r} of arm {arm!r} is one number, not an array over test samples"
                raise claim.wrong(f"comparisons[{i}].{key}", told)


def seeds_interval(values: Sequence[float], *, level: float = 0.95, resamples: int = 10_000) -> Interval:
    """Mean of one number per seed with a bootstrap interval; the level is expanded, as few seeds make the plain one too narrow.

    Examples
    --------
    >>> seeds_interval([1.0, 1.0, 1.0])
    Interval(value=1.0, low=1.0, high=1.0)
    >>> seeds_interval([1.0]).low
    nan
    """
    x = np.asarray(values, float)
    n = len(x)
    if n < 2 or not np.isfinite(x).all():
        return Interval(float(x.mean()), np.nan, np.nan)
    means = x[np.random.default_rng(0).integers(0, n, (resamples, n))].mean(1)
    tail = float(stats.norm.cdf(np.sqrt(n / (n - 1)) * stats.t.ppf((1 - level) / 2, n - 1)))
    low, high = np.quantile(means, [tail, 1 - tail])
    return Interval(float(x.mean()), float(low), float(high))


def verdict_of_difference(effect: Interval, smallest: float = 0.0) -> str:
    """The rule for a difference.

    Examples
    --------
    >>> verdict_of_difference(Interval(0.02, 0.01, 0.03), smallest=0.015)
    'reproduced'
    """
    if not np.isfinite(effect).all():
        return "inconclusive"
    if effect.low > min(smallest, 0.0) and effect.value >= smallest:
        return "reproduced"
    return "not reproduced" if effect.high < smallest else "inconclusive"


def verdict_of_bound(values: Sequence[float], above: float | None, below: float | None) -> str:
    """The rule for a bound.

    Examples
    --------
    >>> verdict_of_bound([40.0, 31.0], above=30, below=None)
    'reproduced'
    """
    low, high = -np.inf if above is None else above, np.inf if below is None else below
    if not np.isfinite(values).all():
        return "inconclusive"
    if all(low < v < high for v in values):
        return "reproduced"
    return "inconclusive" if low < np.mean(values) < high else "not reproduced"


def mean_of(runs: Sequence[Mapping[str, Array]], metric: str, *, macro: bool = False) -> float:
    """Mean of a measurement over seeds.

    Examples
    --------
    >>> mean_of([{"right": np.array([1, 1, 0]), "labels": np.array([0, 0, 1])}], "right", macro=True)
    0.5
    """
    if metric not in runs[0]:
        raise UsageError(f"{metric!r} is not among the measurements; there are: {', '.join(runs[0])}")
    c = Comparison(("",), metric, macro=macro)
    return float(np.mean(_effect(c, [np.asarray(m[metric], float) for m in runs], runs)[1]))


def _compare(c: Comparison, found: Found, seeds: Sequence[int]) -> dict[str, Any]:
    sign = -1.0 if c.direction == "lower" else 1.0
    scores = [sign * _difference(c, found, s) for s in range(len(seeds))]
    effect, by_seed, over = _effect(c, scores, found[c.method[0]])
    if c.baseline:
        bare = verdict_of_difference(effect, c.smallest)
        rule: dict[str, Any] = {"direction": c.direction, "smallest": c.smallest}
    else:
        bare = verdict_of_bound(by_seed, c.above, c.below)
        rule = {k: v for k, v in (("above", c.above), ("below", c.below)) if v is not None}
    bare = "inconclusive" if bare == "reproduced" and len(seeds) < FEWEST_SEEDS else bare
    compared = {
        "method": _told(c.method), "baseline": _told(c.baseline), "metric": c.metric, "macro": c.macro, "part": c.part, **rule,
        "gate": c.gate, **effect._asdict(), "seeds": by_seed, "interval_over": over, "share": _is_share(c, found),
        "verdict": _marked(bare, len(seeds)), "bare": bare,
    }  # fmt: skip
    broken = [s for s, v in zip(seeds, by_seed, strict=True) if not np.isfinite(v)]
    if broken:
        compared["not_finite"] = f"no finite number on seeds {', '.join(map(str, broken))}"
    return compared


def _told(arms: Sequence[str]) -> str | None:
    return " - ".join(arms) or None


def _marked(verdict: str, seeds: int) -> str:
    return verdict if seeds >= ENOUGH_SEEDS else f"{verdict} (on {seeds} seed{'s' if seeds > 1 else ''})"


def _difference(c: Comparison, found: Found, s: int) -> Array:
    def gain(arms: Sequence[str]) -> Array:
        values = [np.asarray(found[arm][s][c.metric], float) for arm in arms]
        return values[0] - values[1] if len(values) == 2 else values[0]

    return gain(c.method) - gain(c.baseline) if c.baseline else gain(c.method)


def _effect(
    c: Comparison, scores: Sequence[Array], measured: Sequence[Mapping[str, Array]]
) -> tuple[Interval, list[float], str]:
    """Mean and interval, value by seed, and what the interval is over."""
    if not scores[0].ndim:
        values = [float(v) for v in scores]
        return seeds_interval(values), values, "seeds"
    inside = [m[c.part].astype(bool) if c.part else np.ones(len(m[c.metric]), bool) for m in measured]
    if c.macro:
        inside = [keep & (m["labels"] >= 0) for keep, m in zip(inside, measured, strict=True)]
    scores = [v[keep] for v, keep in zip(scores, inside, strict=True)]

    def within(name: str) -> list[Array]:
        return [m[name][keep] for m, keep in zip(measured, inside, strict=True)]

    labels = within("labels") if c.macro else None
    groups = within("groups") if "groups" in measured[0] else None
    values = [_mean(v, labels[s] if labels else None) for s, v in enumerate(scores)]
    over = "seeds and groups of test samples" if groups else "seeds and test samples"
    if not np.isfinite(values).all():
        return Interval(float(np.mean(values)), np.nan, np.nan), values, over
    return paired_interval(scores, labels=labels, groups=groups), values, over


def _mean(values: Array, labels: Array | None) -> float:
    if labels is None:
        return float(np.mean(values)) if len(values) else np.nan
    return float(np.mean([values[labels == k].mean() for k in np.unique(labels)])) if len(values) else np.nan


def _is_share(c: Comparison, found: Found) -> bool:
    """Whether the metric is right or wrong by sample, so that its mean is a share and told in points."""
    return all(
        m[c.metric].ndim and np.isin(m[c.metric], (0, 1)).all() for a in (*c.method, *c.baseline) for m in found[a]
    )


def _summary(claim: Claim, runs: Sequence[Mapping[str, Array]]) -> dict[str, Any]:
    """Mean, standard deviation and value by seed of every measurement, and of every way in which comparisons look at one."""
    parts = {c.part for c in claim.comparisons}
    values = {
        name: [float(np.mean(m[name], dtype=float)) for m in runs]
        for name in runs[0]
        if name not in (*Comparison.RESERVED, *parts) and all(name in m for m in runs)
    }
    for c in claim.comparisons:
        if (c.macro or c.part) and c.metric in runs[0]:
            values[c.measure] = _effect(c, [np.asarray(m[c.metric], float) for m in runs], runs)[1]
    return {
        name: {"mean": float(np.mean(v)), "sd": float(np.std(v, ddof=1)) if len(v) > 1 else None, "seeds": v}
        for name, v in values.items()
    }


def _check_pairs(found: Found, seeds: Sequence[int]) -> None:
    first, *others = found
    for s, seed in enumerate(seeds):
        for arm in others:
            a, b = found[first][s], found[arm][s]
            same = all(np.array_equal(a[n], b[n]) for n in Comparison.RESERVED if n in a and n in b)
            lengths = {len(x) for m in (a, b) for x in m.values() if x.ndim}
            shapes = all(a[n].ndim == b[n].ndim for n in a if n in b)
            if not same or len(lengths) > 1 or not shapes:
                raise ContraltoError(
                    f"arms {first!r} and {arm!r} of seed {seed} were not tested on the same samples, which arms of a seed share"
                )
