"""The memory bank: moved rows, repeated samples, checkpoints."""

import pytest
import torch
from torch.nn import functional as F

from contralto.errors import UsageError
from contralto.memory.bank import MemoryBank


def test_rows_are_moved_and_stay_unit_rows():
    bank = MemoryBank(5, 3, rate=0.7, seed=1)
    before, new = bank.features.clone(), torch.tensor([[2.0, 0, 0], [0, 0, 5.0]])
    copy = bank.read(torch.tensor([4]))
    bank.update(torch.tensor([4, 1]), new)
    for row, feature in ((4, new[0]), (1, new[1])):
        expected = F.normalize(0.7 * before[row] + 0.3 * feature / feature.norm(), dim=0)
        torch.testing.assert_close(bank.features[row], expected)
    assert torch.equal(bank.features[[0, 2, 3]], before[[0, 2, 3]])
    torch.testing.assert_close(bank.features.norm(dim=1), torch.ones(5))
    assert torch.equal(copy[0], before[4])


def test_of_a_sample_that_is_there_twice_the_first_feature_counts():
    one, twice = MemoryBank(3, 2), MemoryBank(3, 2)
    one.update(torch.tensor([2]), torch.tensor([[1.0, 0.0]]))
    twice.update(torch.tensor([2, 2]), torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    assert torch.equal(one.features, twice.features)


def test_it_begins_as_its_seed_says_and_is_part_of_the_state_dict():
    assert torch.equal(MemoryBank(3, 2, seed=4).features, MemoryBank(3, 2, seed=4).features)
    bank, other = MemoryBank(3, 2, seed=4), MemoryBank(3, 2, seed=5)
    assert not torch.equal(bank.features, other.features)
    other.load_state_dict(bank.state_dict())
    assert torch.equal(bank.features, other.features)


def test_what_cannot_be_is_named():
    with pytest.raises(UsageError, match="index 3 is not among the 3 samples"):
        MemoryBank(3, 2).read(torch.tensor([3]))
    with pytest.raises(UsageError, match="num_samples"):
        MemoryBank(0, 2)
    with pytest.raises(UsageError, match="rate"):
        MemoryBank(3, 2, rate=1.0)
