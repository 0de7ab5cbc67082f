"""The tiled form against the dense one: values and gradients over shapes, masks, temperatures, forms and extreme logits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from contralto.errors import UsageError
from contralto.losses import tiled
from contralto.losses.bounded import clip_mean
from contralto.losses.contrast import contrast


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(tiled, "TILE_BYTES", 200)  # a few rows


def draw(g, kind, n, m):
    """Positives, weights or temperatures of a kind."""
    x = torch.rand(n, m, generator=g, dtype=torch.float64)
    return {
        "none": None,
        "index": torch.randint(-1, m, (n,), generator=g),
        "mask": x > 0.6,
        "dense": x * (x > 0.3),
        "column": torch.rand(m, generator=g, dtype=torch.float64) * (torch.rand(m, generator=g) > 0.2),
        "row": 0.05 + x[:, :1],
        "one": torch.tensor(0.3, dtype=torch.float64),
        "number": 0.2,
        "each": 0.1 + x,
        "out": torch.randint(-1, m, (n, 2), generator=g),
        "function": lambda i, j: (i + 2 * j) % 3 == 0,
    }[kind]


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, 10_000), st.integers(1, 9), st.integers(1, 9), st.sampled_from(["index", "mask", "dense", "function"]),
    st.sampled_from(["none", "column", "mask", "dense", "out", "function"]), st.sampled_from(["number", "one", "row", "each"]),
    st.sampled_from(["", "coupled", "log_outside"]), st.sampled_from(["mean", "mean_all", "sum", "none"]),
    st.sampled_from([1.0, 1e3, 1e-3]), st.booleans(),
)  # fmt: skip
def test_it_equals_the_dense_form(seed, n, m, positives, weights, temperature, form, reduction, scale, learnt):
    g = torch.Generator().manual_seed(seed)
    query, key = (scale * torch.randn(r, 3, generator=g, dtype=torch.float64) for r in (n, m))
    options = {
        "positives": draw(g, positives, n, m),
        "weights": draw(g, weights, n, m),
        "temperature": draw(g, temperature, n, m),
    }
    upstream = torch.randn(n, generator=g, dtype=torch.float64)
    found = []
    for kind in ("dense", "tiled"):
        q, k = query.clone().requires_grad_(), key.clone().requires_grad_()
        t = options["temperature"]
        t = t.clone().requires_grad_() if isinstance(t, torch.Tensor) and learnt else t
        how = options | {"temperature": t} | ({form: True} if form else {})
        loss = contrast(q, k, **how, normalize=False, reduction=reduction, form=kind)
        (loss * upstream if reduction == "none" else loss * 1.7).sum().backward()
        found.append([loss.detach(), q.grad, k.grad] + ([t.grad] if isinstance(t, torch.Tensor) and learnt else []))
    for ours, theirs in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10 * scale**2)


def test_weights_that_learn_get_their_gradient():
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(5, 3, generator=g, dtype=torch.float64), torch.randn(6, 3, generator=g, dtype=torch.float64)
    for shape in ((6,), (5, 6), (5, 1)):
        w = (0.1 + torch.rand(shape, generator=g, dtype=torch.float64)).requires_grad_()
        for form in ({}, {"coupled": True}, {"log_outside": True}):
            grads = []
            for kind in ("dense", "tiled"):
                w.grad = None
                contrast(q, k, positives=torch.arange(5), weights=w, form=kind, **form).backward()
                grads.append(w.grad.clone())
            torch.testing.assert_close(grads[1], grads[0])


def test_gradients_by_finite_differences():
    g = torch.Generator().manual_seed(1)
    q, k = (torch.randn(r, 3, generator=g, dtype=torch.float64).requires_grad_() for r in (4, 5))
    t = torch.full((4, 1), 0.3, dtype=torch.float64, requires_grad=True)
    for reduction in ("mean", "none"):
        for form in ({}, {"coupled": True}, {"log_outside": True}):
            assert torch.autograd.gradcheck(
                lambda a, b, c, f=form, r=reduction: contrast(
                    a, b, positives=torch.tensor([0, 4, -1, 2]), temperature=c, form="tiled", reduction=r, **f
                ),
                (q, k, t),
            )


def test_a_second_derivative_is_refused_in_words():
    q = torch.randn(4, 3, requires_grad=True)
    loss = contrast(q, torch.randn(4, 3), positives=torch.arange(4), form="tiled")
    with pytest.raises(UsageError, match="dense"):
        torch.autograd.grad(loss, q, create_graph=True)
    with pytest.raises(UsageError, match="leading"):
        contrast(
            torch.randn(2, 4, 3), torch.randn(2, 4, 3), positives=torch.zeros(2, 4, dtype=torch.long), form="tiled"
        )


def test_two_runs_are_equal_to_the_bit():
    g = torch.Generator().manual_seed(2)
    q, k = torch.randn(40, 8, generator=g), torch.randn(30, 8, generator=g)
    grads = []
    for _ in range(2):
        a, b = q.clone().requires_grad_(), k.clone().requires_grad_()
        contrast(a, b, positives=torch.arange(40) % 30, form="tiled").backward()
        grads.append((a.grad, b.grad))
    assert torch.equal(grads[0][0], grads[1][0])
    assert torch.equal(grads[0][1], grads[1][1])


@pytest.mark.parametrize("temperature", [1.0, 0.1, 0.01, 0.001])
@pytest.mark.parametrize("n", [1, 2, 7, 30])
def test_clip_is_the_mean_of_two_cross_entropies(n, temperature):
    g = torch.Generator().manual_seed(3)
    rows = [F.normalize(torch.randn(n, 4, generator=g, dtype=torch.float64), dim=1) for _ in range(2)]
    found = []
    for slow in (True, False):
        a, b = (r.clone().requires_grad_() for r in rows)
        scale = torch.tensor(1 / temperature, dtype=torch.float64, requires_grad=True)
        if slow:
            logits = scale * a @ b.T
            loss = sum(F.cross_entropy(x, torch.arange(n)) for x in (logits, logits.T)) / 2
        else:
            loss = clip_mean(a, b, scale)
        (1.7 * loss).backward()
        found.append([loss.detach(), a.grad, b.grad, scale.grad])
    for ours, theirs in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_clip_in_single_precision_where_one_shift_would_not_do():
    """No row is near any column: all logits lie 150 to 200 below the largest that unit rows allow."""
    a = F.normalize(torch.tensor([[1.0, 0.1], [1.0, -0.1], [1.0, 0.2]]), dim=1)
    b = -a.flip(0)
    for x, y in ((a, b), (torch.cat([a, b]), torch.cat([a, b.flip(0)]))):
        logits = 100 * x.double() @ y.double().T
        n = torch.arange(len(x))
        expected = (F.cross_entropy(logits, n) + F.cross_entropy(logits.T, n)) / 2
        torch.testing.assert_close(clip_mean(x, y, torch.tensor(100.0)).double(), expected, rtol=1e-4, atol=1e-3)


@settings(max_examples=50, deadline=None)
@given(
    st.integers(0, 10_000), st.integers(1, 7), st.integers(1, 7), st.sampled_from(["none", "column", "mask", "out", "function"]),
    st.sampled_from(["number", "one", "row", "each"]), st.sampled_from(["mean", "none"]),
)  # fmt: skip
def test_denominators_alone(seed, n, m, weights, temperature, reduction):
    g = torch.Generator().manual_seed(seed)
    query, key = (torch.randn(r, 3, generator=g, dtype=torch.float64) for r in (n, m))
    w, t = draw(g, weights, n, m), draw(g, temperature, n, m)
    found = []
    for kind in ("dense", "tiled"):
        q, k = query.clone().requires_grad_(), key.clone().requires_grad_()
        loss = contrast(q, k, positives=None, weights=w, temperature=t, reduction=reduction, form=kind, normalize=False)
        loss.sum().backward()
        found.append([loss.detach(), q.grad, k.grad])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)
    if weights == "none" and reduction == "none":
        torch.testing.assert_close(found[0][0], (query @ key.T / t).logsumexp(1))
