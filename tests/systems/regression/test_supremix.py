"""Regression and SupReMix: steps by hand for every method, ranks, resumption, schedule, and what is refused."""

import copy
import inspect
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from contralto.errors import DataError, UsageError
from contralto.evaluation.regression import fit_probe
from contralto.losses.regression import mixing_shares, rank_n_contrast, sup_con_numbers, sup_re_mix
from contralto.systems.regression.supremix import METHODS

from tests.ranks import on_two_ranks
from tests.systems.regression import steps
from tests.systems.selfsup.steps import train


def doubled(step, n=12):
    whole = steps.batch("", None, step, n)
    return whole | {"views": [v.double() for v in whole["views"]], "number": whole["number"].double()}


def test_a_step_of_regression_is_the_error_of_both_views():
    batch, system = steps.batch("regression", None), steps.build("regression")
    system.learn_scale(torch.tensor([2.0, 8.0, 2.0, 8.0]))  # mean 5, deviation 3
    told = torch.cat([system.tell(v) for v in batch["views"]])
    error = (told - batch["number"].repeat(2)).abs().mean()
    found = system.step(batch)
    torch.testing.assert_close(found["mae"], error.detach(), check_dtype=False)
    torch.testing.assert_close(found["loss"], error / 3, check_dtype=False)


@pytest.mark.parametrize("method", METHODS)
def test_a_step_is_the_loss_of_its_method(method):
    batch = steps.batch("supremix", None)
    system = steps.build("supremix", method=method, window=3.0, weight="squared", seed=4)
    f = system.encoder(torch.cat(batch["views"]))
    y = batch["number"].repeat(2)
    z = system.projector(f)
    shares = mixing_shares(16, generator=torch.Generator().manual_seed(4 << 32))
    expected = {
        "supremix": lambda: sup_re_mix(z, y, shares, window=3.0, weight="squared"),
        "mix_neg": lambda: sup_re_mix(z, y, shares, window=None, weight="squared"),
        "mix_pos": lambda: sup_re_mix(z, y, None, window=3.0, weight="squared"),
        "supcon": lambda: sup_con_numbers(z, y, temperature=0.3, weight="none"),
        "weighted_supcon": lambda: sup_con_numbers(z, y, temperature=0.3, weight="squared"),
        "rnc": lambda: rank_n_contrast(f, y, temperature=2.0),
        "l1": lambda: F.l1_loss(system.output(f).squeeze(1), y),
    }[method]()
    torch.testing.assert_close(system.step(batch)["loss"], expected)
    names = {name.split(".")[0] for name, _ in system.named_parameters()}
    assert names == {"encoder", *{"l1": ["output"], "rnc": []}.get(method, ["projector"])}


def test_the_defaults_are_those_of_the_paper():
    system = steps.SYSTEMS["supremix"](nn.Linear(4, 4), num_features=4)
    assert (system.temperature, system.window, system.alpha, system.beta, system.weight) == (0.3, 5.0, 2.0, 8.0, "l1")
    assert (system.epochs, system.lr, system.batch_size, system.optimizer, system.parts) == (100, 1e-3, 64, "adam", 1)
    assert system.projector[-1].out_features == 128
    assert system.shift == "joint"


def test_numbers_of_a_fine_scale_are_rounded_to_units_of_a_bin():
    batch = steps.batch("supremix", None)
    system = steps.build("supremix", bin=0.5)
    fine = batch | {"number": batch["number"] / 2 + 0.1}
    whole = steps.build("supremix", bin=1.0)
    torch.testing.assert_close(system.step(fine)["loss"], whole.step(batch)["loss"])
    raw = steps.build("supremix", bin=0.0)
    assert not torch.isclose(raw.step(fine)["loss"], whole.step(batch)["loss"])


def test_a_batch_is_mixed_in_parts():
    batch = steps.batch("supremix", None, n=12)
    system = steps.build("supremix", parts=3, method="mix_pos")
    halves = [
        {k: [v[r] for v in x] if k == "views" else x[r] for k, x in batch.items()} for r in torch.arange(12).split(4)
    ]
    one = steps.build("supremix", method="mix_pos")
    torch.testing.assert_close(system.step(batch)["loss"], torch.stack([one.step(h)["loss"] for h in halves]).mean())


@pytest.mark.parametrize("method", METHODS)
def test_saved_and_loaded_it_takes_the_same_next_steps(method):
    one, other = (steps.build("supremix", method=method).double() for _ in range(2))
    train(one, make=doubled)
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    torch.manual_seed(5)  # nothing comes from the global state
    after = train(other, first=3, make=doubled)
    assert torch.equal(train(one, first=3, make=doubled), after)
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def on_ranks(rank, world):
    found = {}
    for method in METHODS:
        system = steps.build("supremix", method=method).double()
        system.learn_scale(torch.tensor([2.0, 8.0]))
        found[method] = {"loss": train(system, make=doubled, rank=rank, world=world)} | dict(system.state_dict())
    return found


