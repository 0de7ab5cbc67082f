"""Decoupled contrast against values of two public implementations, and row by row."""

import pytest
import torch
from torch.nn import functional as F

from contralto.errors import UsageError
from contralto.losses.decoupled import coupling, decoupled_info_nce, decoupled_sup_con, expected_coupling
from contralto.losses.pairs import dcl, nt_xent

from tests.systems.webly.reference import load

REFERENCE = load("dcl.npz")


def leaf(name):
    return torch.as_tensor(REFERENCE[name]).clone().requires_grad_()


def tangential(gradient, unit):
    """What is left of a gradient at unit rows once they are normalised inside."""
    return gradient - (gradient * unit).sum(1, keepdim=True) * unit


@pytest.mark.parametrize(("case", "t"), [("a1", 0.1), ("b5", 0.5), ("c1", 0.1)])
@pytest.mark.parametrize("weighted", [False, True])
def test_dcl_has_the_reference_values(case, t, weighted):
    z1, z2 = leaf(f"{case}_z1"), leaf(f"{case}_z2")
    sigma = 0.5 if weighted else None
    loss = 2 * dcl(z1, z2, temperature=t, sigma=sigma, detach_weight=False)  # there: the sum of both directions
    loss.backward()
    name = f"dclw_grad_{case}" if weighted else f"dcl_{case}"
    close = {"rtol": 1e-9, "atol": 1e-11}
    torch.testing.assert_close(loss.detach(), torch.as_tensor(REFERENCE[f"{name}_loss"]), **close)
    for z, g in ((z1, "g1"), (z2, "g2")):
        expected = tangential(torch.as_tensor(REFERENCE[f"{name}_{g}"]), z.detach())
        torch.testing.assert_close(z.grad, expected, **close)


def test_dclw_with_constant_weights_has_the_reference_values():
    z1, z2 = leaf("raw_z1"), leaf("raw_z2")
    loss = dcl(z1, z2, temperature=0.1, sigma=0.5)
    loss.backward()
    close = {"rtol": 1e-9, "atol": 1e-11}
    torch.testing.assert_close(loss.detach(), torch.as_tensor(REFERENCE["lightly_dclw_loss"]), **close)
    torch.testing.assert_close(z1.grad, torch.as_tensor(REFERENCE["lightly_dclw_g1"]), **close)
    torch.testing.assert_close(z2.grad, torch.as_tensor(REFERENCE["lightly_dclw_g2"]), **close)


def test_the_weights_of_dclw_are_the_reference_weights():
    z1, z2 = (F.normalize(torch.as_tensor(REFERENCE[f"raw_{z}"]), dim=1) for z in ("z1", "z2"))
    plain, weighted = (dcl(z1, z2, temperature=0.1, sigma=s, reduction="none") for s in (None, 0.5))
    w = 1 - (weighted - plain) * 0.1 / (z1 * z2).sum(1).repeat(2)
    torch.testing.assert_close(w, torch.as_tensor(REFERENCE["weights_raw"]).repeat(2))
    torch.testing.assert_close(w.mean(), torch.ones((), dtype=w.dtype))


def rows(n, seed, d=4):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cosine(a, b):
    return a @ b / (a.norm() * b.norm())


@pytest.mark.parametrize("sigma", [None, 0.5])
@pytest.mark.parametrize("queue", [False, True])
def test_decoupled_info_nce_row_by_row(queue, sigma):
    q, k, negatives, t = rows(5, 0), rows(5, 1), rows(7, 2) if queue else None, 0.2
    expected = []
    s = torch.stack([cosine(q[i], k[i]) for i in range(5)])
    w = torch.ones(5) if sigma is None else 2 - (s / sigma).exp() / (s / sigma).exp().mean()
    for i in range(5):
        others = negatives if queue else [k[j] for j in range(5) if j != i]
        expected.append(-w[i] * s[i] / t + torch.stack([cosine(q[i], o) / t for o in others]).exp().sum().log())
    given = {"negatives": negatives, "temperature": t, "sigma": sigma}
    torch.testing.assert_close(decoupled_info_nce(q, k, reduction="none", **given), torch.stack(expected))
    torch.testing.assert_close(decoupled_info_nce(q, k, **given), torch.stack(expected).mean())
    torch.testing.assert_close(decoupled_info_nce(q, k, reduction="sum", **given), torch.stack(expected).sum())


def test_the_positive_is_not_among_the_negatives_even_at_small_temperatures():
    """Nothing of the positive leaks into the denominator, as it does where a mask is a finite number."""
    q, k = rows(4, 3), rows(4, 4)
    nearer = k.clone()
    nearer[0] = q[0]
    far, near = (decoupled_info_nce(q, x, temperature=0.01, reduction="none")[0] for x in (k, nearer))
    torch.testing.assert_close(far - near, (1 - cosine(q[0], k[0])) / 0.01)


def test_decoupled_sup_con_row_by_row():
    z, labels, t = rows(7, 5), torch.tensor([0, 1, 0, 2, 1, 0, 3]), 0.3
    expected = []
    for i in range(7):
        same = [j for j in range(7) if j != i and labels[j] == labels[i]]
        other = torch.stack([cosine(z[i], z[j]) / t for j in range(7) if labels[j] != labels[i]]).logsumexp(0)
        if same:
            expected.append(torch.stack([other - cosine(z[i], z[j]) / t for j in same]).mean())
    torch.testing.assert_close(decoupled_sup_con(z, labels, temperature=t), torch.stack(expected).mean())


def test_coupling_is_the_share_of_the_negatives():
    z0, z1, t = rows(6, 6), rows(6, 7), 0.2
    loss = nt_xent(z0, z1, temperature=t, reduction="none")
    torch.testing.assert_close(coupling(loss).log() + loss, dcl(z0, z1, temperature=t, reduction="none"))
    n = 32
    same = torch.eye(2 * n, dtype=torch.float64)[:n]  # positives at cosine c, negatives at 0
    other = 0.9 * same + (1 - 0.81) ** 0.5 * torch.eye(2 * n, dtype=torch.float64)[n:]
    measured = coupling(nt_xent(same, other, temperature=0.1, reduction="none"))
    assert measured[0].item() == pytest.approx(expected_coupling(n, 0.9), rel=1e-9)
    assert expected_coupling(1, 0.9) == 0


def test_what_cannot_be_is_named():
    with pytest.raises(UsageError, match="batch of 1"):
        decoupled_info_nce(rows(1, 0), rows(1, 1))
    assert torch.isfinite(decoupled_info_nce(rows(1, 0), rows(1, 1), negatives=rows(3, 2)))
    with pytest.raises(UsageError, match="one shape"):
        decoupled_info_nce(rows(2, 0), rows(3, 1))
    with pytest.raises(UsageError, match="labels"):
        decoupled_sup_con(rows(2, 0), torch.tensor([1]))
