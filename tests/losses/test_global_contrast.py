"""SogCLR and iSogCLR against their published code, step by step, and against the objective that they descend."""

import math

import pytest
import torch
from torch.nn import functional as F

from contralto.errors import UsageError
from contralto.losses.global_contrast import (
    ItemState,
    TemperatureRule,
    bimodal_global_contrast,
    global_contrast,
    queue_global_contrast,
    step_size,
)

from tests.systems.webly.reference import load

REFERENCE = load("isogclr.npz")
CLOSE = {"rtol": 1e-9, "atol": 1e-11}
ITEMS = 9


def ref(name):
    return torch.as_tensor(REFERENCE[name])


def everything(temperature):
    return ItemState.start(ITEMS, temperature, like=torch.empty(0, dtype=torch.float64))


def of(state, index):
    return ItemState(*(x[index] for x in state))


def put(state, index, after):
    for kept, new in zip(state, after, strict=True):
        kept[index] = new


def leaf(x):
    return x.clone().requires_grad_()


def test_five_steps_of_two_views_equal_the_published_code():
    rule = TemperatureRule(gamma=0.8, rho=6.0, eta=0.001, beta=0.9, low=0.05, high=1.0, clamp=3.0)
    state = everything(0.07)
    for step in range(5):
        index, z0, z1 = ref("idx")[step], leaf(ref("uni_default_z1")[step]), leaf(ref("uni_default_z2")[step])
        loss, after = global_contrast(
            z0, z1, of(state, index), rule, index=index, restart=bool(ref("epoch")[step] == 0), official=True,
            normalize=False,
        )  # fmt: skip
        put(state, index, after)
        loss.backward()
        torch.testing.assert_close(loss.detach(), ref("uni_default_loss")[step], **CLOSE)
        torch.testing.assert_close(z0.grad, ref("uni_default_g1")[step], **CLOSE)
        torch.testing.assert_close(z1.grad, ref("uni_default_g2")[step], **CLOSE)
        expected = torch.stack([state.log_mean.exp(), state.momentum, state.temperature])
        torch.testing.assert_close(expected, ref("uni_default_state")[step], **CLOSE)


def test_five_steps_of_sogclr_equal_the_published_code():
    rule, state = TemperatureRule(gamma=0.9, learn=False), everything(0.1)
    for step in range(5):
        index, z0, z1 = ref("idx")[step], leaf(ref("sog_z1")[step]), leaf(ref("sog_z2")[step])
        loss, after = global_contrast(z0, z1, of(state, index), rule, official=True)
        put(state, index, after)
        loss.backward()
        torch.testing.assert_close(loss.detach(), ref("sog_loss")[step], **CLOSE)
        torch.testing.assert_close(z0.grad, ref("sog_g1")[step], **CLOSE)
        torch.testing.assert_close(z1.grad, ref("sog_g2")[step], **CLOSE)
        torch.testing.assert_close(state.log_mean.exp(), ref("sog_u")[step], **CLOSE)
        assert (state.temperature == 0.1).all()


def test_three_steps_against_a_queue_equal_the_published_code():
    state = everything(0.1)
    for step in range(3):
        index, cosine = ref("idx")[step], leaf(ref("moco_logits")[step])
        loss, after = queue_global_contrast(cosine, of(state, index), official=True)
        put(state, index, after)
        loss.backward()
        torch.testing.assert_close(loss.detach(), ref("moco_loss")[step], **CLOSE)
        torch.testing.assert_close(cosine.grad, ref("moco_g")[step], **CLOSE)
        expected = torch.stack([state.log_mean.exp(), state.momentum, state.temperature])
        torch.testing.assert_close(expected, ref("moco_state")[step], **CLOSE)


def test_five_steps_of_pairs_equal_the_published_code():
    rule = TemperatureRule(gamma=0.8, rho=0.1, eta=0.01, beta=0.9, low=0.005, high=1.0, clamp=5.0)
    states = everything(0.07), everything(0.07)
    for step in range(5):
        image, text = leaf(ref("bi_default_image")[step]), leaf(ref("bi_default_text")[step])
        indices = ref("idx")[step], ref("idx_text")[step]
        assert step_size(0.01, "const", int(ref("epoch")[step]), 10) == ref("bi_default_eta")[step]
        loss, *after = bimodal_global_contrast(
            image, text, *map(of, states, indices), rule, official=True, normalize=False
        )
        for state, index, new in zip(states, indices, after, strict=True):
            put(state, index, new)
        loss.backward()
        torch.testing.assert_close(loss.detach(), ref("bi_default_loss")[step], **CLOSE)
        torch.testing.assert_close(image.grad, ref("bi_default_gi")[step], **CLOSE)
        torch.testing.assert_close(text.grad, ref("bi_default_gt")[step], **CLOSE)
        found = [row for s in states for row in ((s.log_mean - s.offset).exp(), s.momentum, s.temperature, s.offset)]
        torch.testing.assert_close(torch.stack(found), ref("bi_default_state")[step], **CLOSE)


