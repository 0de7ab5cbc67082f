"""The parts of ProtoGCD's claim: what is hidden, arms that differ in nothing but what they say, and what is measured."""

import numpy as np
import pytest
import torch

from contralto.claims import protogcd
from contralto.claims.plan import find_claim
from contralto.evaluation.discovery import right_clusters

CLAIM = find_claim("protogcd")
BUDGET = {"epochs": 1, "batch_size": 256}


def measure(arm, seed=100):
    return protogcd.run(CLAIM.arms[arm], seed=seed, data="digits", budget=BUDGET, progress=lambda s: None)


def test_labels_of_half_of_the_old_digits_are_shown_and_no_others():
    split, truth = protogcd.partly_labelled(0)
    shown = split.train_labels.numpy()
    assert len(split.test) == 0
    assert (shown[truth >= 5] == -1).all()
    assert (shown[shown >= 0] == truth[shown >= 0]).all()
    assert (shown[truth < 5] >= 0).mean() == pytest.approx(0.5, abs=0.01)
    assert np.array_equal(protogcd.partly_labelled(0)[1], truth)
    assert not np.array_equal(protogcd.partly_labelled(1)[1], truth)


def test_batches_show_no_label_that_is_hidden_and_are_half_labelled():
    split, _ = protogcd.partly_labelled(0)
    make = protogcd.discovery_batches(split, seed=0, batch_size=128)
    seen = [make(step) for step in (0, 5, 13, 14, 30)]
    for batch in seen:
        assert torch.equal(batch["label"], split.train_labels[batch["index"]])
        assert len(batch["views"]) == 2
    assert np.mean([(b["label"] >= 0).float().mean() for b in seen]) == pytest.approx(0.5, abs=0.08)
    assert not torch.equal(seen[0]["index"], seen[3]["index"])  # another epoch
    assert torch.equal(make(13)["index"], seen[2]["index"])


@pytest.mark.parametrize("arm", CLAIM.arms)
def test_arms_have_the_same_first_weights(arm):
    ours, first = (protogcd.build(CLAIM.arms[a], seed=3, budget=BUDGET, samples=1797) for a in (arm, "full"))
    for part in ("encoder", "projector"):
        for a, b in zip(getattr(ours, part).parameters(), getattr(first, part).parameters(), strict=True):
            assert torch.equal(a, b)


def test_arms_of_a_seed_are_measured_on_the_same_digits_and_repeat_themselves():
    found = {arm: measure(arm) for arm in ("full", "no balance", "untrained")}
    for one in found.values():
        assert np.array_equal(one["labels"], found["full"]["labels"])
        assert np.array_equal(one["old"], ~one["new"])
        assert (one["labels"][one["old"]] < 5).all()
        assert one["apart"].mean() >= one["right"].mean() > 0.1
        assert 1 <= one["in_use"] <= 10
    assert not np.array_equal(found["full"]["right"], found["no balance"]["right"])
    again = measure("full")
    assert all(np.array_equal(again[k], v) for k, v in found["full"].items())


def test_the_untrained_arm_is_clustering_of_first_features_with_the_labels_that_are_shown():
    found = measure("untrained")
    split, truth = protogcd.partly_labelled(100)
    system = protogcd.build(CLAIM.arms["untrained"], seed=100, budget=BUDGET, samples=len(truth)).eval()
    shown = split.train_labels.numpy()
    with torch.no_grad():
        features = system.embed(split.train).numpy()
    clusters = protogcd.semi_supervised_kmeans(features, shown, 10, seed=100).labels
    expected = right_clusters(truth[shown < 0], clusters[shown < 0], range(5))
    assert np.mean(found["right"] == expected) > 0.99
