"""Ways to say which given labels are wrong, and which are right instead, that are cheap to have and need no text.

Each takes scores of all classes for every picture and gives P(wrong) and new labels. None of them says what is off-topic.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from contralto.errors import MissingExtraError

__all__ = ["by_confidence", "by_neighbours"]

Array = npt.NDArray[Any]


def by_confidence(probs: Array, labels: npt.NDArray[np.int64]) -> tuple[Array, npt.NDArray[np.int64]]:
    """Confident learning (Northcutt, Jiang and Chuang 2021), by cleanlab: what it flags gets the label that the model names.

    Parameters
    ----------
    probs : array (N, C)
        Class probabilities for pictures that the model was not trained on.
    labels : array (N,)
        Given labels.

    Returns
    -------
    p_wrong : array (N,)
        One minus the probability of the given label, in [0, 1].
    new : array (N,)
        Labels after correction.

    Raises
    ------
    MissingExtraError
        Without cleanlab.

    Examples
    --------
    >>> probs = np.array([[0.9, 0.1]] * 10 + [[0.1, 0.9]] * 10)
    >>> labels = np.array([0] * 9 + [1] * 11)  # the tenth is wrong
    >>> by_confidence(probs, labels)[1].tolist() == [0] * 10 + [1] * 10
    True
    """
    try:
        from cleanlab.filter import find_label_issues
        from cleanlab.rank import get_self_confidence_for_each_label
    except ImportError as error:
        raise MissingExtraError("confident learning", extra="cleanlab") from error
    wrong = find_label_issues(labels, probs, n_jobs=1)  # in this process: some thousands of pictures take a second
    p_wrong = 1 - get_self_confidence_for_each_label(labels, probs)
    return np.asarray(p_wrong), np.where(wrong, probs.argmax(1), labels)


def by_neighbours(
    vote: Array, labels: npt.NDArray[np.int64], threshold: float = 0.6
) -> tuple[Array, npt.NDArray[np.int64]]:
    """The vote of `contralto.neighbors.vote.neighbour_vote`: a label is corrected where another one has a clear majority.

    Parameters
    ----------
    vote : array (N, C)
        Rows sum to 1.
    labels : array (N,)
        Given labels.
    threshold : float
        Share of the vote that another label needs.

    Returns
    -------
    p_wrong : array (N,)
        One minus the share of the vote for the given label, in [0, 1].
    new : array (N,)

    Examples
    --------
    >>> by_neighbours(np.array([[0.5, 0.5], [0.4, 0.6], [0.45, 0.55]]), np.array([1, 0, 0]))[1].tolist()
    [1, 1, 0]
    """
    own = vote[np.arange(len(labels)), labels]
    return 1 - own, np.where(vote.max(1) >= threshold, vote.argmax(1), labels)
