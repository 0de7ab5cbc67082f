"""k-means with bounds on sizes: they are kept, at nearly the cost of the exact transport problem."""

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from contralto.errors import UsageError
from contralto.neighbors.kmeans import kmeans
from contralto.neighbors.sized import sized_assignment, sized_kmeans


def distances(x, c):
    return ((x[:, None] - c) ** 2).sum(2)


@pytest.mark.parametrize(("n", "k"), [(60, 4), (205, 10), (301, 7)])
def test_equal_sizes_cost_hardly_more_than_the_best(n, k):
    rng = np.random.default_rng(n)
    x, c = rng.normal(size=(n, 5)), rng.normal(size=(k, 5))
    low, high = n // k, -(-n // k)
    found = sized_assignment(x, c, smallest=low, largest=high)
    sizes = np.bincount(found, minlength=k)
    assert low <= sizes.min()
    assert sizes.max() <= high
    cost = distances(x, c)
    places = np.repeat(cost, high, axis=1)  # exact, but that sizes may be low by more
    best = places[linear_sum_assignment(places)].sum()
    nearest = cost.min(1).sum()
    own = cost[np.arange(n), found].sum()
    assert nearest < own < 1.02 * best
    assert own - nearest < 0.25 * (cost[np.arange(n), np.arange(n) % k].sum() - nearest)


def test_bounds_that_do_not_bind_change_nothing():
    rng = np.random.default_rng(0)
    x, c = rng.normal(size=(100, 3)), rng.normal(size=(4, 3))
    assert np.array_equal(sized_assignment(x, c, smallest=0), distances(x, c).argmin(1))


@pytest.mark.parametrize("bounds", [{"smallest": 20}, {"largest": 40}, {"smallest": 10, "largest": 60}])
def test_one_bound_alone(bounds):
    rng = np.random.default_rng(1)
    x = np.concatenate([rng.normal(size=(140, 2)), 30 + rng.normal(size=(4, 2))])
    found = sized_kmeans(x, 4, normalize=False, **bounds)
    sizes = np.bincount(found.labels, minlength=4)
    assert sizes.min() >= bounds.get("smallest", 1)
    assert sizes.max() <= bounds.get("largest", len(x))
    free = kmeans(x, 4, normalize=False)
    assert np.bincount(free.labels).min() < 10  # the far points are a cluster of their own
    assert found.inertia > free.inertia
    for c in range(4):
        np.testing.assert_allclose(found.centroids[c], x[found.labels == c].mean(0), rtol=1e-4, atol=1e-4)


def test_clusters_of_one_size_are_found_again():
    rng = np.random.default_rng(2)
    truth = np.repeat(np.arange(5), 20)
    x = 4 * np.eye(5)[truth] + 0.3 * rng.normal(size=(100, 5))
    found = sized_kmeans(x, 5, smallest=20, largest=20, normalize=False)
    assert len({*zip(truth, found.labels, strict=True)}) == 5
    again = sized_kmeans(x, 5, smallest=20, largest=20, normalize=False)
    assert np.array_equal(found.labels, again.labels)


def test_equal_rows_are_divided():
    assert sorted(np.bincount(sized_kmeans(np.ones((9, 2)), 3, smallest=3, largest=3).labels)) == [3, 3, 3]
    assert sized_assignment(np.ones((4, 1)), [[0.0]]).tolist() == [0, 0, 0, 0]


def test_what_cannot_be_is_said():
    with pytest.raises(UsageError, match="smallest is at most 3 and largest at least 4"):
        sized_kmeans(np.ones((10, 2)), 3, smallest=4)
    with pytest.raises(UsageError, match="10 rows cannot be in 3 clusters of 1 to 3 rows"):
        sized_assignment(np.ones((10, 2)), np.ones((3, 2)), largest=3)
