"""Mixing of features and the focal loss on mixed labels: values of the released code, slow loops, and its slips."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from contralto.errors import UsageError
from contralto.losses.contrast import soft_cross_entropy
from contralto.losses.focal import focal_sup_con, same_targets
from contralto.losses.mixing import MixingDraws, beta_shares, draw_mixing, hard_mixtures, hardest_partners
from contralto.losses.pairs import sup_con

REFERENCE = Path(__file__).parents[1] / "reference" / "core_tuning.npz"
TIGHT = {"rtol": 1e-9, "atol": 1e-11}


def reference(prefix):
    with np.load(REFERENCE, allow_pickle=False) as z:
        return {k.removeprefix(prefix): torch.from_numpy(np.asarray(z[k])) for k in z.files if k.startswith(prefix)}


def test_the_focal_loss_is_that_of_the_released_code():
    r = reference("focal0_")
    z = r["z"].clone().requires_grad_()
    loss = focal_sup_con(z, r["y"], temperature=0.07, over="rows")
    torch.testing.assert_close(loss, r["loss"], **TIGHT)
    # The rows of the code are of length one already and it does not scale them: compare the part of its gradient across them.
    (grad,) = torch.autograd.grad(loss, z)
    across = r["grad_z"] - r["z"] * (r["grad_z"] * r["z"]).sum(1, keepdim=True)
    torch.testing.assert_close(grad, across, **TIGHT)


def test_mixtures_and_the_whole_objective_are_those_of_the_released_code():
    r = reference("mix0_")
    f = r["f"].clone().requires_grad_()
    draws = MixingDraws(r["order"], r["lam_neg_raw"].clamp_min(0.8), r["lam_pos"])
    hard, near = hardest_partners(f, r["y"])
    assert torch.equal(hard, r["hard_pos_index"])
    assert torch.equal(near, r["hard_neg_index"])
    rows, targets = hard_mixtures(f, r["y"], 4, draws)
    torch.testing.assert_close(rows, r["mixed_f"], **TIGHT)
    torch.testing.assert_close(targets, r["mixed_y"], **TIGHT)
    (probe,) = torch.autograd.grad((rows * r["probe_w"]).sum(), f, retain_graph=True)
    torch.testing.assert_close(probe, r["grad_probe"], **TIGHT)
    ce = soft_cross_entropy(rows @ r["W_cls"].T, targets).mean()
    con = focal_sup_con(rows @ r["W_proj"].T, targets, temperature=0.07, over="rows")
    torch.testing.assert_close(ce, r["ce"], **TIGHT)
    torch.testing.assert_close(con, r["con"], **TIGHT)
    (grad,) = torch.autograd.grad(ce + 0.1 * con, f)
    torch.testing.assert_close(grad, r["grad_total"], **TIGHT)


def by_loop(z, targets, temperature, gamma, over):
    """The equation of the paper (or the division of the code), anchor by anchor."""
    u, total, anchors = F.normalize(z, dim=1), 0.0, 0
    for i in range(len(z)):
        others = [k for k in range(len(z)) if k != i]
        denominator = sum((u[i] @ u[k] / temperature).exp() for k in others)
        mine = [j for j in others if (targets[i] - targets[j]).abs().max() < 1e-5]
        p = [(u[i] @ u[j] / temperature).exp() / denominator for j in mine]
        if mine:
            anchors += 1
            total = total + sum(-((1 - q) ** gamma) * q.log() for q in p) / (
                len(mine) if over == "positives" else len(z)
            )
    return total / max(anchors, 1)


@pytest.mark.parametrize("over", ["positives", "rows"])
@pytest.mark.parametrize("gamma", [0.0, 1.0, 2.0])
def test_the_focal_loss_is_a_loop_over_anchors(over, gamma):
    g = torch.Generator().manual_seed(0)
    z = torch.randn(9, 5, generator=g, dtype=torch.float64, requires_grad=True)
    y = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2])
    targets = F.one_hot(y, 4).double()
    targets[3] = targets[4] = torch.tensor([0.2, 0.8, 0, 0])
    targets[8] = torch.tensor([0.0, 0.0, 0.0, 1.0])  # alone: no anchor, but a negative of others
    found = focal_sup_con(z, targets, temperature=0.3, gamma=gamma, over=over)
    expected = by_loop(z, targets, 0.3, gamma, over)
    torch.testing.assert_close(found, expected, **TIGHT)
    torch.testing.assert_close(
        torch.autograd.grad(found, z)[0], torch.autograd.grad(expected, z)[0], rtol=1e-8, atol=1e-10
    )
    assert torch.autograd.gradcheck(
        lambda x: focal_sup_con(x, targets, temperature=0.3, gamma=gamma, over=over), z, eps=1e-6
    )


def test_without_the_weight_it_is_supervised_contrast():
    z = torch.randn(12, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    y = torch.arange(12) % 5
    torch.testing.assert_close(focal_sup_con(z, y, temperature=0.2, gamma=0), sup_con(z, y, temperature=0.2))


def test_the_two_divisions_differ_by_the_share_of_positives():
    z = torch.randn(12, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    y = torch.arange(12) % 3  # three positives each
    paper, code = (focal_sup_con(z, y, over=over) for over in ("positives", "rows"))
    torch.testing.assert_close(code, paper * 3 / 12)


def test_the_hardest_positive_is_found_among_cosines_that_are_all_positive():
    """Features after a ReLU: the released code sets other entries to 0 and finds one of those instead."""
    g = torch.Generator().manual_seed(0)
    f, y = torch.rand(40, 8, generator=g) + 0.1, torch.arange(40) % 4
    f[0, 0] += 3  # unlike its class: row 0 is a partner like others
    cosine = F.normalize(f, dim=1) @ F.normalize(f, dim=1).T
    assert cosine.min() > 0
    hard, near = hardest_partners(f, y)
    for i in range(40):
        mates = [j for j in range(40) if j != i and y[j] == y[i]]
        assert hard[i] == min(mates, key=lambda j: cosine[i, j])
        assert near[i] == max((j for j in range(40) if y[j] != y[i]), key=lambda j: cosine[i, j])
    assert (hard[4::4] == 0).any()


def test_the_most_similar_negative_is_found_among_cosines_below_zero():
    f = torch.tensor([[1.0, 0.0], [1.0, 0.1], [-1.0, 0.5], [-1.0, 0.1]])
    assert hardest_partners(f, torch.tensor([0, 0, 1, 1]))[1].tolist() == [2, 2, 1, 1]


def test_a_row_without_mates_or_without_others_is_its_own_partner():
    f = torch.randn(3, 4)
    hard, near = hardest_partners(f, torch.tensor([0, 1, 2]))
    assert hard.tolist() == [0, 1, 2]
    assert (near != torch.arange(3)).all()
    assert hardest_partners(f, torch.tensor([1, 1, 1]))[1].tolist() == [0, 1, 2]


def test_mixtures_of_one_pair_with_the_floor_as_share_are_positives_and_with_other_shares_are_not():
    """Four of five uniform shares are at the floor, so whole groups of negatives have one label."""
    f, y = torch.randn(6, 4), torch.tensor([0, 0, 0, 1, 1, 1])
    order = torch.tensor([3, 4, 5, 0, 1, 2])
    share = torch.tensor([0.8, 0.8, 0.9, 0.8, 0.95, 0.85])
    _, targets = hard_mixtures(f, y, 2, MixingDraws(order, share, torch.ones(6)))
    same = same_targets(targets)
    assert same[6, 7]
    assert not same[6, 8]
    assert not same[6, 9]  # mostly class 1 against mostly class 0
    assert same[0, 1]
    assert same[0, 12]  # a hard positive that is nothing else has the label of its class


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_labels_of_many_classes_are_compared_without_overflow(dtype):
    """The released code makes numbers of labels by powers of ten, which end at 38 classes in single precision."""
    y = torch.arange(300) % 150
    same = same_targets(F.one_hot(y, 150).to(dtype))
    assert torch.equal(same, (y[:, None] == y) & ~torch.eye(300, dtype=torch.bool))


def test_a_mixture_within_a_class_keeps_its_label_to_the_last_bit():
    y = torch.zeros(200, dtype=torch.int64)
    draws = draw_mixing(200, floor=0.0, generator=torch.Generator().manual_seed(0))
    _, targets = hard_mixtures(torch.randn(200, 3), y, 5, draws)
    assert torch.equal(targets[:, 0], torch.ones(600))


def test_unmixed_rows_carry_no_gradient_unless_wanted():
    y, draws = torch.arange(6) % 2, draw_mixing(6, generator=torch.Generator().manual_seed(0))
    f = torch.randn(6, 3, requires_grad=True)
    rows, _ = hard_mixtures(f, y, 2, draws)
    assert torch.autograd.grad(rows[:6].sum(), f, allow_unused=True, retain_graph=True)[0].abs().sum() == 0
    assert (torch.autograd.grad(rows[6:12].sum(), f)[0].abs().sum(1) > 0).all()  # the permutation reaches every row
    rows, _ = hard_mixtures(f, y, 2, draws, detach_original=False)
    assert (torch.autograd.grad(rows[:6].sum(), f)[0] == 1).all()


def test_shares_are_of_their_law_and_of_the_generator():
    draws = draw_mixing(20_000, alpha=1.0, floor=0.8, generator=torch.Generator().manual_seed(3))
    assert (draws.negative == 0.8).float().mean() == pytest.approx(0.8, abs=0.01)
    assert draws.positive.mean() == pytest.approx(0.5, abs=0.01)
    again = draw_mixing(20_000, alpha=1.0, floor=0.8, generator=torch.Generator().manual_seed(3))
    assert all(torch.equal(a, b) for a, b in zip(draws, again, strict=True))
    x = beta_shares((50_000,), 8.0, 2.0, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert x.dtype == torch.float64
    assert x.mean() == pytest.approx(0.8, abs=0.005)
    assert x.var() == pytest.approx(16 / 100 / 11, abs=0.001)


def test_a_batch_without_positives_gives_zero_with_gradient():
    z = torch.randn(3, 4, requires_grad=True)
    loss = focal_sup_con(z, torch.tensor([0, 1, -1]))
    loss.backward()
    assert loss == 0
    assert (z.grad == 0).all()


def test_extreme_rows_give_numbers():
    z = torch.eye(4).repeat(2, 1).mul(1e4).requires_grad_()
    loss = focal_sup_con(z, torch.arange(4).repeat(2), temperature=0.001)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(z.grad).all()


def test_what_does_not_fit_is_said():
    g = torch.Generator()
    with pytest.raises(UsageError, match="above 0, got 0"):
        beta_shares((2,), 0, 1, generator=g)
    with pytest.raises(UsageError, match="floor"):
        draw_mixing(2, floor=1.2, generator=g)
    with pytest.raises(UsageError, match="3 labels"):
        hard_mixtures(torch.zeros(2, 2), torch.zeros(3, dtype=torch.int64), 2, draw_mixing(2, generator=g))
    with pytest.raises(UsageError, match="over"):
        focal_sup_con(torch.eye(2), torch.zeros(2, dtype=torch.int64), over="all")
    with pytest.raises(UsageError, match="target for each"):
        focal_sup_con(torch.eye(2), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(UsageError, match="soft labels"):
        same_targets(torch.zeros(3))
    with pytest.raises(UsageError, match="temperature"):
        focal_sup_con(torch.eye(2), torch.zeros(2, dtype=torch.int64), temperature=0)
