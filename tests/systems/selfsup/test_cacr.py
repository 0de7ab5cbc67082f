"""CACR as a system: a step of the published code with its queue, the three forms, views of several sizes, bad input."""

import pytest
import torch
from torch import nn

from contralto.errors import UsageError
from contralto.losses.attraction import attraction, momentum_attraction_repulsion, queue_repulsion, repulsion
from contralto.systems.selfsup.cacr import CACR

from tests.systems.selfsup import steps
from tests.systems.webly.reference import load

REFERENCE = load("cacr.npz")
CLOSE = {"rtol": 1e-9, "atol": 1e-11}


def build(**arguments):
    given = {"num_features": 10, "dim": 5, "num_views": 3, "queue_size": 24, "decay": 0.9}
    return steps.without_batch_norm(CACR(steps.encoder(), **(given | arguments)))


def embeddings(system, views, *heads):
    found = []
    for view in views:
        z = system.projector(system.encoder(view))
        for head in heads:
            z = head(z)
        found.append(z)
    return torch.stack(found)


def test_a_step_with_a_queue_equals_the_published_code():
    ref = {k.removeprefix("mq_"): torch.as_tensor(REFERENCE[k]) for k in REFERENCE if k.startswith("mq_")}
    system = CACR(
        nn.Identity(),
        num_features=7,
        form="queue",
        num_views=3,
        dim=5,
        queue_size=8,
        decay=0.9,
        tau_neg=2.0,
        official=True,
    ).double()
    with torch.no_grad():
        for layer, side in ((system.projector[0], "q"), (system.key_network[1][0], "k")):
            layer.weight.copy_(ref[f"w{side}"])
            layer.bias.copy_(ref[f"b{side}"])
        system.queue.keys.copy_(ref["queue"].T)
    found = system.step({"views": list(ref["x"]), "index": torch.arange(4)})
    found["loss"].backward()
    torch.testing.assert_close(found["attraction"], ref["loss1"], **CLOSE)
    torch.testing.assert_close(found["repulsion"], ref["loss2"], **CLOSE)
    torch.testing.assert_close(system.projector[0].weight.grad, ref["grad_wq"], **CLOSE)
    torch.testing.assert_close(system.key_network[1][0].weight, ref["wk_after"], **CLOSE)
    torch.testing.assert_close(system.queue.keys.T, ref["queue_after"], **CLOSE)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"weigh_positives": "uniform"},
        {"weigh_negatives": "detached", "tau_pos": 0.5, "tau_neg": 2.0, "alpha": 1.5, "beta": 0.7},
        {"cost": "rbf"},
        {"tau_plus": 0.1},
    ],
)
def test_views_of_a_batch(settings):
    system, batch = build(**settings), steps.batch(1, views=3)
    z = embeddings(system, batch["views"])
    s = {"tau_pos": 1.0, "tau_neg": 0.9, "alpha": 1.0, "beta": 1.0} | settings
    pull = attraction(z, tau=s["tau_pos"], alpha=s["alpha"], weighing=s.get("weigh_positives", "softmax")).loss
    rest = {k: v for k, v in s.items() if k in ("cost", "tau_plus")}
    push = repulsion(z, tau=s["tau_neg"], beta=s["beta"], weighing=s.get("weigh_negatives", "softmax"), **rest).loss
    torch.testing.assert_close(system.step(batch)["loss"], pull + push)


def test_with_a_queue_every_view_has_its_own_distances():
    system, batch = build(form="queue"), steps.batch(1, views=3)
    past = system.queue.read()
    z = embeddings(system, batch["views"])
    found = system.step(batch)
    key = torch.stack([system.key_network(v) for v in batch["views"]])
    torch.testing.assert_close(found["attraction"], attraction(z, key, weighing="detached").loss)
    torch.testing.assert_close(found["repulsion"], queue_repulsion(z, past, tau=0.9).loss)
    torch.testing.assert_close(system.queue.keys[:8], nn.functional.normalize(key[-1], dim=1))


@pytest.mark.parametrize("cost", ["rbf", "distance"])
@pytest.mark.parametrize("key_views", [2, 0])
def test_with_a_predictor_all_other_views_are_queries(cost, key_views):
    system, batch = build(form="momentum", hidden=7, cost=cost, key_views=key_views), steps.batch(1, views=3)
    z = embeddings(system, batch["views"], system.predictor)
    found = system.step(batch)["loss"]
    expected = []
    for i in range(key_views or 3):
        queries = torch.stack([z[j] for j in range(3) if j != i])
        expected.append(momentum_attraction_repulsion(queries, system.key_network(batch["views"][i]), cost=cost).loss)
    torch.testing.assert_close(found, torch.stack(expected).mean())


def test_small_views_are_queries_only():
    class Mean(nn.Module):
        def forward(self, x):
            return x.mean((2, 3))

    system = CACR(Mean(), num_features=3, form="momentum", num_views=2, small_views=2, hidden=7, dim=5)
    views = system.views(56, (0.5,) * 3, (0.5,) * 3)
    assert [v.size for v in views] == [56, 56, 24, 24]
    g = torch.Generator().manual_seed(0)
    batch = {"views": [torch.rand(4, 3, v.size, v.size, generator=g) for v in views], "index": torch.arange(4)}
    system.step(batch)["loss"].backward()
    assert system.predictor[0].weight.grad.abs().sum() > 0


def test_the_views_of_the_forms():
    assert len(build(num_views=5).views(32, (0.5,) * 3, (0.5,) * 3)) == 5
    assert {v.blur_p for v in build(form="queue").views(32, (0.5,) * 3, (0.5,) * 3)} == {0.5}


def test_the_momentum_of_the_predictor_form_rises():
    """At the end the momentum network stands still."""
    system = build(form="momentum", hidden=7, epochs=1, steps_per_epoch=4)
    system.steps += 4
    before = [p.clone() for p in system.key_network.parameters()]
    with torch.no_grad():
        for p in system.encoder.parameters():
            p.add_(1.0)
    system.step(steps.batch(1, views=3))
    for old, new in zip(before, system.key_network.parameters(), strict=True):
        torch.testing.assert_close(old, new)


def test_bad_input_is_named():
    with pytest.raises(UsageError, match="takes 3 views"):
        build().step(steps.batch(0))
    with pytest.raises(UsageError, match="two"):
        build().step(steps.batch(0, n=1, views=3))
    for wrong in (
        {"form": "moco"}, {"num_views": 1}, {"small_views": 2}, {"form": "queue", "tau_plus": 0.1},
        {"form": "momentum", "weigh_positives": "uniform"},
    ):  # fmt: skip
        with pytest.raises(UsageError, match="|".join(wrong)):
            build(**wrong)
