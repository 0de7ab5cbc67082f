"""The rule on differences that are known."""

import numpy as np
import pytest

from contralto.claims.judge import judge, mean_of, seeds_interval, verdict_of_bound, verdict_of_difference
from contralto.claims.plan import load_claim
from contralto.errors import ContraltoError, DataError, UsageError
from contralto.evaluation.classification import Interval, paired_interval

SEEDS = [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("effect", "smallest", "verdict"),
    [
        ((0.3, 0.1, 0.5), 0.0, "reproduced"),
        ((0.3, 0.1, 0.5), 0.3, "reproduced"),
        ((0.3, 0.1, 0.5), 0.31, "inconclusive"),  # above 0, but smaller than what counts
        ((0.3, 0.1, 0.5), 0.6, "not reproduced"),
        ((0.1, -0.1, 0.3), 0.0, "inconclusive"),
        ((0.1, 0.0, 0.3), 0.0, "inconclusive"),
        ((-0.2, -0.3, -0.1), 0.0, "not reproduced"),
        ((0.0, 0.0, 0.0), 0.0, "inconclusive"),
        ((-0.01, -0.015, -0.005), -0.02, "reproduced"),  # no more than two points worse
        ((-0.01, -0.03, 0.01), -0.02, "inconclusive"),
        ((-0.05, -0.06, -0.04), -0.02, "not reproduced"),
        ((np.nan, np.nan, np.nan), 0.0, "inconclusive"),
    ],
)
def test_a_difference_is_judged_by_its_interval_and_its_size(effect, smallest, verdict):
    assert verdict_of_difference(Interval(*effect), smallest) == verdict


@pytest.mark.parametrize(
    ("values", "above", "below", "verdict"),
    [
        ([3, 4, 5], 2, None, "reproduced"),
        ([1, 4, 5], 2, None, "inconclusive"),
        ([1, 1, 3], 2, None, "not reproduced"),
        ([3, 4, 5], 2, 6, "reproduced"),
        ([3, 4, 7], 2, 6, "inconclusive"),
        ([3, 4, 5], None, 3, "not reproduced"),
        ([3, np.nan, 5], 2, None, "inconclusive"),
    ],
)
def test_a_bound_must_hold_in_every_seed(values, above, below, verdict):
    assert verdict_of_bound(values, above, below) == verdict


def test_the_interval_of_one_number_per_seed_is_wide_enough_for_few_seeds():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(400, 5))
    inside = [low <= 0 <= high for _, low, high in (seeds_interval(v, resamples=2000) for v in values)]
    assert 0.9 <= np.mean(inside) <= 0.98  # the plain percentile interval holds 0 in 83 %
    assert seeds_interval([1.0, 2.0, 6.0])[:2] == (3.0, 1.0)
    assert np.isnan(seeds_interval([1.0]).low)


def slow_interval(values, labels, groups, resamples, seed=0):
    """The bootstrap of `paired_interval` with loops: seeds and groups drawn, classes averaged within a seed."""
    names = [[g if g else f"\0{i}" for i, g in enumerate(of_seed)] for of_seed in groups]
    every = sorted({n for of_seed in names for n in of_seed})
    rng, means = np.random.default_rng(seed), []
    for _ in range(0, resamples, 200):
        drawn = rng.multinomial(len(every), np.full(len(every), 1 / len(every)), size=200)
        seeds = rng.multinomial(len(values), np.full(len(values), 1 / len(values)), size=200)
        for weight, times in zip(drawn, seeds, strict=True):
            total = 0.0
            for s in range(len(values)):
                by_class = []
                for c in set(labels[s]):
                    at = [i for i in range(len(values[s])) if labels[s][i] == c]
                    w = [weight[every.index(names[s][i])] for i in at]
                    if sum(w):
                        by_class.append(sum(a * values[s][i] for a, i in zip(w, at, strict=True)) / sum(w))
                total += times[s] / len(values) * (np.mean(by_class) if by_class else 0.0)
            means.append(total)
    return np.quantile(means, [0.025, 0.975])


