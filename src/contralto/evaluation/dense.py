"""How good a feature map is, cell by cell: a linear probe on cells, and the mean intersection over union."""

from typing import Any

import numpy as np
import numpy.typing as npt

from contralto.errors import UsageError

__all__ = ["cell_labels", "confusion_matrix", "dense_probe", "mean_iou", "propagate_labels"]

Array = npt.NDArray[Any]
Ints = npt.NDArray[np.int64]


def cell_labels(masks: Array, height: int, width: int, *, classes: int) -> Ints:
    """The class of every cell: the most frequent one among its pixels.

    Parameters
    ----------
    masks : integers (N, H, W)
        Classes in [0, classes) of pixels; all other values are unlabelled.
    height, width : int
        Of the feature maps; H and W must be multiples of them.
    classes : int

    Returns
    -------
    integers (N, height, width)
        -1 where most pixels are unlabelled; of classes with equally many pixels, the one with the lowest number.

    Examples
    --------
    >>> cell_labels(np.array([[[0, 0, 1, 1], [0, 2, 1, 9], [9, 9, 0, 0], [2, 9, 1, 1]]]), 2, 2, classes=3).tolist()
    [[[0, 1], [-1, 0]]]
    """
    masks = np.asarray(masks)
    if masks.ndim != 3 or masks.shape[1] % height or masks.shape[2] % width:
        raise UsageError(
            f"masks (N, H, W) of shape {masks.shape} cannot be cut into {height} x {width} cells of one size"
        )
    n, side_y, side_x = len(masks), masks.shape[1] // height, masks.shape[2] // width
    cells = masks.reshape(n, height, side_y, width, side_x).swapaxes(2, 3).reshape(n, height, width, -1)
    counts = np.stack([(cells == c).sum(-1) for c in range(classes)], -1)
    unlabelled = cells.shape[-1] - counts.sum(-1)
    return np.where(counts.max(-1) >= np.maximum(unlabelled, 1), counts.argmax(-1), -1).astype(np.int64)


def dense_probe(
    train: Array, train_labels: Ints, test: Array, *, C: float = 0.1, cells: int | None = 4000, seed: int = 0
) -> Ints:
    """What a linear probe says of every test cell: logistic regression on standardised, frozen features of cells.

    Parameters
    ----------
    train : array (N, D, h, w)
        Feature maps.
    train_labels : integers (N, h, w)
        From `cell_labels`; cells of -1 are left out.
    test : array (M, D, h, w)
    C : float
        Inverse strength of the L2 penalty, as in scikit-learn.
    cells : int, optional
        Train on so many, drawn by `seed`; default: all.
    seed : int

    Returns
    -------
    integers (M, h, w)

    Examples
    --------
    >>> maps = np.array([[[[0.0, 0.1], [1.0, 1.1]]]])
    >>> dense_probe(maps, np.array([[[0, 0], [1, 1]]]), maps, C=10.0).tolist()
    [[[0, 0], [1, 1]]]
    """
    from sklearn.linear_model import LogisticRegression

    rows, labels = _labelled(train, train_labels)
    if cells is not None and cells < len(rows):
        chosen = np.random.default_rng(seed).choice(len(rows), cells, replace=False)
        rows, labels = rows[chosen], labels[chosen]
    mean, scale = rows.mean(0), rows.std(0)
    scale = np.where(scale > 1e-12, scale, 1.0)
    probe = LogisticRegression(C=C, max_iter=1000).fit((rows - mean) / scale, labels)
    said = probe.predict((_rows(test) - mean) / scale)
    return np.asarray(said.reshape(len(test), *test.shape[2:]), dtype=np.int64)


def propagate_labels(
    train: Array, train_labels: Ints, test: Array, *, k: int = 10, cells: int | None = 4000, seed: int = 0
) -> Ints:
    """What the nearest training cells say of every test cell: a vote of `k`, by cosine.

    Parameters
    ----------
    train, train_labels, test, cells, seed
        See `dense_probe`.
    k : int

    Returns
    -------
    integers (M, h, w)
        Of classes with equally many votes, the one with the lowest number.

    Examples
    --------
    >>> maps = np.array([[[[1.0, 0.9]], [[0.0, 0.1]]], [[[0.0, 0.1]], [[1.0, 0.8]]]])
    >>> propagate_labels(maps, np.array([[[0, 0]], [[1, 1]]]), maps, k=1).tolist()
    [[[0, 0]], [[1, 1]]]
    """
    from contralto.neighbors.knn import knn

    rows, labels = _labelled(train, train_labels)
    if cells is not None and cells < len(rows):
        chosen = np.random.default_rng(seed).choice(len(rows), cells, replace=False)
        rows, labels = rows[chosen], labels[chosen]
    _, index = knn(rows, min(k, len(rows)), queries=_rows(test), search="auto")
    votes = np.zeros((len(index), int(labels.max()) + 1))
    np.add.at(votes, (np.arange(len(index))[:, None], labels[index]), 1)
    return np.asarray(votes.argmax(1).reshape(len(test), *test.shape[2:]), dtype=np.int64)


def confusion_matrix(truth: Ints, said: Ints, *, classes: int) -> Ints:
    """How many cells of class i were taken for class j; those of -1 are left out.

    Examples
    --------
    >>> confusion_matrix(np.array([0, 1, 1, -1]), np.array([0, 0, 1, 1]), classes=2).tolist()
    [[1, 0], [1, 1]]
    """
    truth, said = np.asarray(truth).ravel(), np.asarray(said).ravel()
    if truth.shape != said.shape:
        raise UsageError(f"truth and answers must be of one size, got {truth.size} and {said.size}")
    there = truth >= 0
    if (truth >= classes).any() or (said[there] >= classes).any() or (said[there] < 0).any():
        raise UsageError(f"classes must be in [0, {classes})")
    return np.bincount(truth[there] * classes + said[there], minlength=classes**2).reshape(classes, classes)


def mean_iou(confusion: Ints) -> float:
    """Mean over classes of intersection over union; classes that neither are there nor were named do not count.

    Parameters
    ----------
    confusion : integers (C, C)
        From `confusion_matrix`.

    Examples
    --------
    >>> mean_iou(np.array([[2, 0, 0], [1, 1, 0], [0, 0, 0]]))
    0.583333...
    """
    hit = np.diag(confusion).astype(np.float64)
    union = confusion.sum(0) + confusion.sum(1) - hit
    if not (union > 0).any():
        raise UsageError("there is no labelled cell at all")
    return float((hit[union > 0] / union[union > 0]).mean())


def _rows(maps: Array) -> Array:
    """Cells (N * h * w, D) of maps (N, D, h, w)."""
    if maps.ndim != 4:
        raise UsageError(f"feature maps must be of shape (N, D, h, w), got {maps.shape}")
    return np.moveaxis(maps, 1, 3).reshape(-1, maps.shape[1])


def _labelled(maps: Array, labels: Ints) -> tuple[Array, Ints]:
    """Cells that have a class, and their classes."""
    rows, flat = _rows(maps), np.asarray(labels).ravel()
    if (len(maps), *maps.shape[2:]) != np.shape(labels):
        raise UsageError(
            f"labels must be of shape {(len(maps), *maps.shape[2:])} for these maps, got {np.shape(labels)}"
        )
    if not (flat >= 0).any():
        raise UsageError("no cell has a label to learn from")
    return rows[flat >= 0], flat[flat >= 0]
