"""Episodes are what they say: distinct classes and rows, a function of (seed, epoch), shared out over ranks, resumable."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from contralto import distributed
from contralto.data.episodes import EpisodeSampler, draw_episodes
from contralto.errors import DataError, UsageError

LABELS = np.repeat(np.arange(8), [12, 5, 9, 30, 2, 7, 8, 6])
RNG = np.random.default_rng(3)


def rows_of(sampler):
    return [[row for _, row in batch] for batch in sampler]


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 5), st.integers(1, 3), st.integers(1, 3), st.integers(1, 20), st.integers(0, 2**31))
def test_episodes_hold_whole_classes_in_order_and_no_row_twice(way, shot, queries, episodes, seed):
    order = np.random.default_rng(seed).permutation(len(LABELS))
    labels = LABELS[order]
    labels[:3] = -1
    found = draw_episodes(
        labels, way=way, shot=shot, queries=queries, episodes=episodes, rng=np.random.default_rng(seed)
    )
    assert found.shape == (episodes, way * (shot + queries))
    sizes = np.bincount(labels[labels >= 0])
    for rows in found:
        assert len(set(rows.tolist())) == len(rows)
        support = labels[rows[: way * shot]].reshape(way, shot)
        asked = labels[rows[way * shot :]].reshape(way, queries)
        assert (support == support[:, :1]).all()
        assert (asked == support[:, :1]).all()
        assert len(set(support[:, 0].tolist())) == way
        assert (support >= 0).all()
        assert (sizes[support[:, 0]] >= shot + queries).all()


def test_all_classes_and_all_rows_are_drawn_equally_often():
    labels = np.repeat(np.arange(6), [4, 5, 6, 7, 8, 9])
    found = draw_episodes(labels, way=3, shot=1, queries=2, episodes=6000, rng=np.random.default_rng(0))
    classes = np.bincount(labels[found[:, :3]].ravel()) / 6000
    assert np.abs(classes - 0.5).max() < 0.03
    first = np.bincount(found[:, 0], minlength=len(labels))  # the place in front is not for some rows only
    expected = 6000 / 6 / np.bincount(labels)[labels]
    assert (np.abs(first - expected) < 5 * np.sqrt(expected)).all()
    for place in (0, 3, 4):  # support row, first query and second query of the first class
        share = np.bincount(found[:, place], minlength=len(labels))
        assert (np.abs(share - expected) < 5 * np.sqrt(expected)).all(), place


def test_an_epoch_is_a_function_of_seed_and_epoch_and_goes_on_where_it_stopped():
    arguments = {"way": 3, "shot": 1, "queries": 2, "episodes": 6}
    sampler = EpisodeSampler(LABELS, **arguments, seed=1)
    first = rows_of(sampler)
    assert len(first) == len(sampler) == 6
    assert first == rows_of(EpisodeSampler(LABELS, **arguments, seed=1))
    assert first != rows_of(EpisodeSampler(LABELS, **arguments, seed=2))
    sampler.set_epoch(3)
    third = list(sampler)
    assert third[0][0][0] == 3
    assert [[row for _, row in batch] for batch in third] != first
    again = EpisodeSampler(LABELS, **arguments, seed=1)
    again.start_at(3, 4)
    assert list(again) == third[4:]
    again.set_epoch(4)
    assert len(list(again)) == 6


def test_two_ranks_share_the_episodes_of_one(monkeypatch):
    arguments = {"way": 3, "shot": 1, "queries": 2, "episodes": 7, "seed": 0}
    alone = rows_of(EpisodeSampler(LABELS, **arguments, per_batch=2))
    assert len(alone) == 3  # the seventh fills no batch
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    parts = []
    for rank in range(2):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        parts.append(rows_of(EpisodeSampler(LABELS, **arguments)))
    for whole, a, b in zip(alone, *parts, strict=True):
        assert whole == a + b


def test_what_cannot_be_drawn_is_said():
    with pytest.raises(DataError, match="4 classes of 10 pictures or more, and 2 of 8 classes"):
        EpisodeSampler(LABELS, way=4, shot=5, queries=5, seed=0)
    with pytest.raises(UsageError, match="at least two classes"):
        draw_episodes(LABELS, way=1, shot=1, queries=1, episodes=1, rng=RNG)
    with pytest.raises(UsageError, match="integers"):
        draw_episodes(LABELS.astype(float), way=2, shot=1, queries=1, episodes=1, rng=RNG)
    with pytest.raises(UsageError, match="do not fill one batch of 4"):
        len(EpisodeSampler(LABELS, way=2, shot=1, queries=1, seed=0, episodes=3, per_batch=4))
    with pytest.raises(UsageError, match="at least 1"):
        EpisodeSampler(LABELS, way=2, shot=1, queries=1, seed=0, episodes=0)
    with pytest.raises(DataError, match="0 of 0 classes"):
        draw_episodes(np.full(4, -1), way=2, shot=1, queries=1, episodes=1, rng=RNG)
