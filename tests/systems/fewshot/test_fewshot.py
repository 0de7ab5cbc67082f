"""Few-shot systems: what their steps compute, what they refuse, and that two ranks are one."""

import copy
import inspect

import pytest
import torch
from torch import nn

from contralto.errors import DataError, UsageError
from contralto.losses.episodes import proto_triplet, prototypical_cross_entropy
from contralto.losses.icnn import icnn_loss
from contralto.systems.base import EncoderSystem
from contralto.systems.fewshot.susana import SuSana

from tests.ranks import average, on_two_ranks
from tests.systems.fewshot import steps
from tests.systems.selfsup.steps import train

NAMES = sorted(steps.SYSTEMS)
EPISODIC = ["susana", "protonet"]


def by_hand(system, batch):
    """Embeddings of support and queries of the one episode of a batch, and their classes."""
    z = system.encoder(batch["views"][0])
    way, shot, queries = system.way, system.shot, system.queries
    support = z[: way * shot].view(way, shot, -1)
    return z, support.mean(1), z[way * shot :], torch.arange(way).repeat_interleave(queries)


@pytest.mark.parametrize(
    "terms", [["cross"], ["cross", "prototriplet"], ["prototriplet", "fullicnn"], ["cross", "prototriplet", "fullicnn"]]
)
def test_susana_is_the_plain_mean_of_its_terms(terms):
    system = steps.build("susana", way=3, shot=2, queries=3, terms=terms, margin=0.3, temperature=2.0)
    batch = steps.batch("susana", system, n=15)
    z, prototypes, queries, y = by_hand(system, batch)
    shown = torch.arange(3).repeat_interleave(2)
    parts = {
        "cross": prototypical_cross_entropy(queries, prototypes, y, temperature=2.0),
        "prototriplet": proto_triplet(queries, prototypes, y, margin=0.3),
        "fullicnn": icnn_loss(z, torch.cat([shown, y]), window=5),  # a whole class of an episode
    }
    out = system.step(batch)
    torch.testing.assert_close(out["loss"], sum(parts[t] for t in terms) / len(terms))
    for term in terms:
        torch.testing.assert_close(out[term], parts[term])
    right = torch.cdist(queries, prototypes).argmin(1) == y
    torch.testing.assert_close(out["accuracy"], right.float().mean())


def test_the_support_alone_can_be_judged_where_it_has_neighbours():
    system = steps.build("susana", way=3, shot=4, queries=2, terms=["suppicnn"])
    batch = steps.batch("susana", system, n=18)
    z = system.encoder(batch["views"][0])[:12]
    expected = icnn_loss(z, torch.arange(3).repeat_interleave(4))
    torch.testing.assert_close(system.step(batch)["loss"], expected)
    with pytest.raises(UsageError, match="take fullicnn"):
        steps.build("susana", terms=["suppicnn"])


def test_a_window_is_never_smaller_than_the_neighbours_that_are_judged():
    system = steps.build("susana", way=3, shot=1, queries=1, terms=["fullicnn"])
    batch = steps.batch("susana", system, n=6)
    z = system.encoder(batch["views"][0])
    expected = icnn_loss(z, torch.arange(3).repeat(2), window=4)
    torch.testing.assert_close(system.step(batch)["loss"], expected)


@pytest.mark.parametrize("name", EPISODIC)
def test_several_episodes_of_a_step_are_their_mean(name):
    one = steps.build(name)
    both = steps.build(name, episodes_per_step=2)
    batch = steps.batch(name, one, n=16)
    parts = [{k: [v[0][i : i + 8]] if k == "views" else v[i : i + 8] for k, v in batch.items()} for i in (0, 8)]
    losses = [one.step(p)["loss"] for p in parts]
    torch.testing.assert_close(both.step(batch)["loss"], sum(losses) / 2)


@pytest.mark.parametrize("name", EPISODIC)
@pytest.mark.parametrize("change", ["order", "classes", "unlabelled", "short"])
def test_what_is_no_episode_is_refused(name, change):
    system = steps.build(name)
    batch = steps.batch(name, system)
    labels = batch["label"].clone()
    if change == "order":  # class by class, support beside its queries
        labels = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    elif change == "classes":
        labels[:] = labels[0]
    elif change == "unlabelled":
        labels[labels == labels[0]] = -1
    batch |= {"label": labels}
    if change == "short":
        batch = {k: [v[0][:7]] if k == "views" else v[:7] for k, v in batch.items()}
    with pytest.raises(UsageError, match=r"contralto\.data\.episodes"):
        system.step(batch)


