"""Batches of one group each, checked against a plain loop over the groups."""

from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from lightning import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, Dataset

from contralto import distributed
from contralto.data.grouped import GroupBatchSampler
from contralto.errors import UsageError

REFERENCE = Path(__file__).parents[1] / "reference" / "mcl_multistage.npz"


def sequence_by_loop(groups, width, smallest):
    """Groups of the batches of a pass, one of each group in turn."""
    left = {int(g): int((groups == g).sum()) for g in np.unique(groups) if g >= 0}
    sequence, sizes = [], []
    while any(left.values()):
        for g in sorted(left):
            size = min(left[g], width)
            if size == width or (size and size >= smallest):
                sequence.append(g)
                sizes.append(size)
            else:
                size = left[g]  # dropped
            left[g] -= size
    return sequence, sizes


@given(
    st.lists(st.integers(-1, 4), min_size=1, max_size=60),
    st.integers(1, 5),
    st.integers(0, 3),
    st.sampled_from([None, 1, 2]),
)
@settings(deadline=None)
def test_a_pass_takes_one_batch_of_every_group_in_turn(groups, size, seed, smallest):
    groups = np.array(groups)
    smallest = None if smallest is None else min(smallest, size)
    expected, sizes = sequence_by_loop(groups, size, size if smallest is None else smallest)
    sampler = GroupBatchSampler(groups, size, seed=seed, smallest=smallest)
    if not expected:
        with pytest.raises(UsageError, match="no group has"):
            len(sampler)
        return
    batches = [[row for _, row in batch] for batch in sampler]
    assert [set(groups[b].tolist()) for b in batches] == [{g} for g in expected]
    assert [len(b) for b in batches] == sizes
    assert len(sampler) == len(batches)
    assert sampler.sequence().tolist() == expected
    rows = [row for b in batches for row in b]
    assert len(set(rows)) == len(rows)


def test_the_sequence_is_that_of_the_reference():
    with np.load(REFERENCE, allow_pickle=False) as z:
        groups, sequence, length = z["sampler_pseudo"], z["sampler_w1_seq"], z["sampler_w1_len"]
    sampler = GroupBatchSampler(groups, 4, seed=0)
    assert [int(groups[b[0][1]]) for b in sampler] == sequence.tolist()
    assert len(sampler) == int(length)
    assert all(len(set(groups[[row for _, row in b]])) == 1 and len({*b}) == 4 for b in sampler)


def test_order_is_a_function_of_seed_and_epoch():
    groups = np.repeat([0, 1, 2], 20)
    orders = []
    for seed, epoch in ((0, 0), (0, 1), (1, 0), (0, 0)):
        sampler = GroupBatchSampler(groups, 4, seed=seed)
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
    assert orders[0] == orders[3]
    assert [[row for _, row in b] for b in orders[0]] != [[row for _, row in b] for b in orders[1]]
    assert orders[0] != orders[2]
    assert {e for b in orders[1] for e, _ in b} == {1}


def test_ranks_share_the_rows_of_every_batch(monkeypatch):
    groups = np.random.default_rng(0).integers(0, 3, 100)
    alone = [[row for _, row in b] for b in GroupBatchSampler(groups, 8, seed=1, smallest=2)]
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    parts = []
    for rank in range(2):
        monkeypatch.setattr(distributed, "rank", lambda r=rank: r)
        parts.append([[row for _, row in b] for b in GroupBatchSampler(groups, 4, seed=1, smallest=1)])
    assert len(parts[0]) == len(parts[1]) == len(alone)
    for whole, first, second in zip(alone, *parts, strict=True):
        assert len(first) == len(second)
        assert first == whole[0::2][: len(first)]
        assert second == whole[1::2]


def test_an_epoch_of_a_given_length_keeps_the_share_of_every_group():
    groups = np.repeat([0, 1], [900, 100])
    sampler = GroupBatchSampler(groups, 10, seed=0, batches=250)  # a pass has 100
    batches = list(sampler)
    assert len(batches) == len(sampler) == 250
    small = sum(groups[b[0][1]] == 1 for b in batches)
    assert 20 <= small <= 30  # two whole passes have 10 each; half of the third is drawn
    starts = np.array([groups[b[0][1]] for b in batches[200:]])
    assert starts.mean() < 0.25  # round robin alone would begin with as many of the small group
    half = GroupBatchSampler(groups, 10, seed=0, batches=50)
    seen = {groups[b[0][1]] for epoch in range(20) for b in _epoch(half, epoch)}
    assert seen == {0, 1}


def _epoch(sampler, epoch):
    sampler.set_epoch(epoch)
    return list(sampler)


@pytest.mark.parametrize("done", [0, 1, 11, 12, 13, 29])
def test_it_goes_on_where_it_was_interrupted(done):
    groups = np.repeat([0, 1, 2], [20, 17, 13])  # 12 batches of 4
    whole = _epoch(GroupBatchSampler(groups, 4, seed=3, batches=30), 5)
    sampler = GroupBatchSampler(groups, 4, seed=3, batches=30)
    sampler.start_at(5, done)
    assert list(sampler) == whole[done:]
    assert _epoch(sampler, 6) == _epoch(GroupBatchSampler(groups, 4, seed=3, batches=30), 6)


def test_what_cannot_be_is_said():
    with pytest.raises(UsageError, match="no group has the 4 rows of a batch over all ranks, the largest of 2 has 3"):
        list(GroupBatchSampler([0, 0, 0, 1], 4, seed=0))
    with pytest.raises(UsageError, match=r"integers of shape \(N,\), got float64"):
        GroupBatchSampler([0.5], 4, seed=0)
    with pytest.raises(UsageError, match="smallest must be between 1 and the batch size, 4; got 5"):
        GroupBatchSampler([0], 4, seed=0, smallest=5)
    with pytest.raises(UsageError, match="batch_size must be at least 1"):
        GroupBatchSampler([0], 0, seed=0)
    with pytest.raises(UsageError, match="batches must be at least 1"):
        GroupBatchSampler([0], 1, seed=0, batches=0)
    with pytest.raises(UsageError, match="the largest of 0 has 0"):
        len(GroupBatchSampler([-1, -1], 1, seed=0))


class Rows(Dataset):
    def __init__(self, n):
        self.x = torch.arange(float(n)).unsqueeze(1)

    def __getitem__(self, key):
        epoch, row = key
        return torch.tensor(epoch), torch.tensor(row), self.x[row]

    def __len__(self):
        return len(self.x)


class Watching(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer, self.seen = nn.Linear(1, 1), []

    def training_step(self, batch, batch_idx):
        epoch, rows, x = batch
        self.seen.append((epoch.tolist(), rows.tolist()))
        return self.layer(x).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.0)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_takes_it_and_the_trainer_tells_the_epoch(workers, tmp_path):
    groups = np.repeat([0, 1], [9, 5])
    loader = DataLoader(Rows(14), batch_sampler=GroupBatchSampler(groups, 4, seed=0), num_workers=workers)
    module = Watching()
    flags = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    Trainer(max_epochs=2, enable_model_summary=False, default_root_dir=tmp_path, **flags).fit(module, loader)
    sampler = GroupBatchSampler(groups, 4, seed=0)
    assert module.seen == [([e] * 4, [row for _, row in b]) for e in range(2) for b in _epoch(sampler, e)]
