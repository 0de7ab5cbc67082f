"""Which samples of earlier tasks are kept: herding, the samples closest to the mean, chance, or a reservoir over a stream.

The memory holds the numbers of samples, in the order in which they were chosen, and never more than its size; the samples
themselves stay where they are. It grows with what is kept, not with what came by.
"""

from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from contralto.errors import UsageError

__all__ = ["ReplayMemory", "Rule", "barycenter", "closest_to_mean", "herd"]

Rule = Literal["random", "closest", "barycenter", "reservoir"]


def closest_to_mean(features: Tensor, count: int) -> Tensor:
    """Rows whose Euclidean distance to the mean of all is smallest, closest first.

    Parameters
    ----------
    features : Tensor (N, D)
        Raw features of one class.
    count : int

    Examples
    --------
    >>> closest_to_mean(torch.tensor([[0.0], [1.0], [5.0]]), 2)
    tensor([1, 0])
    """
    distance = (features - features.mean(0)).norm(dim=1)
    nearest: Tensor = distance.argsort(stable=True)[:count]
    return nearest


def barycenter(features: Tensor, count: int, *, iterations: int = 1000) -> Tensor:
    """Herding (Welling 2009; iCaRL, Rebuffi et al. 2017, by dot products): rows whose mean stays close to that of all.

    With unit rows u and their mean m, w begins as m; each turn takes ``j = argmax w u_j`` if it is new, and moves w by
    ``m - u_j``.

    Parameters
    ----------
    features : Tensor (N, D)
        Features of one class.
    count : int
    iterations : int
        Turns at most; rows that are missing then are taken in the order of ``w u_j``, so that there are `count` of them.

    Returns
    -------
    Tensor (min(count, N),)
        In the order in which they were chosen: the first k of them are the choice of k.

    Examples
    --------
    >>> barycenter(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]), 2)
    tensor([2, 0])
    """
    unit = F.normalize(features, dim=1)
    mean = unit.mean(0)
    count, w = min(count, len(unit)), mean.clone()
    taken: dict[int, None] = {}
    for _ in range(iterations):
        if len(taken) == count:
            break
        best = int((unit @ w).argmax())
        taken.setdefault(best)
        w = w + mean - unit[best]
    found = torch.tensor(list(taken), dtype=torch.int64, device=unit.device)
    rest = (unit @ w).argsort(descending=True, stable=True)
    return torch.cat([found, rest[~torch.isin(rest, found)]])[:count]


