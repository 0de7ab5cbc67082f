"""Sorting networks and group ordering against the official code's values, and against matrices multiplied out one by one."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from contralto.errors import UsageError
from contralto.losses.sorting import SIGMOIDS, groco, group_mass, soft_sort, sorting_network

REFERENCE = np.load(Path(__file__).parents[1] / "reference" / "groco.npz", allow_pickle=False)
SORTS = sorted(k.removesuffix("_x") for k in REFERENCE.files if k.startswith("sort_") and k.endswith("_x"))
NETWORKS = ("odd_even", "bitonic")


def ref(name):
    return torch.from_numpy(REFERENCE[name])


def settings_of(name):
    """sort_odd_even_5_logistic_phi_10 -> network, sigmoid, steepness."""
    words = name.removeprefix("sort_").removeprefix("odd_even_").removeprefix("bitonic_").split("_")
    network = "bitonic" if "bitonic" in name else "odd_even"
    return {"network": network, "sigmoid": "_".join(words[1:-1]), "steepness": float(words[-1])}


def by_matrices(x, f, network):
    """P of one row as a product of n x n matrices, comparator by comparator."""
    n = len(x)
    P = torch.eye(n, dtype=x.dtype)
    for layer in sorting_network(network, n):
        W = torch.eye(n, dtype=x.dtype)
        for lo, hi in layer:
            alpha = f(float(x[hi] - x[lo]))
            W[lo, lo] = W[hi, hi] = alpha
            W[hi, lo] = W[lo, hi] = 1 - alpha
        x, P = x @ W, P @ W
    return x, P


BY_HAND = {
    "cauchy": lambda v, d: 0.5 + math.atan(v) / math.pi,
    "logistic": lambda v, d: 1 / (1 + math.exp(-v)),
    "logistic_phi": lambda v, d: 1 / (1 + math.exp(-v / (abs(d) + 1e-10) ** 0.25)),
    "gaussian": lambda v, d: 0.5 * math.erfc(-v / math.sqrt(2)),
    "reciprocal": lambda v, d: 0.5 * (v / (2 + abs(v)) + 1),
    "optimal": lambda v, d: v + 0.5 if abs(v) <= 0.25 else 1 - 1 / (16 * v) if v > 0 else 1 / (16 * abs(v)),
}


@pytest.mark.parametrize("name", SORTS)
def test_sorting_equals_the_official_code(name):
    x = ref(f"{name}_x").requires_grad_()
    y, P = soft_sort(x, **settings_of(name))
    torch.testing.assert_close(y, ref(f"{name}_y"), rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(P, ref(f"{name}_P"), rtol=1e-9, atol=1e-11)
    (P * ref(f"{name}_c")).sum().backward()
    torch.testing.assert_close(x.grad, ref(f"{name}_g"), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("sigmoid", SIGMOIDS)
@pytest.mark.parametrize("n", [1, 2, 3, 6, 7, 11])
def test_sorting_equals_matrices_multiplied_out(network, sigmoid, n):
    x = torch.randn(4, n, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    y, P = soft_sort(x, network=network, sigmoid=sigmoid, steepness=2.0)
    for row in range(4):
        slow_y, slow_P = by_matrices(x[row], lambda d: BY_HAND[sigmoid](2.0 * d, d), network)
        torch.testing.assert_close(y[row], slow_y)
        torch.testing.assert_close(P[row], slow_P)
    torch.testing.assert_close((x.unsqueeze(1) @ P).squeeze(1), y)
    torch.testing.assert_close(P.sum(1), torch.ones(4, n, dtype=torch.float64))
    torch.testing.assert_close(P.sum(2), torch.ones(4, n, dtype=torch.float64))


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("n", range(1, 18))
def test_every_network_sorts_where_it_is_steep(network, n):
    x = torch.stack([torch.randperm(n, generator=torch.Generator().manual_seed(s)).double() for s in range(20)])
    y, P = soft_sort(x, network=network, sigmoid="logistic", steepness=1e4)
    torch.testing.assert_close(y, torch.arange(float(n), dtype=torch.float64).expand(20, n))
    assert torch.equal(P.argmax(2), x.long())
    for layer in sorting_network(network, n):
        wires = [w for pair in layer for w in pair]
        assert len(wires) == len(set(wires))


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 10_000), st.integers(2, 9), st.sampled_from(NETWORKS), st.sampled_from(sorted(SIGMOIDS)), st.data()
)
def test_group_mass_is_the_sum_over_ranks_with_the_same_gradients(seed, n, network, sigmoid, data):
    last = data.draw(st.integers(1, n))
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(3, n, generator=g, dtype=torch.float64, requires_grad=True)
    along = torch.randn(3, n, generator=g, dtype=torch.float64)
    options = {"network": network, "sigmoid": sigmoid, "steepness": 1.5}
    slow, fast = soft_sort(x, **options)[1][..., n - last :].sum(2), group_mass(x, last, **options)
    torch.testing.assert_close(fast, slow)
    (by_matrix,) = torch.autograd.grad((slow * along).sum(), x)
    (by_vector,) = torch.autograd.grad((fast * along).sum(), x)
    torch.testing.assert_close(by_vector, by_matrix, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("sigmoid", SIGMOIDS)
def test_sigmoids_are_symmetric_bounded_and_have_right_gradients(sigmoid):
    f = SIGMOIDS[sigmoid]
    d = torch.tensor([-30.0, -1.0, -0.25, -0.1, 0.0, 0.1, 0.25, 1.0, 30.0], dtype=torch.float64)
    torch.testing.assert_close(f(d, 1.0) + f(-d, 1.0), torch.ones_like(d))
    assert ((f(d, 1.0) >= 0) & (f(d, 1.0) <= 1)).all()
    assert (f(d, 1.0).diff() > 0).all()
    inside = d[(d.abs() != 0.25) & (d != 0)].clone().requires_grad_()  # "optimal" has a bend, logistic_phi a pole
    torch.autograd.gradcheck(lambda v: f(v, 1.3), inside)
    edge = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    f(edge, 1.0).sum().backward()
    assert torch.isfinite(edge.grad).all()


@pytest.mark.parametrize(
    ("case", "options"),
    [("groco_2v", {"hardest": 5}), ("groco_mc", {"hardest": 4, "positive_views": 2, "steepness": 2.0})],
)
def test_group_ordering_equals_the_official_code(case, options):
    z = ref(f"{case}_z").requires_grad_()
    loss = groco(z, **options)
    torch.testing.assert_close(loss, ref(f"{case}_loss"), rtol=1e-9, atol=1e-11)
    loss.backward()
    torch.testing.assert_close(z.grad, ref(f"{case}_g"), rtol=1e-9, atol=1e-11)


def by_loops(z, hardest, full, steepness, sigmoid="cauchy", network="odd_even"):
    """The method section, anchor by anchor; losses (B,)."""
    V, B, _ = z.shape
    cosine = lambda a, b: float(F.cosine_similarity(a, b, dim=0))  # noqa: E731
    losses = torch.zeros(B, dtype=torch.float64)
    for v in range(V):
        for i in range(B):
            positives = sorted(cosine(z[v, i], z[u, i]) for u in range(full) if u != v)
            negatives = sorted(cosine(z[v, i], z[v, j]) for j in range(B) if j != i)[-hardest:]
            x = torch.tensor(negatives + positives, dtype=torch.float64)
            _, P = by_matrices(x, lambda d: BY_HAND[sigmoid](steepness * d, d), network)
            mass = P[:, -len(positives) :].sum(1).clamp(0, 1)
            right = torch.cat([1 - mass[: len(negatives)], mass[len(negatives) :]])
            losses[i] += -right.log().clamp_min(-100).mean() / V
    return losses


@pytest.mark.parametrize(("views", "full"), [(2, 2), (3, 3), (5, 2), (4, 3)])
@pytest.mark.parametrize("network", NETWORKS)
def test_group_ordering_equals_a_loop_over_anchors(views, full, network):
    z = torch.randn(views, 7, 4, generator=torch.Generator().manual_seed(views), dtype=torch.float64)
    slow = by_loops(z, 4, full, 1.5, "logistic", network)
    options = {"hardest": 4, "positive_views": full, "steepness": 1.5, "sigmoid": "logistic", "network": network}
    torch.testing.assert_close(groco(z, **options, reduction="none"), slow)
    torch.testing.assert_close(groco(z, **options), slow.mean())
    torch.testing.assert_close(groco(z, **options, reduction="sum"), slow.sum())


@pytest.mark.parametrize(
    ("positive", "negatives", "loss"),
    [(0.5, [0.5] * 10, 0.202), (0.9, torch.linspace(-0.5, 0.3, 10).tolist(), 0.184), (1.0, [-1.0] * 10, 0.147)],
)
def test_the_range_of_the_loss_is_narrow(positive, negatives, loss):
    x = torch.tensor([*negatives, positive], dtype=torch.float64)
    mass = group_mass(x, 1)
    found = F.binary_cross_entropy(mass, torch.tensor([0.0] * 10 + [1.0], dtype=torch.float64))
    assert found.item() == pytest.approx(loss, abs=5e-4)


def test_gradient_stops_at_the_partners_and_need_not():
    z = torch.randn(2, 8, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    stopped, free = groco(z, hardest=5), groco(z, hardest=5, stop_grad=False)
    assert stopped.item() == free.item()
    one, two = (torch.autograd.grad(loss, z)[0] for loss in (stopped, free))
    assert (one - two).abs().max() > 1e-3
    torch.autograd.gradcheck(lambda v: groco(v, hardest=3, stop_grad=False), z)
    # The gradient of an anchor alone: with all partners held, moving one row moves its own loss only.
    held = z.detach().clone()
    held[0, 3].requires_grad_(False)
    row = z[0, 3].detach().clone().requires_grad_()
    x = torch.cat([(F.normalize(held[0], dim=1) @ F.normalize(row, dim=0))[torch.arange(8) != 3].sort().values[-5:]])
    positive = F.cosine_similarity(row, held[1, 3], dim=0)
    mass = group_mass(torch.cat([x, positive[None]]), 1)
    F.binary_cross_entropy(mass, torch.tensor([0.0] * 5 + [1.0], dtype=torch.float64)).div(16).backward()
    torch.testing.assert_close(row.grad, one[0, 3])


def test_half_precision_and_equal_rows_stay_finite():
    z = torch.ones(2, 8, 4, dtype=torch.bfloat16, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = groco(z, hardest=5)
    loss.backward()
    assert loss.dtype == torch.float32
    assert torch.isfinite(z.grad).all()


def test_what_cannot_be_is_said():
    z = torch.randn(2, 6, 4)
    assert groco(z, hardest=4) > 0
    for hardest in (5, 6, 0):
        with pytest.raises(UsageError, match="a batch of 6 has 5"):
            groco(z, hardest=hardest)
    for full in (1, 3):
        with pytest.raises(UsageError, match="positives come from 2 to 2 views"):
            groco(z, hardest=3, positive_views=full)
    with pytest.raises(UsageError, match="views, samples, width"):
        groco(z[0], hardest=3)
    with pytest.raises(UsageError, match="group must hold 1 to 6"):
        group_mass(torch.zeros(6), 7)
    with pytest.raises(UsageError, match="sigmoid must be one of cauchy"):
        soft_sort(torch.zeros(3), sigmoid="step")
    with pytest.raises(UsageError, match="network must be"):
        soft_sort(torch.zeros(3), network="quick")


def test_what_is_no_number_stays_none_and_certainty_has_finite_gradients():
    z = torch.randn(2, 8, 4)
    z[0, 3, 1] = torch.nan
    assert groco(z, hardest=3).isnan()
    x = torch.randn(2, 9, 4, dtype=torch.float64)
    x[1] = -x[0]
    x.requires_grad_()
    loss = groco(x, hardest=3, sigmoid="logistic", steepness=1e6)  # all mass in the wrong group
    loss.backward()
    assert 10 < loss.item() <= 100
    assert torch.isfinite(x.grad).all()
