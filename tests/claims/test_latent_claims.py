"""The claims of cMIM and SepCLR: what their arms share, and what their images are."""

import numpy as np
import pytest
import torch

from contralto.claims import cmim, sepclr
from contralto.claims.plan import find_claim


def test_images_of_training_and_test_share_neither_digits_nor_cells():
    train, test = sepclr.blended(100)
    again = sepclr.blended(100)[0]
    assert torch.equal(train.images, again.images)
    assert not torch.equal(train.images, sepclr.blended(101)[0].images)
    for part, n in ((train, 1200), (test, 597)):
        assert part.images.shape == (2 * n, 3, 16, 16)
        assert part.target.sum() == n
        assert (part.digit[part.target] >= 0).all()
        assert (part.digit[~part.target] == -1).all()
        assert part.place.unique().tolist() == [0, 1, 2, 3]
    cells = sepclr._cells()
    assert len(np.unique(cells, axis=0)) == len(cells)
    assert (cells[:, 1:].max(0) + sepclr.CELL <= np.array(sepclr._photographs()[0].shape[:2])).all()


def test_a_target_is_half_a_patch_and_half_a_digit():
    train, _ = sepclr.blended(100)
    background, target = train.images[~train.target].float(), train.images[train.target].float()
    assert background.max() <= 128  # half of the range
    assert target.mean() > background.mean() + 20
    assert target.max() > 200


def test_a_patch_has_the_label_of_its_place():
    cells = sepclr._cells()
    patches, place = sepclr._patches(cells, np.random.default_rng(0))
    assert patches.shape == (len(cells), 3, 16, 16)
    width = sepclr._photographs()[0].shape[1]
    for (photograph, _, left), label in zip(cells.tolist(), place.tolist(), strict=True):
        assert label // 2 == photograph
        assert (label % 2 == 1) == (left + sepclr.CELL / 2 > width / 2)
    photograph, top, left = cells[5]
    region = sepclr._photographs()[photograph][top : top + sepclr.CELL, left : left + sepclr.CELL] / 255
    assert region.min() <= patches[5].min()
    assert patches[5].max() <= region.max()


def test_batches_are_half_background_and_the_same_for_all_arms():
    train, _ = sepclr.blended(100)
    make, alike = (sepclr._batches(train, 100, 32, flag) for flag in (False, True))
    first, other = make(3), alike(3)
    assert first["label"].tolist() == [0] * 16 + [1] * 16
    assert other["label"].tolist() == [1] * 32
    for a, b in zip(first["views"], other["views"], strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(*first["views"])
    seen = torch.cat([make(step)["index"] for step in range(75)])  # an epoch of 75 steps
    assert len(seen.unique()) == 2400


@pytest.mark.parametrize(("module", "name"), [(cmim, "cmim"), (sepclr, "sepclr")])
def test_arms_of_one_seed_start_alike_and_are_measured_on_the_same_samples(module, name):
    claim = find_claim(name)
    assert claim.function() is module.run
    budget, data = {**claim.budget, **claim.quick}, next(iter(claim.data))
    found = [module.run(dict(arm), seed=100, data=data, budget=budget) for arm in list(claim.arms.values())[:3]]
    for other in found[1:]:
        assert np.array_equal(other["labels"], found[0]["labels"])
        assert other.keys() == found[0].keys()
    for comparison in claim.comparisons:
        assert comparison.metric in found[0]


def test_models_of_one_mode_are_the_same_whatever_is_read_from_them():
    h, mu = (cmim.build({"mode": "cmim", "dim": 8, "use": use}, 3, 1, 16) for use in ("informative", "mean"))
    for a, b in zip(h.state_dict().values(), mu.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    x = torch.rand(4, 64)
    assert h.embed(x).shape == (4, 256)
    assert mu.embed(x).shape == (4, 8)


@pytest.mark.parametrize("kept", [False, True])
def test_an_arm_gives_the_same_again(tmp_path, kept):
    budget = {"steps": 3, "batch_size": 16}
    arm = {"mode": "vae", "dim": 4, "use": "mean"}
    work = tmp_path if kept else None
    one, two = (cmim.run(arm, seed=100, data="digits", budget=budget, work=work) for _ in range(2))
    assert len(list(tmp_path.iterdir())) == kept
    assert one["nll"] == two["nll"]
    assert np.array_equal(one["few_shot"], two["few_shot"])
