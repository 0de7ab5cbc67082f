"""Parts of the claims of SwAV, GroCo and the projection head."""

import pytest
import torch
from torch.nn import functional as F

from contralto.claims.groco import hardest_info_nce, labelled
from contralto.claims.plan import find_claim
from contralto.claims.projection_head import pair_views, pairs
from contralto.claims.projection_head import run as run_heads
from contralto.claims.swav import picture_batches
from contralto.views.presets import multi_crop


def test_info_nce_of_the_hardest_is_a_loop_over_anchors():
    z = torch.randn(2, 7, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    found, total = hardest_info_nce(z, hardest=3, temperature=0.5), 0.0
    u = F.normalize(z.detach(), dim=2)
    for v in range(2):
        for i in range(7):
            near = torch.stack([u[v, i] @ u[v, j] for j in range(7) if j != i]).topk(3).values
            own = u[v, i] @ u[1 - v, i]
            total -= float(torch.cat([own[None], near]).div(0.5).log_softmax(0)[0]) / 14
    assert found.item() == pytest.approx(total)
    # Gradient reaches anchors only: that of one anchor alone, with everything else held.
    (grad,) = torch.autograd.grad(found, z)
    row = z[0, 2].detach().clone().requires_grad_()
    a = F.normalize(row, dim=0)
    near = torch.stack([a @ u[0, j] for j in range(7) if j != 2]).topk(3).values
    loss = -torch.cat([(a @ u[1, 2])[None], near]).div(0.5).log_softmax(0)[0] / 14
    torch.testing.assert_close(torch.autograd.grad(loss, row)[0], grad[0, 2])


def test_labels_of_every_class():
    labels = torch.tensor([2, 0, 0, 1, 0, 2, 2, 1, 1, 0])
    assert labels[labelled(labels, 2)].bincount().tolist() == [2, 2, 2]
    assert labelled(labels, 2).tolist() == [0, 1, 2, 3, 5, 7]


def test_pairs_stand_side_by_side_and_only_the_left_is_blanked():
    left, right = torch.rand(400, 64) + 1, torch.rand(400, 64) + 1
    assert torch.equal(pairs(left, right).view(-1, 8, 16)[:, :, :8].flatten(1), left)
    shown = pair_views(left, right, torch.Generator().manual_seed(0), 0.5).view(-1, 8, 16)
    gone = shown[:, :, :8].mean((1, 2)) < 0.3
    assert 0.4 < gone.float().mean() < 0.6
    assert (shown[:, :, 8:].mean((1, 2)) > 0.5).all()
    assert not torch.equal(pair_views(left, right, torch.Generator().manual_seed(1), 0.5).view(-1, 8, 16), shown)


def test_both_layers_are_of_one_model_and_untrained_is_a_start():
    budget = {"steps": 3, "batch_size": 16}
    one, two = (
        run_heads({"head": "fixed", "blank": 0.5, "layer": "pre"}, seed=100, data="digits", budget=budget) for _ in "ab"
    )
    assert (one["left"] == two["left"]).all()
    assert len(one["left"]) == 597
    other = run_heads({"head": "fixed", "blank": 0.5, "layer": "post"}, seed=100, data="digits", budget=budget)
    assert abs(other["left"].mean() - one["left"].mean()) < 0.02  # a fixed head is invertible: a probe sees through it
    start = run_heads(
        {"head": "none", "blank": 0.5, "layer": "pre", "steps": 0}, seed=100, data="digits", budget=budget
    )
    assert start["left"].mean() > 0.7


def test_pictures_pass_in_new_orders_with_the_same_views_for_all_arms():
    pictures = torch.rand(10, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    make, steps = picture_batches(pictures, multi_crop(24, 12, 2), seed=1, batch_size=4)
    assert steps == 2
    assert [tuple(v.shape[1:]) for v in make(0)["views"]] == [(3, 24, 24)] * 2 + [(3, 12, 12)] * 2
    epochs = [torch.cat([make(2 * e + s)["index"] for s in range(2)]).tolist() for e in range(2)]
    assert all(len(set(e)) == 8 for e in epochs)
    assert epochs[0] != epochs[1]
    again, _ = picture_batches(pictures, multi_crop(24, 12, 2), seed=1, batch_size=4)
    assert all(torch.equal(a, b) for a, b in zip(make(3)["views"], again(3)["views"], strict=True))


@pytest.mark.parametrize("name", ["swav", "groco", "projection_head"])
def test_the_claims_have_an_untrained_arm_and_a_verdict(name):
    claim = find_claim(name)
    assert "untrained" in claim.arms
    assert callable(claim.function())
    assert claim.deciding() == {"swav": [0, 1, 2, 3], "groco": [0], "projection_head": [0, 1, 2]}[name]
