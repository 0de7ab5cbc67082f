"""Losses of episodes and the ICNN score: against the released code, against plain loops, and what must hold of them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from contralto.errors import UsageError
from contralto.losses.episodes import distances, proto_triplet, prototypical_cross_entropy, prototypical_logits
from contralto.losses.icnn import icnn_loss, icnn_score

REFERENCE = Path(__file__).parents[1] / "reference" / "susana.npz"


@pytest.fixture(scope="module")
def reference():
    with np.load(REFERENCE, allow_pickle=False) as archive:
        return {k: torch.from_numpy(np.asarray(archive[k])) for k in archive.files}


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("case", "window"), [("icnn_1", 10), ("icnn_2", None)])
def test_icnn_is_that_of_the_released_code(reference, case, window):
    x, y = reference[f"{case}__x"].requires_grad_(), reference[f"{case}__y"]
    close(icnn_score(x, y, window=window).detach(), reference[f"{case}__score"])
    loss = icnn_loss(x, y, window=window)
    close(loss.detach(), reference[f"{case}__loss"])
    close(torch.autograd.grad(loss, x)[0], reference[f"{case}__grad"])


def test_proto_triplet_is_that_of_the_released_code(reference):
    q, p = reference["pt_0__queries"].requires_grad_(), reference["pt_0__prototypes"].requires_grad_()
    loss = proto_triplet(q, p, reference["pt_0__y"], margin=0.5)
    close(loss.detach(), reference["pt_0__loss"])
    grads = torch.autograd.grad(loss, (q, p))
    close(grads[0], reference["pt_0__grad_queries"])
    close(grads[1], reference["pt_0__grad_prototypes"])


def slow_score(x, y, *, k=4, window=None, omega=False):
    """The score row by row, as it is written down."""
    x, y, n = x.numpy(), y.numpy(), len(x)
    whole = k + 2 < n
    k = k if whole else n - 2
    m = min(k + 1 if window is None else window, n - 1)
    e = np.sqrt(((x[:, None] - x[None]) ** 2).sum(-1) + 1e-6)
    a, b, own, intra, rows, scaled = [], [], [], [], [], []
    for i in range(n):
        near = sorted((j for j in range(n) if j != i), key=lambda j: e[i, j])[:m]
        others = [e[i, j] for j in near if y[j] != y[i]]
        u = min(others) if others else np.inf
        judged = near[:k]
        r = np.array([e[i, j] / (u + 1e-7) for j in judged])
        r = r / max(1, r.max())
        same = np.array([y[j] == y[i] for j in judged])
        own.append(same.sum())
        if same.any():
            intra.append((r * same).sum() / (same.sum() + 1e-7))
        rows.append((np.array([e[i, j] for j in judged]) * ~same, (~same).sum()))
        d = np.array([e[i, j] for j in judged])
        scaled.append(((d - d.min()) / (d.max() - d.min() + 1e-7)).var())
    top = max(t.max() for t, _ in rows)
    b = [(t / (top + 1e-7)).sum() / (g + 1e-7) for t, g in rows if g]
    a = 1 - sum(intra) / (len(intra) + 1e-7)
    inter = abs(sum(b) / (len(b) + 1e-7) - (not b))
    parts = [(a + inter) / 2, np.mean(own) / k if whole else 1.0]
    return np.mean([*parts, 1 - np.mean(scaled)] if omega else parts)


@settings(max_examples=60, deadline=None)
@given(st.integers(3, 14), st.integers(1, 5), st.integers(0, 6), st.booleans(), st.integers(0, 2**31))
def test_icnn_is_the_loop_over_rows(n, k, wider, omega, seed):
    g = torch.Generator().manual_seed(seed)
    x, y = torch.randn(n, 3, generator=g, dtype=torch.float64), torch.randint(3, (n,), generator=g)
    window = None if wider == 0 else min(k, n - 2) + wider - 1
    assert icnn_score(x, y, k=k, window=window, omega=omega).item() == pytest.approx(
        slow_score(x, y, k=k, window=window, omega=omega), abs=1e-12
    )


def test_several_sets_are_each_its_own():
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(3, 12, 4, generator=g, dtype=torch.float64), torch.arange(12).remainder(3).expand(3, -1)
    close(icnn_score(x, y), torch.stack([icnn_score(x[i], y[i]) for i in range(3)]))
    close(icnn_loss(x, y), torch.stack([icnn_loss(x[i], y[i]) for i in range(3)]).mean())


def compact(width):
    """Three far classes of ten points each, so wide."""
    g = torch.Generator().manual_seed(1)
    y = torch.arange(3).repeat_interleave(10)
    return 100 * torch.eye(3, dtype=torch.float64)[y] + width * torch.randn(30, 3, generator=g, dtype=torch.float64), y


def test_compact_far_classes_score_one():
    scores = [icnn_score(*compact(width), window=10).item() for width in (10.0, 1.0, 0.1, 0.001)]
    assert scores == sorted(scores)
    assert scores[-1] > 0.9999
    assert icnn_loss(*compact(0.001), window=10) < 1e-4


def test_order_turns_and_shifts_change_nothing_and_scale_hardly_anything():
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(20, 5, generator=g, dtype=torch.float64), torch.randint(3, (20,), generator=g)
    order = torch.randperm(20, generator=g)
    turn = torch.linalg.qr(torch.randn(5, 5, generator=g, dtype=torch.float64)).Q
    score = icnn_score(x, y)
    close(icnn_score(x[order], y[order]), score)
    torch.testing.assert_close(icnn_score(x @ turn + 3, y), score, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(icnn_score(50 * x, y), score, rtol=1e-5, atol=1e-5)
    a, b = x.clone().requires_grad_(), x[order].clone().requires_grad_()
    (grad,), (moved,) = torch.autograd.grad(icnn_loss(a, y), a), torch.autograd.grad(icnn_loss(b, y[order]), b)
    close(moved, grad[order])


def test_the_count_of_own_neighbours_carries_no_gradient():
    x, y = compact(0.1)
    x, pool = x[:6].clone().requires_grad_(), x[:10]
    # One class only: nothing is inter, all ratios are 0, and what is left of the score is the count.
    score = icnn_score(x, y[:6], pool=pool, pool_labels=y[:10], k=2)
    (grad,) = torch.autograd.grad(score, x)
    assert score == 1.0
    assert (grad == 0).all()


def test_three_rows_have_one_neighbour_to_judge_and_their_count_is_left_out():
    x = torch.tensor([[0.0], [1.0], [5.0]], dtype=torch.float64)
    y = torch.tensor([0, 0, 1])
    # Neighbours: 1, 0, 1. Ratios to the nearest of another class in a window of two: 1/5, 1/4; the third row has none of its own.
    lam_intra = 1 - (1 / 5 + 1 / 4) / 2
    lam_inter = 1.0  # one neighbour of another class, the farthest of all
    assert icnn_score(x, y).item() == pytest.approx(((lam_intra + lam_inter) / 2 + 1) / 2, abs=1e-5)


def test_a_twin_at_the_same_place_is_a_neighbour_and_the_point_itself_is_not():
    x = torch.tensor([[0.0], [0.0], [3.0], [3.0], [9.0], [9.5], [9.9]], dtype=torch.float64)
    own, foreign = torch.tensor([0, 0, 1, 1, 2, 2, 2]), torch.tensor([0, 1, 1, 0, 2, 2, 2])
    assert icnn_score(x, own, k=1, window=2) > 0.9
    assert icnn_score(x, foreign, k=1, window=2) < 0.75
    x.requires_grad_()
    (grad,) = torch.autograd.grad(icnn_loss(x, own, k=1, window=2), x)
    assert torch.isfinite(grad).all()


def test_of_another_set_no_neighbour_is_dropped():
    prototypes = torch.eye(4, dtype=torch.float64) * 10
    x, y = prototypes + 0.1, torch.arange(4)
    kept = icnn_score(x, y, k=1, pool=prototypes, pool_labels=y)
    dropped = icnn_score(x, y, k=1, pool=prototypes.roll(1, 0), pool_labels=(y + 1) % 4)  # as without the nearest
    assert kept == icnn_score(x, y, k=1, pool=prototypes.flip(0), pool_labels=y.flip(0))
    assert kept > 0.97
    assert dropped < 0.8


def test_windows_are_cut_to_what_is_there_and_too_small_ones_refused():
    x, y = compact(1.0)
    close(icnn_score(x, y, window=29), icnn_score(x, y, window=1000))
    with pytest.raises(UsageError, match="at least the k = 4"):
        icnn_score(x, y, window=3)
    with pytest.raises(UsageError, match="three rows"):
        icnn_score(x[:2], y[:2])
    with pytest.raises(UsageError, match="do not fit"):
        icnn_score(x, y[:5])
    with pytest.raises(UsageError, match="pool_labels"):
        icnn_score(x, y, pool=x)


def test_minimising_the_score_gathers_random_points():
    from contralto.claims.susana import points

    for seed in (100, 101, 102):
        found = points(seed)
        assert found["before"] < 0.5
        assert found["neighbours"] > 0.85
        assert found["loss"] < 0.2


def test_distances_are_those_of_differences_even_far_from_the_origin():
    a = torch.tensor([[1000.0, 0.0], [1000.001, 0.0]])
    torch.testing.assert_close(distances(a, a)[0, 1].item(), (0.001**2 + 1e-6) ** 0.5, rtol=0.1, atol=0)


def test_prototypical_loss_is_a_softmax_over_squared_distances():
    g = torch.Generator().manual_seed(0)
    q, p = (
        torch.randn(2, 6, 5, generator=g, dtype=torch.float64),
        torch.randn(2, 3, 5, generator=g, dtype=torch.float64),
    )
    y = torch.randint(3, (2, 6), generator=g)
    found = prototypical_cross_entropy(q, p, y, temperature=4.0, reduction="none")
    for e in range(2):
        for i in range(6):
            scores = torch.stack([-((q[e, i] - p[e, w]) ** 2).sum() / 4 for w in range(3)])
            assert found[e, i].item() == pytest.approx(float(scores.logsumexp(0) - scores[y[e, i]]))
    close(prototypical_cross_entropy(q, p, y, temperature=4.0), found.mean())
    close(prototypical_cross_entropy(q, p, y, temperature=4.0, reduction="sum"), found.sum())


def test_proto_triplet_is_the_margin_where_all_prototypes_are_one_and_nothing_where_all_is_far():
    q, p = torch.randn(4, 3), torch.zeros(2, 3)
    y = torch.tensor([0, 1, 0, 1])
    torch.testing.assert_close(proto_triplet(q, p, y, margin=0.7), torch.tensor(0.7))
    far = 10 * torch.eye(2)
    assert proto_triplet(far[y], far, y) == 0
    assert proto_triplet(far[y] / 100, far / 100, y) > 0  # a margin is a distance: the scale matters


def test_the_negative_is_the_nearest_other_prototype():
    q, p = torch.tensor([[0.0]]), torch.tensor([[1.0], [5.0], [1.2]])
    torch.testing.assert_close(proto_triplet(q, p, torch.tensor([0])), torch.tensor(0.3), rtol=0, atol=1e-5)


def test_gradient_is_finite_where_points_coincide():
    q = torch.zeros(3, 4, requires_grad=True)
    p = torch.zeros(2, 4, requires_grad=True)
    y = torch.tensor([0, 1, 0])
    (proto_triplet(q, p, y) + prototypical_cross_entropy(q, p, y)).backward()
    assert torch.isfinite(q.grad).all()
    assert torch.isfinite(p.grad).all()


def test_arguments_that_do_not_fit_are_refused():
    q, p, y = torch.randn(4, 3), torch.randn(2, 3), torch.tensor([0, 1, 0, 1])
    with pytest.raises(UsageError, match="two classes"):
        proto_triplet(q, p[:1], y)
    with pytest.raises(UsageError, match="do not fit"):
        prototypical_cross_entropy(q, p, y[:3])
    with pytest.raises(UsageError, match="temperature"):
        prototypical_logits(q, p, temperature=0.0)
    with pytest.raises(UsageError, match="reduction"):
        proto_triplet(q, p, y, reduction="median")
