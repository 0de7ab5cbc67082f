"""Dense probes and measures against loops over cells, and scikit-learn."""

import numpy as np
import pytest
from sklearn.metrics import confusion_matrix as theirs
from sklearn.metrics import jaccard_score

from contralto.errors import UsageError
from contralto.evaluation.dense import cell_labels, confusion_matrix, dense_probe, mean_iou, propagate_labels


def blobs(seed=0, n=6, h=3, w=4, classes=3, d=5):
    """Maps whose cells lie around the centre of their class."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(classes, size=(n, h, w))
    centres = 4 * np.random.default_rng(9).normal(size=(classes, d))
    return np.moveaxis(centres[labels] + rng.normal(size=(n, h, w, d)), 3, 1), labels


def test_the_class_of_a_cell_is_that_of_most_of_its_pixels():
    masks = np.random.default_rng(0).integers(5, size=(4, 6, 9))  # 3 and 4 are no classes
    found = cell_labels(masks, 3, 3, classes=3)
    for n in range(4):
        for r in range(3):
            for c in range(3):
                pixels = masks[n, 2 * r : 2 * r + 2, 3 * c : 3 * c + 3].ravel().tolist()
                counts = [pixels.count(k) for k in range(3)]
                nothing = len(pixels) - sum(counts)
                assert found[n, r, c] == (counts.index(max(counts)) if max(counts) >= max(nothing, 1) else -1)
    assert (cell_labels(np.full((1, 2, 2), 255), 1, 1, classes=3) == -1).all()


def test_the_mean_intersection_over_union_is_that_of_scikit_learn():
    rng = np.random.default_rng(1)
    truth, said = rng.integers(-1, 4, size=200), rng.integers(4, size=200)
    found = confusion_matrix(truth, said, classes=4)
    there = truth >= 0
    assert np.array_equal(found, theirs(truth[there], said[there]))
    assert mean_iou(found) == pytest.approx(jaccard_score(truth[there], said[there], average="macro"))
    assert mean_iou(np.pad(found, (0, 2))) == mean_iou(found)  # classes that are nowhere
    with pytest.raises(UsageError, match="no labelled cell"):
        mean_iou(np.zeros((2, 2), dtype=np.int64))


@pytest.mark.parametrize("probe", [dense_probe, propagate_labels])
def test_probes_find_what_can_be_found(probe):
    train, labels = blobs()
    test, truth = blobs(1)
    said = probe(train, labels, test)
    assert said.shape == truth.shape
    assert (said == truth).mean() > 0.95
    noise = np.random.default_rng(2).normal(size=train.shape)
    assert (probe(noise, labels, noise[::-1]) == labels).mean() < 0.6


@pytest.mark.parametrize("probe", [dense_probe, propagate_labels])
def test_probes_see_no_unlabelled_cell_and_draw_by_the_seed(probe):
    train, labels = blobs()
    train[:2], hidden = 1e3, labels.copy()
    hidden[:2] = -1
    test, _ = blobs(1)
    assert np.array_equal(probe(train, hidden, test), probe(train[2:], labels[2:], test))
    few = [probe(train, hidden, test, cells=12, seed=s) for s in (0, 0, 1)]
    assert np.array_equal(few[0], few[1])
    assert not np.array_equal(few[0], few[2]) or probe is propagate_labels


def test_the_vote_of_neighbours_is_by_cosine():
    train, labels = blobs()
    test, _ = blobs(1)
    rows, cells = (np.moveaxis(x, 1, 3).reshape(-1, 5) for x in (train, test))
    cosine = (cells / np.linalg.norm(cells, axis=1)[:, None]) @ (rows / np.linalg.norm(rows, axis=1)[:, None]).T
    nearest = np.argsort(-cosine, axis=1)[:, :3]
    slow = [np.bincount(labels.ravel()[n], minlength=3).argmax() for n in nearest]
    assert propagate_labels(train, labels, test, k=3).ravel().tolist() == slow


def test_what_does_not_fit_is_named():
    train, labels = blobs()
    with pytest.raises(UsageError, match="cannot be cut into 4 x 3 cells"):
        cell_labels(np.zeros((1, 9, 9)), 4, 3, classes=2)
    with pytest.raises(UsageError, match=r"labels must be of shape \(6, 3, 4\)"):
        dense_probe(train, labels[:, :2], train)
    with pytest.raises(UsageError, match=r"feature maps must be of shape \(N, D, h, w\)"):
        dense_probe(train, labels, train[0])
    with pytest.raises(UsageError, match="no cell has a label"):
        dense_probe(train, np.full_like(labels, -1), train)
    with pytest.raises(UsageError, match="one size"):
        confusion_matrix(labels, labels[:2], classes=3)
    with pytest.raises(UsageError, match=r"in \[0, 2\)"):
        confusion_matrix(labels, labels, classes=2)
