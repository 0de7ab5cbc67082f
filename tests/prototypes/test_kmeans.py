"""Spherical k-means."""

import numpy as np
import pytest

from contralto.errors import UsageError
from contralto.prototypes.kmeans import spherical_kmeans


def test_clusters_are_found_by_direction_and_depend_on_the_seed_alone():
    rng = np.random.default_rng(0)
    centres = np.linalg.qr(rng.normal(size=(8, 8)))[0][:4]
    kind = rng.integers(4, size=200)
    x = (centres[kind] + 0.1 * rng.normal(size=(200, 8))) * rng.uniform(0.01, 100, (200, 1))
    found = spherical_kmeans(x, 4, restarts=3)
    assert len({(k, c) for k, c in zip(kind, found.labels, strict=True)}) == 4
    np.testing.assert_allclose(np.linalg.norm(found.centroids, axis=1), 1, rtol=1e-6)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    np.testing.assert_array_equal(found.labels, (unit @ found.centroids.T).argmax(1))
    again, other = spherical_kmeans(x, 4, restarts=3), spherical_kmeans(x, 9, seed=1)
    np.testing.assert_array_equal(found.centroids, again.centroids)
    assert np.isfinite(other.centroids).all()


def test_centroids_are_the_directions_of_the_means():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(60, 3)) + np.array([[3.0, 0, 0]]) * rng.choice([-1, 1], (60, 1))
    found = spherical_kmeans(x, 2, iterations=50)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    for c in range(2):
        mean = unit[found.labels == c].sum(0)
        np.testing.assert_allclose(found.centroids[c], mean / np.linalg.norm(mean), atol=1e-5)


def test_more_clusters_than_rows_are_refused():
    for clusters in (0, 5):
        with pytest.raises(UsageError, match="clusters cannot be made of 4 rows"):
            spherical_kmeans(np.eye(4), clusters)
