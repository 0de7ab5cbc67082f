"""Losses of latent-variable models that keep information: VAE, A-MIM and cMIM, and the parts they are made of.

Mutual information machines (MIM, Livne et al. 2019; SentenceMIM 2020; cMIM 2025, arXiv 2502.19642) train an encoder q(z|x) and a
decoder p(x|z) with the sign of log q(z|x) opposite to a VAE's: confident posteriors are rewarded, so that they do not
collapse. cMIM adds the probability that a code belongs to its own sample rather than to the others of the batch.
"""

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from contralto.errors import UsageError
from contralto.losses.contrast import contrast

__all__ = ["LatentMode", "LatentScaling", "code_contrast", "gaussian_log_density", "latent_loss", "score_function"]

LatentMode = Literal["vae", "amim", "cmim"]
LatentScaling = Literal["none", "gradient", "loss"]


def gaussian_log_density(z: Tensor, mean: Tensor | None = None, log_scale: Tensor | None = None) -> Tensor:
    """``log N(z; mean, exp(log_scale)^2)``, summed over the last dimension; the standard normal without further arguments.

    Parameters
    ----------
    z, mean, log_scale : Tensor (..., d)
        `log_scale` is the logarithm of the standard deviation (half the logarithm of the variance).

    Returns
    -------
    Tensor (...)

    Examples
    --------
    >>> gaussian_log_density(torch.zeros(2, 1))  # -log(2 pi) / 2
    tensor([-0.9189, -0.9189])
    """
    deviation = z if mean is None else z - mean
    if log_scale is None:
        return (-0.5 * deviation.square() - 0.5 * math.log(2 * math.pi)).sum(-1)
    deviation = deviation * (-log_scale).exp()
    return (-0.5 * deviation.square() - log_scale - 0.5 * math.log(2 * math.pi)).sum(-1)


def code_contrast(z: Tensor, *, temperature: float = 0.1, reduction: Literal["mean", "sum", "none"] = "mean") -> Tensor:
    """Minus the log-probability that a code is its sample's own, the others of the batch being the alternative (cMIM).

    ``log(exp(1/t) + mean_{j != i} exp(cos(z_i, z_j) / t)) - 1/t``: the code is its own positive, so that codes are only pushed
    apart in angle, and negatives enter by their mean, so that neither value nor gradient grows with the batch. Between
    log(1 + exp(-2/t)) and log 2; 0 for a batch of one.

    Parameters
    ----------
    z : Tensor (B, d)
        Sampled codes; scaled to length one here.
    temperature : float
    reduction : {"mean", "sum", "none"}

    Examples
    --------
    >>> code_contrast(torch.ones(8, 3))  # all alike: log 2
    tensor(0.6931)
    """
    n = len(z)
    one = torch.ones((), dtype=torch.promote_types(z.dtype, torch.float32), device=z.device)
    share = one / max(n - 1, 1)

    def weights(rows: Tensor, columns: Tensor) -> Tensor:
        return torch.where(rows == columns, one, share)

    own = torch.arange(n, device=z.device)
    return contrast(z, z, positives=own, weights=weights, temperature=temperature, reduction=reduction)


def latent_loss(
    nll: Tensor,
    z: Tensor,
    mean: Tensor,
    log_scale: Tensor,
    *,
    mode: LatentMode = "cmim",
    temperature: float = 0.1,
    scaling: LatentScaling = "none",
) -> Tensor:
    """The loss of a latent-variable model per sample, all terms with weight one.

    - ``vae``: ``nll + log q(z|x) - log P(z)``
    - ``amim``: ``nll - (log q(z|x) + log P(z)) / 2``
    - ``cmim``: the same and `code_contrast`

    Parameters
    ----------
    nll : Tensor (B,)
        ``-log p(x|z)``, summed over pixels or tokens.
    z, mean, log_scale : Tensor (B, d)
        ``z = mean + exp(log_scale) * eps``; P is the standard normal.
    mode : {"vae", "amim", "cmim"}
    temperature : float
        Of `code_contrast`.
    scaling : {"none", "gradient", "loss"}
        Divide log q and log P by d: not at all, in their gradients only, or altogether (both in the authors' molecule code).

    Returns
    -------
    Tensor (B,)

    Examples
    --------
    >>> zero = torch.zeros(1, 2)
    >>> latent_loss(torch.ones(1), zero, zero, zero, mode="vae")
    tensor([1.])
    >>> latent_loss(torch.ones(1), zero, zero, zero, mode="amim")  # 1 + log(2 pi)
    tensor([2.8379])
    """
    if mode not in get_args(LatentMode):
        raise UsageError(f"mode must be one of {', '.join(get_args(LatentMode))}; got {mode!r}")
    if scaling not in get_args(LatentScaling):
        raise UsageError(f"scaling must be one of {', '.join(get_args(LatentScaling))}; got {scaling!r}")
    q, prior = gaussian_log_density(z, mean, log_scale), gaussian_log_density(z)
    if scaling != "none":
        width = z.shape[-1]
        q, prior = (v / width if scaling == "loss" else v / width + (v - v / width).detach() for v in (q, prior))
    if mode == "vae":
        return nll + q - prior
    loss = nll - (q + prior) / 2
    return loss + code_contrast(z, temperature=temperature, reduction="none") if mode == "cmim" else loss


def score_function(loss: Tensor, log_prob: Tensor) -> Tensor:
    """A term of value 0 whose gradient is that of the expected `loss` through the drawing of discrete samples (REINFORCE).

    Parameters
    ----------
    loss : Tensor (B,)
        Of samples that were drawn, and detached.
    log_prob : Tensor (B,)
        Log-probability of these samples, with gradient to what they were drawn from.

    Examples
    --------
    >>> log_prob = torch.tensor([-1.0], requires_grad=True)
    >>> term = score_function(torch.tensor([3.0]), log_prob)
    >>> term.sum().backward()
    >>> term.item(), log_prob.grad
    (0.0, tensor([3.]))
    """
    loss = loss.detach()
    return loss * log_prob - (loss * log_prob).detach()
