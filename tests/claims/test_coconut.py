"""The parts of COCONUT's claim: arms that differ in nothing but what they say, and measures over the same recordings."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from contralto.claims import coconut
from contralto.claims.plan import find_claim

CLAIM = find_claim("coconut")
BUDGET = {"epochs": 1, "per_class": 4, "tasks": 2}
HAS_DATA = (Path(os.environ.get("CONTRALTO_DATA", "")) / "spoken_digits" / "spoken_digits.parquet").is_file()


@pytest.mark.parametrize("arm", CLAIM.arms)
def test_arms_have_the_same_first_weights_and_the_same_memory(arm):
    ours, first = (
        coconut.build(a, seed=3, budget=BUDGET, vocabulary=9, length=6) for a in (CLAIM.arms[arm], CLAIM.arms["replay"])
    )
    for part in ("encoder", "decoder", "audio_head", "text_head"):
        for a, b in zip(getattr(ours, part).parameters(), getattr(first, part).parameters(), strict=True):
            assert torch.equal(a, b)
    assert (ours.memory.size, ours.memory.num_classes, ours.replayed) == (20, 10, 6)
    assert (ours.task_epochs, ours.total_steps) == (first.task_epochs, first.total_steps)


def test_the_arms_are_the_designs_of_the_paper():
    built = {n: coconut.build(a, seed=0, budget=BUDGET, vocabulary=9, length=6) for n, a in CLAIM.arms.items()}
    assert built["replay"].nspt_weight == built["replay"].mm_weight == 0
    assert (built["coconut"].nspt_weight, built["coconut"].mm_weight) == (0.1, 0.1)
    designs = {n: (built[n].positive_from, built[n].negative_from) for n in ("nspt", "scl", "ntpt")}
    assert designs == {
        "nspt": ("teacher", "student"), "scl": ("student", "student"), "ntpt": ("teacher", "teacher")
    }  # fmt: skip
    assert all(built[n].mm_weight == 0 for n in designs)
    assert built["coconut and tokens"].distillation == "token"


def test_the_average_is_that_of_the_stream_and_last_that_of_its_end():
    rng = np.random.default_rng(0)
    right, task = rng.random((3, 60)) < 0.5, rng.permutation(np.repeat([0, 1, 2], 20))
    found = coconut._measures(right, task)
    expected = np.mean([right[i, task <= i].mean() for i in range(3)])
    assert abs(found["average"].mean() - expected) < 1e-12
    assert abs(found["last"].mean() - right[2].mean()) < 1e-12


@pytest.mark.data
@pytest.mark.skipif(not HAS_DATA, reason="CONTRALTO_DATA holds no spoken_digits")
def test_arms_see_the_same_recordings_and_words_in_the_same_order(tmp_path, monkeypatch):
    pytest.importorskip("soundfile")
    seen, begun = [], []
    step, begin = coconut.COCONUT.step, coconut.COCONUT.begin_task
    monkeypatch.setattr(
        coconut.COCONUT, "step",
        lambda self, batch: seen.append((batch["index"].tolist(), batch["views"][0])) or step(self, batch),
    )  # fmt: skip
    monkeypatch.setattr(
        coconut.COCONUT, "begin_task", lambda self, classes, **o: begun.append(classes) or begin(self, classes, **o)
    )
    runs = []
    for arm in ("replay", "coconut and tokens"):
        seen.clear(), begun.clear()
        found = coconut.run(CLAIM.arms[arm], seed=100, data="spoken_digits", budget=BUDGET, work=tmp_path)
        runs.append((list(seen), list(begun), found))
    (one, order, found), (other, again, more) = runs
    assert order == again
    assert sorted(c for classes in order for c in classes) == list(range(10))
    assert [i for i, _ in one] == [i for i, _ in other]
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(one, other, strict=True))
    assert len(found["last"]) == len(found["average"]) == 300
    assert np.array_equal(found["labels"], more["labels"])
