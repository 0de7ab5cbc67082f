"""N-way K-shot evaluation against loops over episodes and scikit-learn's logistic regression."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from contralto.data.episodes import draw_episodes
from contralto.errors import UsageError
from contralto.evaluation import episodes as module
from contralto.evaluation.episodes import classify_episodes, few_shot_accuracy


@pytest.fixture(scope="module")
def clouds():
    """Ten classes of twenty points each, which overlap."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(10), 20)
    return (rng.normal(size=(10, 6))[labels] * 1.2 + rng.normal(size=(200, 6))).astype(np.float32), labels


def answers(x, support, queries, classifier, way, shot):
    truth = np.arange(way).repeat(shot)
    if classifier == "prototype":
        centres = np.stack([x[support][truth == w].mean(0) for w in range(way)])
        return ((x[queries][:, None] - centres) ** 2).sum(-1).argmin(1)
    if classifier == "nearest":
        return truth[((x[queries][:, None] - x[support]) ** 2).sum(-1).argmin(1)]
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    middle = unit[support].mean(0)
    probe = LogisticRegression(C=1.0, fit_intercept=False, tol=1e-8, max_iter=5000)
    return probe.fit(unit[support] - middle, truth).predict(unit[queries] - middle)


@pytest.mark.parametrize("classifier", ["prototype", "nearest", "probe"])
@pytest.mark.parametrize("shot", [1, 4])
def test_it_is_the_loop_over_episodes(clouds, classifier, shot, monkeypatch):
    x, labels = clouds
    monkeypatch.setattr(module, "BLOCK", 5 * 3 * (shot + 6) * 6)  # several blocks of episodes
    found = few_shot_accuracy(x, labels, way=3, shot=shot, queries=6, episodes=23, classifier=classifier, seed=5)
    drawn = draw_episodes(labels, way=3, shot=shot, queries=6, episodes=23, rng=np.random.default_rng([5, 7]))
    right, hits = [], {c: [] for c in range(10)}
    for rows in drawn:
        support, queries = rows[: 3 * shot], rows[3 * shot :]
        correct = answers(x.astype(np.float64), support, queries, classifier, 3, shot) == np.arange(3).repeat(6)
        right.append(correct.mean())
        for c, hit in zip(labels[queries], correct, strict=True):
            hits[c].append(hit)
    np.testing.assert_allclose(found.episodes, right)
    np.testing.assert_allclose(found.classes, [np.mean(hits[c]) if hits[c] else np.nan for c in range(10)])
    value, low, high = found.accuracy
    assert value == pytest.approx(np.mean(right))
    half = 1.96 * np.std(right, ddof=1) / 23**0.5
    assert (low, high) == pytest.approx((value - half, value + half))
    assert 1 / 3 < value < 1


def test_the_interval_holds_what_more_episodes_say(clouds):
    truth = few_shot_accuracy(*clouds, queries=10, episodes=5000, seed=1).accuracy.value
    inside = 0
    for seed in range(2, 42):
        _, low, high = few_shot_accuracy(*clouds, queries=10, episodes=100, seed=seed).accuracy
        inside += low <= truth <= high
    assert inside >= 34  # 38 of 40 are expected


def test_other_features_see_the_same_episodes_and_chance_is_chance(clouds):
    x, labels = clouds
    again = few_shot_accuracy(x, labels, queries=10, episodes=50)
    assert (again.episodes == few_shot_accuracy(x + 0, labels, queries=10, episodes=50).episodes).all()
    turned = few_shot_accuracy(
        x @ np.linalg.qr(np.random.default_rng(0).normal(size=(6, 6)))[0], labels, queries=10, episodes=50
    )
    assert np.abs(turned.episodes - again.episodes).max() < 0.03
    noise = np.random.default_rng(0).normal(size=(200, 6))
    assert abs(few_shot_accuracy(noise, labels, queries=10, episodes=600).accuracy.value - 0.2) < 0.02


def test_more_shots_help_and_length_may_be_taken_out(clouds):
    x, labels = clouds
    one, five = (few_shot_accuracy(x, labels, shot=s, queries=10, episodes=200).accuracy.value for s in (1, 5))
    assert five > one + 0.1
    scaled = x * np.random.default_rng(0).uniform(0.1, 10, (200, 1))
    a = few_shot_accuracy(scaled, labels, queries=10, episodes=50, normalize=True)
    b = few_shot_accuracy(x, labels, queries=10, episodes=50, normalize=True)
    np.testing.assert_allclose(a.episodes, b.episodes, atol=0.03)


def test_rows_without_label_and_classes_that_are_too_small_are_left_out(clouds):
    x, labels = clouds
    labels = np.where(np.arange(200) % 20 < np.where(labels < 5, 20, 3), labels, -1)
    found = few_shot_accuracy(x, labels, way=4, queries=10, episodes=80)
    assert np.isnan(found.classes[5:]).all()
    assert not np.isnan(found.classes[:5]).any()


def test_arguments_that_do_not_fit_are_refused(clouds):
    x, labels = clouds
    with pytest.raises(UsageError, match="do not fit"):
        few_shot_accuracy(x[:5], labels)
    with pytest.raises(UsageError, match="row 7 hold"):
        few_shot_accuracy(np.where(np.arange(200)[:, None] == 7, np.nan, x), labels)
    with pytest.raises(UsageError, match="classifier must be"):
        classify_episodes(torch.zeros(1, 2, 1, 3), torch.zeros(1, 4, 3), classifier="forest")
