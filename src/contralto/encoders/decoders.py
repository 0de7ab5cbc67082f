"""Decoders: from a code back to what it stands for, as a distribution; and the tap that reads a hidden layer of any network."""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from contralto.errors import UsageError

__all__ = ["Decoder", "Likelihood", "PictureDecoder", "VectorDecoder", "tap"]

Likelihood = Literal["bernoulli", "gaussian"]
MIN_LOG_SCALE = -6.0


def tap(layer: nn.Module, run: Callable[[], Any]) -> Tensor:
    """What goes into a layer while something runs: the hidden activations just before it.

    Parameters
    ----------
    layer : nn.Module
        A part of the network that runs.
    run : function

    Returns
    -------
    Tensor
        First argument of the layer's last call.

    Raises
    ------
    UsageError
        If the layer was not called.

    Examples
    --------
    >>> net = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    >>> tap(net[1], lambda: net(torch.ones(1, 2, 2))).shape
    torch.Size([1, 4])
    """
    seen: list[Tensor] = []
    hook = layer.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    try:
        run()
    finally:
        hook.remove()
    if not seen:
        raise UsageError(f"the layer {type(layer).__name__} takes no part in what was run")
    return seen[-1]


class Decoder(nn.Module):
    """Base: codes z (B, d) to p(x|z), whose parameters the layer `output` makes of hidden activations.

    Attributes
    ----------
    shape : tuple of int
        Of one x.
    output : nn.Module
    discrete : bool
        Whether what is drawn takes no gradient.
    """

    shape: tuple[int, ...]
    output: nn.Module
    discrete: bool

    @property
    def draws(self) -> int:
        """Uniform numbers that `sample` takes for every x."""
        return math.prod(self.shape)

    def nll(self, z: Tensor, x: Tensor) -> Tensor:
        """``-log p(x|z)`` (B,), summed over the parts of x (B, ...)."""
        raise NotImplementedError

    def mean(self, z: Tensor) -> Tensor:
        """What is expected of x (B, ...)."""
        raise NotImplementedError

    def sample(self, z: Tensor, uniform: Tensor) -> Tensor:
        """Draw x ~ p(x|z) (B, ...) from uniform numbers in (0, 1) (B, draws)."""
        raise NotImplementedError

    def hidden(self, z: Tensor, x: Tensor) -> Tensor:
        """Activations just before `output`, as one row per sample (B, H); `x` is what the codes are of."""
        raise NotImplementedError


class _ValueDecoder(Decoder):
    """Base for values that are independent given the code.

    Parameters
    ----------
    likelihood : {"bernoulli", "gaussian"}
        "bernoulli": values in [0, 1], the parameters are logits. "gaussian": any values, with one learnt scale for all of them.
    """

    def __init__(self, likelihood: Likelihood = "bernoulli") -> None:
        super().__init__()
        if likelihood not in get_args(Likelihood):
            raise UsageError(f"likelihood must be bernoulli or gaussian; got {likelihood!r}")
        self.likelihood = likelihood
        self.discrete = likelihood == "bernoulli"
        if likelihood == "gaussian":
            self.log_scale = nn.Parameter(torch.zeros(()))

    def nll(self, z: Tensor, x: Tensor) -> Tensor:
        found = self(z)
        if self.discrete:
            return F.binary_cross_entropy_with_logits(found, x, reduction="none").flatten(1).sum(1)
        scale = self.log_scale.clamp_min(MIN_LOG_SCALE)
        each: Tensor = 0.5 * ((x - found) * (-scale).exp()).square() + scale + 0.5 * math.log(2 * math.pi)
        return each.flatten(1).sum(1)

    def mean(self, z: Tensor) -> Tensor:
        found: Tensor = self(z)
        return found.sigmoid() if self.discrete else found

    def sample(self, z: Tensor, uniform: Tensor) -> Tensor:
        u = uniform.view(len(z), *self.shape)
        if self.discrete:
            return (u < self.mean(z).detach()).to(z.dtype)
        drawn: Tensor = self.mean(z) + self.log_scale.clamp_min(MIN_LOG_SCALE).exp() * torch.special.ndtri(u)
        return drawn

    def hidden(self, z: Tensor, x: Tensor) -> Tensor:
        return tap(self.output, lambda: self(z)).flatten(1)


class VectorDecoder(_ValueDecoder):
    """Two hidden layers.

    Parameters
    ----------
    dim, hidden, width : int
        Of codes, hidden layers, and vectors.
    likelihood : {"bernoulli", "gaussian"}
        "bernoulli": values in [0, 1], the parameters are logits. "gaussian": any values, with one learnt scale for all of them.

    Examples
    --------
    >>> VectorDecoder(8, 16, 64)(torch.zeros(2, 8)).shape
    torch.Size([2, 64])
    """

    def __init__(self, dim: int, hidden: int, width: int, likelihood: Likelihood = "bernoulli") -> None:
        super().__init__(likelihood)
        self.shape = (width,)
        self.layers = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU())
        self.output = nn.Linear(hidden, width)

    def forward(self, z: Tensor) -> Tensor:
        """Codes (B, dim) to parameters (B, width)."""
        found: Tensor = self.output(self.layers(z))
        return found


class PictureDecoder(_ValueDecoder):
    """A small map from the code, doubled by transposed convolutions until it is as large as the picture.

    Parameters
    ----------
    dim : int
        Of codes.
    hidden : int
        Channels of the first map (4 to 7 pixels a side); halved with every doubling, at least 16.
    side : int
        Of the pictures, at least 4.
    channels : int
    likelihood : {"bernoulli", "gaussian"}
        "bernoulli": values in [0, 1], the parameters are logits. "gaussian": any values, with one learnt scale for all of them.

    Examples
    --------
    >>> decoder = PictureDecoder(8, 32, side=30)
    >>> decoder(torch.zeros(2, 8)).shape
    torch.Size([2, 3, 30, 30])
    >>> decoder.hidden(torch.zeros(2, 8), torch.zeros(2, 3, 30, 30)).shape
    torch.Size([2, 256])
    """

    GRID = 4

    def __init__(
        self, dim: int, hidden: int, side: int, channels: int = 3, likelihood: Likelihood = "bernoulli"
    ) -> None:
        super().__init__(likelihood)
        if side < self.GRID:
            raise UsageError(f"side of the decoded pictures must be at least {self.GRID}, got {side}")
        doublings = int(math.log2(side / self.GRID))
        first = math.ceil(side / 2**doublings)
        widths = [max(hidden // 2**k, 16) for k in range(doublings + 1)]
        self.shape = (channels, side, side)
        self.start = nn.Linear(dim, widths[0] * first**2)
        self.first = (widths[0], first, first)
        layers: list[nn.Module] = [nn.GroupNorm(1, widths[0]), nn.GELU()]
        for before, after in pairwise(widths):
            layers += [nn.ConvTranspose2d(before, after, 4, 2, 1), nn.GroupNorm(1, after), nn.GELU()]
        self.layers = nn.Sequential(*layers)
        self.output = nn.Conv2d(widths[-1], channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        """Codes (B, dim) to parameters (B, channels, side, side)."""
        side = self.shape[-1]
        found: Tensor = self.output(self.layers(self.start(z).view(-1, *self.first))[..., :side, :side])
        return found

    def hidden(self, z: Tensor, x: Tensor) -> Tensor:
        """The last map (B, C, side, side), averaged over the cells of a 4 x 4 grid (B, 16 C)."""
        return F.adaptive_avg_pool2d(tap(self.output, lambda: self(z)), self.GRID).flatten(1)
