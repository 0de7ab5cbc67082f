"""Global contrast with a running average per item, and a temperature per item: SogCLR and iSogCLR.

For anchor i, with cosines s to its negatives and s+ to its positive, h_ij = s_ij - s_i+, both minimise an objective over ALL
negatives of the data set::

    F_i(t_i) = t_i log mean_j exp(h_ij / t_i) + t_i rho,      t_low <= t_i <= t_high

A batch alone estimates the gradient of that logarithm with a bias; a running mean of the exponentials per item (SogCLR, Yuan et
al. 2022, arXiv 2202.12387) takes it away. iSogCLR (Qiu et al. 2023, arXiv 2305.11965) also moves t_i, the dual variable of a
distributionally robust objective: where it comes to rest, the weights of the negatives have divergence rho from uniform. So
items with many look-alikes get a large temperature, and rare ones a small one.

What is kept per item comes in and goes out of these functions as an `ItemState`; the values that they return have the right
gradient but are not the objective itself. The mean is kept as its logarithm, which neither over- nor underflows.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from contralto.errors import UsageError

__all__ = [
    "ItemState",
    "TemperatureRule",
    "bimodal_global_contrast",
    "global_contrast",
    "queue_global_contrast",
    "step_size",
]


class ItemState(NamedTuple):
    """What is kept of every item of a batch, (B,) each.

    Attributes
    ----------
    log_mean : Tensor
        Logarithm of the running mean of exp; -inf before the first visit.
    momentum : Tensor
        Running gradient of the temperature (u).
    temperature : Tensor
    seen : Tensor of bool
        Whether there was a visit.
    offset : Tensor, optional
        Largest exponent so far; only the bimodal form as published needs it.

    Examples
    --------
    >>> ItemState.start(2, 0.1).temperature
    tensor([0.1000, 0.1000])
    """

    log_mean: Tensor
    momentum: Tensor
    temperature: Tensor
    seen: Tensor
    offset: Tensor | None = None

    @classmethod
    def start(cls, size: int, temperature: float, *, like: Tensor | None = None) -> "ItemState":
        """State before the first visit, with the type and place of another tensor."""
        like = torch.empty(0) if like is None else like
        zero = like.new_zeros(size)
        return cls(zero - torch.inf, zero.clone(), zero + temperature, zero.bool(), zero.clone())

    def kept(self) -> dict[str, Tensor]:
        """What there is, by name."""
        return {name: value for name, value in self._asdict().items() if value is not None}


@dataclass(frozen=True)
class TemperatureRule:
    """How running means and temperatures move.

    Parameters
    ----------
    gamma : float
        Weight of the batch in the running mean, in (0, 1].
    rho : float
        Divergence of the negatives' weights from uniform that temperatures aim at; at most log of the number of negatives can
        be had. Larger values give smaller temperatures.
    eta : float
        Step size of temperatures.
    beta : float
        Weight of the new gradient in the running one (beta_u).
    low, high : float
        Bounds of temperatures.
    clamp : float
        Largest absolute gradient of a temperature.
    learn : bool
        `False` leaves temperatures as they are: SogCLR.
    """

    gamma: float = 0.8
    rho: float = 0.4
    eta: float = 0.03
    beta: float = 0.5
    low: float = 0.05
    high: float = 1.0
    clamp: float = 3.0
    learn: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.gamma <= 1:
            raise UsageError(f"gamma must be in (0, 1], got {self.gamma}")
        if not 0 < self.low <= self.high:
            raise UsageError(f"bounds of the temperature must be 0 < low <= high, got {self.low} and {self.high}")


def global_contrast(
    z0: Tensor,
    z1: Tensor,
    state: ItemState,
    rule: TemperatureRule | None = None,
    *,
    index: Tensor | None = None,
    restart: bool = False,
    official: bool = False,
    normalize: bool = True,
) -> tuple[Tensor, ItemState]:
    """Two views of a batch: the mean over items of the sum over views of ``sum_j w_ij h_ij``, and the state after it.

    Parameters
    ----------
    z0, z1 : Tensor (B, D)
        Two views of the same items.
    state : ItemState
        Of these items; not changed.
    rule : TemperatureRule
    index : Tensor (B,), optional
        Which item a row is: rows of one item are no negatives of each other. Default: all differ.
    restart : bool
        Forget the running means, as the official code does in its epoch 0.
    official : bool
        As the published code: exponents without the positive (``s`` for ``h``; with a running mean this differs), and means
        that start at 0. For `learn=False` (SogCLR) exponents are without the positive in any case.
    normalize : bool
        `False` takes rows as they are.

    Returns
    -------
    loss : Tensor ()
        Carries gradient to the views through cosines alone; weights, means and temperatures are constants.
    state : ItemState

    Raises
    ------
    UsageError
        If all rows are of one item.

    Examples
    --------
    >>> loss, after = global_contrast(torch.eye(3), torch.eye(3), ItemState.start(3, 0.5))
    >>> loss
    tensor(-2.)
    >>> after.temperature
    tensor([0.4940, 0.4940, 0.4940])
    """
    rule = rule or TemperatureRule()
    z0, z1 = _rows(z0, z1, normalize)
    n = len(z0)
    index = torch.arange(n, device=z0.device) if index is None else index
    other = (index.unsqueeze(1) != index).repeat(1, 2)  # (B, 2B): neither itself nor its positive
    count = other.sum(1)
    if n < 2 or not bool((count > 0).all()):
        raise UsageError(f"a batch of {n} has rows of one item only: contrast needs at least two items")
    with torch.autocast(z0.device.type, enabled=False):
        cosine = torch.stack([z0, z1]) @ torch.cat([z0, z1]).T  # (2, B, 2B)
        positive = (z0 * z1).sum(1)
        plain = official or not rule.learn
        values = cosine if plain else cosine - positive.unsqueeze(1)
        started = state.seen
        if restart:
            started = torch.zeros_like(started)
        elif official:  # SogCLR's code: from the batch alone where nothing of it was seen
            started = torch.ones_like(started) if rule.learn else started.any().expand(n)
        loss, after = _visit(values, other, count, state, rule, started)
        return (loss - positive if plain else loss).sum(0).mean(), after


def queue_global_contrast(
    cosine: Tensor, state: ItemState, rule: TemperatureRule | None = None, *, official: bool = False
) -> tuple[Tensor, ItemState]:
    """One view against its key and a queue (MoCo); means are over all columns, the positive among them.

    Parameters
    ----------
    cosine : Tensor (B, 1 + K)
        Cosines to the positive key, in column 0, and to the keys of the queue.
    state : ItemState
        Of these items; not changed.
    rule : TemperatureRule
    official : bool
        As the published code: means start at 0.

    Returns
    -------
    loss : Tensor ()
    state : ItemState

    Examples
    --------
    >>> queue_global_contrast(torch.tensor([[0.9, 0.1, 0.4]]), ItemState.start(1, 0.5))[0]
    tensor(-0.2201)
    """
    rule = rule or TemperatureRule()
    if cosine.ndim != 2 or cosine.shape[1] < 2:
        raise UsageError(f"cosine must be of shape (B, 1 + K) with a queue of K >= 1 keys, got {tuple(cosine.shape)}")
    with torch.autocast(cosine.device.type, enabled=False):
        cosine = cosine.to(torch.promote_types(cosine.dtype, torch.float32))
        every = torch.ones_like(cosine, dtype=torch.bool)
        started = torch.ones_like(state.seen) if official else state.seen
        loss, after = _visit((cosine - cosine[:, :1])[None], every, every.sum(1), state, rule, started)
        return loss.mean(), after


def bimodal_global_contrast(
    image: Tensor,
    text: Tensor,
    image_state: ItemState,
    text_state: ItemState,
    rule: TemperatureRule | None = None,
    *,
    image_index: Tensor | None = None,
    text_index: Tensor | None = None,
    official: bool = False,
    normalize: bool = True,
) -> tuple[Tensor, ItemState, ItemState]:
    """Image-text pairs: the sum of both sides' losses, each with its own state, and both states after it.

    Parameters
    ----------
    image, text : Tensor (B, D)
        Row i of one belongs to row i of the other.
    image_state, text_state : ItemState
    rule : TemperatureRule
        The paper's: ``rho=6.0, beta=0.9, low=0.005, clamp=5.0`` and temperatures that start at 0.01.
    image_index, text_index : Tensor (B,), optional
        Which image, which text: a text is no negative of an image that it belongs to, wherever in the batch. Default: all differ.
    official : bool
        As the published code: the pair itself stands in the sums but not in their divisor B - 1, and means start at 0.
    normalize : bool
        `False` takes rows as they are.

    Returns
    -------
    loss : Tensor ()
    image_state, text_state : ItemState

    Examples
    --------
    >>> start = ItemState.start(2, 0.5)
    >>> bimodal_global_contrast(torch.eye(2), torch.eye(2), start, start)[0]
    tensor(-2.)
    """
    rule = rule or TemperatureRule()
    image, text = _rows(image, text, normalize)
    n = len(image)
    if n < 2:
        raise UsageError(f"a batch of {n} has no negatives: contrast needs at least two pairs")
    own = torch.arange(n, device=image.device)
    image_index = own if image_index is None else image_index
    text_index = own if text_index is None else text_index
    other = (image_index.unsqueeze(1) != image_index) & (text_index.unsqueeze(1) != text_index)
    count = other.sum(1)
    if official:
        other, count = torch.ones_like(other), torch.full_like(count, n - 1)
    elif not bool((count > 0).all()):
        raise UsageError(f"a batch of {n} pairs has one without negatives: it needs other images and texts")
    with torch.autocast(image.device.type, enabled=False):
        cosine = image @ text.T
        losses, states = [], []
        for values, state in ((cosine, image_state), (cosine.T, text_state)):
            difference = values - values.diagonal().unsqueeze(1)
            started = torch.ones_like(state.seen) if official else state.seen
            loss, after = _visit(difference[None], other, count, state, rule, started, published=official)
            losses.append(loss.mean())
            states.append(after)
        return losses[0] + losses[1], states[0], states[1]


def _visit(
    values: Tensor,
    other: Tensor,
    count: Tensor,
    state: ItemState,
    rule: TemperatureRule,
    started: Tensor,
    *,
    published: bool = False,
) -> tuple[Tensor, ItemState]:
    """One visit of every item: ``sum_j w_ij v_ij`` (V, B) of the values (V, B, M), and the state after it."""
    with torch.no_grad():
        tau = state.temperature.to(values.dtype)
        exponents = (values / tau.unsqueeze(1)).masked_fill(~other, -torch.inf)
        count = count.to(values.dtype)
        batch = exponents.logsumexp(2) - count.log()  # (V, B)
        kept = math.log1p(-rule.gamma) if rule.gamma < 1 else -math.inf
        running = torch.logaddexp(state.log_mean.to(batch) + kept, batch + math.log(rule.gamma))
        log_mean = torch.where(started, running, batch)
        weights = (exponents - log_mean.unsqueeze(2)).exp() / count.unsqueeze(1)
        offset = state.offset
        if offset is not None:
            offset = torch.maximum(offset, exponents.amax((0, 2)).to(offset))
            if published:  # its divisor is s + 1e-10, s = mean / exp(offset)
                weights = weights / (1 + 1e-10 * (offset - log_mean).exp()).unsqueeze(2)
        gradient = log_mean + rule.rho - (weights * exponents.masked_fill(~other, 0)).sum(2)
        gradient = gradient.mean(0).clamp(-rule.clamp, rule.clamp)
        momentum, temperature = state.momentum, state.temperature
        if rule.learn:
            momentum = (1 - rule.beta) * momentum + rule.beta * gradient.to(momentum)
            temperature = (temperature - rule.eta * momentum).clamp(rule.low, rule.high)
        over_views = log_mean.logsumexp(0) - math.log(len(log_mean))
        after = ItemState(over_views.to(state.log_mean), momentum, temperature, torch.ones_like(state.seen), offset)
    return (weights * values.masked_fill(~other, 0)).sum(2), after


def step_size(
    eta: float,
    schedule: Literal["const", "cosine", "exp"],
    epoch: int,
    epochs: int,
    *,
    smallest: float = 1e-4,
    rate: float = 0.8,
) -> float:
    """Step size of temperatures in an epoch: constant, by a quarter of a cosine, or exponentially falling.

    Examples
    --------
    >>> [round(step_size(0.03, "cosine", e, 30), 4) for e in (0, 15, 30)]
    [0.03, 0.0212, 0.0001]
    """
    if schedule == "const":
        return eta
    if schedule == "cosine":
        return smallest + (eta - smallest) * math.cos(math.pi / 2 * epoch / epochs)
    if schedule == "exp":
        return float((eta - smallest) * rate ** (epoch - 1) + smallest)
    raise UsageError(f'the schedule of eta must be "const", "cosine" or "exp", got {schedule!r}')


def _rows(a: Tensor, b: Tensor, normalize: bool) -> tuple[Tensor, Tensor]:
    if a.ndim != 2 or a.shape != b.shape:
        raise UsageError(f"both sides must be of one shape (B, D), got {tuple(a.shape)} and {tuple(b.shape)}")
    dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    a, b = a.to(dtype), b.to(dtype)
    return (F.normalize(a, dim=1), F.normalize(b, dim=1)) if normalize else (a, b)
