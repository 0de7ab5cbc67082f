"""Accuracy of clusters against all matchings tried out, by both protocols."""

import itertools

import numpy as np
import pytest

from contralto.errors import UsageError
from contralto.evaluation.discovery import cluster_accuracy, match_clusters, right_clusters


def brute(truth, found):
    """Most samples that a one-to-one naming of clusters gets right."""
    clusters, classes = found.max() + 1, truth.max() + 1
    size = max(clusters, classes)
    return max(
        sum(names[c] == y for c, y in zip(found, truth, strict=True)) for names in itertools.permutations(range(size))
    )


@pytest.mark.parametrize(("classes", "clusters"), [(4, 4), (3, 5), (5, 3)])
def test_the_matching_is_the_best_of_all(classes, clusters):
    for seed in range(5):
        rng = np.random.default_rng(seed)
        truth, found = rng.integers(0, classes, 40), rng.integers(0, clusters, 40)
        truth[:classes], found[:clusters] = np.arange(classes), np.arange(clusters)
        assert right_clusters(truth, found, [0]).sum() == brute(truth, found)
        match = match_clusters(truth, found)
        named = match[match >= 0]
        assert len(set(named)) == len(named) == min(classes, clusters)


def some(seed=0, n=300):
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, 6, n)
    found = np.where(rng.random(n) < 0.7, (truth + 2) % 6, rng.integers(0, 6, n))
    return truth, found


@pytest.mark.parametrize("protocol", ["together", "apart"])
def test_names_of_clusters_do_not_matter_and_all_is_the_weighted_mean(protocol):
    truth, found = some()
    old = [0, 1, 2]
    one = cluster_accuracy(truth, found, old, protocol=protocol)
    other = cluster_accuracy(truth, np.random.default_rng(1).permutation(6)[found], old, protocol=protocol)
    assert one == other
    share = np.isin(truth, old).mean()
    assert one.all.value == pytest.approx(share * one.old.value + (1 - share) * one.new.value)
    for part in (one.all, one.old, one.new):
        assert part.low < part.value < part.high
    assert one.all.value == right_clusters(truth, found, old, protocol=protocol).mean()
    assert one.clusters == 6


def test_apart_is_never_lower_and_forgives_a_new_class_swallowed_by_an_old_one():
    for seed in range(5):
        truth, found = some(seed)
        together, apart = (right_clusters(truth, found, [0, 1], protocol=p).mean() for p in ("together", "apart"))
        assert apart >= together
    truth = np.repeat([0, 1], 50)
    swallowed = np.zeros(100, int)
    assert cluster_accuracy(truth, swallowed, [0]).all.value == 0.5
    assert cluster_accuracy(truth, swallowed, [0], protocol="apart").all.value == 1


def test_one_matching_serves_old_and_new():
    truth = np.array([0, 0, 0, 1, 1])
    found = np.array([7, 7, 7, 7, 3])
    got = cluster_accuracy(truth, found, [0])
    assert (got.old.value, got.new.value) == (1.0, 0.5)


def test_intervals_narrow_with_samples_and_widen_with_groups():
    truth, found = some(n=300)
    more = [np.tile(x, 16) for x in (truth, found)]
    width = [x.high - x.low for x in (cluster_accuracy(truth, found, [0]).all, cluster_accuracy(*more, [0]).all)]
    assert width[1] < 0.4 * width[0]
    grouped = cluster_accuracy(*more, [0], groups=np.tile(np.arange(300), 16).astype(str)).all
    assert grouped.high - grouped.low > 2 * width[1]


def test_parts_that_are_not_there_are_left_out():
    got = cluster_accuracy([0, 0, 1], [1, 1, 0], old_classes=[0, 1])
    assert np.isnan(got.new.value)
    assert set(got.scores()) == {"accuracy", "accuracy of old classes"}
    assert got.scores()["accuracy"]["value"] == 1


def test_what_cannot_be_is_said():
    with pytest.raises(UsageError, match="do not fit"):
        cluster_accuracy([0, 1], [0], [0])
    with pytest.raises(UsageError, match="without a right class"):
        cluster_accuracy([-1, 1], [0, 1], [0])
    with pytest.raises(UsageError, match="together"):
        cluster_accuracy([0, 1], [0, 1], [0], protocol="v1")
