"""Momentum copies and the queue."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from contralto.errors import UsageError
from contralto.memory.momentum import momentum_copy, momentum_update
from contralto.memory.queue import Queue


@pytest.mark.parametrize("decay", [0.0, 0.9, 1.0])
def test_momentum_moves_every_parameter_and_no_buffer(decay):
    source = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).double()
    target = momentum_copy(source)
    with torch.no_grad():
        for p in source.parameters():
            p.add_(torch.randn_like(p))
    source.train()(torch.randn(8, 3, dtype=torch.float64))
    before = [p.clone() for p in target.parameters()]
    momentum_update(target, source, decay)
    for now, old, new in zip(target.parameters(), before, source.parameters(), strict=True):
        torch.testing.assert_close(now, decay * old + (1 - decay) * new)
    assert target[1].num_batches_tracked == 0
    assert source[1].num_batches_tracked == 1


def test_queue_is_first_in_first_out_and_reads_are_copies():
    queue, keys = Queue(5, 3), F.normalize(torch.randn(7, 3), dim=1)
    queue.enqueue(keys[:3])
    read = queue.read()
    torch.testing.assert_close(read[:3], keys[:3])
    queue.enqueue(keys[3:5])
    torch.testing.assert_close(queue.read(), keys[:5])
    queue.enqueue(keys[5:7])  # over the oldest
    torch.testing.assert_close(queue.read(), torch.cat([keys[5:7], keys[2:5]]))
    torch.testing.assert_close(read[:3], keys[:3])
    with pytest.raises(UsageError, match="queue of 5"):
        queue.enqueue(torch.randn(6, 3))


def test_a_batch_past_the_end_is_written_at_the_last_places_and_the_state_is_saved():
    queue, keys = Queue(5, 2), F.normalize(torch.randn(8, 2), dim=1)
    queue.enqueue(keys[:4])
    queue.enqueue(keys[4:7])
    torch.testing.assert_close(queue.read()[2:], keys[4:7])
    other = Queue(5, 2, seed=9)
    other.load_state_dict(queue.state_dict())
    for q in (queue, other):
        q.enqueue(keys[7:])
    assert torch.equal(queue.read(), other.read())