def test_the_interval_draws_seeds_and_groups_though_every_seed_has_other_samples():
    rng = np.random.default_rng(3)
    values = [rng.normal(size=n) for n in (7, 9, 8)]
    labels = [np.arange(len(v)) % 2 for v in values]
    groups = [np.array(rng.choice(["a", "b", "c", ""], len(v))) for v in values]
    found = paired_interval(values, labels=labels, groups=groups, resamples=400)
    assert found[1:] == pytest.approx(slow_interval(values, labels, groups, 400), abs=1e-12)
    by_class = [np.mean([v[c == k].mean() for k in (0, 1)]) for v, c in zip(values, labels, strict=True)]
    assert found.value == pytest.approx(np.mean(by_class))


def found(good, bad, seeds=5, **more):
    """Measurements of both arms by seed, from their answers (60,)."""

    def of(right):
        return [{"right": np.array(right), "score": np.array(float(np.sum(right))), "labels": np.arange(60) % 3, **more}
                for _ in range(seeds)]  # fmt: skip

    return {"good": of(good), "bad": of(bad)}


def comparisons(*listed):
    return [{"method": "good", "baseline": "bad", "metric": "right"} | c for c in listed]


def test_all_is_told_of_arms_and_comparisons(fake):
    listed = comparisons(
        {}, {"macro": True}, {"part": "rare", "macro": True}, {"metric": "score"}, {"direction": "lower"}
    )
    claim = load_claim(fake.write(comparisons=listed))
    labels = np.arange(60) % 3
    result = judge(claim, found(labels > 0, labels > 1, rare=labels > 0), SEEDS)
    plain, macro, rare, score, lower = result["comparisons"]
    assert result["verdict"] == plain["verdict"] == "reproduced"
    assert result["test_samples"] == 60
    assert plain["value"] == macro["value"] == pytest.approx(1 / 3)
    assert rare["value"] == pytest.approx(1 / 2)
    assert rare["seeds"] == [0.5] * 5
    assert (score["value"], score["interval_over"]) == (20, "seeds")
    assert plain["interval_over"] == "seeds and test samples"
    assert (plain["share"], score["share"]) == (True, False)
    assert (lower["value"], lower["verdict"]) == (-plain["value"], "not reproduced")
    metrics = result["arms"]["good"]["metrics"]
    assert metrics["right"]["mean"] == pytest.approx(2 / 3)
    assert metrics["right, mean over classes, rare"] == {"mean": 1.0, "sd": 0.0, "seeds": [1.0] * 5}
    assert set(metrics) == {"right", "score", "right, mean over classes", "right, mean over classes, rare"}
    assert result["arms"]["good"]["settings"] == {"p": 0.8}


def test_the_interval_is_wider_where_samples_are_grouped(fake):
    claim = load_claim(fake.write(comparisons=comparisons({})))
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(6), 10)
    right = rng.random(6)[groups] < 0.7
    alone = judge(claim, found(right, np.zeros(60, bool)), SEEDS)["comparisons"][0]
    grouped = judge(claim, found(right, np.zeros(60, bool), groups=groups.astype(str)), SEEDS)["comparisons"][0]
    assert grouped["interval_over"] == "seeds and groups of test samples"
    assert grouped["high"] - grouped["low"] > 1.5 * (alone["high"] - alone["low"])


def test_a_difference_of_gains(fake):
    arms = {"many": {"p": 1}, "many, plain": {"p": 1}, "few": {"p": 1}, "few, plain": {"p": 1}}
    listed = [{"method": ["many", "many, plain"], "baseline": ["few", "few, plain"], "metric": "score"}]
    claim = load_claim(fake.write(arms=arms, comparisons=listed))
    values = {"many": 9, "many, plain": 4, "few": 3, "few, plain": 2}
    runs = {a: [{"score": np.array(float(v + s))} for s in SEEDS] for a, v in values.items()}
    result = judge(claim, runs, SEEDS)["comparisons"][0]
    assert (result["value"], result["method"], result["verdict"]) == (4.0, "many - many, plain", "reproduced")


