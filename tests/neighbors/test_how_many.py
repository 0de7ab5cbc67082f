"""How many classes there are: found where it is clear, with an interval that is wider where it is not."""

import numpy as np
import pytest

from contralto.errors import UsageError
from contralto.neighbors.how_many import Estimate, estimate_number, rounds_of_splits, within_variance


def sample(classes, shown, *, n=600, spread=0.25, seed=0):
    """Rows around corners, and labels of half of the rows of the first classes."""
    rng = np.random.default_rng(seed)
    truth = rng.integers(classes, size=n)
    x = 5 * np.eye(classes)[truth] + spread * 5 * rng.normal(size=(n, classes))
    return x, np.where((truth < shown) & (rng.random(n) < 0.5), truth, -1)


@pytest.mark.parametrize(("method", "off"), [("search", 1), ("whole", 1), ("split", 0)])
def test_clear_classes_are_counted(method, off):
    x, labels = sample(10, 6, spread=0.08)
    found = estimate_number(x, labels, method=method, repeats=5)
    assert found.low <= 10 <= found.high
    assert abs(found.number - 10) <= off
    assert found.low <= found.number <= found.high
    assert all(6 <= k <= 38 and 0 < v <= 1 for k, v in found.tried.items())
    assert found == estimate_number(x, labels, method=method, repeats=5)


def test_numbers_of_labels_do_not_matter():
    x, labels = sample(8, 4)
    other = np.where(labels >= 0, 10 * labels + 3, -1)
    assert estimate_number(x, labels, repeats=3) == estimate_number(x, other, repeats=3)


def test_few_classes_are_enough_and_their_sizes_do_not_matter():
    x, labels = sample(6, 3, spread=0.08)
    found = estimate_number(x, labels, method="whole", repeats=5)
    assert abs(found.number - 6) <= 2
    assert found.tried[3] < 0.9 < max(found.tried.values())
    labels[np.flatnonzero(labels == 0)[:-16]] = -1  # few labels, of a class as large as the others
    assert abs(estimate_number(x, labels, method="whole", repeats=5).number - 6) <= 2


def test_bounds_are_kept():
    x, labels = sample(9, 4, n=300)
    for method in ("search", "whole", "split"):
        found = estimate_number(x, labels, method=method, low=12, high=15, repeats=3)
        assert found.low >= 12
        assert found.high <= 15
        assert set(found.tried) <= {12, 13, 14, 15}


def test_unclear_classes_have_a_wider_interval():
    samples = sample(8, 4, spread=0.05), sample(8, 4, spread=0.18)
    clear, unclear = (estimate_number(*s, method="split", repeats=8) for s in samples)
    assert (clear.low, clear.number, clear.high) == (8, 8, 8)
    assert unclear.high > unclear.low


def test_from_too_many_clusters_the_rounds_come_down():
    x, labels = sample(10, 5, spread=0.08)
    for start in (16, 20):
        numbers = rounds_of_splits(x, labels, start)
        assert numbers[0] == start
        assert numbers[-1] == 10
        assert numbers == rounds_of_splits(x, labels, start)
    assert rounds_of_splits(x, labels, 5, rounds=1, coin=1.0, smallest=0) == [5, 5]  # labelled ones are left alone
    assert len(rounds_of_splits(x, labels, 16, rounds=1)) == 2


def test_variance_within_classes_is_that_around_their_means():
    x, labels = sample(6, 3, n=200)
    parts = [((x[labels == c] - x[labels == c].mean(0)) ** 2).sum() for c in range(3)]
    known = (labels >= 0).sum()
    assert within_variance(x, labels) == pytest.approx(sum(parts) / known / 6, rel=1e-4)
    with pytest.raises(UsageError, match="no row is labelled"):
        within_variance(x, np.full(200, -1))


def test_what_cannot_be_is_said():
    x, labels = sample(6, 3, n=100)
    with pytest.raises(UsageError, match="'search' needs at least 4 labelled classes, got 3"):
        estimate_number(x, labels, method="search")
    with pytest.raises(UsageError, match="'whole' needs at least 2 labelled classes, got 1"):
        estimate_number(x, np.where(labels == 0, 0, -1), method="whole")
    with pytest.raises(UsageError, match="search, whole or split"):
        estimate_number(x, labels, method="guess")
    with pytest.raises(UsageError, match="low must be at least the number of labelled classes, 3"):
        estimate_number(x, labels, method="split", low=2)
    with pytest.raises(UsageError, match="repeats"):
        estimate_number(x, labels, method="split", repeats=0)
    with pytest.raises(UsageError, match="100 integers"):
        estimate_number(x, labels[:5])
    assert isinstance(estimate_number(x, labels, method="split", repeats=1), Estimate)