def test_names_of_classes_do_not_matter():
    system = steps.build("susana")
    batch = steps.batch("susana", system)
    other = batch | {"label": 1000 - 7 * batch["label"]}
    assert system.step(batch)["loss"] == system.step(other)["loss"]


def test_training_on_easy_episodes_gathers_classes():
    system = steps.build("susana", lr=3e-3, epochs=30, queries=3)
    [optimizer], _ = system.optimizers_and_schedules()
    before, after = [], []
    for i in range(120):
        out = system.step(steps.batch("susana", system, seed=i))
        optimizer.zero_grad()
        out["loss"].backward()
        optimizer.step()
        system.at_step_end()
        (before if i < 20 else after if i >= 100 else []).append(float(out["loss"].detach()))
    assert sum(after) / 20 < 0.8 * sum(before) / 20


def test_the_base_classifier_takes_labels_of_base_classes_only():
    system = steps.build("base_classifier")
    batch = steps.batch("base_classifier", system)
    assert system.step(batch)["loss"].requires_grad
    for wrong in (-1, steps.CLASSES):
        labels = batch["label"].clone()
        labels[2] = wrong
        with pytest.raises(DataError, match="4 base classes"):
            system.step(batch | {"label": labels})


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"terms": []}, "terms must be"), ({"terms": ["cross", "cross"]}, "each once"), ({"terms": ["icnn"]}, "terms must be"),
        ({"margin": -1.0}, "margin"), ({"k": 0}, "k at least 1"), ({"way": 1}, "two classes"), ({"queries": 0}, "at least 1"),
    ],
)  # fmt: skip
def test_wrong_settings_are_refused(arguments, told):
    with pytest.raises(UsageError, match=told):
        steps.build("susana", **arguments)


def test_defaults_are_those_that_the_docstring_tells():
    system = SuSana(nn.Linear(2, 2), num_features=2)
    assert (system.terms, system.margin, system.k, system.way, system.queries) == (
        ("cross", "prototriplet"),
        0.5,
        4,
        5,
        15,
    )
    assert system.batch_size == 80


@pytest.mark.parametrize("name", NAMES)
def test_saved_and_loaded_it_goes_on_bit_by_bit(name):
    def build():
        return steps.build(name).double()

    def make(step):
        batch = steps.batch(name, build(), seed=step)
        return batch | {"views": [v.double() for v in batch["views"]]}

    one, other = build(), build()
    train(one, make=make)
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    assert torch.equal(train(one, first=3, make=make), train(other, first=3, make=make))


@pytest.mark.parametrize("name", NAMES)
def test_every_argument_is_named_and_typed(name):
    system = steps.SYSTEMS[name]
    assert issubclass(system, EncoderSystem)
    for parameter in list(inspect.signature(system).parameters.values())[1:]:
        assert parameter.kind is parameter.KEYWORD_ONLY
        assert parameter.annotation is not parameter.empty


def trained(rank, world):
    """Weights after three steps of two episodes each, which the ranks share."""
    found = {}
    for name in EPISODIC:
        more = {"terms": ["cross", "prototriplet", "fullicnn"]} if name == "susana" else {}
        system = steps.build(name, episodes_per_step=2 // world, **more).double()
        optimizer = torch.optim.SGD(system.parameters(), 0.1)
        for step in range(3):
            whole = steps.batch(name, system, seed=step, n=16)
            mine = slice(8 * rank, 8 * rank + 16 // world)
            batch = {k: [v[0][mine].double()] if k == "views" else v[mine] for k, v in whole.items()}
            optimizer.zero_grad()
            system.step(batch)["loss"].backward()
            for p in system.parameters():
                p.grad = average(p.grad)
            optimizer.step()
        found[name] = {k: v.clone() for k, v in system.encoder.state_dict().items()}
    return found


@pytest.mark.slow
def test_two_ranks_are_one(tmp_path):
    alone = trained(0, 1)
    for other in on_two_ranks(trained, tmp_path):
        for name, weights in alone.items():
            for key, value in weights.items():
                torch.testing.assert_close(other[name][key], value, rtol=1e-10, atol=1e-12)
