"""The parts of GPC's claims: arms that start alike, samples that all arms share, and what is measured."""

import numpy as np
import pytest
import torch

from contralto.claims import gpc, gpc_number
from contralto.claims.digits import digits
from contralto.claims.plan import find_claim
from contralto.neighbors.how_many import within_variance

CLAIM, NUMBER = find_claim("gpc"), find_claim("gpc_number")

BUDGET = {"epochs": 2, "batch_size": 256, "wait_epochs": 1}


def measure(arm, epochs=2, seed=100):
    return gpc.run(CLAIM.arms[arm], seed=seed, data="digits", budget=BUDGET | {"epochs": epochs})


def test_arms_are_measured_on_the_same_digits():
    found = {arm: measure(arm) for arm in ("gpc", "known", "instance", "untrained")}
    first = found["gpc"]
    for measured in found.values():
        assert np.array_equal(measured["labels"], first["labels"])
        assert np.array_equal(measured["new"], ~measured["old"])
    assert len(first["labels"]) == 1347
    assert {arm for arm, m in found.items() if "number_error" in m} == {"gpc", "known"}
    assert found["known"]["number_error"] == 0
    assert found["untrained"]["right"].mean() > 0.4


def test_all_arms_are_one_until_the_first_clustering(monkeypatch):
    """The first half of the epochs is the same training: an arm with no clustering yet ends where the baseline does."""
    never = dict(CLAIM.arms["gpc"]) | {"wait_epochs": 9}
    one, other = (gpc.run(arm, seed=101, data="digits", budget=BUDGET) for arm in (never, CLAIM.arms["instance"]))
    assert np.array_equal(one["right"], other["right"])
    assert not np.array_equal(one["right"], measure("gpc", seed=101)["right"])


def test_methods_and_baseline_differ_in_the_prototypes_alone():
    own = {"system", "num_new", "estimate", "coin", "temperature", "epochs"}
    arms = [{k: v for k, v in arm.items() if k not in own} for arm in CLAIM.arms.values()]
    assert all(arm == arms[0] for arm in arms)


def test_rounds_begin_where_the_arm_says_and_features_are_of_unit_length():
    budget = {"restarts": 1}
    assert gpc_number.run(NUMBER.arms["start"], seed=100, data="digits", budget=budget) == {"error": 6}
    one = gpc_number.run(dict(NUMBER.arms["gpc"]) | {"rounds": 3}, seed=100, data="digits", budget=budget)
    assert one == gpc_number.run(dict(NUMBER.arms["gpc"]) | {"rounds": 3}, seed=100, data="digits", budget=budget)
    assert one["error"] < 6


def test_learnt_features_tell_classes_better_and_leave_the_random_state_alone():
    split = digits(100, test=898)
    state = torch.get_rng_state()
    learnt = gpc_number.learnt_features(split, 100, steps=60)
    assert torch.equal(torch.get_rng_state(), state)
    np.testing.assert_array_equal(learnt, gpc_number.learnt_features(split, 100, steps=60))
    labels = split.test_labels.numpy()

    def spread(x):
        return within_variance(x, labels) / x.var(0).mean()

    assert spread(learnt) < 0.8 * spread(split.test.numpy())


@pytest.mark.parametrize("claim", [CLAIM, NUMBER], ids=["gpc", "gpc_number"])
def test_the_claim_asks_for_what_is_measured(claim):
    assert claim.system == "gpc"
    assert claim.deciding()
