"""What the most similar others say: k-NN label voting, leaving each picture and its copies out."""

from typing import Any

import numpy as np
import numpy.typing as npt

from contralto.errors import UsageError
from contralto.neighbors.knn import knn

__all__ = ["neighbour_vote"]

Array = npt.NDArray[Any]


def neighbour_vote(
    features: Array, known: Array, k: int = 20, *, copies: Array | None = None
) -> npt.NDArray[np.float64]:
    """Mean of what is known of the k nearest others, weighted by the positive part of the cosine.

    Parameters
    ----------
    features : array (N, D)
        Scaled to length one here.
    known : array (N, K)
        Distributions over K classes, such as one-hot labels.
    k : int
        Neighbours that vote, the row itself not among them.
    copies : array (N,), optional
        A number for every row; rows with the same number are copies and have no vote on each other.

    Returns
    -------
    array (N, K)
        Rows sum as those of `known`; the mean of `known` where no neighbour has a vote.

    Raises
    ------
    UsageError
        If the lengths do not fit, or k is below 1.

    Examples
    --------
    >>> features = np.array([[1.0, 0.0], [0.9, 0.1], [0.8, 0.2], [0.0, 1.0]])
    >>> neighbour_vote(features, np.eye(2)[[0, 1, 1, 0]], k=2).round(2).tolist()[0]
    [0.0, 1.0]
    """
    if known.ndim != 2 or len(known) != len(features) or (copies is not None and len(copies) != len(features)):
        raise UsageError(
            f"features (N, D), known (N, K) and copies (N,) do not fit: {features.shape}, {known.shape}, "
            f"{None if copies is None else copies.shape}"
        )
    if k < 1:
        raise UsageError(f"k must be at least 1, got {k}")
    similarity, index = knn(features, min(k + 1, len(features)), search="auto")
    weight = similarity.clip(0) * (index != np.arange(len(index))[:, None])
    # With copies of it in the data, a row need not be its own first neighbour: then the last one is one too many.
    weight[(weight > 0).all(1), -1] = 0
    if copies is not None:
        weight = weight * (copies[index] != copies[:, None])
    out = np.zeros(known.shape)
    for j in range(index.shape[1]):  # one neighbour at a time: (N, k, K) may not fit into memory
        out += weight[:, j, None] * known[index[:, j]]
    total = weight.sum(1, keepdims=True)
    return np.asarray(np.where(total > 1e-9, out / np.maximum(total, 1e-9), known.mean(0)))
