"""Fine-tuning and Core-tuning: steps by hand, parts of a batch, ranks, resumption, and what is refused."""

import copy
import inspect
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from contralto.errors import DataError, UsageError
from contralto.losses.contrast import soft_cross_entropy
from contralto.losses.focal import focal_sup_con
from contralto.losses.mixing import draw_mixing, hard_mixtures
from contralto.losses.pairs import sup_con
from contralto.pipelines.job import load_preset
from contralto.systems.finetuning.core_tuning import CoreTuning

from tests.ranks import on_two_ranks
from tests.systems.finetuning import steps
from tests.systems.selfsup.steps import train

NAMES = sorted(steps.SYSTEMS)


def doubled(step, n=12):
    whole = steps.batch("", None, step, n)
    return whole | {"views": [v.double() for v in whole["views"]]}


def test_a_step_of_fine_tuning_is_cross_entropy_and_contrast():
    batch = steps.batch("finetuning", None)
    system = steps.build("finetuning", eta=0.5)
    f = system.encoder(batch["views"][0])
    ce = F.cross_entropy(f @ system.classifier.weight.T, batch["label"])
    con = sup_con(system.projector(f), batch["label"], temperature=0.07)
    torch.testing.assert_close(system.step(batch)["loss"], ce + 0.5 * con)
    plain = steps.build("finetuning")
    assert "contrast" not in plain.step(batch)
    assert sorted(dict(plain.named_parameters())) == ["classifier.weight", "encoder.2.bias", "encoder.2.weight"]
    torch.testing.assert_close(plain.step(batch)["loss"], ce)


def test_a_step_of_core_tuning_is_the_sum_of_its_two_terms():
    batch = steps.batch("core_tuning", None)
    system = steps.build("core_tuning", eta=2.0, floor=0.7, alpha=0.5, gamma=2.0, over="rows", temperature=0.2)
    f = system.encoder(batch["views"][0])
    draws = draw_mixing(8, alpha=0.5, floor=0.7, generator=torch.Generator().manual_seed(0))
    rows, targets = hard_mixtures(f, batch["label"], 3, draws)
    ce = soft_cross_entropy(system.classifier(rows), targets).mean()
    con = focal_sup_con(system.projector(rows), targets, temperature=0.2, gamma=2.0, over="rows")
    found = system.step(batch)
    torch.testing.assert_close(found["loss"], ce + 2 * con)
    torch.testing.assert_close(found["cross_entropy"], ce)
    torch.testing.assert_close(found["contrast"], con)
    assert not torch.equal(found["features"], torch.zeros_like(f))


def test_without_contrast_there_is_no_projector_and_the_boundary_is_smooth_all_the_same():
    system, batch = steps.build("core_tuning", eta=0.0), steps.batch("core_tuning", None)
    assert isinstance(system.projector, nn.Identity)
    plain = steps.build("finetuning")
    assert not torch.isclose(system.step(batch)["loss"], plain.step(batch)["loss"])


def test_the_defaults_are_those_of_the_paper():
    system = steps.SYSTEMS["core_tuning"](nn.Linear(4, 4), num_features=4)
    facts = (system.temperature, system.eta, system.alpha, system.floor, system.epochs, system.lr, system.batch_size)
    assert facts == (0.07, 0.1, 1.0, 0.8, 100, 0.01, 256)
    assert (system.micro_batch, system.weight_decay, system.momentum, system.gamma, system.over) == (
        64, 1e-4, 0.9, 1.0, "positives",
    )  # fmt: skip
    assert system.classifier.bias is None
    assert [layer.out_features for layer in system.projector if isinstance(layer, nn.Linear)] == [4, 256]
    group = system.optimizers_and_schedules()[0][0].param_groups[0]
    assert group["nesterov"]
    assert (group["momentum"], group["lr"]) == (0.9, 0.01)


