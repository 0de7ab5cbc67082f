"""k-means: repeatable, the optimum on clear clusters, as good as scikit-learn's elsewhere."""

import faiss
import numpy as np
import pytest
from sklearn.cluster import KMeans as Sklearn
from sklearn.datasets import load_digits
from sklearn.metrics import adjusted_rand_score

from contralto.errors import UsageError
from contralto.neighbors.kmeans import kmeans


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def test_clear_clusters_are_found_and_other_rows_assigned():
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 6, 600)
    x = 5 * np.eye(6)[truth] + 0.2 * rng.normal(size=(600, 6))
    found = kmeans(x, 6)
    assert adjusted_rand_score(truth, found.labels) == 1
    for c in range(6):  # means of unit rows, by a loop
        np.testing.assert_allclose(found.centroids[c], unit(x)[found.labels == c].mean(0), atol=1e-5)
    assert np.array_equal(found.assign(x[:50] * 3), found.labels[:50])
    own = ((unit(x) - found.centroids[found.labels]) ** 2).sum(1).mean()
    assert found.inertia == pytest.approx(own, rel=1e-3)


def test_length_counts_only_where_it_is_wanted():
    x = np.array([[1.0, 0.01], [1.0, -0.01], [9.0, 0.02], [9.0, -0.02]])
    assert len(set(kmeans(x, 2, normalize=False).labels[:2])) == 1
    plain = kmeans(x, 2, normalize=False)
    assert plain.labels[0] != plain.labels[2]
    assert plain.assign([[8.0, 0.0]])[0] == plain.labels[2]


def test_as_good_as_another_implementation():
    x = unit(load_digits().data)
    other = Sklearn(10, n_init=10, random_state=0).fit(x).inertia_ / len(x)
    for seed in range(3):
        assert kmeans(x, 10, seed=seed).inertia < 1.01 * other


def test_the_same_seed_gives_the_same_centres_with_any_number_of_threads():
    x = load_digits().data
    threads = faiss.omp_get_max_threads()
    try:
        first = kmeans(x, 10, seed=3)
        faiss.omp_set_num_threads(1)
        second, third = kmeans(x, 10, seed=3), kmeans(x, 10, seed=3)
    finally:
        faiss.omp_set_num_threads(threads)
    assert np.array_equal(first.labels, second.labels)
    assert np.allclose(first.centroids, second.centroids, atol=1e-5)
    assert np.array_equal(second.centroids, third.centroids)
    assert not np.array_equal(first.labels, kmeans(x, 10, seed=4).labels)


def test_of_many_rows_some_are_drawn_and_all_are_assigned():
    x = load_digits().data
    found = kmeans(x, 10, seed=0, max_rows=400)
    assert len(found.labels) == len(x)
    assert found.inertia < 1.1 * kmeans(x, 10, seed=0).inertia
    assert np.array_equal(found.labels, kmeans(x, 10, seed=0, max_rows=400).labels)


def test_what_cannot_be_is_said():
    x = np.ones((5, 3))
    with pytest.raises(UsageError, match="k must be between 1 and the number of rows, 5; got 6"):
        kmeans(x, 6)
    x[3, 1] = np.nan
    with pytest.raises(UsageError, match=r"row 3 of the features is not finite \(1 of 5"):
        kmeans(x, 2)
    with pytest.raises(UsageError, match=r"shape \(N, D\)"):
        kmeans(np.ones(5), 2)
    with pytest.raises(UsageError, match="at least 1, got 0, 4 and 1000000"):
        kmeans(np.ones((5, 3)), 2, iterations=0)


def test_clusters_are_found_by_direction_and_depend_on_the_seed_alone():
    rng = np.random.default_rng(0)
    centres = np.linalg.qr(rng.normal(size=(8, 8)))[0][:4]
    kind = rng.integers(4, size=200)
    x = (centres[kind] + 0.1 * rng.normal(size=(200, 8))) * rng.uniform(0.01, 100, (200, 1))
    found = kmeans(x, 4, spherical=True)
    assert len({(k, c) for k, c in zip(kind, found.labels, strict=True)}) == 4
    np.testing.assert_allclose(np.linalg.norm(found.centroids, axis=1), 1, rtol=1e-6)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    np.testing.assert_array_equal(found.labels, (unit @ found.centroids.T).argmax(1))
    again, other = kmeans(x, 4, spherical=True), kmeans(x, 9, seed=1, spherical=True)
    np.testing.assert_array_equal(found.centroids, again.centroids)
    assert np.isfinite(other.centroids).all()


def test_centroids_are_the_directions_of_the_means():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(60, 3)) + np.array([[3.0, 0, 0]]) * rng.choice([-1, 1], (60, 1))
    found = kmeans(x, 2, spherical=True)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    for c in range(2):
        mean = unit[found.labels == c].sum(0)
        np.testing.assert_allclose(found.centroids[c], mean / np.linalg.norm(mean), atol=1e-5)
