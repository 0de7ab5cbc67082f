"""The system of the four losses: bank, queue and batch; what is a negative of what; collapse without output norm; bad input."""

import pytest
import torch
from torch import nn

from contralto.errors import UsageError
from contralto.losses.behaviour import behaviour
from contralto.systems.selfsup.contrastive_behaviour import ContrastiveBehaviour

from tests.systems.selfsup import steps


def build(**arguments):
    given = {"num_features": 10, "num_samples": steps.SAMPLES, "dim": 5, "alpha": 0.2}
    return steps.without_batch_norm(ContrastiveBehaviour(steps.encoder(), **(given | arguments)))


@pytest.mark.parametrize("loss", ["contrastive", "simple", "hard", "hard_simple"])
def test_with_a_bank_the_own_slot_is_the_positive_and_no_negative(loss):
    system, batch = build(loss=loss), steps.batch(1, views=1)
    slots, index = system.bank.features.clone(), batch["index"]
    z = system.projector(system.encoder(batch["views"][0]))
    expected = []
    for i in range(8):
        others = slots[[j for j in range(steps.SAMPLES) if j != index[i]]]
        expected.append(behaviour(z[i : i + 1], slots[index[i]][None], kind=loss, negatives=others, alpha=0.2))
    torch.testing.assert_close(system.step(batch)["loss"], torch.stack(expected).mean())
    unit = nn.functional.normalize(z, dim=1)
    moved = nn.functional.normalize(0.5 * slots[index] + 0.5 * unit, dim=1)
    torch.testing.assert_close(system.bank.features[index], moved)


def test_negatives_are_drawn_anew_in_every_step_and_are_a_function_of_it():
    system, other = build(num_negatives=9), build(num_negatives=9)
    first = system._drawn()
    assert torch.equal(first, other._drawn())
    system.at_step_end()
    assert not torch.equal(first, system._drawn())
    assert build(num_negatives=9, loss="hard")._drawn() is None
    assert build(num_negatives=30)._drawn() is None
    batch = steps.batch(1, views=1)
    z = other.projector(other.encoder(batch["views"][0]))
    slots = other.bank.features.clone()
    expected = behaviour(z, slots[batch["index"]], negatives=slots[first], numbers=first, own=batch["index"])
    torch.testing.assert_close(other.step(batch)["loss"], expected)


def test_with_a_queue():
    system, batch = build(negatives="queue", queue_size=16, decay=0.9, loss="hard_simple"), steps.batch(1)
    past = system.queue.read()
    query = system.projector(system.encoder(batch["views"][0]))
    found = system.step(batch)["loss"]
    key = system.key_network(batch["views"][1])
    torch.testing.assert_close(found, behaviour(query, key, kind="hard_simple", negatives=past, alpha=0.2))
    torch.testing.assert_close(system.queue.keys[:8], nn.functional.normalize(key, dim=1))


def test_within_a_batch_both_views_are_queries():
    system, batch = build(negatives="batch", temperature=0.2), steps.batch(1)
    z0, z1 = (system.projector(system.encoder(v)) for v in batch["views"])
    expected = (behaviour(z0, z1, temperature=0.2) + behaviour(z1, z0, temperature=0.2)) / 2
    torch.testing.assert_close(system.step(batch)["loss"], expected)


def test_the_output_has_a_batch_norm_unless_it_is_said_not_to():
    heads = [
        ContrastiveBehaviour(nn.Identity(), num_features=4, num_samples=2, output_norm=x).projector
        for x in (True, False)
    ]
    assert [isinstance(head[-1], nn.BatchNorm1d) for head in heads] == [True, False]
    assert not heads[0][-1].affine


def test_the_number_of_views():
    mean = std = (0.5, 0.5, 0.5)
    assert [len(build(negatives=n).views(32, mean, std)) for n in ("bank", "queue", "batch")] == [1, 2, 2]
    system = build()
    both = steps.batch(1, views=2)
    system.step(both)
    with pytest.raises(UsageError, match="takes 2 views"):
        build(negatives="batch").step(steps.batch(1, views=1))


def test_bad_input_is_named():
    with pytest.raises(UsageError, match="num_samples"):
        build(num_samples=0)
    with pytest.raises(UsageError, match="negatives"):
        build(negatives="memory")
    with pytest.raises(UsageError, match="kind"):
        build(loss="softmax").step(steps.batch(0))
    with pytest.raises(UsageError, match=r"index \d+ is not among the 3 samples"):
        build(num_samples=3).step(steps.batch(0))
    with pytest.raises(UsageError, match="two"):
        build().step(steps.batch(0, n=1))
