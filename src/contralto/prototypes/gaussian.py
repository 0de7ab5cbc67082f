"""Clusters as Gaussians of unknown mean and covariance: how likely a set of points is as one cluster, and what to do about it.

Under a normal-inverse-Wishart (NIW) prior the likelihood of a set of points, with mean and covariance integrated out, is known in
closed form. So two clusterings of different size can be compared: a cluster is split in two, or two are merged, where that
makes the points likelier (Hastings ratio). GPC (Zhao et al., ICCV 2023, arXiv 2305.06144), eqs. of its E-step.

All clusters are computed at once, in float64; K clusters in D dimensions take memory K D^2.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from contralto.errors import UsageError
from contralto.prototypes import bank

__all__ = [
    "Moments",
    "Prior",
    "Round",
    "fitted_psi",
    "log_evidence",
    "log_split_ratio",
    "moments",
    "niw_prior",
    "pooled",
    "posterior",
    "posterior_means",
    "split_and_merge",
    "two_means",
]


class Prior(NamedTuple):
    """What is thought of a cluster before its points are seen: mean (D,), its weight kappa, degrees nu, and Psi (D, D)."""

    mean: Tensor
    kappa: float
    nu: float
    psi: Tensor


@dataclass(frozen=True)
class Moments:
    """Of K sets of points: their number (K,), mean (K, D), and sum of outer products around it (K, D, D)."""

    count: Tensor
    mean: Tensor
    scatter: Tensor


def niw_prior(x: Tensor, *, kappa: float = 1e-4, nu: float | None = None, psi: float | Tensor = 0.005) -> Prior:
    """The prior around the mean of all points.

    Parameters
    ----------
    x : Tensor (N, D)
    kappa : float
        So many points is the prior mean worth.
    nu : float, optional
        Degrees of freedom, above D - 1; default D + 2. It must grow with D, or the evidence says nothing.
    psi : float or Tensor (D, D)
        Scale of the covariance, a number times the identity. How many clusters are found depends on it: take the variance within
        a class. The paper's 0.005 is for rows of length one.

    Examples
    --------
    >>> niw_prior(torch.eye(3)).nu
    5.0
    """
    if x.ndim != 2 or not len(x):
        raise UsageError(f"x must be of shape (N, D) with at least one row, got {tuple(x.shape)}")
    dim = x.shape[1]
    nu = float(dim + 2 if nu is None else nu)
    if kappa <= 0 or nu <= dim - 1:
        raise UsageError(f"kappa must be above 0 and nu above D - 1 = {dim - 1}, got {kappa} and {nu}")
    x = x.double()
    matrix = psi.to(x) if isinstance(psi, Tensor) else psi * torch.eye(dim, dtype=x.dtype, device=x.device)
    if matrix.shape != (dim, dim) or torch.linalg.slogdet(matrix)[0] <= 0 or (matrix.diagonal() <= 0).any():
        raise UsageError("psi must be a positive number or a positive definite matrix (D, D)")
    return Prior(x.mean(0), float(kappa), nu, matrix)


def moments(x: Tensor, labels: Tensor, k: int) -> Moments:
    """Number, mean and scatter of the points of every cluster, in float64.

    The rows of a cluster are laid out in blocks of D, the last filled up with zeros, and multiplied block by block: as many
    operations as one product of all rows, memory as the rows and K matrices.

    Parameters
    ----------
    x : Tensor (N, D)
    labels : Tensor (N,)
        In [0, k); rows with others are left out.
    k : int

    Examples
    --------
    >>> moments(torch.tensor([[1.0], [3.0], [5.0]]), torch.tensor([0, 0, 1]), 2).scatter.flatten()
    tensor([2., 0.], dtype=torch.float64)
    """
    known = (labels >= 0) & (labels < k)
    labels = labels[known]
    order = labels.argsort(stable=True)
    labels, x = labels[order], x[known][order].double()
    n, dim = x.shape
    count = torch.bincount(labels, minlength=k)
    mean = bank.means(x, labels, k)
    blocks = -(-count // dim)  # of every cluster
    first_row, first_block = count.cumsum(0) - count, blocks.cumsum(0) - blocks
    place = torch.arange(n, device=x.device) - first_row[labels] + dim * first_block[labels]
    laid = x.new_zeros(int(blocks.sum()) * dim, dim)
    laid[place] = x - mean[labels]
    laid = laid.view(-1, dim, dim)
    owner = torch.repeat_interleave(torch.arange(k, device=x.device), blocks)
    scatter = x.new_zeros(k, dim, dim).index_add_(0, owner, laid.mT @ laid)
    return Moments(count.double(), mean, scatter)


def pooled(a: Moments, b: Moments) -> Moments:
    """The moments of each set of `a` together with that of `b` in the same place.

    Examples
    --------
    >>> x = torch.tensor([[1.0], [3.0], [5.0]])
    >>> one = moments(x, torch.tensor([0, 1, 0]), 1)
    >>> pooled(one, moments(x, torch.tensor([1, 0, 1]), 1)).scatter.item()
    8.0
    """
    count = a.count + b.count
    share = (b.count / count.clamp(min=1)).unsqueeze(1)
    apart = b.mean - a.mean
    between = (a.count.unsqueeze(1) * share).unsqueeze(2) * _outer(apart)
    return Moments(count, a.mean + share * apart, a.scatter + b.scatter + between)


def posterior(of: Moments, prior: Prior) -> tuple[Tensor, Tensor]:
    """Mean (K, D) and covariance (K, D, D) of every cluster, drawn towards the prior; an empty one has the prior's mean and Psi.

    Examples
    --------
    >>> x = torch.tensor([[0.0], [2.0]])
    >>> mean, _ = posterior(moments(x, torch.tensor([0, 0]), 2), niw_prior(x, kappa=1.0))
    >>> mean.flatten()
    tensor([1., 1.], dtype=torch.float64)
    """
    n, dim = of.count, len(prior.mean)
    degrees = torch.where(n > 0, prior.nu + n + dim + 2, 1.0)
    return _shrunk(n, of.mean, prior), _scale(of, prior) / degrees[:, None, None]


def posterior_means(x: Tensor, labels: Tensor, k: int, prior: Prior) -> Tensor:
    """Mean of every cluster (k, D) drawn towards that of the prior, in float64; rows with other labels are left out.

    Examples
    --------
    >>> x = torch.tensor([[0.0], [2.0]])
    >>> posterior_means(x, torch.tensor([0, 0]), 1, niw_prior(x))
    tensor([[1.]], dtype=torch.float64)
    """
    count = torch.bincount(labels[(labels >= 0) & (labels < k)], minlength=k).double()
    return _shrunk(count, bank.means(x.double(), labels, k), prior)


def log_evidence(of: Moments, prior: Prior) -> Tensor:
    """Logarithm of the likelihood of every set of points as one Gaussian, mean and covariance integrated out (K,).

    Examples
    --------
    >>> x = torch.tensor([[0.0, 0.1], [0.1, 0.0], [9.0, 9.0]])
    >>> together, apart = (log_evidence(moments(x, torch.tensor(c), 2), niw_prior(x)) for c in ([0, 0, 0], [0, 0, 1]))
    >>> bool(together.sum() < apart.sum())
    True
    """
    n, dim = of.count, len(prior.mean)
    kappa, nu = prior.kappa + n, prior.nu + n
    before = n.new_tensor(prior.nu)
    return (
        torch.mvlgamma(nu / 2, dim)
        - torch.mvlgamma(before / 2, dim)
        + before / 2 * torch.logdet(prior.psi)
        - nu / 2 * torch.logdet(_scale(of, prior))
        + dim / 2 * (math.log(prior.kappa) - kappa.log())
        - n * dim / 2 * math.log(math.pi)
    )


def log_split_ratio(first: Moments, second: Moments, prior: Prior, *, alpha: float = 1.0) -> Tensor:
    """Hastings ratio, as logarithm (K,), of two clusters in the place of their union; of the merge it is the negative.

    ``ln alpha + lnG(n1) + ln f(X1) + lnG(n2) + ln f(X2) - lnG(n) - ln f(X)``; minus infinity where a part is empty.

    Parameters
    ----------
    first, second : Moments
        The two parts of each.
    prior : Prior
    alpha : float
        Concentration: how readily clusters are split.

    Examples
    --------
    >>> x = torch.cat([torch.randn(50, 2), torch.randn(50, 2) + 20])
    >>> sides = torch.arange(100) // 50
    >>> a, b = moments(x, sides, 1), moments(x, 1 - sides, 1)
    >>> bool(log_split_ratio(a, b, niw_prior(x, psi=1.0)) > 0)
    True
    """
    if alpha <= 0:
        raise UsageError(f"alpha must be above 0, got {alpha}")
    whole = pooled(first, second)
    parts = _weighed(first, prior) + _weighed(second, prior)
    ratio = math.log(alpha) + parts - _weighed(whole, prior)
    return ratio.masked_fill((first.count < 1) | (second.count < 1), -math.inf)


def two_means(
    x: Tensor, labels: Tensor, k: int, *, generator: torch.Generator, restarts: int = 4, iterations: int = 100
) -> Tensor:
    """Halve every cluster by 2-means, all of them at once; the best of some beginnings (k-means++) for each.

    Parameters
    ----------
    x : Tensor (N, D)
    labels : Tensor (N,)
        In [0, k).
    k : int
    generator : torch.Generator
        On the CPU.
    restarts, iterations : int

    Returns
    -------
    Tensor (N,)
        0 or 1: the half of every row.

    Examples
    --------
    >>> x = torch.tensor([[0.0], [0.1], [5.0], [7.0], [9.0], [9.1]])
    >>> half = two_means(x, torch.tensor([0, 0, 0, 1, 1, 1]), 2, generator=torch.Generator().manual_seed(0))
    >>> (half[0] == half[1] != half[2]).item(), (half[4] == half[5] != half[3]).item()
    (True, True)
    """
    best = torch.zeros_like(labels)
    if not len(x):
        return best
    lowest = torch.full((k,), math.inf, dtype=x.dtype, device=x.device)
    for _ in range(restarts):
        first = x[_drawn(torch.zeros_like(x[:, 0]), labels, k, generator)]
        apart = (x - first[labels]).square().sum(1)
        second = x[_drawn(apart.log(), labels, k, generator)]
        half, inertia = _halves(x, labels, torch.stack([first, second], 1), iterations)
        better = inertia < lowest
        best, lowest = torch.where(better[labels], half, best), torch.where(better, inertia, lowest)
    return best


@torch.no_grad()
def fitted_psi(
    x: Tensor,
    labels: Tensor,
    *,
    kappa: float = 1e-4,
    nu: float | None = None,
    seed: int = 0,
) -> float:
    """Psi under which `split_and_merge` would leave labelled classes as they are: beyond the paper.

    For values from a hundredth to a hundred times the variance within the classes, it is counted which share of the classes
    would be split into the halves of their 2-means, and which share of the pairs of nearest classes be merged. The value
    with the smallest sum is taken, the middle one of several.

    Parameters
    ----------
    x : Tensor (N, D)
        All rows; the prior lies around their mean.
    labels : Tensor (N,)
        Class of labelled rows, in [0, C), without gaps; -1 elsewhere.
    kappa, nu
        See `niw_prior`.
    seed : int
        Of the halves.

    Returns
    -------
    float

    Raises
    ------
    UsageError
        If fewer than two classes are labelled.

    Examples
    --------
    >>> x = torch.cat([torch.randn(40, 2), torch.randn(40, 2) + 20])
    >>> 0.01 < fitted_psi(x, torch.arange(80) // 40) < 200
    True
    """
    count = _old_classes(labels, labels)
    if count < 2:
        raise UsageError(f"psi is fitted to two labelled classes at least, there are {count}: say a number")
    known = labels >= 0
    rows, group = x[known].double(), labels[known]
    half = two_means(rows, group, count, generator=torch.Generator().manual_seed(seed))
    first, second = (moments(rows, torch.where(half == side, group, -1), count) for side in (0, 1))
    whole = pooled(first, second)
    variance = float(whole.scatter.diagonal(dim1=1, dim2=2).sum() / whole.count.sum()) / x.shape[1]
    a, b = _nearest_pairs(whole.mean, torch.ones(count, dtype=torch.bool, device=x.device))
    pair = _some(whole, a), _some(whole, b)
    values = max(variance, 1e-8) * torch.logspace(-2, 2, 41, dtype=torch.float64)
    wrong = []
    for psi in values.tolist():
        prior = niw_prior(x, kappa=kappa, nu=nu, psi=psi)
        split, apart = log_split_ratio(first, second, prior) > 0, log_split_ratio(*pair, prior) > 0
        wrong.append(split.double().mean() + (~apart).double().mean())
    fewest = torch.stack(wrong).cpu()
    best = (fewest <= fewest.min() + 1e-9).nonzero().squeeze(1)
    return float(values[best[len(best) // 2]])


@dataclass(frozen=True)
class Round:
    """What a round of splits and merges gave.

    Attributes
    ----------
    centres : Tensor (K, D)
        Those of clusters with labelled rows first, in their order.
    labels : Tensor (N,)
        Number of the nearest centre of every row; of a labelled row, its own.
    splits, merges : int
    """

    centres: Tensor
    labels: Tensor
    splits: int
    merges: int


@torch.no_grad()
def split_and_merge(
    x: Tensor,
    labels: Tensor,
    k: int,
    prior: Prior,
    *,
    generator: torch.Generator,
    fixed: Tensor | None = None,
    alpha: float = 1.0,
    coin: float = 0.0,
    smallest: int = 5,
    restarts: int = 4,
) -> Round:
    """Split clusters, merge those that were not split with their nearest, and assign all rows anew (GPC, E-step 4b to 4h).

    A cluster is split into the halves of its 2-means, or two are merged, where the Hastings ratio is above one. Every pair is
    looked at once, and a cluster is merged once in a round: of several wishes the likeliest. Clusters with labelled rows stay.

    Parameters
    ----------
    x : Tensor (N, D)
    labels : Tensor (N,)
        Cluster of every row, in [0, k).
    k : int
    prior : Prior
    generator : torch.Generator
        Of the halves and of the coin; on the CPU.
    fixed : Tensor (N,), optional
        Class of labelled rows, in [0, C) and the same as in `labels`; -1 elsewhere. Each class has a row.
    alpha : float
        See `log_split_ratio`.
    coin : float
        Probability of a split or merge that the ratio speaks against, for exploration.
    smallest : int
        Both halves of a cluster that is split, and it itself, have more rows than this.
    restarts : int
        Of the 2-means.

    Returns
    -------
    Round

    Examples
    --------
    >>> x = torch.cat([torch.randn(40, 2), torch.randn(40, 2) + 20])
    >>> seed = torch.Generator().manual_seed(0)
    >>> found = split_and_merge(x, torch.zeros(80, dtype=torch.long), 1, niw_prior(x, psi=1.0), generator=seed)
    >>> len(found.centres), found.splits
    (2, 1)
    """
    if not 0 <= coin <= 1:
        raise UsageError(f"coin must be in [0, 1], got {coin}")
    if len(labels) != len(x) or (len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < k):
        raise UsageError(f"labels must have a number in [0, {k}) for each of the {len(x)} rows")
    old = _old_classes(labels, fixed)
    x = x.double()
    free = labels >= old
    rows, group, k_free = x[free], labels[free] - old, k - old
    half = two_means(rows, group, k_free, generator=generator, restarts=restarts)
    first, second = (moments(rows, torch.where(half == side, group, -1), k_free) for side in (0, 1))
    whole = pooled(first, second)
    centre = _shrunk(whole.count, whole.mean, prior)

    split = (torch.minimum(first.count, second.count) > smallest) & _accepted(
        log_split_ratio(first, second, prior, alpha=alpha), coin, generator
    )
    pairs = _nearest_pairs(centre, ~split & (whole.count > 0))
    ratio = -log_split_ratio(_some(whole, pairs[0]), _some(whole, pairs[1]), prior, alpha=alpha)
    wanted = _accepted(ratio, coin, generator)
    pairs = _each_once(pairs[:, wanted], ratio[wanted], k_free)

    halves = torch.stack([_shrunk(half_of.count, half_of.mean, prior) for half_of in (first, second)], 1)
    found, parent = bank.split(centre, split.nonzero().squeeze(1), halves[split])
    found, place = bank.merge(found, pairs.T)
    there = torch.zeros(len(found), dtype=torch.bool, device=x.device)
    there[place[whole.count[parent] > 0]] = True  # empty clusters are dropped
    centres = torch.cat([posterior_means(x, labels, old, prior), found[there]])
    nearest, _ = bank.assign(x, centres, metric="euclidean", fixed=fixed)
    return Round(centres, nearest, int(split.sum()), pairs.shape[1])


def _shrunk(count: Tensor, mean: Tensor, prior: Prior) -> Tensor:
    """Means drawn towards that of the prior."""
    return (count.unsqueeze(1) * mean + prior.kappa * prior.mean) / (count + prior.kappa).unsqueeze(1)


def _scale(of: Moments, prior: Prior) -> Tensor:
    """Psi of the posterior (K, D, D)."""
    weight = prior.kappa * of.count / (prior.kappa + of.count)
    return prior.psi + of.scatter + weight[:, None, None] * _outer(of.mean - prior.mean)


def _outer(x: Tensor) -> Tensor:
    return x.unsqueeze(2) * x.unsqueeze(1)


def _weighed(of: Moments, prior: Prior) -> Tensor:
    """Evidence and the Dirichlet process's weight of every cluster."""
    return log_evidence(of, prior) + torch.lgamma(of.count)


def _some(of: Moments, which: Tensor) -> Moments:
    return Moments(of.count[which], of.mean[which], of.scatter[which])


def _drawn(log_weight: Tensor, labels: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """One row of every cluster (k,), drawn by weight: that of the largest weight plus Gumbel noise. 0 where there is none."""
    uniform = torch.rand(len(labels), generator=generator, dtype=torch.float64).clamp(min=1e-300).to(labels.device)
    key = log_weight - (-uniform.log()).log()
    order = key.argsort()
    order = order[labels[order].argsort(stable=True)]  # by cluster, the largest key last
    last: Tensor = torch.bincount(labels, minlength=k).cumsum(0) - 1
    drawn: Tensor = order[last.clamp(min=0)]
    return drawn


def _halves(x: Tensor, labels: Tensor, centres: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """Lloyd's iterations from two centres (k, 2, D) of every cluster; the half of every row, and the inertia of every cluster."""
    k, half = len(centres), torch.full_like(labels, -1)
    for _ in range(iterations):
        distance = (x.unsqueeze(1) - centres[labels]).square().sum(2)  # (N, 2)
        nearest = distance.argmin(1)
        if torch.equal(nearest, half):
            break
        half = nearest
        place = 2 * labels + half
        count = torch.bincount(place, minlength=2 * k).unsqueeze(1)
        mean = x.new_zeros(2 * k, x.shape[1]).index_add_(0, place, x) / count.clamp(min=1)
        centres = torch.where(count > 0, mean, centres.flatten(0, 1)).view_as(centres)
    distance = (x - centres[labels, half]).square().sum(1)
    return half, x.new_zeros(k).index_add_(0, labels, distance)


def _accepted(ratio: Tensor, coin: float, generator: torch.Generator) -> Tensor:
    """Whether a change is made: the ratio is above one, or the coin says so."""
    tossed = torch.rand(len(ratio), generator=generator).to(ratio.device) < coin
    return (ratio > 0) | (tossed & ratio.isfinite())


def _nearest_pairs(centres: Tensor, among: Tensor) -> Tensor:
    """Each of some centres with the nearest other one of them (2, P); what is mutual is there once."""
    place = among.nonzero().squeeze(1)
    if len(place) < 2:
        return place.new_zeros(2, 0)
    distance = torch.cdist(centres[place], centres[place]).fill_diagonal_(math.inf)
    pairs: Tensor = torch.stack([place, place[distance.argmin(1)]]).sort(0).values.unique(dim=1)
    return pairs


def _each_once(pairs: Tensor, ratio: Tensor, k: int) -> Tensor:
    """Of pairs (2, P), those that are taken one after the other by their ratio, if no end of one is taken yet."""
    pairs = pairs[:, ratio.argsort(descending=True)]
    taken = [pairs[:, :0]]
    while pairs.shape[1]:
        rank = torch.arange(pairs.shape[1], device=pairs.device)
        best = rank.new_full((k,), len(rank)).scatter_reduce_(0, pairs.flatten(), rank.repeat(2), "amin")
        first = (best[pairs] == rank).all(0)  # the best of both its ends
        taken.append(pairs[:, first])
        ends = torch.zeros(k, dtype=torch.bool, device=pairs.device).index_fill_(0, taken[-1].flatten(), True)
        pairs = pairs[:, ~ends[pairs].any(0)]
    return torch.cat(taken, 1)


def _old_classes(labels: Tensor, fixed: Tensor | None) -> int:
    """How many clusters have labelled rows: the first ones."""
    if fixed is None or not (fixed >= 0).any():
        return 0
    known = fixed >= 0
    if not torch.equal(labels[known], fixed[known]):
        raise UsageError("labelled rows must be in the cluster of their class: labels differ from fixed")
    count = torch.bincount(fixed[known])
    if (count == 0).any():
        raise UsageError(f"class {int((count == 0).nonzero()[0])} has no labelled row: number the classes without gaps")
    return len(count)
