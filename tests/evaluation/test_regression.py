"""Scores of regression against scipy, resamples by hand, and probes."""

import numpy as np
import pytest
from scipy import stats

from contralto.errors import UsageError
from contralto.evaluation.regression import fit_probe, paired_errors, regression_scores, shots


@pytest.fixture(scope="module")
def told():
    rng = np.random.default_rng(0)
    y = rng.integers(0, 30, 200).astype(float) + 1000
    return y, y + rng.normal(0, 4, 200)


def test_values_are_those_of_scipy(told):
    y, t = told
    found = {k: v.value for k, v in regression_scores(y, t).items()}
    error = np.abs(y - t)
    assert found["mae"] == pytest.approx(error.mean())
    assert found["rmse"] == pytest.approx(np.sqrt((error**2).mean()))
    assert found["gm"] == pytest.approx(stats.gmean(error))
    assert found["pearson"] == pytest.approx(stats.pearsonr(y, t).statistic)
    assert found["spearman"] == pytest.approx(stats.spearmanr(y, t).statistic)


def test_intervals_hold_the_value_and_are_those_of_a_plain_bootstrap(told):
    y, t = told
    found = regression_scores(y, t)
    assert all(v.low < v.value < v.high for v in found.values())
    rng = np.random.default_rng(1)
    rows = rng.integers(0, 200, (3000, 200))
    plain = np.quantile(np.abs(y - t)[rows].mean(1), [0.025, 0.975])
    np.testing.assert_allclose(found["mae"][1:], plain, rtol=0.03)
    plain = np.quantile([stats.pearsonr(y[r], t[r]).statistic for r in rows[:600]], [0.025, 0.975])
    np.testing.assert_allclose(found["pearson"][1:], plain, atol=0.01)


def test_samples_of_a_group_stand_together(told):
    y, t = told
    groups = np.repeat(np.arange(20), 10).astype(str)
    alike = np.repeat(t[::10] - y[::10], 10)  # ten times the same error is one error
    alone, together = (regression_scores(y, y + alike, groups=g)["mae"] for g in (None, groups))
    assert together.high - together.low > 2 * (alone.high - alone.low)


def test_common_and_rare_numbers_are_told_apart():
    learnt = np.repeat([0.0, 1.0, 2.0], [150, 50, 5])
    y, t = np.array([0.0, 0.0, 1.0, 2.0, 7.0]), np.array([1.0, 0.0, 3.0, 7.0, 8.0])
    assert shots(y, learnt).tolist() == ["many", "many", "medium", "few", "few"]
    found = regression_scores(y, t, learnt=learnt)
    assert [found[f"mae, {k}"].value for k in ("many", "medium", "few")] == [0.5, 2.0, 3.0]
    assert "mae, few" not in regression_scores(y[:3], t[:3], learnt=learnt)
    assert shots(np.array([20.0, 21.0]), np.repeat([20.0, 21.0], [100, 20])).tolist() == ["medium", "medium"]


def test_one_answer_for_all_has_an_error_and_no_correlation():
    found = regression_scores(np.arange(10.0), np.full(10, 4.5))
    assert found["mae"].value == 2.5
    assert np.isnan(found["pearson"].value)
    assert np.isnan(found["spearman"].value)
    assert regression_scores(np.arange(4.0), np.arange(4.0))["gm"].value == pytest.approx(1e-10)


@pytest.mark.parametrize("kind", ["ridge", "l1"])
def test_a_probe_finds_a_linear_function_in_features_of_any_scale(kind):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 5)) * [1, 100, 0.01, 1, 1] + 7
    x[:, 4] = 3.0  # says nothing
    y = 2 * x[:, 0] - 0.03 * x[:, 1] + 500 + 0.1 * rng.normal(size=400)
    probe = fit_probe(x[:300], y[:300], kind=kind)
    assert np.abs(probe.tell(x[300:]) - y[300:]).mean() < 0.15
    again = fit_probe(x[:300], y[:300], kind=kind)
    assert (again.weight == probe.weight).all()


def test_the_absolute_probe_does_not_follow_outliers():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, 2))
    y = x @ [1.0, -1.0]
    wild = y.copy()
    wild[:45] += 60
    errors = {k: np.abs(fit_probe(x, wild, kind=k).tell(x) - y).mean() for k in ("ridge", "l1")}
    assert errors["l1"] < 0.5 < 5 < errors["ridge"]


def test_pairs_and_what_does_not_fit():
    assert paired_errors(np.array([1.0]), np.array([1.5]), np.array([0.0])).tolist() == [0.5]
    with pytest.raises(UsageError, match="one shape"):
        regression_scores(np.zeros(3), np.zeros(2))
    with pytest.raises(UsageError, match="NaN"):
        regression_scores(np.zeros(2), np.array([0.0, np.nan]))
    with pytest.raises(UsageError, match="at least two"):
        fit_probe(np.zeros((1, 2)), np.zeros(1))
    with pytest.raises(UsageError, match="kind"):
        fit_probe(np.zeros((3, 2)), np.zeros(3), kind="svm")
    with pytest.raises(UsageError, match="width above 0"):
        shots(np.zeros(1), np.zeros(1), bin=0)
