"""The claim of TMV-HLP: its draws are paired, its arms differ in what they say, and the quick version runs."""

import numpy as np
import pytest

from contralto.claims.plan import find_claim
from contralto.claims.tmv_hlp import draw_views, run

BUDGET = {"samples": 150, "held": 3, "k": 5, "times": 3, "hyper_k": 5, "hyper_times": 3, "alpha": 0.5}


def test_a_draw_depends_on_the_seed_alone_and_the_first_of_every_class_are_its_shots():
    views, truth, place = draw_views(3, samples=150)
    for a, b in zip(views, draw_views(3, samples=150)[0], strict=True):
        np.testing.assert_array_equal(a, b)
    for shots in (1, 3):
        assert np.bincount(truth[place < shots]).tolist() == [shots] * 10
    assert all(np.array_equal(np.sort(place[truth == c]), np.arange((truth == c).sum())) for c in range(10))
    assert (draw_views(4, samples=150)[1] != truth).any()


def test_every_arm_answers_for_the_same_digits_none_of_which_has_a_label_anywhere():
    claim = find_claim("tmv_hlp")
    found = {name: run(arm, seed=100, data="digits", budget=BUDGET) for name, arm in claim.arms.items()}
    _, truth, place = draw_views(100, samples=150)
    assert max(arm["shots"] for arm in claim.arms.values()) <= claim.budget["held"]
    for measured in found.values():
        np.testing.assert_array_equal(measured["labels"], truth[place >= 3])
        assert len(measured["right"]) == 120
    assert len({m["right"].tobytes() for m in found.values()}) > len(found) - 3
    assert min(m["right"].mean() for m in found.values()) > 0.3  # ten classes: far above chance


def test_nearest_is_that_of_scikit_learn():
    from sklearn.neighbors import KNeighborsClassifier

    views, truth, place = draw_views(100, samples=150)
    x = np.hstack(views)
    x = (x - x.mean(0)) / np.maximum(x.std(0), 1e-12)
    known, tested = place < 1, place >= 3
    theirs = KNeighborsClassifier(1, metric="cosine").fit(x[known], truth[known]).predict(x[tested]) == truth[tested]
    ours = run({"shots": 1, "nearest": True}, seed=100, data="digits", budget=BUDGET)["right"]
    assert ours.mean() == pytest.approx(theirs.mean())


def test_the_arms_are_compared_under_the_same_settings():
    claim = find_claim("tmv_hlp")
    for shots in ("1 shot", "3 shots"):
        full, pairwise = claim.arms[f"full, {shots}"], claim.arms[f"pairwise, {shots}"]
        assert {k: v for k, v in pairwise.items() if k != "pairwise"} == full
    assert claim.deciding() == [0, 1]
    assert claim.seeds >= 20
