"""What is kept per sample: by index, through checkpoints, with repeated and impossible indices."""

import pytest
import torch

from contralto.errors import UsageError
from contralto.memory.per_sample import PerSample


def test_values_are_read_and_written_by_index():
    memory = PerSample(5, mean=-torch.inf, seen=False)
    memory.write(
        torch.tensor([4, 1]), mean=torch.tensor([2.0, 3.0], dtype=torch.float64), seen=torch.tensor([True, True])
    )
    assert memory.mean.tolist() == [-torch.inf, 3.0, -torch.inf, -torch.inf, 2.0]
    assert memory.mean.dtype == torch.float32
    assert memory.read(torch.tensor([1, 0]))["seen"].tolist() == [True, False]
    copy = memory.read(torch.tensor([1]))["mean"]
    copy.fill_(9)
    assert memory.mean[1] == 3


def test_of_a_sample_that_is_there_twice_the_first_value_is_kept():
    memory = PerSample(4, x=0.0)
    memory.write(torch.tensor([2, 0, 2, 2, 0]), x=torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]))
    assert memory.x.tolist() == [2.0, 0.0, 1.0, 0.0]


def test_it_is_part_of_the_state_dict():
    memory, other = PerSample(3, x=0.0), PerSample(3, x=0.0)
    memory.write(torch.tensor([1]), x=torch.tensor([7.0]))
    other.load_state_dict(memory.state_dict())
    assert other.x.tolist() == [0.0, 7.0, 0.0]


def test_what_cannot_be_is_named():
    memory = PerSample(3, x=0.0)
    for index in (3, -1):
        with pytest.raises(UsageError, match=f"index {index} is not among the 3 samples"):
            memory.read(torch.tensor([0, index]))
    with pytest.raises(UsageError, match="integers"):
        memory.write(torch.tensor([0.0]), x=torch.tensor([1.0]))
    with pytest.raises(UsageError, match="num_samples"):
        PerSample(0, x=0.0)
