"""Attraction and repulsion against the published code, and number by number."""

import math

import pytest
import torch
from torch.nn import functional as F

from contralto.errors import UsageError
from contralto.losses.attraction import attraction, momentum_attraction_repulsion, queue_repulsion, repulsion
from contralto.losses.decoupled import decoupled_info_nce

from tests.systems.webly.reference import load

REFERENCE = load("cacr.npz")
CLOSE = {"rtol": 1e-9, "atol": 1e-11}


def ref(name):
    return torch.as_tensor(REFERENCE[name])


def tangential(gradient, unit):
    """What is left of a gradient at unit rows once they are normalised inside."""
    return gradient - (gradient * unit).sum(-1, keepdim=True) * unit


def equals(case, loss, z):
    loss.backward()
    torch.testing.assert_close(loss.detach(), ref(f"{case}_loss"), **CLOSE)
    unit = F.normalize(z.detach(), dim=-1)
    torch.testing.assert_close(unit, z.detach())
    torch.testing.assert_close(z.grad, tangential(ref(f"{case}_grad"), unit), **CLOSE)


SETTINGS = {
    "v2_tp1.0_tn1.0": ("v2", {"tau": 1.0}, {"tau": 1.0}),
    "v2_tp0.5_tn2.0": ("v2", {"tau": 0.5, "alpha": 1.5}, {"tau": 2.0, "beta": 0.7}),
    "v3_tp1.0_tn0.9": ("v3", {"tau": 1.0}, {"tau": 0.9}),
    "none_v2": ("v2", {"weighing": "uniform"}, {"weighing": "uniform"}),
    "none_v3": ("v3", {"weighing": "uniform"}, {"weighing": "uniform"}),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_views_of_a_batch_equal_the_published_code(case):
    views, pull, push = SETTINGS[case]
    z = ref(f"{views}_z").clone().requires_grad_()
    found = attraction(z, **pull)
    equals(f"ca_{case}", found.loss, z)
    n = z.shape[1]
    if f"ca_{case}_w" in REFERENCE:  # of the last query view; of the last pair of views
        torch.testing.assert_close(found.weights[-1, :, :-1].detach(), ref(f"ca_{case}_w"), **CLOSE)
    z = ref(f"{views}_z").clone().requires_grad_()
    found = repulsion(z, **push)
    equals(f"cr_{case}", found.loss, z)
    if f"cr_{case}_w" in REFERENCE:
        others = found.weights[-1][~torch.eye(n, dtype=torch.bool)].view(n, n - 1)
        torch.testing.assert_close(others.detach(), ref(f"cr_{case}_w"), **CLOSE)


@pytest.mark.parametrize("views", ["v2", "v3"])
@pytest.mark.parametrize(
    ("case", "settings"),
    [("debiased", {"tau": 1.0, "tau_plus": 0.1, "official": True}), ("rbf", {"tau": 2.0, "cost": "rbf"})],
)
def test_other_costs_equal_the_published_code(case, settings, views):
    z = ref(f"{views}_z").clone().requires_grad_()
    equals(f"cr_{case}_{views}", repulsion(z, **settings).loss, z)


@pytest.mark.parametrize("cost", ["rbf", "distance"])
def test_the_form_with_predictor_and_momentum_encoder_equals_the_published_code(cost):
    query = ref("m3_T1.0_q").clone().requires_grad_()
    loss, _ = momentum_attraction_repulsion(query, ref("m3_T1.0_k"), cost=cost, official=True)
    loss.backward()
    case = f"m3_T1.0_cacr_{'rbf' if cost == 'rbf' else 'euclidean'}loss"
    torch.testing.assert_close(loss.detach(), ref(f"{case}_loss"), **CLOSE)
    torch.testing.assert_close(query.grad, ref(f"{case}_grad"), **CLOSE)


def test_a_step_with_a_queue_equals_the_published_code():
    weight = ref("mq_wq").clone().requires_grad_()
    moved = 0.9 * ref("mq_wk") + 0.1 * ref("mq_wq")
    torch.testing.assert_close(moved, ref("mq_wk_after"), **CLOSE)
    q = ref("mq_x") @ weight.T + ref("mq_bq")
    k = ref("mq_x") @ moved.T + 0.9 * ref("mq_bk") + 0.1 * ref("mq_bq")
    pull = attraction(q, k, weighing="detached").loss
    push = queue_repulsion(q, ref("mq_queue").T, official=True).loss
    torch.testing.assert_close(pull.detach(), ref("mq_loss1"), **CLOSE)
    torch.testing.assert_close(push.detach(), ref("mq_loss2"), **CLOSE)
    (pull + push).backward()
    torch.testing.assert_close(weight.grad, ref("mq_grad_wq"), **CLOSE)


def rows(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def d2(a, b):
    return ((a / a.norm() - b / b.norm()) ** 2).sum()


def weighted(costs, scores, detach):
    w = torch.stack(scores).softmax(0)
    return ((w.detach() if detach else w) * torch.stack(costs)).sum()


def same(ours, slow, z):
    torch.testing.assert_close(ours, slow)
    torch.testing.assert_close(torch.autograd.grad(ours, z)[0], torch.autograd.grad(slow, z)[0])


@pytest.mark.parametrize("detach", [False, True])
def test_attraction_number_by_number(detach):
    z = rows(3, 4, 5).requires_grad_()
    slow = 0.0
    for v in range(3):
        for i in range(4):
            d = [d2(z[v, i], z[j, i]) for j in range(3) if j != v]
            slow = slow + 1.5 * weighted(d, [0.7 * x for x in d], detach) / 12
    same(attraction(z, tau=0.7, alpha=1.5, weighing="detached" if detach else "softmax").loss, slow, z)


@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("tau_plus", [0.0, 0.1])
def test_repulsion_number_by_number(detach, tau_plus):
    z = rows(3, 4, 5, seed=1).requires_grad_()
    slow = 0.0
    for x in range(3):
        for y in range(x + 1, 3):
            for i in range(4):
                d = [d2(z[x, i], z[y, j]) for j in range(4) if j != i]
                push = weighted([-0.8 * e for e in d], [-0.9 * e for e in d], detach)
                positive = -0.8 * d2(z[x, i], z[y, i])
                slow = slow + (push - tau_plus * positive) / (1 - tau_plus) / 12
    weighing = "detached" if detach else "softmax"
    same(repulsion(z, tau=0.9, beta=0.8, weighing=weighing, tau_plus=tau_plus).loss, slow, z)


def test_repulsion_from_a_queue_number_by_number():
    """Every view with its own distances to the queue, whose weights carry no gradient."""
    z, queue = rows(2, 3, 4, seed=2).requires_grad_(), rows(5, 4, seed=3)
    slow = 0.0
    for v in range(2):
        for i in range(3):
            past = [d2(z[v, i], k) for k in queue]
            batch = [d2(z[v, i], z[v, j]) for j in range(3) if j != i]
            scores = [-2 * d.detach() for d in past] + [-2 * d for d in batch]
            slow = slow + weighted([-0.5 * d for d in past + batch], scores, False) / 6
    same(queue_repulsion(z, queue, tau=2.0, beta=0.5).loss, slow, z)


@pytest.mark.parametrize("cost", ["rbf", "distance"])
def test_queries_against_a_momentum_view_number_by_number(cost):
    q, keys, own, t = rows(3, 2, 4, seed=4).requires_grad_(), rows(5, 4, seed=5), torch.tensor([3, 1]), 0.4
    slow = 0.0
    for n in range(2):
        p = torch.stack([d2(q[v, n], keys[own[n]]) / t for v in range(3)]).softmax(0).detach()
        for v in range(3):
            cosines = torch.stack([1 - d2(q[v, n], k) / 2 for k in keys])
            if cost == "rbf":
                value = 2 * t * F.cross_entropy(cosines / t, own[n])
            else:
                others = torch.tensor([m for m in range(5) if m != own[n]])
                r = (cosines[others].detach() / t).softmax(0)
                value = 1 - cosines[own[n]] - (r * (1 - cosines[others])).sum()
            slow = slow + p[v] * value / 2
    ours = momentum_attraction_repulsion(q, keys[own], all_keys=keys, own=own, temperature=t, cost=cost).loss
    same(ours, slow, q)


def test_far_positives_and_close_negatives_weigh_most():
    z = rows(3, 6, 5, seed=6)
    unit = F.normalize(z, dim=2)
    pull, push = attraction(z, tau=1.0).weights, repulsion(z, tau=2.0).weights
    for v in range(3):
        for i in range(6):
            d = (unit[v, i] - unit[:, i]).pow(2).sum(1)
            d[v] = -1
            assert pull[v, i].argmax() == d.argmax()
    for pair, (x, y) in enumerate([(0, 1), (0, 2), (1, 2)]):
        for i in range(6):
            d = (unit[x, i] - unit[y]).pow(2).sum(1)
            d[i] = 9
            assert push[pair, i].argmax() == d.argmin()
    assert (attraction(z[:2]).weights.sum(2) == 1).all()
    assert set(attraction(z[:2]).weights.flatten().tolist()) == {0.0, 1.0}


def test_with_constant_weights_and_two_views_the_gradient_is_that_of_decoupled_contrast():
    """2 tau = 1 / t: attraction with one positive is t times its positive term twice; likewise the repulsion."""
    z, tau = rows(2, 5, 4, seed=7).requires_grad_(), 0.9
    t = 1 / (2 * tau)
    ours = attraction(z).loss + repulsion(z, tau=tau, weighing="detached").loss
    theirs = 2 * t * decoupled_info_nce(z[0], z[1], temperature=t)
    torch.testing.assert_close(torch.autograd.grad(ours, z)[0], torch.autograd.grad(theirs, z)[0])


def test_uniform_repulsion_depends_on_the_means_alone():
    z = rows(2, 6, 3, seed=8)
    unit = F.normalize(z, dim=2)
    n = 6
    crossed = n * n * (unit[0].mean(0) @ unit[1].mean(0)) - (unit[0] * unit[1]).sum()
    expected = -2 + 2 * crossed / (n * (n - 1))
    torch.testing.assert_close(repulsion(z, weighing="uniform").loss, expected)


def test_rows_are_normalised_and_single_precision_is_kept_under_autocast():
    z = rows(2, 5, 4, seed=9).float()
    torch.testing.assert_close(repulsion(z).loss, repulsion(3 * z).loss)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = repulsion(z).loss
    torch.testing.assert_close(mixed, repulsion(z).loss)
    assert math.isfinite(repulsion(z, tau=1e4).loss)


def test_what_cannot_be_is_named():
    z = rows(2, 3, 4)
    with pytest.raises(UsageError, match="batch of 1"):
        repulsion(z[:, :1])
    with pytest.raises(UsageError, match="two views"):
        attraction(z[:1])
    with pytest.raises(UsageError, match="batch of 1"):
        momentum_attraction_repulsion(z[:, :1], z[0, :1])
    with pytest.raises(UsageError, match="stacked"):
        attraction(z[0])
    with pytest.raises(UsageError, match="weighing"):
        repulsion(z, weighing="none")
    with pytest.raises(UsageError, match="tau_plus"):
        repulsion(z, tau_plus=1.0)
    with pytest.raises(UsageError, match="tau_plus"):
        repulsion(z, cost="rbf", tau_plus=0.1)
    with pytest.raises(UsageError, match="do not fit"):
        momentum_attraction_repulsion(z, z[0, :2])
