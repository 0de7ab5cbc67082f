"""k-means with some labels: the released code's result, labels that stay, centres that are means, as good as without labels."""

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits

from contralto.errors import UsageError
from contralto.neighbors.kmeans import kmeans, semi_supervised_kmeans

REFERENCE = Path(__file__).parents[1] / "reference" / "gpc.npz"


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def test_result_of_the_released_code():
    with np.load(REFERENCE, allow_pickle=False) as file:
        ref = {k.removeprefix("sskm__"): file[k] for k in file if k.startswith("sskm")}
    x = np.concatenate([ref["labelled"], ref["unlabelled"]])
    labels = np.concatenate([ref["labels"], np.full(len(ref["unlabelled"]), -1)])
    found = semi_supervised_kmeans(x, labels, 4, normalize=False)
    centres = unit(found.centroids)
    match = (centres @ ref["centroids"].T).argmax(1)  # own number -> that of the reference
    assert match[:2].tolist() == [0, 1]
    assert sorted(match) == [0, 1, 2, 3]
    assert np.array_equal(match[found.labels], ref["assign"])
    np.testing.assert_allclose(centres, ref["centroids"][match], rtol=1e-6, atol=1e-6)


def test_labelled_rows_stay_whatever_is_near_and_classes_come_first():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 3)).astype(np.float32)
    labels = np.full(200, -1)
    labels[:30] = rng.choice([3, 11, 70], 30)  # any numbers
    for seed in range(3):
        found = semi_supervised_kmeans(x, labels, 6, seed=seed, normalize=False, tolerance=0.0)
        place = np.searchsorted([3, 11, 70], labels[:30])
        assert np.array_equal(found.labels[:30], place)
        for c in range(6):  # means over labelled and other members, by a loop
            np.testing.assert_allclose(found.centroids[c], x[found.labels == c].mean(0), atol=1e-5)
        distance = ((x[:, None] - found.centroids) ** 2).sum(2)
        assert np.array_equal(found.labels[30:], distance[30:].argmin(1))
        own = distance[np.arange(200), found.labels].mean()
        assert found.inertia == pytest.approx(own, rel=1e-4)
        assert np.array_equal(found.labels, semi_supervised_kmeans(x, labels, 6, seed=seed, normalize=False).labels)


def test_without_labels_it_is_k_means():
    x = unit(load_digits().data)
    none = np.full(len(x), -1)
    for seed in range(2):
        assert semi_supervised_kmeans(x, none, 10, seed=seed).inertia < 1.01 * kmeans(x, 10, restarts=10).inertia


def test_labels_help_to_find_classes():
    data = load_digits()
    rng = np.random.default_rng(0)
    labels = np.where((data.target < 5) & (rng.random(len(data.target)) < 0.5), data.target, -1)
    found = semi_supervised_kmeans(data.data, labels, 10)
    hidden = (labels < 0) & (data.target < 5)
    assert (found.labels[hidden] == data.target[hidden]).mean() > 0.8  # cluster c is class c


def test_seeds_are_spread_in_proportion_to_the_squared_distance():
    x = np.concatenate([np.zeros((50, 1)), np.full((1, 1), 1.0), np.full((1, 1), 3.0)])
    labels = np.r_[np.zeros(50, int), -1, -1]
    far = [
        semi_supervised_kmeans(x, labels, 2, seed=s, restarts=1, iterations=1, normalize=False).centroids[1, 0]
        for s in range(200)
    ]
    assert 0.82 < (np.array(far) > 2).mean() < 0.96  # 9 in 10; from either the other point goes to the class
    assert set(np.round(far, 3)) <= {1.0, 2.0, 3.0}


def test_directions_with_labels():
    rng = np.random.default_rng(0)
    kind = rng.integers(4, size=300)
    x = (np.eye(6)[kind] + 0.1 * rng.normal(size=(300, 6))) * rng.uniform(0.1, 10, (300, 1))
    labels = np.where((kind < 2) & (rng.random(300) < 0.3), kind, -1)
    found = semi_supervised_kmeans(x, labels, 4, spherical=True)
    np.testing.assert_allclose(np.linalg.norm(found.centroids, axis=1), 1, rtol=1e-5)
    assert (found.labels[kind < 2] == kind[kind < 2]).all()
    assert len({*zip(kind, found.labels, strict=True)}) == 4


def test_duplicates_and_clusters_of_one():
    x = np.array([[0.0], [0.0], [0.0], [5.0]])
    labels = np.array([0, -1, -1, -1])
    found = semi_supervised_kmeans(x, labels, 4, normalize=False)
    assert np.isfinite(found.centroids).all()
    assert found.labels[0] == 0
    only = semi_supervised_kmeans(x, [0, 0, 1, 1], 2, normalize=False)
    np.testing.assert_allclose(only.centroids[:, 0], [0.0, 2.5])


def test_memory_is_linear_in_the_rows():
    rng, k = np.random.default_rng(0), 400
    peak = []
    for n in (2000, 8000):
        x = rng.normal(size=(n, 16)).astype(np.float32)
        labels = np.where(np.arange(n) < 200, np.arange(n) % 20, -1)
        tracemalloc.start()
        semi_supervised_kmeans(x, labels, k, restarts=1, iterations=3)
        peak.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peak[1] < 5 * peak[0]
    assert peak[1] < 8000 * k * 4 / 2  # far from a matrix of all distances


def test_what_cannot_be_is_said():
    x = np.ones((6, 2))
    with pytest.raises(UsageError, match=r"k must be between the number of classes with labels, 2, .* 6; got 1"):
        semi_supervised_kmeans(x, [0, 5, -1, -1, -1, -1], 1)
    with pytest.raises(UsageError, match="got 7"):
        semi_supervised_kmeans(x, [0, 5, -1, -1, -1, -1], 7)
    with pytest.raises(UsageError, match="labels must be 6 integers"):
        semi_supervised_kmeans(x, [0.5] * 6, 2)
    with pytest.raises(UsageError, match="labels must be 6 integers"):
        semi_supervised_kmeans(x, [0], 2)
    with pytest.raises(UsageError, match="at least 1, got 100 and 0"):
        semi_supervised_kmeans(x, [-1] * 6, 2, restarts=0)
