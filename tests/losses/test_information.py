"""Losses of latent-variable models against loops, distributions of torch, and values of the authors' code."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Normal
from torch.nn import functional as F

from contralto.errors import UsageError
from contralto.losses import tiled
from contralto.losses.information import code_contrast, gaussian_log_density, latent_loss, score_function

ARRAYS = np.load(Path(__file__).parents[1] / "reference" / "cmim.npz", allow_pickle=False)
REF = {k: torch.from_numpy(ARRAYS[k]) for k in ARRAYS.files}
CLOSE = {"rtol": 1e-9, "atol": 1e-11}


def rows(n, d, seed, dtype=torch.float64):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def slow_code_contrast(z, t):
    losses = []
    for i in range(len(z)):
        s = [F.cosine_similarity(z[i], z[j], dim=0) / t for j in range(len(z))]
        others = [s[j].exp() for j in range(len(z)) if j != i]
        denominator = s[i].exp() + (torch.stack(others).mean() if others else 0.0)
        losses.append(-(s[i].exp() / denominator).log())
    return torch.stack(losses)


def test_the_density_is_that_of_torch():
    z, mean, log_scale = rows(4, 3, 0), rows(4, 3, 1), 0.3 * rows(4, 3, 2)
    torch.testing.assert_close(
        gaussian_log_density(z, mean, log_scale), Normal(mean, log_scale.exp()).log_prob(z).sum(1)
    )
    torch.testing.assert_close(gaussian_log_density(z), Normal(0, 1).log_prob(z).sum(1))


@pytest.mark.parametrize("tile", [1, 2**20])
@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 7), st.floats(0.05, 2.0))
def test_code_contrast_equals_its_equation_code_by_code(tile, seed, n, t):
    z = [rows(n, 3, seed).requires_grad_() for _ in range(2)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiled, "TILE_BYTES", tile)
        ours = code_contrast(z[0], temperature=t, reduction="none")
        ours.square().sum().backward()
    theirs = slow_code_contrast(z[1], t)
    theirs.square().sum().backward()
    torch.testing.assert_close(ours, theirs, **CLOSE)
    torch.testing.assert_close(z[0].grad, z[1].grad, rtol=1e-7, atol=1e-9)


def test_it_equals_the_official_code():
    mean, log_scale = (REF[f"c0_{k}"].clone().requires_grad_() for k in ("mean", "log_scale"))
    z = mean + log_scale.exp() * REF["c0_eps"]
    torch.testing.assert_close(z, REF["c0_z"], **CLOSE)
    torch.testing.assert_close(-code_contrast(z, reduction="none"), REF["c0_log_p_k1"], **CLOSE)
    torch.testing.assert_close(gaussian_log_density(z, mean, log_scale), REF["c0_log_q"], **CLOSE)
    torch.testing.assert_close(gaussian_log_density(z), REF["c0_log_P"], **CLOSE)
    loss = latent_loss(torch.zeros(5, dtype=torch.float64), z, mean, log_scale)
    torch.testing.assert_close(loss, REF["c0_loss_per_sample"], **CLOSE)
    loss.mean().backward()
    torch.testing.assert_close(mean.grad, REF["c0_grad_mean"], **CLOSE)
    torch.testing.assert_close(log_scale.grad, REF["c0_grad_log_scale"], **CLOSE)


def test_the_text_loss_equals_sentence_mims():
    mean, log_var, logits = (REF[f"amim_{k}"].clone().requires_grad_() for k in ("mean", "log_var", "logits"))
    z = mean + (0.5 * log_var).exp() * REF["amim_eps"]
    nll = F.cross_entropy(logits.transpose(1, 2), REF["amim_targets"], ignore_index=0, reduction="none").sum(1)
    torch.testing.assert_close(nll.sum(), REF["amim_nll_sum"], **CLOSE)
    loss = latent_loss(nll, z, mean, 0.5 * log_var, mode="amim").mean()  # log-variance there, log-scale here
    torch.testing.assert_close(loss, REF["amim_loss"] - math.log(4) / 4, **CLOSE)
    loss.backward()
    for name, x in (("mean", mean), ("log_var", log_var), ("logits", logits)):
        torch.testing.assert_close(x.grad, REF[f"amim_grad_{name}"], **CLOSE)


def test_vae_and_mim_differ_in_the_sign_of_the_posterior():
    nll, mean, log_scale, eps = rows(3, 1, 0).squeeze(1), rows(3, 2, 1), rows(3, 2, 2), rows(3, 2, 3)
    grad = {}
    for mode in ("vae", "amim"):
        s = log_scale.clone().requires_grad_()
        z = mean + log_scale.exp() * eps  # as a constant: only log q depends on s
        latent_loss(nll, z, mean, s, mode=mode).sum().backward()
        grad[mode] = s.grad
    torch.testing.assert_close(grad["amim"], -grad["vae"] / 2)
    q = Normal(mean, log_scale.exp()).log_prob(z).sum(1)
    p = Normal(0, 1).log_prob(z).sum(1)
    torch.testing.assert_close(latent_loss(nll, z, mean, log_scale, mode="vae"), nll + q - p)
    torch.testing.assert_close(latent_loss(nll, z, mean, log_scale, mode="amim"), nll - (q + p) / 2)


def test_scaling_divides_gradients_or_values_by_the_width():
    nll, mean, log_scale = torch.zeros(3, dtype=torch.float64), rows(3, 4, 1), rows(3, 4, 2)
    found = {}
    for scaling in ("none", "gradient", "loss"):
        m = mean.clone().requires_grad_()
        loss = latent_loss(nll, m + log_scale.exp(), m, log_scale, mode="amim", scaling=scaling)
        loss.sum().backward()
        found[scaling] = loss.detach(), m.grad
    torch.testing.assert_close(found["gradient"][0], found["none"][0])
    torch.testing.assert_close(found["loss"][0], found["none"][0] / 4)
    for scaling in ("gradient", "loss"):
        torch.testing.assert_close(found[scaling][1], found["none"][1] / 4)


def test_the_contrast_of_codes_stays_within_its_bounds():
    alike = torch.ones(6, 3, dtype=torch.float64)
    assert code_contrast(alike).item() == pytest.approx(math.log(2))
    opposite = torch.tensor([[1.0, 0.0], [-2.0, 0.0]], dtype=torch.float64)
    assert code_contrast(opposite, temperature=0.5).item() == pytest.approx(math.log1p(math.exp(-4)))
    alone = torch.ones(1, 3, requires_grad=True)
    loss = code_contrast(alone)
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(alone.grad, torch.zeros(1, 3))


def test_neither_value_nor_gradient_grows_with_the_batch_while_infonces_does():
    """Negatives by their mean; with their sum the loss is InfoNCE, the code being its own positive."""
    value, gradient, info = {}, {}, {}
    for n in (2, 8, 64, 512):
        draws = max(2048 // n, 4)
        many = [rows(n, 16, 100 * n + k).requires_grad_() for k in range(draws)]
        losses = [code_contrast(z, temperature=1.0) for z in many]
        for loss in losses:
            (loss * n).backward()  # per sample
        value[n] = torch.stack(losses).mean().item()
        gradient[n] = torch.stack([z.grad.norm(dim=1).mean() for z in many]).mean().item()
        s = [F.normalize(z.detach(), dim=1) @ F.normalize(z.detach(), dim=1).T for z in many]
        info[n] = np.mean([F.cross_entropy(x, torch.arange(n)).item() for x in s])
    assert max(value.values()) - min(value.values()) < 0.02
    assert gradient[512] < gradient[2]
    assert info[512] - info[2] > math.log(512 / 2) - 1


def test_codes_of_any_length_and_zero_codes_are_finite():
    z = torch.cat([torch.zeros(1, 3), 1e20 * torch.ones(1, 3), torch.ones(1, 3)]).requires_grad_()
    loss = code_contrast(z)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(z.grad).all()


def test_the_score_function_finds_the_gradient_of_an_expectation():
    """Over all outcomes of one coin, weighted: d/dp (p * 2 + (1 - p) * 5) = -3."""
    logit = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    log_prob = torch.stack([F.logsigmoid(logit), F.logsigmoid(-logit)])
    term = score_function(torch.tensor([2.0, 5.0], dtype=torch.float64), log_prob)
    assert torch.equal(term, torch.zeros_like(term))
    (term * log_prob.detach().exp()).sum().backward()
    p = logit.detach().sigmoid()
    torch.testing.assert_close(logit.grad, -3 * p * (1 - p))


@pytest.mark.parametrize("wrong", [{"mode": "smim"}, {"scaling": "both"}])
def test_bad_input_is_named(wrong):
    z = torch.zeros(2, 3)
    with pytest.raises(UsageError, match=next(iter(wrong))):
        latent_loss(torch.zeros(2), z, z, z, **wrong)
