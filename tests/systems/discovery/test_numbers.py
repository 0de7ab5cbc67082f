"""The score of prototypes, and the search that trains with several numbers of them."""

import numpy as np
import pytest

from contralto.errors import UsageError
from contralto.systems.discovery.base import Discovered
from contralto.systems.discovery.numbers import Trial, prototype_number, prototype_score

KINDS = 6


def test_the_score_is_nearness_less_the_nearest_other_prototype_among_those_in_use():
    rng = np.random.default_rng(0)
    u, mu = rng.normal(size=(40, 5)), rng.normal(size=(7, 5))
    u[:, 0] += 4
    mu[3] = [-9, 0, 0, 0, 0]  # nobody's
    unit, centre = u / np.linalg.norm(u, axis=1)[:, None], mu / np.linalg.norm(mu, axis=1)[:, None]
    near = [max(float(x @ m) for m in centre) for x in unit]
    used = sorted({int(np.argmax([x @ m for m in centre])) for x in unit})
    far = [max(float(centre[k] @ centre[j]) for j in used if j != k) for k in used]
    assert len(used) < 7
    assert prototype_score(u, mu) == pytest.approx(np.mean(near) - np.mean(far), rel=1e-5)
    assert prototype_score(np.ones((4, 2)), np.eye(2)[:1]) == -1


def world(seed=0):
    rng = np.random.default_rng(seed)
    kind = rng.integers(KINDS, size=300)
    x = np.eye(KINDS)[kind] + 0.1 * rng.normal(size=(300, KINDS))
    labels = np.where((kind < 3) & (rng.random(300) < 0.5), kind, -1)
    return x, kind, labels


def trained(x, k, *, wrong=()):
    """Prototypes at the centres; if there are too many, some twice with a shift; labelled samples go wrong at some numbers."""
    mu = np.concatenate([np.eye(KINDS), np.eye(KINDS) + 0.2 * np.eye(KINDS)[::-1], np.eye(KINDS) + 0.1])[:k]
    found = (x @ (mu / np.linalg.norm(mu, axis=1)[:, None]).T).argmax(1)
    return Trial(x, Discovered(found + 100 if k in wrong else found, np.ones(len(x)), mu, 0.1, [k]))


@pytest.mark.parametrize(("low", "high"), [(2, 18), (3, 12), (5, 7)])
def test_the_search_finds_the_number_and_trains_few_times(low, high):
    x, _, labels = world()
    asked = []

    def train(k, seed):
        asked.append((k, seed))
        return trained(x, k)

    found = prototype_number(train, labels, low=low, high=high, repeats=3, seed=4)
    assert (found.number, found.low, found.high) == (KINDS, KINDS, KINDS)
    assert {s for _, s in asked} == {4, 5, 6}
    assert len(asked) == len(set(asked)) <= 3 * min(12, high - low + 1)
    assert max(found.tried, key=found.tried.get) == KINDS
    assert all(low <= k <= high for k in found.tried)


def test_a_number_at_which_labelled_samples_go_wrong_is_not_taken():
    x, _, labels = world()
    found = prototype_number(lambda k, s: trained(x, k, wrong=(KINDS,)), labels, low=5, high=7)
    assert found.number != KINDS
    forgiven = prototype_number(lambda k, s: trained(x, k, wrong=(KINDS,)), labels, low=5, high=7, loss=1.0)
    assert forgiven.number == KINDS


def test_what_cannot_be_is_said():
    x, _, labels = world()
    for low, high, repeats in ((1, 5, 1), (6, 5, 1), (2, 5, 0)):
        with pytest.raises(UsageError, match="low <= high"):
            prototype_number(lambda k, s: trained(x, k), labels, low=low, high=high, repeats=repeats)
    with pytest.raises(UsageError, match="do not fit"):
        prototype_score(np.eye(3), np.eye(2))
