"""The parts of the claims of DCL, iSogCLR, CACR and contrastive behaviour: arms in pairs, data, what is measured."""

import numpy as np
import pytest
import torch
from torch import nn

from contralto.claims import cacr, contrastive_behaviour, dcl, isogclr
from contralto.claims.digits import digits, few_labels, thinned
from contralto.claims.plan import find_claim
from contralto.losses.pairs import nt_xent
from contralto.systems.selfsup.dcl import DecoupledContrast
from contralto.systems.selfsup.isogclr import ISogCLR

CLAIMS = {"dcl": dcl, "isogclr": isogclr, "cacr": cacr, "contrastive_behaviour": contrastive_behaviour}


def test_thinned_data_have_the_sizes_in_an_order_of_the_seed():
    whole, sizes = digits(3), [3, 5, 8, 13, 21, 34, 55, 70, 80, 90]
    part = thinned(whole, sizes, 3)
    assert sorted(part.train_labels.bincount().tolist()) == sizes
    assert torch.equal(part.test, whole.test)
    rows = {row.numpy().tobytes() for row in whole.train}
    assert all(row.numpy().tobytes() in rows for row in part.train)
    orders = {tuple(thinned(digits(s), sizes, s).train_labels.bincount().tolist()) for s in range(4)}
    assert len(orders) == 4
    again = thinned(digits(3), sizes, 3)
    assert torch.equal(part.train, again.train)


def test_few_labels_are_as_many_of_every_class_and_drawn_by_the_seed():
    labels = digits(0).train_labels
    rows = few_labels(labels, 5, 7)
    assert labels[rows].bincount().tolist() == [5] * 10
    assert len(set(rows.tolist())) == 50
    assert np.array_equal(rows, few_labels(labels, 5, 7))
    assert not np.array_equal(rows, few_labels(labels, 5, 8))


@pytest.mark.parametrize("claim", ["isogclr", "cacr"])
def test_all_arms_of_a_seed_start_from_the_same_encoder_and_head(claim):
    plan, more = find_claim(claim), {"isogclr": (50,), "cacr": ()}[claim]
    first = None
    for arm in plan.arms.values():
        system = CLAIMS[claim].build(arm, 4, 10, 16, *more)
        start = {k: v for k, v in system.state_dict().items() if k.startswith(("encoder.", "projector."))}
        first = first or start
        assert start.keys() == first.keys()
        assert all(torch.equal(v, first[k]) for k, v in start.items())
        assert (system.optimizer, system.weight_decay, system.batch_size, system.total_steps) == ("adam", 0.0, 16, 10)


@pytest.mark.parametrize("claim", CLAIMS)
def test_arms_are_a_function_of_the_seed_and_are_tested_on_the_same_samples(claim):
    plan = find_claim(claim)
    budget = dict(plan.budget) | {"steps": 2} | ({"batch_size": 16} if "batch_size" in plan.budget else {})
    arms = list(plan.arms.values())
    found = [plan.function()(arms[i], seed=101, data="digits", budget=budget) for i in (0, 0, -1)]
    for name, value in found[0].items():
        assert np.array_equal(value, found[1][name], equal_nan=True), name
    assert len(found[2]["probe"]) == len(found[0]["probe"]) == 597
    assert np.isfinite(found[0]["probe"]).all()


def tiny(**arguments):
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU())
    return DecoupledContrast(encoder, num_features=6, hidden=6, dim=4, **arguments)


def test_the_identity_holds_and_its_error_would_show_if_it_did_not(monkeypatch):
    system, views = tiny(), [torch.randn(6, 5), torch.randn(6, 5)]
    before = {k: v.clone() for k, v in system.state_dict().items()}
    assert dcl.identity_error(system, views) < 1e-11
    assert all(torch.equal(v, before[k]) for k, v in system.state_dict().items())
    monkeypatch.setattr(dcl, "coupling", lambda loss: 1 - (-1.5 * loss).exp())
    assert dcl.identity_error(system, views) > 1e-3


def test_the_baseline_of_dcl_is_the_same_network_with_nt_xent():
    torch.manual_seed(0)
    encoder = nn.Linear(5, 6)
    system = dcl.Coupled(encoder, num_features=6, hidden=6, dim=4, temperature=0.2, epochs=10)
    system.steps += 1  # neither at the beginning, nor halfway, nor at the end
    views = [torch.randn(6, 5), torch.randn(6, 5)]
    z0, z1 = system.projector(encoder(torch.cat(views))).chunk(2)
    each = nt_xent(z0, z1, temperature=0.2, reduction="none")
    found = system.step({"views": views})
    torch.testing.assert_close(found["loss"], each.mean())
    torch.testing.assert_close(found["coupling"], (1 - (-each).exp()).mean())
    assert found["identity_error"] == 0


def test_temperatures_are_compared_with_the_size_of_classes():
    split = thinned(digits(0), [10 * (k + 1) for k in range(10)], 0)
    n = len(split.train)
    system = ISogCLR(nn.Identity(), num_features=64, num_samples=n)
    size = split.train_labels.bincount()[split.train_labels].float()
    system.items.seen.fill_(True)
    for order, expected in ((size, 1.0), (-size, -1.0), (torch.zeros(n), 0.0)):
        system.items.temperature.copy_(0.5 + order / 1000)
        found = isogclr._temperatures(system, split)
        assert found["spearman"] == pytest.approx(expected)
    system.items.temperature.copy_(size)
    largest = split.train_labels == split.train_labels.bincount().argmax()
    system.items.seen[largest] = False  # never in a batch: not looked at
    assert isogclr._temperatures(system, split)["mean_temperature"] == pytest.approx(float(size[~largest].mean()))


def test_the_baseline_of_cacr_is_the_mean_over_pairs_of_views():
    system = cacr.build({"loss": "nt_xent", "temperature": 0.3}, 0, 1, 8).eval()
    views = [torch.rand(8, 64) for _ in range(3)]
    z = [system.projector(system.encoder(v)) for v in views]
    expected = sum(nt_xent(z[i], z[j], temperature=0.3) for i, j in ((0, 1), (0, 2), (1, 2))) / 3
    torch.testing.assert_close(system.step({"views": views})["loss"], expected)