def rows(n, seed, d=4):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def slow_visit(values, s_old, u, tau, rule, seen):
    """One anchor: its weights, mean, and gradient of the temperature, number by number."""
    e = [math.exp(v / tau) for v in values]
    g = sum(e) / len(e)
    s = (1 - rule.gamma) * s_old + rule.gamma * g if seen else g
    w = [x / s / len(e) for x in e]
    return w, s, math.log(s) + rule.rho - sum(a * v / tau for a, v in zip(w, values, strict=True))


def test_three_visits_row_by_row():
    """The form with differences, with its rule for first visits; some items are seen later than others."""
    rule, n = TemperatureRule(gamma=0.7, rho=0.3, eta=0.1, beta=0.4, clamp=0.5), 4
    state = everything(0.2)
    s, u, tau, seen = [0.0] * ITEMS, [0.0] * ITEMS, [0.2] * ITEMS, [False] * ITEMS
    for step, index in enumerate(([0, 1, 2, 3], [3, 4, 0, 5], [5, 0, 3, 1])):
        z = torch.stack([rows(n, 10 * step), rows(n, 10 * step + 1)]).requires_grad_()
        unit = F.normalize(z, dim=2)
        expected = 0.0
        new = {}
        for i, item in enumerate(index):
            found = []
            for v in range(2):
                h = [unit[v, i] @ unit[k, j] - unit[0, i] @ unit[1, i] for k in range(2) for j in range(n) if j != i]
                found.append(slow_visit([x.item() for x in h], s[item], u[item], tau[item], rule, seen[item]))
                expected = expected + sum(a * x for a, x in zip(found[-1][0], h, strict=True)) / n
            gradient = max(-rule.clamp, min(rule.clamp, (found[0][2] + found[1][2]) / 2))
            momentum = (1 - rule.beta) * u[item] + rule.beta * gradient
            temperature = max(rule.low, min(rule.high, tau[item] - rule.eta * momentum))
            new[item] = (found[0][1] + found[1][1]) / 2, momentum, temperature, True
        (slow,) = torch.autograd.grad(expected, z)
        index = torch.tensor(index)
        loss, after = global_contrast(z[0], z[1], of(state, index), rule, index=index)
        (fast,) = torch.autograd.grad(loss, z)
        put(state, index, after)
        for item, (a, b, c, d) in new.items():
            s[item], u[item], tau[item], seen[item] = a, b, c, d
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(fast, slow)
        torch.testing.assert_close(state.log_mean.exp(), torch.tensor(s, dtype=torch.float64))
        torch.testing.assert_close(state.temperature, torch.tensor(tau, dtype=torch.float64))
        torch.testing.assert_close(state.momentum, torch.tensor(u, dtype=torch.float64))
        assert state.seen.tolist() == seen


def test_at_the_first_visit_the_gradient_is_that_of_the_objective():
    """t log mean exp(h / t): the running mean is the batch's own, and nothing but cosines carries gradient."""
    z = torch.stack([rows(5, 1), rows(5, 2)]).requires_grad_()
    tau = 0.3
    loss, _ = global_contrast(z[0], z[1], ItemState.start(5, tau, like=z.detach()))
    unit = F.normalize(z, dim=2)
    objective = 0.0
    for v in range(2):
        for i in range(5):
            h = [unit[v, i] @ unit[k, j] - unit[0, i] @ unit[1, i] for k in range(2) for j in range(5) if j != i]
            objective = objective + tau * ((torch.stack(h) / tau).logsumexp(0) - math.log(len(h))) / 5
    torch.testing.assert_close(torch.autograd.grad(loss, z)[0], torch.autograd.grad(objective, z)[0])


@pytest.mark.parametrize("rho", [0.1, 0.5])
def test_temperatures_come_to_rest_where_the_weights_diverge_by_rho(rho):
    z0, z1 = rows(8, 3), rows(8, 4)
    rule = TemperatureRule(gamma=1.0, rho=rho, eta=0.02, low=1e-3, high=10.0, beta=1.0)
    state = ItemState.start(8, 0.5, like=z0)
    for _ in range(4000):
        _, state = global_contrast(z0, z1, state, rule)
    z0, z1 = F.normalize(z0, dim=1), F.normalize(z1, dim=1)
    for i in range(8):
        divergences = []
        for z in (z0, z1):
            p = torch.stack([z[i] @ x[j] for x in (z0, z1) for j in range(8) if j != i]).div(state.temperature[i])
            p = p.softmax(0)
            divergences.append((p * (p * len(p)).log()).sum())
        assert (sum(divergences) / 2).item() == pytest.approx(rho, abs=1e-6)


def test_items_with_more_look_alikes_come_to_rest_at_larger_temperatures():
    cosine = torch.zeros(3, 61, dtype=torch.float64)
    cosine[:, 0] = 0.9
    for row, alike in enumerate((1, 4, 10)):
        cosine[row, 1 : 1 + alike] = 0.8
    state = ItemState.start(3, 0.3, like=cosine)
    for _ in range(2000):
        _, state = queue_global_contrast(cosine, state, TemperatureRule(rho=0.2, gamma=1.0, high=10.0))
    assert state.temperature.tolist() == sorted(state.temperature.tolist())
    assert state.temperature[2] > state.temperature[0] + 0.1


