"""Past embeddings of views."""

import pytest
import torch

from contralto.errors import UsageError
from contralto.memory.past import PastViews


def test_rows_are_first_in_first_out_with_a_fill_level_in_the_state():
    past, z = PastViews(2, 5, 3), torch.randn(2, 9, 3)
    past.enqueue(z[:, :2])
    past.enqueue(z[:, 2:4])
    assert past.read() is None
    assert int(past.filled) == 4
    past.enqueue(torch.zeros(2, 1, 3))  # zeros fill places as anything does
    read = past.read()
    torch.testing.assert_close(read, torch.cat([torch.zeros(2, 1, 3), z[:, 2:4], z[:, :2]], 1))
    other = PastViews(2, 5, 3)
    other.load_state_dict(past.state_dict())
    for p in (past, other):
        p.enqueue(z[:, 4:7])
    assert torch.equal(past.read(), other.read())
    torch.testing.assert_close(past.read(), torch.cat([z[:, 4:7], torch.zeros(2, 1, 3), z[:, 2:3]], 1))
    torch.testing.assert_close(read[:, 1], z[:, 2])  # reads are copies
    with pytest.raises(UsageError, match="queue of 5 embeddings cannot take a batch of 6"):
        past.enqueue(torch.randn(2, 6, 3))