def test_the_classifier_learns_from_unmixed_rows_and_the_encoder_does_not():
    """With a floor of 1 and pi the identity on classes, the encoder hears of a row only through mixtures."""
    batch = steps.batch("core_tuning", None)
    grads = []
    for learn in (False, True):
        system = steps.build("core_tuning", learn_original=learn)
        system.step(batch)["loss"].backward()
        grads.append((system.encoder[2].weight.grad.clone(), system.classifier.weight.grad.clone()))
    torch.testing.assert_close(grads[0][1], grads[1][1])
    assert not torch.allclose(grads[0][0], grads[1][0])
    assert all((g[0] != 0).all() for g in grads)


@pytest.mark.parametrize("name", NAMES)
def test_a_large_batch_is_taken_in_parts_as_gradients_that_are_added_up(name):
    batch = steps.batch(name, None, n=20)
    system = steps.build(name, eta=0.5, micro_batch=5)
    seen = []
    system.encoder.register_forward_hook(lambda *x: seen.append(len(x[1][0])))
    whole = system.step(batch)["loss"]
    assert seen == [5, 5, 5, 5]
    if name == "finetuning":
        parts = [{k: [v[0][r]] if k == "views" else v[r] for k, v in batch.items()} for r in torch.arange(20).split(5)]
        torch.testing.assert_close(whole, torch.stack([system.step(p)["loss"] for p in parts]).mean())
    other = steps.build(name, eta=0.5, micro_batch=20)
    assert not torch.isclose(whole, other.step(batch)["loss"])  # mining within a part is part of the method


def test_no_part_is_left_with_a_row_or_two():
    system = steps.build("core_tuning", micro_batch=8)
    seen = []
    system.encoder.register_forward_hook(lambda *x: seen.append(len(x[1][0])))
    system.step(steps.batch("core_tuning", None, n=17))
    assert sorted(seen) == [8, 9]


@pytest.mark.parametrize("name", NAMES)
def test_saved_and_loaded_it_takes_the_same_next_steps(name):
    def make(step):
        return doubled(step)

    one, other = (steps.build(name, eta=0.5, micro_batch=6).double() for _ in range(2))
    train(one, make=make)
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    assert other.done == 3
    torch.manual_seed(5)  # nothing comes from the global state
    after = train(other, first=3, make=make)
    assert torch.equal(train(one, first=3, make=make), after)
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def on_ranks(rank, world):
    found = {}
    for name in NAMES:
        for eta in (0.0, 0.5):
            system = steps.build(name, eta=eta, micro_batch=6).double()
            losses = train(system, make=doubled, rank=rank, world=world)
            found[f"{name} {eta}"] = {"loss": losses} | dict(system.state_dict())
    return found


@pytest.mark.xdist_group("ranks")  # two processes are started once
def test_two_ranks_are_one(tmp_path):
    one = on_ranks(0, 1)
    for found in on_two_ranks(on_ranks, tmp_path):
        for key, values in one.items():
            for name, value in values.items():
                torch.testing.assert_close(found[key][name], value, rtol=1e-9, atol=1e-11, msg=f"{key}, {name}")


def test_the_view_is_a_crop_of_nearly_all():
    [view] = steps.build("core_tuning").views(256, (0.5,) * 3, (0.5,) * 3)
    assert (view.size, view.ratio, view.flip, view.jitter) == (256, (1.0, 1.0), 0.5, (0.0,) * 4)
    assert view.scale[0] == view.scale[1] == pytest.approx(0.94**2)


