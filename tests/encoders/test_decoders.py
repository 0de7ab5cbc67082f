"""Decoders: their likelihoods against torch's distributions, what is drawn from them, sides of any size; the tap."""

import pytest
import torch
from torch import nn
from torch.distributions import Bernoulli, Normal

from contralto.encoders.decoders import PictureDecoder, VectorDecoder, tap
from contralto.errors import UsageError


def codes(n, d, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_negative_log_likelihood_is_that_of_torch():
    torch.manual_seed(0)
    z, x = codes(5, 4), torch.rand(5, 6, dtype=torch.float64)
    decoder = VectorDecoder(4, 8, 6).double()
    bits = (x > 0.5).double()
    torch.testing.assert_close(decoder.nll(z, bits), -Bernoulli(logits=decoder(z)).log_prob(bits).sum(1))
    decoder = VectorDecoder(4, 8, 6, "gaussian").double()
    with torch.no_grad():
        decoder.log_scale.fill_(-0.7)
    expected = -Normal(decoder(z), decoder.log_scale.exp()).log_prob(x).sum(1)
    torch.testing.assert_close(decoder.nll(z, x), expected)


def test_what_is_drawn_has_the_distribution_of_the_decoder():
    torch.manual_seed(0)
    z = codes(1, 4).expand(20_000, 4)
    u = torch.rand(20_000, 6, dtype=torch.float64)
    bits = VectorDecoder(4, 8, 6).double()
    drawn = bits.sample(z, u)
    assert set(drawn.unique().tolist()) == {0.0, 1.0}
    assert not drawn.requires_grad
    torch.testing.assert_close(drawn.mean(0), bits.mean(z[:1])[0].detach(), atol=0.015, rtol=0)
    values = VectorDecoder(4, 8, 6, "gaussian").double()
    with torch.no_grad():
        values.log_scale.fill_(0.5)
    drawn = values.sample(z, u)
    assert drawn.requires_grad
    torch.testing.assert_close(drawn.mean(0), values.mean(z[:1])[0], atol=0.05, rtol=0)
    torch.testing.assert_close(drawn.std(0), torch.full((6,), 0.5, dtype=torch.float64).exp(), atol=0.05, rtol=0)


@pytest.mark.parametrize("side", [4, 7, 8, 20, 28, 33, 96])
def test_pictures_of_any_side(side):
    decoder = PictureDecoder(5, 32, side)
    out = decoder(torch.randn(2, 5))
    assert out.shape == (2, 3, side, side)
    hidden = tap(decoder.output, lambda: decoder(torch.randn(2, 5)))
    assert hidden.shape[2:] == (side, side)
    assert decoder.hidden(torch.randn(2, 5), out).shape == (2, 16 * hidden.shape[1])
    assert decoder.draws == 3 * side**2


def test_the_tap_gives_what_goes_into_a_layer_and_leaves_no_hook():
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    x = torch.randn(5, 3)
    assert torch.equal(tap(net[2], lambda: net(x)), net[1](net[0](x)))
    assert not net[2]._forward_pre_hooks
    with pytest.raises(RuntimeError):
        tap(net[2], lambda: net(torch.randn(5, 7)))
    assert not net[2]._forward_pre_hooks
    with pytest.raises(UsageError, match="takes no part"):
        tap(nn.Linear(1, 1), lambda: net(x))


def test_bad_arguments_are_named():
    with pytest.raises(UsageError, match="likelihood"):
        VectorDecoder(2, 3, 4, "poisson")
    with pytest.raises(UsageError, match="at least 4, got 3"):
        PictureDecoder(2, 16, 3)