@pytest.mark.xdist_group("ranks")  # two processes are started once
def test_two_ranks_are_one(tmp_path):
    one = on_ranks(0, 1)
    for found in on_two_ranks(on_ranks, tmp_path):
        for key, values in one.items():
            for name, value in values.items():
                torch.testing.assert_close(found[key][name], value, rtol=1e-9, atol=1e-11, msg=f"{key}, {name}")


def rates(system):
    [optimizer], [schedule] = system.optimizers_and_schedules()
    seen = []
    for _ in range(system.total_steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return seen


def test_the_rate_goes_down_by_a_step_or_a_cosine():
    found = rates(steps.build("supremix", epochs=10, steps_per_epoch=1, lr=0.01))
    assert found == pytest.approx([0.01] * 8 + [0.001] * 2)
    warm = rates(steps.build("supremix", epochs=10, steps_per_epoch=1, lr=0.01, warmup_epochs=3))
    assert warm[:4] == pytest.approx([0.0025, 0.005, 0.0075, 0.01])
    smooth = rates(steps.build("supremix", epochs=10, steps_per_epoch=1, lr=0.01, schedule="cosine"))
    assert all(a > b for a, b in pairwise(smooth))


@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns_the_order(method):
    system = steps.build("supremix", method=method, epochs=60, steps_per_epoch=1, lr=0.01)
    system.learn_scale(torch.arange(11.0))
    [optimizer], [schedule] = system.optimizers_and_schedules()
    for i in range(60):
        system.step(steps.batch("supremix", system, i, 24))["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        system.at_step_end()
    learnt, test = (steps.batch("supremix", system, 900 + i, 200) for i in range(2))
    with torch.no_grad():
        x, y = (system.embed(b["views"][0]).numpy() for b in (learnt, test))
    told = fit_probe(x, learnt["number"].numpy()).tell(y)
    assert np.abs(told - test["number"].numpy()).mean() < 0.6  # 2.7 for one who does not look


def test_rows_of_numbers_are_seen_in_two_views_that_depend_on_their_index():
    system = steps.build("supremix", noise=0.2, drop=0.5, seed=3)
    rows = torch.ones(6, 40)
    batch = {"rows": rows, "epoch": torch.full((6,), 2), "index": torch.arange(6), "number": torch.arange(6.0)}
    one, two = system.on_after_batch_transfer(batch, 0)["views"]
    assert not torch.equal(one, two)
    assert 0.4 < (one == 0).float().mean() < 0.6
    part = {k: v[4:] for k, v in batch.items()}
    assert torch.equal(system.on_after_batch_transfer(part, 0)["views"][1], two[4:])
    later = system.on_after_batch_transfer(batch | {"epoch": torch.full((6,), 3)}, 0)["views"][0]
    assert not torch.equal(later, one)


def test_views_of_pictures_are_not_mirrored_unless_wanted():
    one, two = steps.build("regression").views(32, (0.5,) * 3, (0.5,) * 3)
    assert one == two
    assert (one.flip, one.jitter[3], one.scale) == (0.0, 0.0, (0.6, 1.0))
    assert steps.build("supremix", flip=0.5).views(32, (0.5,) * 3, (0.5,) * 3)[0].flip == 0.5


def test_what_cannot_be_is_said():
    batch = steps.batch("supremix", None)
    with pytest.raises(DataError, match=f"sample {int(batch['index'][3])} has no number"):
        steps.build("supremix").step(batch | {"number": batch["number"].index_fill(0, torch.tensor([3]), torch.nan)})
    with pytest.raises(UsageError, match="needs 'number'"):
        steps.build("supremix").step({k: v for k, v in batch.items() if k != "number"})
    with pytest.raises(UsageError, match="fit a probe"):
        steps.build("supremix").tell(batch["views"][0])
    with pytest.raises(UsageError, match="method must be one of"):
        steps.build("supremix", method="mse")
    with pytest.raises(UsageError, match="all numbers to learn from are 3"):
        steps.build("regression").learn_scale(torch.full((4,), 3.0))
    with pytest.raises(UsageError, match="schedule"):
        steps.build("regression", schedule="linear")
    with pytest.raises(UsageError, match="parts at least 1"):
        steps.build("supremix", parts=0)


@pytest.mark.parametrize("name", sorted(steps.SYSTEMS))
def test_every_argument_has_its_name_and_type(name):
    for parameter in list(inspect.signature(steps.SYSTEMS[name]).parameters.values())[1:]:
        assert parameter.kind is parameter.KEYWORD_ONLY
        assert parameter.annotation is not parameter.empty
