"""Differentiable sorting networks (Petersen et al. 2021, 2022), and the loss of GroCo (Shvetsova et al. 2023) on them.

A sorting network is a list of layers of comparators; each compares two wires and puts the smaller value on the first of them.
Relaxed, a comparator mixes: with ``alpha = f(steepness * (x_hi - x_lo))`` in (0, 1), ::

    x_lo <- alpha x_lo + (1 - alpha) x_hi,     x_hi <- (1 - alpha) x_lo + alpha x_hi

and the same for the columns of a matrix that starts as the identity: P (n, n) is doubly stochastic, P_ir is the mass of input i
at rank r, and ``x @ P`` are the sorted values, ascending.

P is a product of one matrix per layer. So the mass that inputs have in a *group* of ranks needs no P: the 0/1 vector of the
group goes through the layers in reverse (`group_mass`), n times cheaper and with the same gradients.
"""

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from contralto.distributed import gather_rows, gather_with_gradient, rank, world_size
from contralto.errors import UsageError
from contralto.losses.contrast import Reduction

__all__ = ["SIGMOIDS", "Network", "Sigmoid", "groco", "group_mass", "soft_sort", "sorting_network"]

Network = Literal["odd_even", "bitonic"]
Sigmoid = Literal["cauchy", "logistic", "logistic_phi", "gaussian", "reciprocal", "optimal"]


def _optimal(v: Tensor) -> Tensor:
    size = v.abs().clamp_min(0.25)  # the tail has a pole at 0, whose gradient must not reach the middle
    tail = 1 / (16 * size)
    return torch.where(v.abs() <= 0.25, v + 0.5, torch.where(v > 0, 1 - tail, tail))


SIGMOIDS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "cauchy": lambda d, steepness: 0.5 + (steepness * d).atan() / math.pi,
    "logistic": lambda d, steepness: (steepness * d).sigmoid(),
    "logistic_phi": lambda d, steepness: (steepness * d / (d.abs() + 1e-10) ** 0.25).sigmoid(),
    "gaussian": lambda d, steepness: 0.5 + 0.5 * (steepness * d / math.sqrt(2)).erf(),
    "reciprocal": lambda d, steepness: 0.5 + 0.5 * steepness * d / (2 + (steepness * d).abs()),
    "optimal": lambda d, steepness: _optimal(steepness * d),
}
"""Name -> function of a difference and the steepness with values in (0, 1): how sure it is that the difference is positive."""

Layer = tuple[Tensor, Tensor, Tensor, Tensor]


