"""Sources that are repeated, against the order and the shares of AdaInf's own code."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from contralto import distributed
from contralto.data.mixture import MixtureSampler, inflated_rows, source_shares
from contralto.errors import UsageError

REFERENCE = Path(__file__).parents[1] / "reference" / "adainf.npz"


def drawn(sampler, *epochs):
    rows = []
    for epoch in epochs:
        sampler.set_epoch(epoch)
        rows += [row for _, row in sampler]
    return rows


def test_order_labels_and_share_are_those_of_the_reference():
    with np.load(REFERENCE, allow_pickle=False) as z:
        ids, targets, beta = z["mix10_ids"], z["mix10_targets"], z["mix10_beta"]
    every_id, label = np.array([0, 1, 2, 3, 4, *range(100, 112)]), np.array([0, 1, 2, 1, 0] + [-1] * 12)
    rows = inflated_rows([5, 12], [10, 1])
    assert np.array_equal(every_id[rows], ids)
    assert np.array_equal(label[rows], targets)
    assert source_shares([5, 12], [10, 1])[0] == pytest.approx(float(beta), rel=1e-12)


def test_shares_of_the_paper():
    assert source_shares([50_000, 1_000_000], [1, 1])[0] == pytest.approx(0.0476, abs=1e-4)
    assert source_shares([50_000, 1_000_000], [10, 1])[0] == pytest.approx(1 / 3)
    assert source_shares([50_000, 0], [10, 1])[0] == 1


def test_an_epoch_has_every_row_as_often_as_its_source_has_copies():
    counts = Counter(drawn(MixtureSampler([5, 12], [10, 1], seed=0), 3))
    assert counts == Counter(inflated_rows([5, 12], [10, 1]).tolist())


@pytest.mark.parametrize("length", [1, 7, 62, 100])
def test_epochs_of_a_given_length_go_through_one_permutation_after_the_other(length):
    sampler = MixtureSampler([5, 12], [10, 1], seed=4, length=length)
    rows = drawn(sampler, *range(-(-124 // length)))
    for turn in range(2):
        assert Counter(rows[62 * turn : 62 * (turn + 1)]) == Counter(inflated_rows([5, 12], [10, 1]).tolist())
    assert len(sampler) == length
    assert rows[:62] != rows[62:124]


def test_order_is_a_function_of_seed_and_epoch_and_goes_on_where_it_was():
    sampler = MixtureSampler([5, 12], [3, 1], seed=1, length=20)
    whole = drawn(sampler, 2)
    assert whole == drawn(MixtureSampler([5, 12], [3, 1], seed=1, length=20), 2)
    assert whole != drawn(MixtureSampler([5, 12], [3, 1], seed=2, length=20), 2)
    sampler.start_at(2, 13)
    assert [row for _, row in sampler] == whole[13:]


def test_every_rank_gets_its_own_part_of_one_order(monkeypatch):
    whole = drawn(MixtureSampler([5, 12], [3, 1], seed=1, length=21), 1)
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    parts = []
    for rank in range(2):
        monkeypatch.setattr(distributed, "rank", lambda r=rank: r)
        parts.append(drawn(MixtureSampler([5, 12], [3, 1], seed=1, length=21), 1))
    assert [row for pair in zip(*parts, strict=True) for row in pair][:21] == whole


def test_what_cannot_be_is_said():
    with pytest.raises(UsageError, match="must be as many"):
        inflated_rows([5], [1, 2])
    with pytest.raises(UsageError, match="none below 0"):
        source_shares([5, -1], [1, 1])
    with pytest.raises(UsageError, match="nothing to draw"):
        MixtureSampler([5, 0], [0, 1], seed=0)
    with pytest.raises(UsageError, match="length must be at least 1"):
        MixtureSampler([5, 3], [1, 1], seed=0, length=0)
