"""cMIM against values of the authors' code; its modes; what is drawn, and from what; embeddings."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from contralto.errors import DataError, UsageError
from contralto.losses.information import gaussian_log_density, latent_loss
from contralto.systems.selfsup.cmim import CMIM

ARRAYS = np.load(Path(__file__).parents[2] / "reference" / "cmim.npz", allow_pickle=False)
REF = {k: torch.from_numpy(ARRAYS[k]) for k in ARRAYS.files}


def build(**arguments):
    torch.manual_seed(0)
    options = {"num_features": 7, "dim": 4, "hidden": 8, "vector": 6} | arguments
    return CMIM(nn.Sequential(nn.Linear(6, 7), nn.Tanh()), **options).double()


def batch(n=8, seed=0, views=1):
    g = torch.Generator().manual_seed(seed)
    return {
        "views": [torch.rand(n, 6, generator=g, dtype=torch.float64) for _ in range(views)],
        "index": torch.arange(n) + 50,
    }


def test_the_objective_equals_the_authors_code(monkeypatch):
    torch.manual_seed(0)
    system = CMIM(nn.Identity(), num_features=16, dim=8, hidden=4, vector=16, likelihood="gaussian").double()
    with torch.no_grad():
        system.to_posterior.weight.copy_(torch.eye(16))
        system.to_posterior.bias.zero_()
    view = torch.cat([REF["c0_mean"], REF["c0_log_scale"]], 1).requires_grad_()
    monkeypatch.setattr(system, "normal", lambda *_: REF["c0_eps"])
    monkeypatch.setattr(system.decoder, "nll", lambda z, x: z.new_zeros(len(z)))
    out = system.step({"views": [view], "index": torch.arange(5)})
    torch.testing.assert_close(out["loss"], REF["c0_loss_per_sample"].mean(), rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(out["log_q"], REF["c0_log_q"].mean(), rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(out["contrast"], -REF["c0_log_p_k1"].mean(), rtol=1e-9, atol=1e-11)
    out["loss"].backward()
    expected = torch.cat([REF["c0_grad_mean"], REF["c0_grad_log_scale"]], 1)
    torch.testing.assert_close(view.grad, expected, rtol=1e-9, atol=1e-11)


def test_modes_are_made_of_the_same_terms():
    found = {mode: build(mode=mode).step(batch()) for mode in ("cmim", "amim", "smim", "vae")}
    nll, q, p = (found["amim"][k] for k in ("nll", "log_q", "log_prior"))
    torch.testing.assert_close(found["amim"]["loss"], nll - (q + p) / 2)
    torch.testing.assert_close(found["vae"]["loss"], nll + q - p)
    torch.testing.assert_close(found["cmim"]["loss"], found["amim"]["loss"] + found["amim"]["contrast"])
    assert found["smim"]["loss"] > found["amim"]["loss"]
    for name in ("nll", "log_q", "log_prior", "contrast", "cosine"):
        assert len({found[mode][name].item() for mode in found}) == 1, name


def test_mim_makes_posteriors_narrower_than_a_vae_does():
    """The sign of log q: what a KL term widens, MIM narrows."""
    spread = {}
    for mode in ("amim", "vae"):
        system = build(mode=mode, lr=0.01)
        [optimizer], _ = system.optimizers_and_schedules()
        for _ in range(100):
            optimizer.zero_grad()
            system.step(batch())["loss"].backward()
            optimizer.step()
            system.at_step_end()
        spread[mode] = system.encode(batch()["views"][0])[2].mean().item()
    assert spread["amim"] < spread["vae"] - 1


def test_log_scales_are_clamped_from_below():
    system = build(min_log_scale=-0.1)
    with torch.no_grad():
        system.to_posterior.bias[4:] = -50
    assert (system.encode(batch()["views"][0])[2] == -0.1).all()
    assert torch.isfinite(system.step(batch())["loss"])


def test_the_own_samples_of_sym_mim_have_the_gradient_of_their_expectation():
    """All four outcomes of two bits, weighted by their probability, against the expectation written out."""
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(2, 5), nn.Tanh())
    system = CMIM(encoder, num_features=5, dim=3, hidden=4, vector=2, mode="smim").double()
    index, like = torch.tensor([3]), torch.zeros(1, dtype=torch.float64)
    outcomes = [torch.tensor([bits], dtype=torch.float64) for bits in itertools.product([0.0, 1.0], repeat=2)]
    prior, again = system.normal(index, 1001, 3, like), system.normal(index, 1003, 3, like)

    def loss_of(x):
        _, mean, log_scale = system.encode(x)
        z = mean + log_scale.exp() * again
        return latent_loss(system.decoder.nll(z, x), z, mean, log_scale, mode="amim")

    expectation = sum((-system.decoder.nll(prior, x)).exp() * loss_of(x) for x in outcomes)
    expected = torch.autograd.grad(expectation.sum(), [*system.parameters()])
    found = [torch.zeros_like(p) for p in system.parameters()]
    value = 0.0
    for x in outcomes:
        system.decoder.sample = lambda *_, x=x: x
        share = (-system.decoder.nll(prior, x)).exp().item()
        term = system._own_samples(index, like)
        torch.testing.assert_close(term, loss_of(x))
        value += share * term.item()
        for total, part in zip(found, torch.autograd.grad(term.sum(), [*system.parameters()]), strict=True):
            total += share * part
    assert value == pytest.approx(expectation.item())
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)


def test_gradient_flows_through_continuous_samples():
    system = build(mode="smim", likelihood="gaussian")
    index, like = torch.arange(4), torch.zeros(1, dtype=torch.float64)
    system._own_samples(index, like).sum().backward()
    assert system.decoder.log_scale.grad.abs() > 0
    assert all(torch.isfinite(p.grad).all() for p in system.parameters())


def test_noise_is_a_function_of_sample_and_step():
    system, given = build(), batch()
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    shuffled = {"views": [given["views"][0][order]], "index": given["index"][order]}
    first = system.step(given)
    torch.testing.assert_close(system.step(shuffled)["loss"], first["loss"])
    torch.testing.assert_close(system.step(shuffled)["cosine"], first["cosine"])
    system.at_step_end()
    assert system.step(given)["loss"] != first["loss"]
    like = torch.zeros(1, dtype=torch.float64)
    many = torch.cat([system.normal(torch.arange(5000), what, 4, like) for what in (1000, 1001)], 1)
    torch.testing.assert_close(many.T.cov(), torch.eye(8, dtype=torch.float64), atol=0.08, rtol=0)


def test_the_informative_embedding_is_the_decoders_last_hidden_layer_at_the_mean():
    system = build().eval()
    x = batch()["views"][0]
    hidden = system.embed(x)
    torch.testing.assert_close(hidden, system.decoder.layers(system.mean_code(x)))
    torch.testing.assert_close(system.decoder.output(hidden).sigmoid(), system.reconstruct(x))
    assert torch.equal(system.embed(x), hidden)  # nothing is drawn
    for arguments in ({"use": "mean"}, {"mode": "infonce_aug"}):
        other = build(**arguments).eval()
        assert torch.equal(other.embed(x), other.mean_code(x))


def test_the_baseline_of_augmented_views_has_no_reconstruction():
    system = build(mode="infonce_aug", temperature=0.5)
    out = system.step(batch(views=2))
    out["loss"].backward()
    assert "nll" not in out
    assert all(p.grad is None for p in system.decoder.parameters())
    assert system.encoder[0].weight.grad.abs().max() > 0


class Pixels(nn.Module):
    size, mean, std = 24, (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(3, 7, 3, 2)

    def forward(self, x):
        return self.layer(x).relu().mean((2, 3))


@pytest.mark.parametrize("mode", ["cmim", "smim"])
@pytest.mark.parametrize(("side", "expected"), [(None, 24), (12, 12)])
def test_pictures_are_reconstructed_as_values_from_0_to_1(side, expected, mode):
    system = CMIM(Pixels(), num_features=7, dim=4, hidden=16, side=side, mode=mode)
    picture = torch.rand(3, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (Pixels.mean, Pixels.std))
    view = (picture - mean) / std
    target = system.target(view)
    assert target.shape == (3, 3, expected, expected)
    if side is None:
        torch.testing.assert_close(target, picture)
        torch.testing.assert_close(system.as_input(target), view)
    assert system.as_input(target).shape == view.shape
    out = system.step({"views": [view], "index": torch.arange(3)})
    out["loss"].backward()
    assert all(torch.isfinite(p.grad).all() for p in system.parameters())
    assert system.embed(view).shape == (3, 16 * system.decoder.output.in_channels)
    assert system.reconstruct(view).shape == target.shape


def test_a_large_picture_is_reconstructed_small():
    class Large(Pixels):
        size = 224

    assert CMIM(Large(), num_features=7, hidden=16).decoder.shape == (3, 64, 64)


def test_generated_samples_come_from_the_prior():
    system = build().eval()
    found = system.generate(3, temperature=0.0)
    torch.testing.assert_close(found, system.decoder.mean(torch.zeros(3, 4, dtype=torch.float64)))
    g = [torch.Generator().manual_seed(1) for _ in range(2)]
    assert torch.equal(system.generate(3, generator=g[0]), system.generate(3, generator=g[1]))


def test_bad_input_is_named():
    given = batch()
    given["views"][0][2, 3] = 1.5
    with pytest.raises(DataError, match=r"sample 52 has values outside of \[0, 1\]"):
        build().step(given)
    assert torch.isfinite(build(likelihood="gaussian").step(given)["loss"])
    with pytest.raises(UsageError, match="takes 1 views"):
        build().step(batch(views=2))
    with pytest.raises(UsageError, match="at least two"):
        build().step(batch(1))
    with pytest.raises(UsageError, match="mode must be"):
        build(mode="mim")
    with pytest.raises(UsageError, match="use must be"):
        build(use="h")
    with pytest.raises(UsageError, match="what is reconstructed"):
        build(vector=None)


def test_the_densities_of_a_step_are_those_of_its_codes():
    system, given = build(), batch()
    out = system.step(given)
    _, mean, log_scale = system.encode(given["views"][0])
    z = mean + log_scale.exp() * system.normal(given["index"], 1000, 4, mean)
    torch.testing.assert_close(out["log_q"], gaussian_log_density(z, mean, log_scale).mean())
    unit = nn.functional.normalize(z, dim=1)
    cosines = (unit @ unit.T)[~torch.eye(8, dtype=torch.bool)]
    torch.testing.assert_close(out["cosine"], cosines.mean())
