"""Spurious correlations: how well the worst group is served, and how well it could be with the same features."""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from contralto.errors import UsageError

__all__ = ["GroupAccuracy", "group_accuracy", "retrained_right"]

Array = npt.NDArray[Any]


class GroupAccuracy(NamedTuple):
    """Accuracy of every group by its name, and the `worst` of them."""

    groups: dict[str, float]
    worst: float


def group_accuracy(right: Array, groups: Array) -> GroupAccuracy:
    """Accuracy by group, such as class and background.

    Parameters
    ----------
    right : array (N,)
        1 where the answer is right.
    groups : array (N,)

    Examples
    --------
    >>> group_accuracy(np.array([1, 1, 0, 1]), np.array(["a", "a", "b", "b"]))
    GroupAccuracy(groups={'a': 1.0, 'b': 0.5}, worst=0.5)
    """
    if len(right) != len(groups) or len(right) == 0:
        raise UsageError(f"right (N,) and groups (N,) do not fit: {np.shape(right)} and {np.shape(groups)}")
    by_group = {str(g): float(np.asarray(right)[groups == g].mean()) for g in np.unique(groups)}
    return GroupAccuracy(by_group, min(by_group.values()))


def retrained_right(
    train: Array,
    held: Array,
    held_labels: Array,
    held_groups: Array,
    test: Array,
    test_labels: Array,
    *,
    C: float = 1.0,
    draws: int = 10,
    seed: int = 0,
) -> npt.NDArray[np.float64]:
    """Last-layer retraining (Kirichenko et al. 2023): a linear classifier from held-out samples of which all groups have as many.

    Parameters
    ----------
    train : array (N, D)
        Features of the training set, by whose mean and deviation all are standardised.
    held, held_labels, held_groups : array (M, D), (M,), (M,)
        From what the classifier learns.
    test, test_labels : array (K, D), (K,)
    C : float
        Inverse strength of the L2 penalty.
    draws : int
        Balanced subsamples; the coefficients are averaged over them.
    seed : int

    Returns
    -------
    array (K,)
        1 where the answer is right, for `group_accuracy`.

    Examples
    --------
    >>> x, y = np.array([[0.0], [0.1], [1.0], [1.1]]), np.array([0, 0, 1, 1])
    >>> retrained_right(x, x, y, np.array(["a", "b", "a", "b"]), x, y, draws=2).tolist()
    [1.0, 1.0, 1.0, 1.0]
    """
    from sklearn.linear_model import LogisticRegression

    if not len(held) == len(held_labels) == len(held_groups):
        raise UsageError(
            f"held-out features, labels and groups do not fit: {len(held)}, {len(held_labels)}, {len(held_groups)}"
        )
    mean, scale = train.mean(0), train.std(0)
    scale = np.where(scale > 1e-12, scale, 1.0)
    held, test = (held - mean) / scale, (test - mean) / scale
    pairs = np.unique(
        np.stack([np.asarray(held_labels, str), np.asarray(held_groups, str)], 1), axis=0, return_inverse=True
    )
    member = pairs[1].reshape(-1)
    size = int(np.bincount(member).min())
    rng, weights, biases = np.random.default_rng(seed), [], []
    for _ in range(draws):
        order = rng.permutation(len(held))
        kept = np.concatenate([order[member[order] == g][:size] for g in range(len(pairs[0]))])
        fitted = LogisticRegression(C=C, max_iter=1000).fit(held[kept], np.asarray(held_labels)[kept])
        weights.append(fitted.coef_)
        biases.append(fitted.intercept_)
    scores = test @ np.mean(weights, 0).T + np.mean(biases, 0)
    found = (scores[:, 0] > 0).astype(int) if scores.shape[1] == 1 else scores.argmax(1)
    return np.asarray((fitted.classes_[found] == test_labels).astype(np.float64))
