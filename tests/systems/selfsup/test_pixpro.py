"""PixPro's step against values of the official code; its order, its arms, its state."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from contralto.encoders.image import image_encoder
from contralto.errors import UsageError
from contralto.losses.pixels import pixel_contrast, positive_cells
from contralto.pipelines.job import load_preset, presets_of
from contralto.systems.registry import get_job
from contralto.systems.selfsup.pixpro import PixPro

from tests.ranks import on_two_ranks
from tests.systems.selfsup import steps

with np.load(Path(__file__).parents[2] / "reference" / "pixpro.npz", allow_pickle=False) as arrays:
    REFERENCE = {k: torch.from_numpy(arrays[k]) for k in arrays.files}

ARMS = {
    "pixpro": {},
    "pixpro, two layers": {"value_layers": 2},
    "pixpro, no layer": {"value_layers": 0},
    "pixcontrast": {"task": "contrast"},
    "pixpro and pictures": {"instance_weight": 1.0},
    "pixcontrast and pictures": {"task": "contrast", "instance": "contrast", "instance_weight": 1.0},
    "pictures, consistency": {"task": "none", "instance_weight": 1.0},
    "pictures, contrast": {"task": "none", "instance": "contrast", "instance_weight": 1.0},
}


def network(channels=4):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, channels, 3, stride=2, padding=1), nn.BatchNorm2d(channels), nn.ReLU())


def build(channels=4, **arguments):
    words = {"hidden": 8, "dim": 6, "epochs": 2, "steps_per_epoch": 5, "optimizer": "sgd", "lr": 0.1} | arguments
    return PixPro(network(channels), num_features=channels, **words).train()


def batch(seed=0, n=4, side=8):
    g = torch.Generator().manual_seed(seed)
    low = torch.rand(2, n, 2, generator=g) * 0.4
    boxes = torch.cat([low, low + 0.4 + 0.2 * torch.rand(2, n, 2, generator=g)], 2)
    return {
        "views": [torch.randn(n, 3, side, side, generator=g) for _ in range(2)],
        "boxes": list(boxes), "index": torch.arange(n),
    }  # fmt: skip


def train(system, steps, first=0):
    [optimizer], [schedule] = system.optimizers_and_schedules()
    losses = []
    for number in range(first, first + steps):
        out = system.step(batch(number))
        out["loss"].backward()
        system.on_before_optimizer_step(optimizer)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        system.at_step_end()
        losses.append(out["loss"].item())
    return losses


@torch.no_grad()
def fill(ours, theirs):
    """Weights of the official code; biases before a batch norm change nothing and are not there."""
    places = {"0": "linear1", "1": "bn1", "3": "linear2"}
    for name, parameter in ours.named_parameters():
        place, kind = name.split(".")
        parameter.copy_(REFERENCE[f"net_{theirs}__{places[place]}__{kind}"])


def test_one_step_with_the_instance_branch_equals_the_official_code():
    system = build(8, hidden=12, dim=256, epochs=1, steps_per_epoch=100, instance_weight=0.5).double()
    for ours, theirs in (("encoder", "encoder"), ("key_encoder", "encoder_k")):
        with torch.no_grad():
            for place, layer in ((0, "c"), (1, "b")):
                for kind in ("weight", "bias"):
                    getattr(getattr(system, ours)[place], kind).copy_(REFERENCE[f"net_{theirs}__{layer}__{kind}"])
    for ours, theirs in (
        ("projector", "projector"), ("key_projector", "projector_k"), ("instance_projector", "projector_instance"),
        ("key_instance_projector", "projector_instance_k"), ("predictor", "predictor"),
    ):  # fmt: skip
        fill(getattr(system, ours), theirs)
    with torch.no_grad():
        system.value[0].weight.copy_(REFERENCE["net_value_transform__weight"])
        system.value[0].bias.copy_(REFERENCE["net_value_transform__bias"])
    system.steps.fill_(30)
    boxes = [REFERENCE["coord_q"], REFERENCE["coord_k"]]
    views = [REFERENCE["net_im1"], REFERENCE["net_im2"]]
    out = system.step({"views": views, "boxes": boxes, "index": torch.arange(3)})
    out["loss"].backward()
    # The weights of the value layer are kept in single precision: eight digits.
    near = {"rtol": 1e-6, "atol": 1e-8}
    torch.testing.assert_close(out["loss"], REFERENCE["net_loss"], **near)
    torch.testing.assert_close(system.encoder[0].weight.grad, REFERENCE["net_grad_encoder_c_weight"], **near)
    torch.testing.assert_close(system.value[0].weight.grad[:8, :, 0, 0], REFERENCE["net_grad_value_w"], **near)
    torch.testing.assert_close(
        system.key_encoder[0].weight, REFERENCE["net_after_key_encoder_c_weight"], rtol=1e-9, atol=1e-11
    )
    assert out["apart"] == 1 / 3  # the views of the last picture do not touch


def test_boxes_of_crops_are_the_official_ones():
    """Corner pixels over width - 1 and height - 1: what `batch["boxes"]` must hold."""
    i, j, h, w, height, width = REFERENCE["crop_params_i_j_h_w_height_width"].T.double()
    boxes = torch.stack([j / (width - 1), i / (height - 1), (j + w - 1) / (width - 1), (i + h - 1) / (height - 1)], 1)
    torch.testing.assert_close(boxes.float(), REFERENCE["crop_coords"].float(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(boxes[:, [2, 1, 0, 3]].float(), REFERENCE["crop_coords_flipped"].float())


@pytest.mark.parametrize("arm", ARMS)
def test_every_part_that_is_there_learns_and_the_copy_does_not(arm):
    system = build(**ARMS[arm])
    system.step(batch())["loss"].backward()
    for name, parameter in system.named_parameters():
        if name.startswith("key_"):
            assert parameter.grad is None, name
        else:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
    assert (
        system.projector[0].weight.grad.abs().sum() > 0 if system.task != "none" else not hasattr(system, "projector")
    )


@pytest.mark.parametrize("arm", ARMS)
def test_equal_runs_agree_and_a_saved_state_gives_the_same_next_step(arm):
    whole, part = build(**ARMS[arm]), build(**ARMS[arm])
    losses = train(whole, 4)
    assert train(part, 2) == losses[:2]
    later = build(**ARMS[arm])
    later.load_state_dict(part.state_dict())
    assert later.done == 2
    # The next loss; those after it need the state of the optimiser too, which belongs to the loop.
    assert later.step(batch(2))["loss"].item() == losses[2]


def test_the_copy_moves_after_the_queries_and_before_the_keys():
    """With decay 0 the copy is the network itself when it makes its keys."""
    system = build(task="contrast", decay=0.0).double()
    with torch.no_grad():
        for parameter in system.key_encoder.parameters():
            parameter.add_(1)
    data = batch()
    views = [v.double() for v in data["views"]]
    out = system.step(data | {"views": views})
    for ours, theirs in zip(system.key_encoder.parameters(), system.encoder.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    x0, x1 = (system.projector(system.encoder(v)) for v in views)
    positives = positive_cells(*data["boxes"], (4, 4))
    there, back = pixel_contrast(x0, x1, positives), pixel_contrast(x1, x0, positives.transpose(1, 2))
    torch.testing.assert_close(out["loss"], (there + back) / 2)


def test_the_decay_rises_by_half_a_cosine_over_all_steps():
    system = build(decay=0.9, epochs=1, steps_per_epoch=4)
    told = []
    for k in range(5):
        system.steps.fill_(k)
        with torch.no_grad():
            for theirs, ours in zip(system.key_encoder.parameters(), system.encoder.parameters(), strict=True):
                theirs.copy_(torch.zeros_like(ours))
            system.encoder[0].weight.fill_(1.0)
        system._move()
        told.append(1 - float(system.key_encoder[0].weight.flatten()[0]))
    expected = [1 - 0.1 * (math.cos(math.pi * k / 4) + 1) / 2 for k in range(5)]
    assert told == pytest.approx(expected, abs=1e-6)
    assert told[0] == pytest.approx(0.9)
    assert told[-1] == pytest.approx(1.0)


def test_the_copy_has_batch_norm_statistics_of_its_own():
    system = build()
    system.step(batch())
    assert int(system.key_encoder[1].num_batches_tracked) == 2
    assert not torch.equal(system.key_projector[1].running_mean, torch.zeros(8))


def test_image_contrast_finds_the_other_view_in_the_batch():
    system = build(**ARMS["pictures, contrast"])
    data = batch()
    out = system.step(data)
    with torch.no_grad():
        y = [system.instance_projector(system.encoder(v)).mean((2, 3)) for v in data["views"]]
    # At the first step the copy is the network.
    unit = [F.normalize(v, dim=1) for v in y]
    logits = unit[0] @ unit[1].T / 0.2
    own = torch.arange(4)
    torch.testing.assert_close(out["loss"], (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2)


def test_views_that_never_touch_are_counted_and_give_nothing():
    system = build()
    data = batch()
    data["boxes"] = [
        torch.tensor([[0.0, 0.0, 0.1, 0.1]]).repeat(4, 1),
        torch.tensor([[0.8, 0.8, 1.0, 1.0]]).repeat(4, 1),
    ]
    out = system.step(data)
    out["loss"].backward()
    assert out["loss"] == 0
    assert out["apart"] == 1
    assert all((p.grad == 0).all() for p in system.encoder.parameters())


def test_levels_of_a_pyramid_are_averaged():
    class Pyramid(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = network(), nn.Conv2d(4, 4, 3, stride=2, padding=1)

        def forward_maps(self, x):
            found = self.first(x)
            return [found, self.second(found)]

    system = PixPro(Pyramid(), num_features=4, hidden=8, dim=6, task="contrast")
    out = system.step(batch())
    out["loss"].backward()
    assert all(p.grad is not None for p in system.encoder.parameters())
    single = []
    for level in range(2):
        one = PixPro(Pyramid(), num_features=4, hidden=8, dim=6, task="contrast")
        one.load_state_dict(system.state_dict())
        one.maps = lambda x, one=one, level=level: one.encoder.forward_maps(x)[level : level + 1]
        inner = one.key_encoder.forward_maps
        one.key_encoder.forward_maps = lambda x, inner=inner, level=level: inner(x)[level : level + 1]
        single.append(one.step(batch())["loss"].item())
    assert out["loss"].item() == pytest.approx(np.mean(single), rel=1e-4)
    assert system.embed(batch()["views"][0]).shape == (4, 4)


def test_half_precision_trains():
    system = build(instance_weight=1.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = system.step(batch())
    out["loss"].backward()
    assert out["loss"].dtype == torch.float32
    assert all(p.grad.isfinite().all() for p in system.encoder.parameters())


def test_an_image_encoder_by_name_serves():
    encoder = image_encoder("resnet8")
    system = PixPro(encoder, num_features=encoder.num_features, hidden=8, dim=4)
    data = batch(side=32)
    out = system.step(data)
    assert out["features"].shape == (4, 128)
    system.eval()
    torch.testing.assert_close(system.embed(data["views"][0]), encoder(data["views"][0]))


def test_what_does_not_fit_is_named():
    with pytest.raises(UsageError, match="compares no cells"):
        build(task="none")
    with pytest.raises(UsageError, match="task must be"):
        build(task="both")
    with pytest.raises(UsageError, match="value_layers"):
        build(value_layers=3)
    with pytest.raises(UsageError, match="'boxes'"):
        build().step({k: v for k, v in batch().items() if k != "boxes"})
    with pytest.raises(UsageError, match="at least two"):
        build().step(batch(n=1))
    with pytest.raises(UsageError, match="takes 2 views"):
        build().step(batch() | {"views": batch()["views"][:1]})
    with pytest.raises(UsageError, match="compares the cells of feature maps of 4 channels"):
        PixPro(nn.Sequential(nn.Flatten(), nn.Linear(192, 4)), num_features=4, hidden=8, dim=4).step(batch())
    with pytest.raises(UsageError, match="has no feature map"):
        PixPro(image_encoder("vit_tiny_patch16_224", pretrained=False), num_features=192, hidden=8, dim=4).step(
            batch(side=224)
        )


@pytest.mark.parametrize("name", presets_of("pixpro"))
def test_presets_hold_arguments_that_there_are_and_train(name):
    given = load_preset(name, "pixpro")
    assert set(given) <= set(get_job("pixpro").parameters())
    words = {
        k: v
        for k, v in given.items()
        if k not in ("image_encoder", "image_size", "batch_size", "epochs", "hidden", "dim")
    }
    system = build(**words)
    data = batch()
    assert system.step(data)["loss"].isfinite()


# Two processes.

RANKED = ("pixpro and pictures", "pixcontrast and pictures")


def plain(arm):
    """Without batch norm, whose statistics are those of a rank."""
    return steps.without_batch_norm(build(**ARMS[arm]))


def trained(arm, n, rank=0, world=1):
    system = plain(arm)
    losses = steps.train(system, rank=rank, world=world, make=lambda step: batch(step, n))
    return {"losses": losses, "state": system.state_dict()}


def run(rank=0, world=1):
    return {f"{arm}, {n}": trained(arm, n, rank, world) for arm in RANKED for n in (6, 7)}


@pytest.mark.xdist_group("ranks")
def test_two_processes_equal_one(tmp_path):
    expected = run()
    for found in on_two_ranks(run, tmp_path):
        for name, alone in expected.items():
            ours = found[name]
            torch.testing.assert_close(ours["losses"], alone["losses"], rtol=1e-9, atol=1e-11)
            for key, value in alone["state"].items():
                torch.testing.assert_close(ours["state"][key], value, rtol=1e-8, atol=1e-10)