def test_every_picture_is_turned_by_an_angle_of_its_own_that_depends_on_its_index():
    pictures = torch.full((6, 3, 24, 24), 255, dtype=torch.uint8)
    batch = {"pictures": pictures, "sizes": torch.full((6, 2), 24), "epoch": torch.zeros(6, dtype=torch.int64)}
    batch |= {"index": torch.arange(6), "label": torch.zeros(6, dtype=torch.int64)}
    shown = {}
    for degrees in (0.0, 15.0):
        system = steps.build("core_tuning", degrees=degrees)
        system.encoder.size, system.encoder.mean, system.encoder.std = 16, (0.0,) * 3, (1.0,) * 3
        [shown[degrees]] = system.on_after_batch_transfer(batch, 0)["views"]
    assert (shown[0.0] == 1).all()
    missing = (shown[15.0] < 0.5).sum((1, 2, 3))  # corners that came in from beyond the border
    assert len(missing.unique()) > 3
    part = {k: v[4:] for k, v in batch.items()}
    assert torch.equal(system.on_after_batch_transfer(part, 0)["views"][0], shown[15.0][4:])


def test_it_learns():
    torch.manual_seed(0)
    for name in NAMES:
        system = steps.build(name, eta=0.1, lr=0.05, epochs=60, steps_per_epoch=1)
        [optimizer], [schedule] = system.optimizers_and_schedules()
        for i in range(60):
            system.step(steps.batch(name, system, i, 24))["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            system.at_step_end()
        test = steps.batch(name, system, 999, 300)
        assert (system.logits(test["views"][0]).argmax(1) == test["label"]).float().mean() > 0.8
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-6)


def test_what_cannot_be_is_said():
    batch = steps.batch("core_tuning", None)
    with pytest.raises(DataError, match=f"sample {int(batch['index'][2])} has another"):
        steps.build("core_tuning").step(batch | {"label": batch["label"].index_fill(0, torch.tensor([2]), -1)})
    with pytest.raises(UsageError, match="needs 'label'"):
        steps.build("core_tuning").step({k: v for k, v in batch.items() if k != "label"})
    with pytest.raises(UsageError, match="1 view"):
        steps.build("core_tuning").step(batch | {"views": batch["views"] * 2})
    with pytest.raises(UsageError, match="num_classes"):
        steps.build("finetuning", num_classes=1)
    with pytest.raises(UsageError, match="eta is at least 0"):
        steps.build("finetuning", eta=-1.0)
    with pytest.raises(UsageError, match="alpha is above 0"):
        steps.build("core_tuning", alpha=0.0)


@pytest.mark.parametrize("name", NAMES)
def test_every_argument_has_its_name_and_type(name):
    for parameter in list(inspect.signature(steps.SYSTEMS[name]).parameters.values())[1:]:
        assert parameter.kind is parameter.KEYWORD_ONLY
        assert parameter.annotation is not parameter.empty


def contrast_after(steps, **settings):
    """The contrast after some steps on features that are as long as those of a large encoder, of ten classes; 100 samples."""
    draws = torch.Generator().manual_seed(0)
    labels = torch.arange(100) % 10
    x = (torch.randn(10, 640, generator=draws)[labels] / 2 + torch.randn(100, 640, generator=draws)).relu()
    x *= 22 / x.norm(dim=1).mean()
    system = CoreTuning(
        nn.Identity(), num_features=640, num_classes=10, epochs=steps, eta=1.0, learn_original=True, **settings
    )
    [optimizer], [schedule] = system.optimizers_and_schedules()
    told = []
    for _ in range(steps):
        rows = torch.randperm(100, generator=draws)[:32]
        losses = system.step({"views": [x[rows]], "index": rows, "label": labels[rows]})
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step(), schedule.step(), system.at_step_end()
        told.append(float(losses["contrast"].detach()))
    return sum(told[-5:]) / 5


def test_the_small_preset_does_not_end_the_contrast():
    """Of 96 rows that are all alike the contrast is 94 / 95 log 95; SGD at 0.03 makes them so, and they stay so."""
    small = {k: v for k, v in load_preset("small", "core_tuning").items() if k in ("optimizer", "lr", "weight_decay")}
    alike = 94 / 95 * math.log(95)
    assert contrast_after(60, **small) < 0.7 * alike
    assert contrast_after(60, optimizer="sgd", lr=0.03) > 0.97 * alike
