"""Accuracy by group, and last-layer retraining."""

import numpy as np
import pytest

from contralto.errors import UsageError
from contralto.evaluation.groups import group_accuracy, retrained_right
from contralto.evaluation.representation import probe_right


def waterbirds(n, share, seed):
    """Two features: the bird, noisy, and its background, clear, that agree in a share of the cases."""
    rng = np.random.default_rng(seed)
    label = rng.integers(2, size=n)
    place = np.where(rng.random(n) < share, label, 1 - label)
    x = np.stack([label + 0.5 * rng.normal(size=n), 3 * place + 0.1 * rng.normal(size=n), rng.normal(size=n)], 1)
    return x, label, np.array(["land", "water"])[place]


def test_the_worst_group_is_found():
    rng = np.random.default_rng(0)
    right, groups = rng.integers(2, size=50), rng.choice(["a", "b", "c"], 50)
    found = group_accuracy(right, groups)
    slow = {g: np.mean([r for r, h in zip(right, groups, strict=True) if h == g]) for g in "abc"}
    assert found.groups == pytest.approx(slow)
    assert found.worst == min(slow.values())
    with pytest.raises(UsageError, match="do not fit"):
        group_accuracy(right, groups[1:])


def test_balanced_retraining_serves_the_worst_group_better_than_a_plain_probe():
    train, train_labels, _ = waterbirds(2000, 0.97, 0)
    held, held_labels, held_groups = waterbirds(1000, 0.9, 1)
    test, test_labels, test_groups = waterbirds(2000, 0.5, 2)
    names = np.char.add(test_labels.astype(str), test_groups)
    plain = group_accuracy(probe_right(train, train_labels, test, test_labels), names)
    again = retrained_right(train, held, held_labels, held_groups, test, test_labels)
    balanced = group_accuracy(again, names)
    assert plain.worst < 0.6
    assert balanced.worst > 0.75
    assert np.array_equal(again, retrained_right(train, held, held_labels, held_groups, test, test_labels))


def test_several_classes_and_unnamed_numbers_serve_as_labels():
    rng = np.random.default_rng(3)
    labels = rng.choice([2, 5, 9], 300)
    x = np.eye(10)[labels] + 0.1 * rng.normal(size=(300, 10))
    groups = rng.choice(["a", "b"], 300)
    assert retrained_right(x, x, labels, groups, x, labels, draws=3).mean() == 1
    with pytest.raises(UsageError, match="do not fit"):
        retrained_right(x, x, labels[1:], groups, x, labels)
