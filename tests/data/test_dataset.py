"""Order and randomness are functions of (seed, epoch, sample, view)."""

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from contralto.data.dataset import EpochSampler, FeatureDataset, ImageDataset
from contralto.errors import UsageError
from contralto.views.image import EvalView, weak_view


def read(row):
    return np.random.default_rng(row).integers(0, 255, (20, 24, 3), dtype=np.uint8)


def images(workers):
    fields = {"label": torch.arange(12) % 3, "weight": torch.ones(12)}
    dataset = ImageDataset(read, fields, [weak_view(8, (0.5,) * 3, (0.5,) * 3), EvalView(8)], seed=3)
    sampler = EpochSampler(12, seed=3)
    sampler.set_epoch(2)
    return list(DataLoader(dataset, batch_size=5, sampler=sampler, num_workers=workers))


def test_workers_change_nothing():
    for a, b in zip(images(0), images(2), strict=True):
        assert torch.equal(a["index"], b["index"])
        assert all(torch.equal(x, y) for x, y in zip(a["views"], b["views"], strict=True))


def test_order_is_a_permutation_that_changes_with_the_epoch():
    sampler = EpochSampler(50, seed=0)
    orders = []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        orders.append([row for _, row in sampler])
    assert sorted(orders[0]) == list(range(50))
    assert orders[0] == orders[2] != orders[1]
    with pytest.raises(UsageError, match="nothing to train on"):
        EpochSampler(0, seed=0)


def test_balanced_draws_give_every_class_the_same_share():
    labels = np.array([0] * 900 + [1] * 90 + [5] * 10)
    sampler = EpochSampler(1000, seed=0, labels=labels)
    drawn = labels[[row for _, row in sampler]]
    counts = np.array([(drawn == c).sum() for c in (0, 1, 5)])
    assert counts.sum() == 1000
    assert (np.abs(counts - 333) < 60).all()


def test_every_rank_gets_its_own_part_of_one_order(monkeypatch):
    from contralto import distributed

    whole = [row for _, row in EpochSampler(10, seed=1)]
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    parts = []
    for rank in range(3):
        monkeypatch.setattr(distributed, "rank", lambda r=rank: r)
        parts.append([row for _, row in EpochSampler(10, seed=1)])
    assert [len(p) for p in parts] == [4, 4, 4]
    merged = [row for together in zip(*parts, strict=True) for row in together]
    assert merged[:10] == whole


def test_feature_views_are_chosen_by_seed_and_epoch_alone():
    arrays = [np.random.default_rng(v).normal(size=(3, 20, 4)).astype(np.float32) for v in range(2)]
    a, b = (FeatureDataset(arrays, {"label": torch.arange(20)}, seed=1) for _ in range(2))
    whole = a.__getitems__([(4, i) for i in range(20)])
    for i in (3, 17):
        alone = b[(4, i)]
        assert all(torch.equal(x[i], y) for x, y in zip(whole["views"], alone["views"], strict=True))
    other = a.__getitems__([(5, i) for i in range(20)])
    assert not torch.equal(whole["views"][0], other["views"][0])
    for view, array in zip(whole["views"], arrays, strict=True):
        for i in range(20):
            assert any(np.array_equal(view[i].numpy(), array[v, i]) for v in range(3))


def test_an_epoch_of_halves_has_half_of_every_group_and_all_of_the_trusted():
    groups = np.array([0] * 5 + [1] * 4 + [-1] * 3)
    sampler = EpochSampler(len(groups), seed=0, halves=groups)
    epochs = []
    for epoch in range(40):
        sampler.set_epoch(epoch)
        rows = [row for _, row in sampler]
        assert len(rows) == len(set(rows)) == len(sampler) == 3 + 2 + 3
        assert np.bincount(groups[rows] + 1).tolist() == [3, 3, 2]
        epochs.append(rows)
    seen = np.bincount(np.concatenate(epochs), minlength=12)
    assert (seen[9:] == 40).all()
    assert (np.abs(seen[:5] - 24) < 12).all()  # 3 of 5
    assert (np.abs(seen[5:9] - 20) < 12).all()
