"""Decoupled contrast as a system: the identity that it rests on, in a network; its form with a queue; bad input."""

import pytest
import torch
from torch.nn import functional as F

from contralto.errors import UsageError
from contralto.losses.pairs import dcl, nt_xent
from contralto.systems.selfsup.dcl import DecoupledContrast

from tests.systems.selfsup import steps

VIEW = {"num_features": 10, "hidden": 7, "dim": 5}


def build(**arguments):
    return steps.without_batch_norm(DecoupledContrast(steps.encoder(), **(VIEW | arguments)))


def test_the_gradient_of_every_weight_is_that_of_nt_xent_without_its_factor():
    """Anchor by anchor, on a network that is being trained: grad NT-Xent = q grad DCL, q = 1 - exp(-L)."""
    system = build()
    steps.train(system, steps=5)
    z0, z1 = (system.projector(system.encoder(v)) for v in steps.batch(9)["views"])
    coupled, decoupled = (loss(z0, z1, temperature=0.1, reduction="none") for loss in (nt_xent, dcl))
    q = -torch.expm1(-coupled)
    torch.testing.assert_close(decoupled, coupled + q.log())
    weights = list(system.parameters())
    for i in (0, 5, 13):
        ours = torch.autograd.grad(decoupled[i], weights, retain_graph=True)
        theirs = torch.autograd.grad(coupled[i], weights, retain_graph=True)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(q[i] * a, b)


def test_it_says_which_factor_infonce_would_have_had():
    system, batch = build(), steps.batch(1)
    found = system.step(batch)
    z0, z1 = (system.projector(system.encoder(v)) for v in batch["views"])
    torch.testing.assert_close(
        found["coupling"], -torch.expm1(-nt_xent(z0, z1, temperature=0.1, reduction="none")).mean()
    )
    torch.testing.assert_close(found["loss"], dcl(z0, z1, temperature=0.1))
    torch.testing.assert_close(found["features"], system.encoder(batch["views"][0]))


@pytest.mark.parametrize("detach", [False, True])
def test_the_weighted_form(detach):
    system, batch = build(sigma=0.5, detach_weight=detach), steps.batch(1)
    weights = list(system.parameters())
    z0, z1 = (system.projector(system.encoder(v)) for v in batch["views"])
    expected = dcl(z0, z1, temperature=0.1, sigma=0.5, detach_weight=detach)
    found = system.step(batch)["loss"]
    torch.testing.assert_close(found, expected)
    for a, b in zip(torch.autograd.grad(found, weights), torch.autograd.grad(expected, weights), strict=True):
        torch.testing.assert_close(a, b)


def test_with_a_queue_the_key_is_no_negative_and_is_kept_for_the_next_step():
    system, batch = build(queue_size=16, decay=0.9, temperature=0.2), steps.batch(1)
    past, before = system.queue.read(), [p.clone() for p in system.key_network.parameters()]
    learnt = [*system.encoder.parameters(), *system.projector.parameters()]
    with torch.no_grad():
        learnt[0].add_(0.5)
    found = system.step(batch)
    for old, new, p in zip(before, system.key_network.parameters(), learnt, strict=True):
        torch.testing.assert_close(new, 0.9 * old + 0.1 * p)
        assert not new.requires_grad
    query = F.normalize(system.projector(system.encoder(batch["views"][0])), dim=1)
    key = F.normalize(system.key_network(batch["views"][1]), dim=1)
    expected = (query @ past.T / 0.2).logsumexp(1) - (query * key).sum(1) / 0.2
    torch.testing.assert_close(found["loss"], expected.mean())
    torch.testing.assert_close(system.queue.keys[:8], key)
    torch.testing.assert_close(system.queue.keys[8:], past[8:])


def test_bad_input_is_named():
    batch = steps.batch(0, n=1)
    with pytest.raises(UsageError, match="two"):
        build().step(batch)
    with pytest.raises(UsageError, match="takes 2 views"):
        build().step(steps.batch(0, views=3))
