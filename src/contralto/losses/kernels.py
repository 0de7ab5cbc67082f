"""Losses of Gaussian kernels on embeddings: alignment, uniformity, joint entropy, and alignment weighted by an attribute.

With the bandwidth tau, ``k(a, b) = exp(-||a - b||^2 / (2 tau))``. Alignment and uniformity are those of Wang and Isola (2020),
whose t is 1 / (2 tau); the joint entropy is a kernel density estimate with a product kernel (k-JEM of SepCLR, Louiset et al.
2024). All logarithms of sums of kernels are cases of the contrast engine: they stay finite where every kernel underflows, and
the matrix of all pairs is not kept where it is large.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from contralto.errors import UsageError
from contralto.losses.contrast import contrast

__all__ = ["alignment", "attribute_alignment", "joint_entropy", "uniformity"]


def alignment(
    a: Tensor, b: Tensor | None = None, *, tau: float = 0.5, where: Tensor | None = None, normalize: bool = True
) -> Tensor:
    """Mean over rows of ``||a_i - b_i||^2 / (2 tau)``.

    Parameters
    ----------
    a, b : Tensor (N, D)
        Row i of one belongs to row i of the other. Without `b`, the rows of `a` are pulled to the origin.
    tau : float
        Bandwidth of the kernel.
    where : Tensor (N,) bool, optional
        Rows that count; where none does, the loss is 0 (with gradient).
    normalize : bool
        Scale rows to length one first.

    Examples
    --------
    >>> alignment(torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 1.0]]))
    tensor(2.)
    >>> alignment(torch.tensor([[2.0, 0.0]]), normalize=False)
    tensor(4.)
    """
    _check_tau(tau)
    if b is not None and a.shape != b.shape:
        raise UsageError(f"alignment takes rows in pairs, got {tuple(a.shape)} and {tuple(b.shape)}")
    if normalize:
        a, b = F.normalize(a, dim=1), None if b is None else F.normalize(b, dim=1)
    squares = (a if b is None else a - b).square().sum(1) / (2 * tau)
    if where is None:
        return squares.mean()
    return torch.where(where, squares, 0.0).sum() / where.sum().clamp_min(1)


def uniformity(z: Tensor, *, tau: float = 0.5, normalize: bool = True) -> Tensor:
    """Logarithm of the mean kernel over pairs of different rows: low where embeddings are spread out.

    Parameters
    ----------
    z : Tensor (N, D)
        At least two rows.
    tau : float
        Bandwidth; 1 / (2 t) in the notation of Wang and Isola.
    normalize : bool
        Scale rows to length one first.

    Examples
    --------
    >>> uniformity(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))  # squared distance 4
    tensor(-4.)
    """
    n = len(z)
    if n < 2:
        raise UsageError(f"uniformity compares rows with each other: at least two are needed, got {n}")
    rows = _log_kernel_sums(F.normalize(z, dim=1) if normalize else z, tau, with_self=False)
    return rows.logsumexp(0) - math.log(n * (n - 1))


def joint_entropy(*codes: Tensor, tau: float = 0.5) -> Tensor:
    """Entropy of several codes together: ``-mean_i log mean_j prod_codes k(code_i, code_j)``, j = i included.

    Maximised, it makes codes independent whose own entropies are kept up: I(c; s) = H(c) + H(s) - H(c, s).

    Parameters
    ----------
    codes : Tensor (N, D_1), (N, D_2), ...
        Rows as they are: normalise those that live on a sphere. The kernel is a product over codes.
    tau : float
        Bandwidth.

    Returns
    -------
    Tensor
        Between 0 (all rows alike) and log N.

    Examples
    --------
    >>> far = 100 * torch.eye(4)
    >>> joint_entropy(far[:, :2], far[:, 2:])  # log 4
    tensor(1.3863)
    """
    if not codes or any(len(c) != len(codes[0]) for c in codes):
        raise UsageError(f"joint_entropy takes codes of the same samples, got rows {[len(c) for c in codes]}")
    # A product of kernels of one bandwidth is the kernel of the codes side by side.
    return math.log(len(codes[0])) - _log_kernel_sums(torch.cat(codes, 1), tau, with_self=True).mean()


def attribute_alignment(x: Tensor, attribute: Tensor, *, tau: float, where: Tensor | None = None) -> Tensor:
    """Pull embeddings together by how near an attribute of them is: mean over pairs i < j of ``w_ij ||x_i - x_j||^2``.

    ``w_ij = exp(-(y_i - y_j)^2 / (2 tau))``; with a tiny `tau` (5e-6 in SepCLR's code) only pairs of the same value count.

    Parameters
    ----------
    x : Tensor (N, D) or (N,)
        Rows as they are.
    attribute : Tensor (N,)
        y, a number per row.
    tau : float
        Bandwidth on the attribute's scale.
    where : Tensor (N,) bool, optional
        Rows that count; with fewer than two the loss is 0 (with gradient).

    Examples
    --------
    >>> x, y = torch.tensor([0.0, 1.0, 3.0]), torch.tensor([5, 5, 7])
    >>> attribute_alignment(x, y, tau=5e-6)  # one of three pairs
    tensor(0.3333)
    """
    _check_tau(tau)
    if attribute.shape != x.shape[:1]:
        raise UsageError(f"attribute must be of shape ({len(x)},), got {tuple(attribute.shape)}")
    x = x.reshape(len(x), -1)
    i, j = torch.triu_indices(len(x), len(x), 1, device=x.device)
    weight = (-(attribute[i] - attribute[j]).to(x.dtype).square() / (2 * tau)).exp()
    if where is not None:
        both = where[i] & where[j]
        weight, count = weight * both, both.sum()
    else:
        count = torch.tensor(len(i), device=x.device)
    return (weight * (x[i] - x[j]).square().sum(1)).sum() / count.clamp_min(1)


def _check_tau(tau: float) -> None:
    if not tau > 0:
        raise UsageError(f"tau must be above 0, got {tau}")


def _log_kernel_sums(z: Tensor, tau: float, *, with_self: bool) -> Tensor:
    """``log sum_j k(z_i, z_j)`` for every row (N,), over all j or all but i."""
    _check_tau(tau)
    z = z - z.detach().mean(0)  # distances stay; fewer digits are lost below
    half = z.square().sum(1, keepdim=True) / 2
    one = torch.ones_like(half)
    # -||a - b||^2 / 2 as an inner product, which is 0 for a row with itself: the engine's positive.
    query, key = torch.cat([z, -half, one], 1), torch.cat([z, one, -half], 1)
    own = torch.arange(len(z), device=z.device)
    weights = None if with_self else own.unsqueeze(1)
    return contrast(query, key, positives=own, weights=weights, temperature=tau, normalize=False, reduction="none")