def herd(
    features: Tensor,
    labels: Tensor,
    per_class: int,
    rule: Rule = "barycenter",
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Samples of every class by a rule.

    Parameters
    ----------
    features : Tensor (N, D)
    labels : Tensor (N,)
    per_class : int
        As many of each class, or all that there are.
    rule : {"random", "closest", "barycenter"}
    generator : torch.Generator, optional
        Of "random", which needs one.

    Returns
    -------
    Tensor (M,)
        Rows, classes in ascending order, in a class in the order of selection.

    Examples
    --------
    >>> herd(torch.tensor([[0.0], [1.0], [5.0], [2.0]]), torch.tensor([0, 0, 0, 1]), 1, "closest")
    tensor([1, 3])
    """
    if labels.ndim != 1 or len(features) != len(labels):
        raise UsageError(f"features (N, D) and labels (N,) do not fit: {tuple(features.shape)}, {tuple(labels.shape)}")
    if rule == "random" and generator is None:
        raise UsageError('rule="random" needs a generator')
    rules: dict[str, Callable[[Tensor], Tensor]] = {
        "random": lambda x: torch.randperm(len(x), generator=generator).to(x.device)[:per_class],
        "closest": lambda x: closest_to_mean(x, per_class),
        "barycenter": lambda x: barycenter(x, per_class),
    }
    if rule not in rules:
        raise UsageError(f"rule must be random, closest or barycenter, got {rule!r}")
    if per_class < 1 or not len(labels):
        return torch.zeros(0, dtype=torch.int64, device=labels.device)
    order = labels.argsort(stable=True)
    sizes = labels.unique(return_counts=True)[1].tolist()
    return torch.cat([rows[rules[rule](features[rows])] for rows in order.split(sizes)])


class ReplayMemory(nn.Module):
    """Samples that are kept of the tasks so far, by number. Part of the state dict.

    Parameters
    ----------
    size : int
        Most samples that are kept, M.
    rule : {"random", "closest", "barycenter", "reservoir"}
        The first three choose at the end of a task (`add`) and give every class of every task so far the same quota; older ones
        keep their first samples. "reservoir" takes what comes by (`observe`), so that at any time every sample so far is as
        likely to be kept; it needs no tasks.
    num_classes : int, optional
        Fixes the quota to ``size // num_classes`` from the beginning; default: ``size //`` classes so far. A class that comes in
        several tasks (of several domains, for instance) counts once for each.
    seed : int
        Of "random" and "reservoir".

    Examples
    --------
    >>> memory = ReplayMemory(4, rule="closest")
    >>> memory.add(torch.arange(6), torch.zeros(6, dtype=torch.int64), torch.arange(6.0).unsqueeze(1))
    >>> memory.add(torch.tensor([8, 9]), torch.tensor([1, 1]), torch.tensor([[0.0], [1.0]]))
    >>> memory.index, memory.label
    (tensor([2, 3, 8, 9]), tensor([0, 0, 1, 1]))
    """

    kept: Tensor
    kept_label: Tensor
    kept_task: Tensor
    seen: Tensor
    tasks: Tensor

    def __init__(self, size: int, *, rule: Rule = "barycenter", num_classes: int | None = None, seed: int = 0) -> None:
        super().__init__()
        if size < 1:
            raise UsageError(f"the size of a memory must be at least 1, got {size}")
        if rule not in ("random", "closest", "barycenter", "reservoir"):
            raise UsageError(f"rule must be random, closest, barycenter or reservoir, got {rule!r}")
        self.size, self.rule, self.num_classes, self.seed = size, rule, num_classes, seed
        for name in ("kept", "kept_label", "kept_task"):
            self.register_buffer(name, torch.full((size,), -1, dtype=torch.int64))
        for name in ("seen", "tasks"):
            self.register_buffer(name, torch.zeros((), dtype=torch.int64))

    def __len__(self) -> int:
        return int((self.kept >= 0).sum())

    @property
    def index(self) -> Tensor:
        """Numbers of the samples that are kept (at most M,); of a class in the order in which they were chosen."""
        return self.kept[: len(self)].clone()

    @property
    def label(self) -> Tensor:
        """Their classes."""
        return self.kept_label[: len(self)].clone()

    @torch.no_grad()
    def add(self, index: Tensor, labels: Tensor, features: Tensor | None = None) -> None:
        """At the end of a task: choose some of its samples, and cut older classes down to the new quota.

        Parameters
        ----------
        index : Tensor (N,)
            Numbers of the samples of the task.
        labels : Tensor (N,)
        features : Tensor (N, D), optional
            By the model as it is now; "random" needs none.
        """
        if self.rule == "reservoir":
            raise UsageError("a reservoir takes what comes by in the steps of a stream: call observe, not add")
        if features is None and self.rule != "random":
            raise UsageError(f"rule {self.rule!r} chooses by features: hand them over")
        index, labels = index.to(self.kept), labels.to(self.kept)
        before = self.kept[: len(self)], self.kept_label[: len(self)], self.kept_task[: len(self)]
        _, group = torch.stack([before[2], before[1]]).unique(dim=1, return_inverse=True)  # by task, then by class
        groups = (int(group.max()) + 1 if len(group) else 0) + len(labels.unique())
        quota = self.size // max(groups, self.num_classes or 1)
        if not quota:
            raise UsageError(f"a memory of {self.size} has no place for one sample of each of {groups} classes")
        self.seen += len(index)
        generator = torch.Generator().manual_seed(self._draw_seed())
        space = torch.zeros(len(index), 1) if features is None else features
        chosen = herd(space.to(index.device), labels, quota, self.rule, generator=generator)
        stay = _places(group) < quota
        new = index[chosen], labels[chosen], torch.full_like(chosen, int(self.tasks))
        for buffer, old, more in zip((self.kept, self.kept_label, self.kept_task), before, new, strict=True):
            whole = torch.cat([old[stay], more])
            buffer.fill_(-1)
            buffer[: len(whole)] = whole
        self.tasks += 1

    @torch.no_grad()
    def observe(self, index: Tensor, labels: Tensor) -> None:
        """In a step of a stream: let a batch come by a reservoir (Vitter 1985), every sample once.

        Parameters
        ----------
        index, labels : Tensor (B,)
            Numbers and classes of new samples, in the order of the stream.
        """
        if self.rule != "reservoir":
            raise UsageError(f"a memory by rule {self.rule!r} chooses at the end of a task: call add, not observe")
        index, labels = index.to(self.kept), labels.to(self.kept)
        generator = torch.Generator().manual_seed(self._draw_seed())
        number = int(self.seen) + torch.arange(len(index))
        drawn = (torch.rand(len(index), generator=generator, dtype=torch.float64) * (number + 1)).long()
        place = torch.where(number < self.size, number, drawn).to(index.device)
        into = (place < self.size).nonzero().squeeze(1)
        last = torch.full((self.size,), -1, dtype=torch.int64, device=index.device)
        last.scatter_reduce_(0, place[into], into, "amax")  # of several for one place, the last one stays
        written = (last >= 0).nonzero().squeeze(1)
        self.kept[written], self.kept_label[written] = index[last[written]], labels[last[written]]
        self.seen += len(index)

    def _draw_seed(self) -> int:
        """Another one for every call, which goes on after a checkpoint."""
        return int(np.random.default_rng([self.seed, int(self.seen)]).integers(2**62))


def _places(groups: Tensor) -> Tensor:
    """The how many-th of its group every sample is (N,), from 0.

    Examples
    --------
    >>> _places(torch.tensor([3, 1, 3, 3]))
    tensor([0, 0, 1, 2])
    """
    order = groups.argsort(stable=True)
    sizes = groups.unique(return_counts=True)[1]
    first = (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
    place = torch.empty_like(groups)
    place[order] = torch.arange(len(groups), device=groups.device) - first
    return place
