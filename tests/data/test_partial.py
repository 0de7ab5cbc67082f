"""Hidden labels, and batches that are half labelled."""

import numpy as np
import pytest

from contralto import distributed
from contralto.data.partial import HalfLabelledSampler, partial_labels
from contralto.errors import UsageError


def test_labels_of_old_classes_are_shown_in_part_and_those_of_new_ones_never():
    truth = np.random.default_rng(0).integers(0, 10, 2000)
    for share in (0.0, 0.1, 0.5, 1.0):
        shown = partial_labels(truth, [1, 4, 7], share, np.random.default_rng(1))
        for number, c in enumerate([1, 4, 7]):
            mine = shown[truth == c]
            assert set(mine) <= {-1, number}
            assert (mine >= 0).sum() == round(share * len(mine))
        assert (shown[~np.isin(truth, [1, 4, 7])] == -1).all()


def test_a_class_of_few_samples_keeps_one_and_the_choice_is_the_generators():
    assert sorted(partial_labels([3, 3, 3, 8], [3, 8], 0.1, np.random.default_rng(0))) == [-1, -1, 0, 1]
    truth = np.repeat([0, 1], 50)
    one, same, other = (partial_labels(truth, [0], 0.5, np.random.default_rng(s)) for s in (0, 0, 1))
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)


def test_what_cannot_be_hidden_is_said():
    with pytest.raises(UsageError, match="no sample of class 5"):
        partial_labels([0, 1], [1, 5], 0.5, np.random.default_rng(0))
    with pytest.raises(UsageError, match=r"share must be in \[0, 1\]"):
        partial_labels([0, 1], [1], 2, np.random.default_rng(0))


def test_half_of_the_draws_are_labelled_whatever_the_share():
    for labelled in (10, 300, 900):
        labels = np.where(np.arange(1000) < labelled, 2, -1)
        drawn = np.array([row for epoch in range(20) for row in epoch_of(labels, epoch)])
        share = (labels[drawn] >= 0).mean()
        assert share == pytest.approx(0.5, abs=0.02)
        mine = np.bincount(drawn, minlength=1000)[labelled:]
        assert mine.std() / mine.mean() < 1.5 / np.sqrt(mine.mean())  # unlabelled samples have equal chances
    with pytest.raises(UsageError, match="nothing to train on"):
        HalfLabelledSampler([], seed=0)


def epoch_of(labels, epoch, seed=3):
    sampler = HalfLabelledSampler(labels, seed=seed)
    sampler.set_epoch(epoch)
    return [row for e, row in sampler if e == epoch]


@pytest.mark.parametrize("labels", [np.full(40, -1), np.zeros(40, int)])
def test_all_or_none_labelled_are_drawn_alike(labels):
    drawn = np.bincount([r for e in range(200) for r in epoch_of(labels, e)], minlength=40)
    assert drawn.sum() == 8000
    assert drawn.min() > 120


def test_order_is_a_function_of_seed_and_epoch_and_goes_on_within_one():
    labels = np.where(np.arange(50) < 10, 0, -1)
    whole = epoch_of(labels, 4)
    assert whole == epoch_of(labels, 4) != epoch_of(labels, 5)
    assert whole != epoch_of(labels, 4, seed=9)
    sampler = HalfLabelledSampler(labels, seed=3)
    sampler.start_at(4, 20)
    assert [row for _, row in sampler] == whole[20:]


def test_ranks_share_one_order(monkeypatch):
    labels = np.where(np.arange(50) < 10, 0, -1)
    whole, parts = epoch_of(labels, 0), []
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    for rank in range(2):
        monkeypatch.setattr(distributed, "rank", lambda r=rank: r)
        parts.append(epoch_of(labels, 0))
    assert [row for pair in zip(*parts, strict=True) for row in pair] == whole
