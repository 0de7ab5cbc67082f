"""The parts of Hydra's claim: arms that differ in nothing but what they say, and what is measured."""

import numpy as np
import pytest
import torch

from contralto.claims import hydra
from contralto.claims.plan import find_claim

CLAIM = find_claim("hydra")
BUDGET = {"steps": 2, "batch_size": 32}


def quiet(share):
    assert 0 <= share < 1


@pytest.fixture(scope="module")
def measured():
    names = ("gate, distinct", "open, distinct", "untrained")
    return {
        n: hydra.run(dict(CLAIM.arms[n]), seed=100, data="digits", budget=BUDGET, device="cpu", progress=quiet)
        for n in names
    }


@pytest.mark.parametrize("arm", CLAIM.arms)
def test_arms_have_the_same_first_weights(arm):
    settings = {k: v for k, v in CLAIM.arms[arm].items() if k != "steps"}
    ours, first = (hydra.build(a, seed=3, steps=2) for a in (settings, {}))
    for part in ("encoder", "projector"):
        for a, b in zip(getattr(ours, part).parameters(), getattr(first, part).parameters(), strict=True):
            assert torch.equal(a, b)


def test_arms_are_tested_on_the_same_digits_known_and_new(measured):
    for found in measured.values():
        assert np.array_equal(found["known"], measured["untrained"]["known"])
        assert np.array_equal(found["new"], ~found["known"])
        assert 0 <= found["right"].min() <= found["right"].max() <= 1
        assert 1 < found["rank_projected"] <= 64
    known = measured["untrained"]["known"]
    assert known.mean() == pytest.approx(0.6, abs=0.1)
    assert not np.array_equal(measured["gate, distinct"]["right"], measured["untrained"]["right"])


def test_the_same_seed_gives_the_same_numbers(measured):
    again = hydra.run(
        dict(CLAIM.arms["gate, distinct"]), seed=100, data="digits", budget=BUDGET, device="cpu", progress=quiet
    )
    assert np.array_equal(again["right"], measured["gate, distinct"]["right"])


def test_only_known_classes_are_learnt(monkeypatch):
    seen = []
    monkeypatch.setattr(
        hydra.Hydra, "step", lambda self, batch, step=hydra.Hydra.step: seen.append(batch["label"]) or step(self, batch)
    )
    hydra.run({}, seed=100, data="digits", budget=BUDGET, device="cpu", progress=quiet)
    assert len(seen) == 2
    assert max(int(labels.max()) for labels in seen) < 6
