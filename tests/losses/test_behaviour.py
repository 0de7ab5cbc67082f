"""The four losses and the instruments against reference values, number by number, and in their limits."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from contralto.errors import UsageError
from contralto.evaluation.representation import tolerance, uniformity
from contralto.losses.behaviour import behaviour, hardest, penalty_distribution, penalty_entropy, separation

from tests.systems.webly.reference import load

REFERENCE = load("contrastive_behaviour.npz")
CLOSE = {"rtol": 1e-9, "atol": 1e-11}
CASES = {
    "ce_0.3": {"temperature": 0.3},
    "ce_1.0": {"temperature": 1.0},
    "hard_a0.2_t0.3": {"kind": "hard", "alpha": 0.2, "temperature": 0.3},
    "hard_simple_a0.2": {"kind": "hard_simple", "alpha": 0.2, "lam": 1.0},
    "simple_l1.0000": {"kind": "simple", "lam": 1.0},
}


def ref(name):
    return torch.as_tensor(REFERENCE[name])


@pytest.mark.parametrize("case", CASES)
def test_losses_have_the_reference_values(case):
    q, k = ref("q").clone().requires_grad_(), ref("k").clone().requires_grad_()
    each = behaviour(q, k, reduction="none", **CASES[case])
    torch.testing.assert_close(each.detach(), ref(f"{case}_loss_per_anchor"), **CLOSE)
    behaviour(q, k, **CASES[case]).backward()
    torch.testing.assert_close(q.grad, ref(f"{case}_grad_q"), **CLOSE)
    torch.testing.assert_close(k.grad, ref(f"{case}_grad_k"), **CLOSE)


@pytest.mark.parametrize("t", [0.3, 1.0])
def test_penalties_have_the_reference_values(t):
    torch.testing.assert_close(penalty_distribution(ref("sim"), t), ref(f"ce_{t}_relative_penalty"), **CLOSE)
    torch.testing.assert_close(penalty_entropy(ref("sim"), t), ref(f"ce_{t}_penalty_entropy"), **CLOSE)
    s = ref("sim").clone().requires_grad_()
    off = ~torch.eye(8, dtype=torch.bool)
    loss = F.softplus((s / t).masked_fill(~off, -torch.inf).logsumexp(1) - s.diagonal() / t)
    (gradient,) = torch.autograd.grad(loss.sum(), s)
    torch.testing.assert_close(gradient, ref(f"ce_{t}_dL_ds"), **CLOSE)
    r = gradient / gradient.diagonal().abs().unsqueeze(1)
    torch.testing.assert_close(r[off], penalty_distribution(ref("sim"), t)[off])


def test_the_hardest_are_the_reference_ones():
    kept = hardest(ref("sim"), 0.2, ~torch.eye(8, dtype=torch.bool))
    assert torch.equal(kept, ref("hard_a0.2_t0.3_keep"))


def test_a_memory_bank_has_the_reference_values():
    q, positive, bank = ref("q"), ref("bank_pos"), ref("bank")
    found = behaviour(q, positive, negatives=bank, temperature=0.3, reduction="none")
    torch.testing.assert_close(found, ref("bank_loss_per_anchor"), **CLOSE)
    found = behaviour(q, positive, negatives=bank, kind="hard", alpha=0.25, temperature=0.3, reduction="none")
    torch.testing.assert_close(found, ref("bank_hard_loss_per_anchor"), **CLOSE)


def test_uniformity_and_tolerance_have_the_reference_values():
    x, labels = REFERENCE["q"], REFERENCE["labels"]
    close = {"rtol": 1e-6}  # rows are scaled in single precision there
    np.testing.assert_allclose(uniformity(x), REFERENCE["uniformity_t2"], **close)
    np.testing.assert_allclose(uniformity(x, t=3), REFERENCE["uniformity_t3"], **close)
    np.testing.assert_allclose(tolerance(x, labels), REFERENCE["tolerance_conditional"], rtol=1e-5)
    np.testing.assert_allclose(tolerance(x, labels, joint=True), REFERENCE["tolerance_joint_with_self"], **close)


def rows(n, seed, d=4):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("kind", ["contrastive", "simple", "hard", "hard_simple"])
def test_a_bank_that_holds_the_anchors_number_by_number(kind):
    """The own slot is no negative and takes no place among the hardest."""
    q, k, bank, own, t, alpha = rows(3, 0), rows(3, 1), rows(7, 2), torch.tensor([4, -1, 0]), 0.4, 0.3
    bank[4], bank[0] = q[0], q[2]
    expected = []
    for i in range(3):
        s = torch.stack([F.cosine_similarity(q[i], b, dim=0) for b in bank])
        s = s[[j for j in range(7) if j != own[i]]]
        if kind.startswith("hard"):
            s = s.sort(descending=True).values[: math.ceil(alpha * len(s))]
        positive = F.cosine_similarity(q[i], k[i], dim=0)
        if kind.endswith("simple"):
            expected.append(s.mean() - positive)
        else:
            expected.append(-((positive / t).exp() / ((positive / t).exp() + (s / t).exp().sum())).log())
    found = behaviour(q, k, kind=kind, negatives=bank, own=own, temperature=t, alpha=alpha, reduction="none")
    torch.testing.assert_close(found, torch.stack(expected))
    found = behaviour(q, k, kind=kind, negatives=bank, own=own, temperature=t, alpha=alpha, reduction="sum")
    torch.testing.assert_close(found, torch.stack(expected).sum())


def test_drawn_negatives_are_known_by_their_numbers():
    q, k, bank = rows(3, 0), rows(3, 1), rows(7, 2)
    drawn = torch.tensor([4, 1, 4, 6])  # the first query's own sample was drawn twice
    found = behaviour(q, k, negatives=bank[drawn], numbers=drawn, own=torch.tensor([4, 0, 6]), reduction="none")
    for i, kept in enumerate(([1, 3], [0, 1, 2, 3], [0, 1, 2])):
        alone = behaviour(q[i : i + 1], k[i : i + 1], negatives=bank[drawn[kept]])
        torch.testing.assert_close(found[i], alone)


def test_separation_number_by_number():
    q, k = rows(5, 10), rows(5, 11)
    s = torch.tensor([[F.cosine_similarity(a, b, dim=0) for b in k] for a in q], dtype=torch.float64)
    negatives = torch.stack([s[i][[j for j in range(5) if j != i]] for i in range(5)]).sort(1, descending=True).values
    found = separation(q, k, temperature=0.2, nearest=2)
    torch.testing.assert_close(found["positive"], s.diagonal().mean())
    torch.testing.assert_close(found["nearest"], negatives[:, :2].mean())
    torch.testing.assert_close(found["gap"], s.diagonal().mean() - negatives[:, :2].mean())
    r = (negatives / 0.2).softmax(1)
    torch.testing.assert_close(found["penalty_entropy"], -(r * r.log()).sum(1).mean())


def test_negatives_that_are_not_kept_get_no_gradient():
    q, k = rows(2, 3), rows(2, 4)
    bank = rows(10, 5).requires_grad_()
    for kind in ("hard", "hard_simple"):
        (gradient,) = torch.autograd.grad(behaviour(q[:1], k[:1], kind=kind, negatives=bank, alpha=0.3), bank)
        kept = hardest(F.normalize(q[:1], dim=1) @ F.normalize(bank, dim=1).T, 0.3)[0]
        assert kept.sum() == 3
        assert (gradient[kept] != 0).any(1).all()
        assert (gradient[~kept] == 0).all()


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.sampled_from([0.01, 0.08, 0.1, 0.3, 0.5, 1.0]), st.booleans())
def test_exactly_so_many_are_kept(m, alpha, equal):
    s = torch.zeros(3, m) if equal else rows(3, m, m).float()
    there = torch.ones(3, m, dtype=torch.bool)
    there[1, : m // 2] = False
    kept = hardest(s, alpha, there)
    assert not (kept & ~there).any()
    for row, all_ in zip(kept.sum(1).tolist(), there.sum(1).tolist(), strict=True):
        assert row == max(1, math.ceil(round(alpha * all_, 9)))


def test_the_entropy_of_penalties_grows_with_the_temperature():
    s = F.normalize(rows(6, 6), dim=1) @ F.normalize(rows(6, 7), dim=1).T
    found = torch.stack([penalty_entropy(s, t) for t in (1e-4, 0.05, 0.1, 0.5, 1.0, 100.0)])
    assert (found.diff(dim=0) > 0).all()
    assert found[0].max() < 1e-6
    torch.testing.assert_close(found[-1], torch.full((6,), math.log(5), dtype=torch.float64), rtol=1e-4, atol=0)
    lower = s.clone()
    lower.diagonal().fill_(-1)
    torch.testing.assert_close(penalty_distribution(lower, 0.3), penalty_distribution(s, 0.3))
    without = penalty_distribution(s, 0.3, torch.full((6,), -1))
    torch.testing.assert_close(without, (s / 0.3).softmax(1))


def test_the_limits_of_the_temperature():
    q, k = rows(5, 8), rows(5, 9)
    s = F.normalize(q, dim=1) @ F.normalize(k, dim=1).T
    off = s.masked_fill(torch.eye(5, dtype=torch.bool), -torch.inf)
    t = 1e-3
    small = behaviour(q, k, temperature=t, reduction="none") * t
    torch.testing.assert_close(small, (off.amax(1) - s.diagonal()).clamp_min(0), rtol=0, atol=2e-3)
    assert torch.isfinite(small).all()
    t, n = 1e4, 5
    large = behaviour(q, k, temperature=t, reduction="none")
    others = s.sum(1) - s.diagonal()
    expected = -(n - 1) / (n * t) * s.diagonal() + others / (n * t) + math.log(n)
    torch.testing.assert_close(large, expected, rtol=0, atol=1e-8)
    simple = behaviour(q, k, kind="simple", reduction="none")
    torch.testing.assert_close((large - math.log(n)) * n * t / (n - 1), simple, rtol=0, atol=1e-3)


def test_single_precision_is_kept_under_autocast():
    q, k = rows(5, 8).float(), rows(5, 9).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = behaviour(q, k, temperature=0.07)
    torch.testing.assert_close(mixed, behaviour(q, k, temperature=0.07))


def test_what_cannot_be_is_named():
    q = rows(2, 0)
    with pytest.raises(UsageError, match="batch of 1"):
        behaviour(q[:1], q[:1])
    with pytest.raises(UsageError, match="batch of 1"):
        behaviour(q[:1], q[:1], kind="hard")
    with pytest.raises(UsageError, match="one shape"):
        behaviour(q, q[:1])
    with pytest.raises(UsageError, match="kind"):
        behaviour(q, q, kind="softmax")
    with pytest.raises(UsageError, match="alpha"):
        behaviour(q, q, kind="hard", alpha=0.0)
