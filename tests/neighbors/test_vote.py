"""The vote of neighbours against loops, copies, and ends of ranges."""

import numpy as np
import pytest

from contralto.errors import UsageError
from contralto.neighbors.vote import neighbour_vote


def slow_vote(features, known, k, copies):
    """One row at a time, by the definition."""
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    out = []
    for i in range(len(features)):
        similarity = unit @ unit[i]
        similarity[i] = -np.inf
        nearest = np.argsort(-similarity, kind="stable")[:k]
        total, weight = np.zeros(known.shape[1]), 0.0
        for j in nearest:
            share = max(similarity[j], 0.0) * (copies is None or copies[i] != copies[j])
            total, weight = total + share * known[j], weight + share
        out.append(total / weight if weight > 0 else known.mean(0))
    return np.array(out)


@pytest.mark.parametrize("with_copies", [False, True])
def test_it_is_the_weighted_mean_of_the_nearest(with_copies):
    rng = np.random.default_rng(0)
    features, known = rng.normal(size=(60, 5)), np.eye(4)[rng.integers(4, size=60)]
    copies = rng.integers(20, size=60) if with_copies else None
    found = neighbour_vote(features, known, 7, copies=copies)
    np.testing.assert_allclose(found, slow_vote(features, known, 7, copies), atol=1e-6)
    np.testing.assert_allclose(found.sum(1), 1)


def test_a_picture_never_votes_for_itself_even_among_identical_ones():
    features, known = np.ones((9, 3)), np.eye(9)
    assert (np.diag(neighbour_vote(features, known, 4)) == 0).all()


def test_where_nobody_votes_the_mean_of_all_stands():
    known = np.array([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    found = neighbour_vote(np.eye(3), known, 2)  # cosines of zero
    np.testing.assert_allclose(found, np.tile(known.mean(0), (3, 1)))
    alone = neighbour_vote(np.ones((3, 2)), known, 2, copies=np.zeros(3, int))
    np.testing.assert_allclose(alone, np.tile(known.mean(0), (3, 1)))


def test_more_neighbours_than_rows_are_all_rows():
    rng = np.random.default_rng(1)
    features, known = rng.random((5, 3)), np.eye(2)[[0, 1, 0, 1, 1]]
    np.testing.assert_allclose(neighbour_vote(features, known, 100), slow_vote(features, known, 4, None), atol=1e-6)


@pytest.mark.parametrize("given", [{"k": 0}, {"known": np.eye(3)}, {"copies": np.zeros(3)}])
def test_what_does_not_fit_is_refused(given):
    arguments = {"known": np.eye(4), "k": 2} | given
    with pytest.raises(UsageError):
        neighbour_vote(np.eye(4), **arguments)
