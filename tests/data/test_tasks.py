"""Streams of tasks: what belongs to which, and the batches of one."""

import numpy as np
import pytest
from torch.utils.data import DataLoader

from contralto.data.canvas import as_it_is
from contralto.data.tasks import (
    TaskSampler,
    class_order,
    split_by_class,
    split_by_domain,
    split_by_drift,
    task_of_samples,
)
from contralto.errors import UsageError

LABELS = np.random.default_rng(0).integers(-1, 10, 400)


@pytest.mark.parametrize("tasks", [1, 3, 5, 10])
def test_tasks_by_class_share_nothing_and_leave_nothing_out(tasks):
    found = split_by_class(LABELS, tasks, seed=3)
    assert len(found) == tasks
    assert sorted(c for t in found for c in t.classes) == list(range(10))
    rows = np.concatenate([t.rows for t in found])
    assert np.array_equal(np.sort(rows), np.flatnonzero(LABELS >= 0))
    assert all(set(LABELS[t.rows]) == set(t.classes) for t in found)
    assert max(len(t.classes) for t in found) - min(len(t.classes) for t in found) <= 1


def test_the_order_of_classes_is_that_of_the_seed_or_of_ones_own():
    orders = [[c for t in split_by_class(LABELS, 5, seed=s) for c in t.classes] for s in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]
    assert orders[0] == class_order(10, 1).tolist()
    own = [9, 8, 7, 6, 5, 4, 3, 2, 1, 0]
    assert split_by_class(LABELS, 5, order=own)[0].classes == (9, 8)
    with pytest.raises(UsageError, match="each of the 10 classes once"):
        split_by_class(LABELS, 5, order=[0, 1])
    with pytest.raises(UsageError, match="between 1 and 10"):
        split_by_class(LABELS, 11)
    with pytest.raises(UsageError, match="integers"):
        split_by_class([0.5, 1.0], 1)


def test_a_task_of_a_domain_has_all_its_classes():
    domains = np.where(np.arange(400) % 3 == 0, "ink", "<b>photo</b>")
    found = split_by_domain(LABELS, domains, seed=0)
    assert {t.name for t in found} == {"ink", "<b>photo</b>"}
    for task in found:
        assert np.array_equal(task.rows, np.flatnonzero((domains == task.name) & (LABELS >= 0)))
        assert task.classes == tuple(range(10))
    test = task_of_samples(found, [3, -1, 4, 4], np.array(["ink", "ink", "<b>photo</b>", "oil"]))
    names = [found[t].name if t >= 0 else None for t in test]
    assert names == ["ink", None, "<b>photo</b>", None]
    with pytest.raises(UsageError, match="one entry per sample"):
        split_by_domain(LABELS, domains[:5])


def test_drift_has_no_boundary_and_every_sample_comes_once():
    labels = np.repeat(np.arange(10), 200)
    found = split_by_drift(labels, 5, width=0.7, seed=1)
    rows = np.concatenate([t.rows for t in found])
    assert np.array_equal(np.sort(rows), np.arange(2000))
    share = np.array([[np.isin(labels[t.rows], u.classes).mean() for u in found] for t in found])
    assert (share.argmax(1) == np.arange(5)).all()  # its own classes are the most frequent ones of a stretch
    assert (share[np.arange(4), np.arange(1, 5)] > 0.05).all()  # and the next ones are there already
    assert share[0, 4] == 0
    again = split_by_drift(labels, 5, width=0.7, seed=1)
    assert all(np.array_equal(a.rows, b.rows) for a, b in zip(found, again, strict=True))
    sharp = split_by_drift(LABELS, 5, width=0.0, seed=1)
    assert all(set(LABELS[t.rows]) == set(t.classes) for t in sharp)
    with pytest.raises(UsageError, match="width"):
        split_by_drift(labels, 5, width=-1)


def test_test_samples_follow_the_classes():
    tasks = split_by_class([5, 2, 9, 9], 3)
    assert task_of_samples(tasks, [9, 2, 5, 7, -1, 12]).tolist() == [2, 0, 1, -1, -1, -1]


def test_a_sampler_takes_the_task_once_in_an_epoch_and_never_another():
    sampler = TaskSampler(np.arange(100, 141), 8, seed=0)
    rows = [row for batch in sampler for _, row in batch]
    assert len(sampler) == 5
    assert len(rows) == len(set(rows)) == 40
    assert set(rows) <= set(range(100, 141))
    sampler.set_epoch(1)
    assert [row for batch in sampler for _, row in batch] != rows


@pytest.mark.parametrize("replayed", [0, 3])
def test_memory_is_shuffled_in_or_has_its_places(replayed):
    memory = np.arange(7)
    sampler = TaskSampler(np.arange(100, 140), 8, seed=0, memory=memory, replayed=replayed)
    batches = [[row for _, row in batch] for batch in sampler]
    assert all(len(batch) == 8 == len(set(batch)) for batch in batches)
    old = [sum(row < 100 for row in batch) for batch in batches]
    if replayed:
        assert old == [3] * 8
        times = np.bincount([row for batch in batches for row in batch if row < 100], minlength=7)
        assert times.max() - times.min() <= 1  # the memory is gone through evenly
    else:
        assert sum(old) <= 7
        assert len(batches) == 47 // 8
    assert TaskSampler([1, 2, 3], 8, seed=0, replayed=3).batch_size == 3  # no memory yet: full of the task


def test_an_interrupted_epoch_goes_on_where_it_was_also_in_workers():
    def make():
        return TaskSampler(np.arange(30), 4, seed=2, memory=np.arange(50, 55), replayed=1, first_epoch=6)

    whole = make()
    whole.set_epoch(1)
    batches = list(whole)
    assert {epoch for batch in batches for epoch, _ in batch} == {7}
    rest = make()
    rest.start_at(1, 4)
    assert list(rest) == batches[4:]
    rest.set_epoch(2)
    assert len(list(rest)) == len(batches)
    loader = DataLoader(_Keys(), batch_sampler=make(), collate_fn=as_it_is, num_workers=1)
    assert list(loader) == list(make())


class _Keys:
    def __getitems__(self, keys):
        return keys

    def __len__(self):
        return 60


def test_ranks_share_the_samples_of_an_epoch(monkeypatch):
    found = []
    for rank in range(2):
        monkeypatch.setattr("contralto.distributed.world_size", lambda: 2)
        monkeypatch.setattr("contralto.distributed.rank", lambda rank=rank: rank)
        sampler = TaskSampler(np.arange(100, 133), 4, seed=0, memory=np.arange(8), replayed=1)
        found.append([row for batch in sampler for _, row in batch])
        assert len(sampler) == 33 // 6
    assert len(found[0]) == len(found[1])
    new = [row for rows in found for row in rows if row >= 100]
    assert len(new) == len(set(new)) == 30


def test_what_cannot_be_drawn_is_refused():
    with pytest.raises(UsageError, match="no samples"):
        TaskSampler([], 4, seed=0)
    with pytest.raises(UsageError, match="leave a place"):
        TaskSampler([1, 2], 4, seed=0, memory=[3], replayed=4)
