"""Parts of the claims of multistage contrastive learning and of AdaInf."""

import numpy as np
import pytest
import torch
import yaml

from contralto.claims import adainf, mcl_multistage
from contralto.claims.digits import batches, conv_encoder, digit_views, digits
from contralto.claims.plan import claims, find_claim


def quick(name):
    plan = yaml.safe_load(claims()[name].read_text())
    return plan["arms"], plan["budget"] | plan["quick"]


@pytest.mark.parametrize("name", ["adainf", "mcl_multistage"])
def test_every_arm_runs_and_is_tested_on_the_same_samples(name):
    arms, budget = quick(name)
    claim = find_claim(name)
    found = {
        arm: claim.function()(settings, seed=100, data="digits", budget=budget, device="cpu", progress=lambda s: None)
        for arm, settings in arms.items()
    }
    first = next(iter(found.values()))
    for comparison in claim.comparisons:
        for arm in (*comparison.method, *comparison.baseline):
            assert found[arm][comparison.metric].shape == first[comparison.metric].shape
            assert set(np.unique(found[arm][comparison.metric])) <= {0.0, 1.0}
    if name == "mcl_multistage":
        assert all(np.array_equal(m["groups"], first["groups"]) for m in found.values())


def test_arms_of_one_seed_agree_with_themselves():
    arms, budget = quick("mcl_multistage")
    a, b = (
        mcl_multistage.run(arms["mcl"], seed=101, data="", budget=budget, device="cpu", progress=lambda s: None)
        for _ in range(2)
    )
    assert all(np.array_equal(a[k], b[k]) for k in a)


def test_composites_have_a_faint_right_digit_and_digits_of_their_own():
    split = digits(0)
    found = mcl_multistage.composites(split.train, split.train_labels, 50, faint=0.3, seed=0)
    pictures = found.pictures.view(50, 8, 18)
    for i in range(50):
        left, right = found.sources[i]
        assert torch.equal(pictures[i, :, :8], split.train[left].view(8, 8))
        assert torch.equal(pictures[i, :, 10:], 0.3 * split.train[right].view(8, 8))
        assert found.labels[i].tolist() == split.train_labels[found.sources[i]].tolist()
    assert (pictures[:, :, 8:10] == 0).all()
    assert set(map(tuple, split.train.tolist())).isdisjoint(map(tuple, split.test.tolist()))


def test_views_of_composites_are_drawn_for_each():
    x = digits(0).train[:2].repeat(1, 3)[:, :144].clone()
    x[1] = x[0]
    view = mcl_multistage.composite_views(x, torch.Generator().manual_seed(0), noise=0.0)
    assert not torch.allclose(view[0], view[1])
    still = mcl_multistage.composite_views(x, torch.Generator().manual_seed(0), noise=0.0, shift=0.0, shear=0.0)
    ratio = still[0] / x[0].clamp_min(1e-9)
    assert ratio[x[0] > 0.1].std() < 1e-3
    assert 0.8 <= ratio[x[0] > 0.1].mean() <= 1.2


def test_the_generator_knows_its_digits_alone_and_gives_new_ones():
    split = digits(0, test=1397)
    drawn = adainf.generate(split.train, 2000, seed=0)
    assert torch.equal(drawn, adainf.generate(split.train, 2000, seed=0))
    assert drawn.min() >= 0
    assert drawn.max() <= 1
    assert (drawn.mean(0) - split.train.mean(0)).abs().max() < 0.06
    distance = torch.cdist(drawn, split.train).min(1).values
    among = torch.cdist(split.train, split.train).fill_diagonal_(torch.inf).min(1).values
    assert distance.min() > 0
    assert distance.mean() < 1.3 * among.mean()  # they look like digits
    halves = adainf.generate(split.train[:200], 500, seed=0)
    assert not torch.equal(halves, drawn[:500])


def test_strength_is_what_the_views_differ_by():
    x = digits(0).train[:200]
    moved = [
        (adainf.strong_views(x, torch.Generator().manual_seed(0), strength) - x).square().mean().item()
        for strength in (0.0, 0.5, 1.0)
    ]
    assert moved[0] < 1e-9 < moved[1] < moved[2]


def test_batches_in_an_order_of_ones_own():
    split = digits(0)
    make = batches(split, seed=0, batch_size=4, view=digit_views, rows=lambda step: np.arange(step, step + 3))
    assert make(5)["index"].tolist() == [5, 6, 7]
    assert make(5)["views"][0].shape == (3, 64)
    assert torch.equal(make(2)["label"], split.train_labels[2:5])


def test_the_small_convolutional_network_takes_any_size():
    assert conv_encoder(5, widths=(4, 8, 8), height=9, width=17)(torch.randn(3, 153)).shape == (3, 5)
