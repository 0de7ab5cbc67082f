"""Sinkhorn against the official code's values and against the equations written out; swapped prediction against loops."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from contralto.errors import UsageError
from contralto.losses.sinkhorn import sinkhorn
from contralto.losses.swapped import swapped_prediction

REFERENCE = np.load(Path(__file__).parents[1] / "reference" / "swav.npz", allow_pickle=False)


def by_scaling(scores, epsilon, iterations):
    """Step 5 of the method: the matrix itself, scaled in turn, with all constants."""
    M = np.exp(scores.numpy() / epsilon).T
    K, B = M.shape
    M = M / M.sum()
    for _ in range(iterations):
        for k in range(K):
            M[k] /= K * M[k].sum()
        for b in range(B):
            M[:, b] /= B * M[:, b].sum()
    return torch.from_numpy((B * M).T)


def test_codes_equal_the_official_code():
    scores, q = (torch.from_numpy(REFERENCE[f"sk_a_{k}"]) for k in ("scores", "q"))
    torch.testing.assert_close(sinkhorn(scores), q, rtol=1e-8, atol=1e-10)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 9), st.integers(1, 7), st.integers(1, 8), st.floats(0.03, 2))
def test_codes_equal_the_matrix_scaled_in_turn(seed, rows, columns, iterations, epsilon):
    g = torch.Generator().manual_seed(seed)
    scores = torch.rand(rows, columns, generator=g, dtype=torch.float64) * 2 - 1
    q = sinkhorn(scores, epsilon=epsilon, iterations=iterations)
    torch.testing.assert_close(q, by_scaling(scores, epsilon, iterations), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(q.sum(1), torch.ones(rows, dtype=torch.float64))


def test_many_iterations_spread_the_rows_evenly_and_none_do_not():
    scores = torch.randn(40, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scores[:, 0] += 3
    torch.testing.assert_close(sinkhorn(scores, epsilon=0.5, iterations=300).sum(0), torch.full((5,), 8.0).double())
    assert sinkhorn(scores, epsilon=0.5, iterations=0).sum(0)[0] > 30
    torch.testing.assert_close(sinkhorn(scores, epsilon=0.5, iterations=0), (scores / 0.5).softmax(1))
    order = torch.randperm(40)
    torch.testing.assert_close(sinkhorn(scores)[order], sinkhorn(scores[order]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("epsilon", [1e-4, 1e-2, 1e3])
def test_no_epsilon_overflows(dtype, epsilon):
    scores = torch.randn(30, 50, generator=torch.Generator().manual_seed(1)).clamp(-1, 1).to(dtype).requires_grad_()
    q = sinkhorn(scores, epsilon=epsilon)
    assert q.dtype == torch.float32
    assert not q.requires_grad
    torch.testing.assert_close(q.sum(1), torch.ones(30))


def predicted_by_loops(scores, codes, assigning, temperature):
    V, B, _ = scores.shape
    losses = torch.zeros(B, dtype=torch.float64)
    for place, i in enumerate(assigning):
        for v in range(V):
            if v != i:
                for b in range(B):
                    p = np.exp(scores[v, b].numpy() / temperature)
                    terms = codes[place, b].numpy() * np.log(p / p.sum())
                    losses[b] -= terms.sum() / len(assigning) / (V - 1)
    return losses


@pytest.mark.parametrize(("views", "assigning"), [(2, (0, 1)), (5, (0, 1)), (4, (2,)), (3, (0, 1, 2))])
def test_swapped_prediction_equals_loops(views, assigning):
    g = torch.Generator().manual_seed(views)
    scores = torch.rand(views, 6, 4, generator=g, dtype=torch.float64) * 2 - 1
    codes = torch.stack([sinkhorn(scores[a], epsilon=0.3) for a in assigning])
    slow = predicted_by_loops(scores, codes, assigning, 0.2)
    options = {"assigning": assigning, "temperature": 0.2}
    torch.testing.assert_close(swapped_prediction(scores, codes, **options, reduction="none"), slow)
    torch.testing.assert_close(swapped_prediction(scores, codes, **options), slow.mean())
    torch.testing.assert_close(swapped_prediction(scores, codes, **options, reduction="sum"), slow.sum())


def test_codes_are_constants_and_the_gradient_reaches_all_other_views():
    g = torch.Generator().manual_seed(3)
    scores = torch.rand(3, 5, 4, generator=g, dtype=torch.float64, requires_grad=True)
    codes = torch.rand(1, 5, 4, generator=g, dtype=torch.float64, requires_grad=True)
    loss = swapped_prediction(scores, codes, assigning=(1,))
    grad, of_codes = torch.autograd.grad(loss, (scores, codes), allow_unused=True)
    assert of_codes is None
    assert grad[1].abs().max() == 0  # the assigning view predicts nobody here
    assert (grad[[0, 2]].abs().amax((1, 2)) > 0).all()
    torch.autograd.gradcheck(lambda s: swapped_prediction(s, codes.detach(), assigning=(1,)), scores)


def test_what_cannot_be_is_said():
    scores, codes = torch.zeros(3, 4, 5), torch.zeros(2, 4, 5)
    for wrong in ((scores[:1], codes), (scores[0], codes)):
        with pytest.raises(UsageError, match="two views at least"):
            swapped_prediction(*wrong)
    for options in ({"assigning": (0,)}, {"assigning": (0, 3)}):
        with pytest.raises(UsageError, match="codes must be of shape"):
            swapped_prediction(scores, codes, **options)
    for shape in ((0, 3), (3, 0), (3,)):
        with pytest.raises(UsageError, match="at least one each"):
            sinkhorn(torch.zeros(shape))
    for options in ({"epsilon": 0.0}, {"iterations": -1}, {"epsilon": float("nan")}):
        with pytest.raises(UsageError, match="epsilon must be above 0"):
            sinkhorn(scores[0], **options)
