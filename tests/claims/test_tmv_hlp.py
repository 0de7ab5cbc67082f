"""The claim of TMV-HLP: its draws are paired, its arms differ in what they say, and the quick version runs."""

import numpy as np
import pytest

from contralto.claims.plan import find_claim
from contralto.claims.tmv_hlp import draw_views, run

BUDGET = {"samples": 150, "k": 5, "times": 3, "hyper_k": 5, "hyper_times": 3, "alpha": 0.5}


def test_a_draw_depends_on_the_seed_alone_and_shots_only_show_more_labels():
    views, truth, one = draw_views(3, samples=150, shots=1)
    again, same, three = draw_views(3, samples=150, shots=3)
    np.testing.assert_array_equal(truth, same)
    for a, b in zip(views, again, strict=True):
        np.testing.assert_array_equal(a, b)
    assert ((one >= 0) <= (three >= 0)).all()
    assert np.bincount(one[one >= 0]).tolist() == [1] * 10
    assert np.bincount(three[three >= 0]).tolist() == [3] * 10
    assert (draw_views(4, samples=150, shots=1)[1] != truth).any()


def test_every_arm_answers_for_the_same_digits_and_arms_of_other_settings_differ():
    claim = find_claim("tmv_hlp")
    found = {name: run(arm, seed=100, data="digits", budget=BUDGET) for name, arm in claim.arms.items()}
    for shots, n in (("1 shot", 140), ("3 shots", 120)):
        mine = {k: v for k, v in found.items() if k.endswith(shots)}
        labels = [m["labels"] for m in mine.values()]
        assert all(np.array_equal(labels[0], other) for other in labels)
        assert all(len(m["right"]) == n for m in mine.values())
        assert len({m["right"].tobytes() for m in mine.values()}) > len(mine) - 2
        assert min(m["right"].mean() for m in mine.values()) > 0.3  # ten classes: far above chance


def test_nearest_is_that_of_scikit_learn():
    from sklearn.neighbors import KNeighborsClassifier

    views, truth, seen = draw_views(100, samples=150, shots=1)
    x = np.hstack(views)
    x = (x - x.mean(0)) / np.maximum(x.std(0), 1e-12)
    known = seen >= 0
    theirs = KNeighborsClassifier(1, metric="cosine").fit(x[known], seen[known]).predict(x[~known]) == truth[~known]
    ours = run({"shots": 1, "nearest": True}, seed=100, data="digits", budget=BUDGET)["right"]
    assert ours.mean() == pytest.approx(theirs.mean())


def test_the_arms_are_compared_under_the_same_settings():
    claim = find_claim("tmv_hlp")
    for shots in ("1 shot", "3 shots"):
        full, pairwise = claim.arms[f"full, {shots}"], claim.arms[f"pairwise, {shots}"]
        assert {k: v for k, v in pairwise.items() if k != "pairwise"} == full
    assert claim.deciding() == [0, 1]
    assert claim.seeds >= 20
