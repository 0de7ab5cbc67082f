"""Parts of the claims of Core-tuning and SupReMix."""

import numpy as np
import pytest
import torch

from contralto.claims.core_tuning import labelled, pooled_encoder
from contralto.claims.core_tuning import run as run_tuning
from contralto.claims.digits import digits
from contralto.claims.plan import find_claim
from contralto.claims.supremix import run as run_numbers
from contralto.claims.supremix import turned_digits


@pytest.mark.parametrize(("name", "gates"), [("core_tuning", [0]), ("supremix", [0])])
def test_the_claims_have_a_gate_and_an_untrained_arm(name, gates):
    claim = find_claim(name)
    assert callable(claim.function())
    assert claim.deciding() == gates
    assert any("untrained" in arm for arm in claim.arms)


def test_labelled_digits_are_some_of_the_training_part():
    split, few = digits(3), labelled(3, 5)
    assert len(few.train) == 50
    rows = {tuple(x) for x in split.train.tolist()}
    assert all(tuple(x) in rows for x in few.train.tolist())
    assert torch.equal(few.test, split.test)


def test_arms_of_a_seed_start_from_one_pretraining_which_is_made_once(tmp_path):
    budget = {"steps": 0, "batch_size": 16, "per_class": 2, "pretraining_steps": 3, "pretraining_batch": 16}
    arms = [{"system": "finetuning", "eta": 0.0}, {"system": "core_tuning", "eta": 1.0, "learn_original": True}]
    found = [run_tuning(arm, seed=100, data="digits", budget=budget, work=tmp_path) for arm in arms]
    assert [p.name for p in tmp_path.iterdir()] == ["seed100"]
    assert torch.equal(found[0]["right"], found[1]["right"])  # no step was taken, and both have one start
    before = (tmp_path / "seed100" / "encoder.safetensors").stat().st_mtime_ns
    untrained = run_tuning(arms[0] | {"pretrained": False}, seed=100, data="digits", budget=budget, work=tmp_path)
    assert (tmp_path / "seed100" / "encoder.safetensors").stat().st_mtime_ns == before
    assert not torch.equal(untrained["right"], found[0]["right"])
    assert all(
        torch.equal(a, b) for a, b in zip(pooled_encoder(1).parameters(), pooled_encoder(1).parameters(), strict=True)
    )


def test_no_digit_is_turned_in_both_parts_and_all_bins_are_there():
    found = turned_digits(2)
    assert set(found.split.train_labels.tolist()) == set(range(31))
    assert len(np.unique(found.digits)) < 400  # 902 digits of five classes, 600 of them for training
    upright = turned_digits(2).split.train[found.split.train_labels == 15]
    from sklearn.datasets import load_digits

    data = torch.from_numpy(load_digits().data / 16).float()
    nearest = torch.cdist(upright, data).min(1)
    assert nearest.values.max() < 1e-4  # bin 15 is 0 degrees
    assert not set(nearest.indices.tolist()) & set(found.digits.tolist())


def test_the_output_of_least_absolute_error_is_not_its_probe():
    budget = {"steps": 3, "batch_size": 8, "train": 40, "test": 60}
    own, probed = (
        run_numbers({"method": "l1", "own": flag}, seed=100, data="digits", budget=budget) for flag in (True, False)
    )
    assert own["error"].mean() != probed["error"].mean()
    assert (own["groups"] == probed["groups"]).all()