def test_larger_rho_gives_smaller_temperatures():
    z0, z1, found = rows(8, 3), rows(8, 4), []
    for rho in (0.1, 0.4, 1.0):
        state = ItemState.start(8, 0.3, like=z0)
        for _ in range(100):
            _, state = global_contrast(z0, z1, state, TemperatureRule(rho=rho))
        found.append(state.temperature.mean().item())
    assert found == sorted(found, reverse=True)


def test_pairs_row_by_row():
    rule, n = TemperatureRule(gamma=0.6, rho=0.5, beta=0.9, low=0.005, clamp=5.0), 4
    image, text = leaf(rows(n, 5)), leaf(rows(n, 6))
    states = everything(0.1), everything(0.2)
    first = torch.arange(n)
    for round_ in range(2):
        kept = [of(s, first) for s in states]
        loss, *after = bimodal_global_contrast(image, text, *kept, rule)
        a, b = F.normalize(image, dim=1), F.normalize(text, dim=1)
        expected = 0.0
        for side, (x, y) in enumerate(((a, b), (b, a))):
            for i in range(n):
                h = [x[i] @ y[j] - a[i] @ b[i] for j in range(n) if j != i]
                s, u, tau = kept[side].log_mean[i].exp().item(), 0.0, kept[side].temperature[i].item()
                w, s, _ = slow_visit([v.item() for v in h], s, u, tau, rule, round_ > 0)
                expected = expected + sum(p * v for p, v in zip(w, h, strict=True)) / n
                assert after[side].log_mean[i].exp().item() == pytest.approx(s)
        torch.testing.assert_close(loss, expected)
        for ours, slow in zip(
            torch.autograd.grad(loss, (image, text)), torch.autograd.grad(expected, (image, text)), strict=True
        ):
            torch.testing.assert_close(ours, slow)
        for state, new in zip(states, after, strict=True):
            put(state, first, new)


def test_rows_of_one_item_are_no_negatives_of_each_other():
    z0, z1 = rows(3, 7), rows(3, 8)
    twice = torch.tensor([0, 1, 0])
    loss, after = global_contrast(z0, z1, ItemState.start(3, 0.2, like=z0), index=twice)
    h = F.normalize(torch.cat([z0, z1]), dim=1)
    row = torch.stack([h[0] @ h[1], h[0] @ h[4]]) - h[0] @ h[3]
    row2 = torch.stack([h[3] @ h[1], h[3] @ h[4]]) - h[0] @ h[3]
    mean = ((row / 0.2).exp().mean() + (row2 / 0.2).exp().mean()) / 2
    torch.testing.assert_close(after.log_mean[0].exp(), mean)
    assert torch.isfinite(loss)
    with pytest.raises(UsageError, match="one item"):
        global_contrast(z0, z1, ItemState.start(3, 0.2, like=z0), index=torch.zeros(3, dtype=torch.int64))
    with pytest.raises(UsageError, match="batch of 1"):
        global_contrast(z0[:1], z1[:1], ItemState.start(1, 0.2))
    with pytest.raises(UsageError, match="batch of 1"):
        bimodal_global_contrast(z0[:1], z1[:1], ItemState.start(1, 0.2), ItemState.start(1, 0.2))
    with pytest.raises(UsageError, match="one shape"):
        global_contrast(z0, z1[:2], ItemState.start(3, 0.2))


def test_extreme_temperatures_neither_overflow_nor_vanish():
    """exp(s / 0.005) is no number in single precision; and a mean of almost nothing has a logarithm all the same."""
    z0, z1 = rows(6, 9).float(), rows(6, 10).float()
    rule = TemperatureRule(low=0.005, gamma=0.9)
    state = ItemState.start(6, 0.005)
    for _ in range(20):
        loss, state = global_contrast(z0, z1, state, rule)
        assert torch.isfinite(loss)
        assert all(torch.isfinite(x).all() for x in state)
    loss, _, _ = bimodal_global_contrast(z0, z1, ItemState.start(6, 0.005), ItemState.start(6, 0.005), rule)
    assert torch.isfinite(loss)


def test_under_autocast_the_loss_is_that_of_single_precision():
    z0, z1 = rows(6, 11).float(), rows(6, 12).float()
    plain, _ = global_contrast(z0, z1, ItemState.start(6, 0.1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed, _ = global_contrast(z0, z1, ItemState.start(6, 0.1))
    torch.testing.assert_close(mixed, plain)


def test_step_sizes():
    assert step_size(0.03, "exp", 3, 10, smallest=0.01, rate=0.5) == pytest.approx(0.015)
    assert step_size(0.03, "cosine", 10, 10, smallest=0.01) == pytest.approx(0.01)
    with pytest.raises(UsageError, match="schedule"):
        step_size(0.03, "linear", 3, 10)
    with pytest.raises(UsageError, match="gamma"):
        TemperatureRule(gamma=0.0)
    with pytest.raises(UsageError, match="bounds"):
        TemperatureRule(low=0.0)