@lru_cache(maxsize=64)
def sorting_network(network: Network, n: int) -> tuple[tuple[tuple[int, int], ...], ...]:
    """The layers of a network for n wires: pairs (wire of the smaller value, wire of the larger one), disjoint in a layer.

    Parameters
    ----------
    network : {"odd_even", "bitonic"}
        "odd_even" compares neighbours in n layers; "bitonic" has about ``log2(n)^2 / 2`` layers.
    n : int

    Examples
    --------
    >>> sorting_network("odd_even", 3)
    (((0, 1),), ((1, 2),), ((0, 1),))
    >>> sorting_network("bitonic", 4)
    (((0, 1), (3, 2)), ((0, 2), (1, 3)), ((0, 1), (2, 3)))
    """
    if n < 1:
        raise UsageError(f"a sorting network needs at least one wire, got {n}")
    if network == "odd_even":
        return tuple(tuple((a, a + 1) for a in range(layer % 2, n - 1, 2)) for layer in range(n if n > 1 else 0))
    if network != "bitonic":
        raise UsageError(f'network must be "odd_even" or "bitonic", got {network!r}')
    blocks = (n - 1).bit_length()
    missing = 2**blocks - n  # the first wires of the next power of two are not there
    layers = []
    for block in range(blocks):
        for layer in range(block + 1):
            m = 2 ** (block - layer)
            pairs = []
            for start in range(0, 2**blocks, 2 * m):
                for w in range(max(start, missing), start + m):
                    a, b = w - missing, w + m - missing
                    pairs.append((b, a) if (w // 2 ** (block + 1)) % 2 else (a, b))
            layers.append(tuple(pairs))
    return tuple(layers)


def soft_sort(
    x: Tensor, *, network: Network = "odd_even", sigmoid: Sigmoid = "cauchy", steepness: float = 10.0
) -> tuple[Tensor, Tensor]:
    """Sort softly, ascending.

    Parameters
    ----------
    x : Tensor (..., n)
    network : {"odd_even", "bitonic"}
    sigmoid : str
        One of `SIGMOIDS`.
    steepness : float
        The larger, the harder.

    Returns
    -------
    sorted : Tensor (..., n)
        ``x @ P``.
    P : Tensor (..., n, n)
        Doubly stochastic; rows are inputs, columns ranks.

    Examples
    --------
    >>> y, P = soft_sort(torch.tensor([2.0, 0.0, 1.0]), steepness=1000.0)
    >>> y
    tensor([6.3658e-04, 1.0000e+00, 1.9994e+00])
    >>> P.round().int()
    tensor([[0, 0, 1],
            [1, 0, 0],
            [0, 1, 0]], dtype=torch.int32)
    """
    n = x.shape[-1]
    wires = x.reshape(-1, n).T
    P = torch.eye(n, dtype=x.dtype, device=x.device).unsqueeze(2).expand(n, n, wires.shape[1])  # (rank, input, batch)
    for layer in _layers(network, n, x.device):
        alpha = _alpha(wires, layer, sigmoid, steepness)
        wires, P = _mix(wires, layer, alpha), _mix(P, layer, alpha.unsqueeze(1))
    return wires.T.reshape(x.shape), P.permute(2, 1, 0).reshape(*x.shape, n)


def group_mass(
    x: Tensor,
    last: int,
    *,
    network: Network = "odd_even",
    sigmoid: Sigmoid = "cauchy",
    steepness: float = 1.0,
) -> Tensor:
    """The mass that every input has among the `last` highest ranks, without the matrix P (exact).

    Parameters
    ----------
    x : Tensor (..., n)
    last : int
        Number of ranks in the group.
    network, sigmoid, steepness
        See `soft_sort`.

    Returns
    -------
    Tensor (..., n)
        Sums to `last`.

    Examples
    --------
    >>> x = torch.tensor([0.1, -0.3, 0.8])
    >>> group_mass(x, 1)
    tensor([0.1711, 0.1044, 0.7245])
    >>> soft_sort(x, steepness=1.0)[1][:, -1:].sum(1)
    tensor([0.1711, 0.1044, 0.7245])
    """
    n = x.shape[-1]
    if not 0 < last <= n:
        raise UsageError(f"the group must hold 1 to {n} ranks, got {last}")
    wires, passed = x.reshape(-1, n).T, []
    for layer in _layers(network, n, x.device):
        alpha = _alpha(wires, layer, sigmoid, steepness)
        wires = _mix(wires, layer, alpha)
        passed.append((layer, alpha))
    mass = torch.zeros_like(wires)
    mass[n - last :] = 1
    for layer, alpha in reversed(passed):
        mass = _mix(mass, layer, alpha)  # the matrix of a layer is symmetric
    return mass.T.reshape(x.shape)


def groco(
    z: Tensor,
    *,
    hardest: int = 10,
    positive_views: int | None = None,
    network: Network = "odd_even",
    sigmoid: Sigmoid = "cauchy",
    steepness: float = 1.0,
    stop_grad: bool = True,
    reduction: Reduction = "mean",
) -> Tensor:
    """Group ordering (GroCo): all positives of an anchor closer to it than its hardest negatives, in any order among themselves.

    Every row of every view is an anchor. Its positives are the other views of the sample, its negatives the `hardest` most
    similar samples of its *own* view, on all processes. Both go through a sorting network; the mass of a positive among the
    highest ranks is asked to be 1, that of a negative 0 (binary cross-entropy, mean over all of them).

    Parameters
    ----------
    z : Tensor (V, B, D)
        Embeddings of V views of B samples, raw.
    hardest : int
        k, below the number of negatives (all rows but one).
    positive_views : int, optional
        How many of the first views serve as positives, at least two: the large crops where there are small ones. Default: all.
    network, sigmoid, steepness
        See `soft_sort`. With steepness 1 a cosine moves little mass: the loss stays above 0.147 for k = 10 and one positive.
    stop_grad : bool
        Gradient reaches the anchor only, not its positives and negatives.
    reduction : {"mean", "sum", "none"}
        "none" gives (B,), mean over the views of a sample; "mean_all" is the same as "mean".

    Returns
    -------
    Tensor

    Raises
    ------
    UsageError
        If there are too few views or negatives.

    Examples
    --------
    >>> z = torch.randn(2, 12, 8, generator=torch.Generator().manual_seed(0))
    >>> groco(z)
    tensor(0.2071)
    """
    if z.ndim != 3:
        raise UsageError(f"z must be of shape (views, samples, width), got {tuple(z.shape)}")
    views, n, _ = z.shape
    full = views if positive_views is None else positive_views
    if not 2 <= full <= views:
        raise UsageError(f"positives come from 2 to {views} views, got positive_views={full} with {views} views")
    with torch.autocast(z.device.type, enabled=False):
        unit = F.normalize(z.to(torch.promote_types(z.dtype, torch.float32)), dim=2)
        other = unit.detach() if stop_grad else unit
        negatives = _hardest(unit, other, hardest)  # (V, B, k), ascending
        positive = (unit.unsqueeze(1) * other[:full].unsqueeze(0)).sum(3)  # (V, full, B)
        options = {"network": network, "sigmoid": sigmoid, "steepness": steepness}
        # Small crops have one positive more than full ones, so their networks are wider.
        own = ~torch.eye(full, dtype=torch.bool, device=z.device)
        of_full = positive[:full][own].reshape(full, full - 1, n)
        losses = [_ordering(negatives[:full], of_full, **options)]  # type: ignore[arg-type]
        if full < views:
            losses.append(_ordering(negatives[full:], positive[full:], **options))  # type: ignore[arg-type]
        loss = torch.cat(losses).mean(0)
    return loss if reduction == "none" else loss.sum() if reduction == "sum" else loss.mean()


def _hardest(unit: Tensor, other: Tensor, hardest: int) -> Tensor:
    """Similarities (V, B, k) to the k nearest other samples of the own view, on all processes, ascending."""
    n = unit.shape[1]
    number = torch.arange(n, device=unit.device) * world_size() + rank()
    numbers = gather_rows(number)
    if not 1 <= hardest < len(numbers) - 1:
        raise UsageError(
            f"hardest must be from 1 to below the number of negatives: a batch of {len(numbers)} has {len(numbers) - 1}, "
            f"got hardest={hardest}; enlarge the batch or lower hardest"
        )
    own = number.unsqueeze(1) == numbers
    found = []
    for anchors, samples in zip(unit, other, strict=True):
        keys = gather_with_gradient(samples) if samples.requires_grad else gather_rows(samples)
        similarity = (anchors @ keys.T).masked_fill(own, -torch.inf)
        found.append(similarity.topk(hardest, dim=1).values.flip(1))
    return torch.stack(found)


def _ordering(negatives: Tensor, positives: Tensor, network: Network, sigmoid: Sigmoid, steepness: float) -> Tensor:
    """Losses (V, B) of anchors with negatives (V, B, k) and positives (V, p, B)."""
    p = positives.shape[1]
    x = torch.cat([negatives, positives.transpose(1, 2).sort(dim=2).values], 2)
    mass = group_mass(x, p, network=network, sigmoid=sigmoid, steepness=steepness).clamp(0, 1)
    right = torch.cat([1 - mass[..., :-p], mass[..., -p:]], -1)
    # The logarithm is floored at -100; a floor inside keeps the gradient of what is not taken finite.
    log = torch.where(
        right > 0, right.clamp_min(torch.finfo(right.dtype).tiny).log(), torch.where(right == 0, -100.0, right)
    )
    return -log.mean(2)


def _layers(network: Network, n: int, device: torch.device) -> list[Layer]:
    """Index tensors of every layer: low wires, high wires, wires without comparator, and the way back into order."""
    layers = []
    for pairs in sorting_network(network, n):
        lo, hi = [a for a, _ in pairs], [b for _, b in pairs]
        idle = sorted(set(range(n)) - set(lo) - set(hi))
        back = torch.tensor(lo + hi + idle).argsort()
        layers.append(tuple(torch.as_tensor(w, dtype=torch.int64, device=device) for w in (lo, hi, idle, back)))
    return layers  # type: ignore[return-value]


def _alpha(wires: Tensor, layer: Layer, sigmoid: Sigmoid, steepness: float) -> Tensor:
    if sigmoid not in SIGMOIDS:
        raise UsageError(f"sigmoid must be one of {', '.join(SIGMOIDS)}; got {sigmoid!r}")
    lo, hi, _, _ = layer
    return SIGMOIDS[sigmoid](wires[hi] - wires[lo], steepness)


def _mix(wires: Tensor, layer: Layer, alpha: Tensor) -> Tensor:
    """One layer on (n, ...)."""
    lo, hi, idle, back = layer
    low, high = wires[lo], wires[hi]
    moved = (1 - alpha) * (high - low)
    return torch.cat([low + moved, high - moved, wires[idle]])[back]