@pytest.mark.parametrize(
    ("seeds", "verdict"),
    [(1, "inconclusive (on 1 seed)"), (2, "inconclusive (on 2 seeds)"), (3, "reproduced (on 3 seeds)"), (5, "reproduced")],
)  # fmt: skip
def test_on_few_seeds_the_verdict_says_so_and_on_fewer_than_three_nothing_is_reproduced(fake, seeds, verdict):
    bound = {"method": "good", "metric": "score", "above": 1}
    claim = load_claim(fake.write(comparisons=[*comparisons({}), bound]))
    result = judge(claim, found(np.ones(60, bool), np.zeros(60, bool), seeds), SEEDS[:seeds])
    assert result["verdict"] == verdict
    assert [c["verdict"] for c in result["comparisons"]] == [verdict] * 2
    worse = judge(claim, found(np.zeros(60, bool), np.ones(60, bool), seeds), SEEDS[:seeds])
    assert worse["verdict"].startswith("not reproduced")


def test_one_verdict_or_all(fake):
    good, bad, open_ = {}, {"direction": "lower"}, {"metric": "score", "smallest": 1000.0}
    runs = found(np.ones(60, bool), np.arange(60) % 2 > 0)
    for listed, first, every in [
        ([good, bad], "reproduced", "not reproduced"),
        ([good, bad | {"gate": False}], "reproduced", "reproduced"),
        ([bad | {"gate": False}, good], "reproduced", "reproduced"),
        ([bad, good], "not reproduced", "not reproduced"),
        ([good, open_], "reproduced", "not reproduced"),
    ]:
        for which, verdict in (("first", first), ("all", every)):
            claim = load_claim(fake.write(comparisons=comparisons(*listed), verdict=which))
            assert judge(claim, runs, SEEDS)["verdict"] == verdict


def test_what_is_not_finite_is_inconclusive_and_said(fake):
    claim = load_claim(fake.write(comparisons=comparisons({}, {"metric": "score"})))
    runs = found(np.ones(60), np.zeros(60))
    runs["good"][2] = runs["good"][2] | {"right": np.full(60, np.nan), "score": np.array(np.nan)}
    result = judge(claim, runs, SEEDS)
    for c in result["comparisons"]:
        assert (c["verdict"], c["not_finite"]) == ("inconclusive", "no finite number on seeds 2")
    assert result["verdict"] == "inconclusive"


def test_samples_without_a_label_are_in_no_class(fake):
    claim = load_claim(fake.write(comparisons=comparisons({"macro": True})))
    labels = np.where(np.arange(60) < 30, 0, -1)
    result = judge(claim, found(labels == 0, np.zeros(60, bool), labels=labels), SEEDS)
    assert result["comparisons"][0]["value"] == 1.0


def test_arms_must_be_tested_on_the_same_samples(fake):
    claim = load_claim(fake.write(comparisons=comparisons({})))
    runs = found(np.ones(60, bool), np.zeros(60, bool))
    for wrong in ({"right": np.zeros(59, bool), "labels": np.arange(59) % 3}, {"labels": np.arange(60) % 2}):
        runs["bad"][1] = found(np.ones(60, bool), np.zeros(60, bool))["bad"][1] | wrong
        with pytest.raises(ContraltoError, match="arms 'good' and 'bad' of seed 1 were not tested on the same samples"):
            judge(claim, runs, SEEDS)


def test_what_was_not_measured_is_named_with_its_key(fake):
    runs = found(np.ones(60, bool), np.zeros(60, bool))
    for change, told in [
        ({"metric": "knn"}, r"fake\.yaml: comparisons\[0\]\.metric: 'knn' is not among the measurements of arm 'good'; there"),
        ({"part": "rare"}, r"comparisons\[0\]\.part: 'rare' is not among"),
        ({"metric": "score", "macro": True}, r"comparisons\[0\]\.metric: 'score' of arm 'good' is one number"),
    ]:  # fmt: skip
        with pytest.raises(DataError, match=told):
            judge(load_claim(fake.write(comparisons=comparisons(change))), runs, SEEDS)
    with pytest.raises(UsageError, match="'knn' is not among the measurements"):
        mean_of(runs["good"], "knn")
