"""Parts of the claim of SuSana."""

import numpy as np
import pytest
import torch

from contralto.claims import susana
from contralto.claims.plan import find_claim
from contralto.errors import DataError

BUDGET = {"episodes": 3, "tested": 300, "width": 8}


def test_the_claim_has_an_untrained_arm_and_one_comparison_decides():
    claim = find_claim("susana")
    assert claim.deciding() == [0]
    assert claim.comparisons[0].method == ("CE + PT",)
    assert "untrained" in claim.arms
    assert claim.function() is susana.run


def test_arms_of_a_seed_see_the_same_episodes():
    pictures, labels = torch.rand(60, 1, 28, 28), torch.arange(60) // 10
    one, two, other = (susana.episodes_of(pictures, labels, shot=1, episodes=4, seed=s) for s in (3, 3, 4))
    assert all(one(i)["index"].equal(two(i)["index"]) for i in range(4))
    assert any(not one(i)["index"].equal(other(i)["index"]) for i in range(4))


def test_without_its_data_it_says_what_to_set(monkeypatch):
    monkeypatch.delenv("CONTRALTO_DATA", raising=False)
    susana.characters.cache_clear()
    with pytest.raises(DataError, match="CONTRALTO_DATA"):
        susana.characters()


@pytest.mark.data
def test_alphabets_for_testing_are_never_learnt_from(data_folder, monkeypatch):
    monkeypatch.setenv("CONTRALTO_DATA", str(data_folder))
    susana.characters.cache_clear()
    pictures, labels, novel = susana.characters()
    assert pictures.shape == (4840, 1, 28, 28)
    base, new = (labels[m].unique() for m in (~novel, novel))
    assert (len(base), len(new)) == (136, 106)
    assert not np.intersect1d(base, new).size
    seen = []
    pretrain = susana.pretrain

    def watched(system, make, **how):
        seen.extend(make(step)["label"] for step in range(system.total_steps))
        return pretrain(system, make, **how)

    monkeypatch.setattr(susana, "pretrain", watched)
    found = susana.run({"terms": ["cross", "prototriplet"]}, seed=100, data="omniglot", budget=BUDGET)
    assert set(torch.cat(seen).tolist()) <= set(base.tolist())
    assert found["one_shot"].shape == found["five_shot"].shape == (106,)
    assert found["five_shot"].mean() > found["one_shot"].mean() > 0.25  # chance is 0.2
    start = susana.run({"episodes": 0}, seed=100, data="omniglot", budget=BUDGET)
    assert abs(start["one_shot"].mean() - 0.4) < 0.15
