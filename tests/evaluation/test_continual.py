"""Measures of continual learning against loops, and their intervals."""

import numpy as np
import pytest

from contralto.errors import UsageError
from contralto.evaluation.continual import (
    accuracy_matrix,
    average_accuracy,
    backward_transfer,
    continual_scores,
    forgetting,
    right_answers,
)

RNG = np.random.default_rng(0)
TASKS = RNG.integers(-1, 4, 300)
RIGHT = RNG.random((4, 300)) < 0.7


def by_hand(right, tasks):
    """All measures with loops over tasks."""
    a = [[np.mean(right[i][tasks == j]) if j <= i else np.nan for j in range(4)] for i in range(4)]
    return {
        "average": np.mean(a[3]),
        "incremental": np.mean([np.mean(right[i][(tasks >= 0) & (tasks <= i)]) for i in range(4)]),
        "last": np.mean(right[3][tasks >= 0]),
        "forgetting": np.mean([max(a[i][j] for i in range(j, 3)) - a[3][j] for j in range(3)]),
        "backward": np.mean([a[3][j] - a[j][j] for j in range(3)]),
    }, a


def test_all_measures_are_what_loops_say():
    wanted, a = by_hand(RIGHT, TASKS)
    matrix = accuracy_matrix(RIGHT, TASKS)
    np.testing.assert_allclose(matrix, a, rtol=1e-12)
    found = {k: v.value for k, v in continual_scores(RIGHT, TASKS).items()}
    assert found == pytest.approx(wanted, rel=1e-12)
    assert average_accuracy(matrix) == pytest.approx(wanted["average"])
    assert forgetting(matrix) == pytest.approx(wanted["forgetting"])
    assert backward_transfer(matrix) == pytest.approx(wanted["backward"])


def test_intervals_are_as_wide_as_binomial_ones_and_wider_for_groups():
    n = 4000
    tasks, right = np.repeat([0, 1], n // 2), np.random.default_rng(1).random((2, n)) < 0.8
    alone = continual_scores(right, tasks)["average"]
    assert (alone.high - alone.low) / (2 * 1.96 * np.sqrt(0.16 / n)) == pytest.approx(1, abs=0.12)
    together = np.repeat(right[:, ::10], 10, axis=1)
    names = np.repeat(np.arange(n // 10), 10).astype(str)
    grouped = continual_scores(together, tasks, groups=names)["average"]
    assert (grouped.high - grouped.low) / (alone.high - alone.low) == pytest.approx(np.sqrt(10), abs=0.5)
    assert continual_scores(right, tasks) == continual_scores(right, tasks)


def test_what_was_said_of_tasks_to_come_does_not_count():
    other = RIGHT.copy()
    other[np.arange(4)[:, None] < TASKS] = True
    assert continual_scores(other, TASKS) == continual_scores(RIGHT, TASKS)


def test_one_task_forgets_nothing():
    scores = continual_scores([[1, 0, 1, 1]], [0, 0, 0, -1])
    assert scores["forgetting"] == scores["backward"] == (0.0, 0.0, 0.0)
    assert scores["average"].value == pytest.approx(2 / 3)
    assert forgetting([[0.5]]) == backward_transfer([[0.5]]) == 0


def test_answers_by_both_protocols():
    logits = RNG.normal(size=(50, 6))
    logits[:, 5] = -np.inf
    labels, classes = RNG.integers(0, 6, 50), [[0, 3], [1, 2], [4, 5]]
    tasks = np.array([next(t for t, group in enumerate(classes) if c in group) for c in labels])
    tasks[7] = -1
    found = right_answers(logits, labels, tasks, classes)
    for row in range(50):
        known = labels[row] != 5 and row != 7
        group = classes[tasks[row]]
        within = group[int(np.argmax(logits[row, group]))]
        assert found.class_incremental[row] == (known and logits[row].argmax() == labels[row])
        assert found.task_incremental[row] == (known and within == labels[row])


def test_what_does_not_fit_is_refused():
    with pytest.raises(UsageError, match="no test sample"):
        accuracy_matrix(RIGHT, np.zeros(300, int))
    with pytest.raises(UsageError, match="right must be"):
        accuracy_matrix(RIGHT, TASKS[:5])
