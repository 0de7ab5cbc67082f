"""The prototype bank: how centres come to be, who belongs to them, how they move, split and merge, what they say of a sample.

Prototypes are a plain tensor (K, D), a row for each; those of CAPro, FoPro and SwAV are unit rows. A prototype that has no
sample yet is a zero row, or stays as it was. Systems keep the tensor as a buffer (`nn.Module.register_buffer`) or learn it
(`prototypes.layer.PrototypeLayer`); everything here is a function of it.

=====================================  ===============================================================================
where they come from                   `class_means`, `means`; `neighbors.kmeans` for unlabelled rows
who belongs to them                    `assign`, in blocks: never N x K numbers at once
how they move                          `ema_update` (sample by sample), `means` (from a clustering)
how many                               `split`, `merge`
what they say                          `prototype_logits`, `reduce_scores` (several for one class)
how sharply                            `density_temperature` (FoPro), `densities` (PCL, GPC)
=====================================  ===============================================================================
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from contralto.errors import UsageError

__all__ = [
    "assign",
    "class_means",
    "densities",
    "density_temperature",
    "ema_update",
    "means",
    "merge",
    "prototype_logits",
    "reduce_scores",
    "split",
]

TILE = 1 << 22
"""Similarities that `assign` holds at a time on a GPU or in double precision."""


def _sums(rows: Tensor, labels: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Sum of the rows of every label (count, D), and how many there are (count, 1); labels outside [0, count) are left out."""
    valid = (labels >= 0) & (labels < count)
    if not valid.all():
        rows, labels = rows[valid], labels[valid]
    sums = rows.new_zeros(count, rows.shape[1]).index_add_(0, labels, rows)
    return sums, torch.bincount(labels, minlength=count).to(rows.dtype).unsqueeze(1)


def class_means(embeddings: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Unit mean of every class (CAPro 4.5: sum over count + 1e-6, normalised); a class without samples is zero.

    Parameters
    ----------
    embeddings : Tensor (N, D)
    labels : Tensor (N,)
        Integers in [0, num_classes); others are left out.
    num_classes : int

    Returns
    -------
    Tensor (num_classes, D)

    Examples
    --------
    >>> class_means(torch.eye(2), torch.tensor([0, 0]), 2)
    tensor([[0.7071, 0.7071],
            [0.0000, 0.0000]])
    """
    sums, count = _sums(embeddings, labels, num_classes)
    return F.normalize(sums / (count + 1e-6), dim=1)


def means(rows: Tensor, labels: Tensor, count: int, *, before: Tensor | None = None, normalize: bool = False) -> Tensor:
    """Mean of the rows of every label: the update of k-means.

    Parameters
    ----------
    rows : Tensor (N, D)
    labels : Tensor (N,)
        Integers in [0, count); others are left out.
    count : int
        K.
    before : Tensor (K, D), optional
        What a prototype stays at that has no row; default zero.
    normalize : bool
        Scale the means to length one (spherical k-means).

    Returns
    -------
    Tensor (K, D)

    Examples
    --------
    >>> means(torch.tensor([[2.0, 0.0], [4.0, 0.0]]), torch.tensor([0, 0]), 2, before=torch.ones(2, 2))
    tensor([[3., 0.],
            [1., 1.]])
    """
    sums, number = _sums(rows, labels, count)
    found = sums / number.clamp_min(1)
    if normalize:
        found = F.normalize(found, dim=1)
    return found if before is None else torch.where(number > 0, found, before.to(found.dtype))


@torch.no_grad()
def assign(
    rows: Tensor,
    prototypes: Tensor,
    *,
    metric: Literal["cosine", "euclidean"] = "cosine",
    fixed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The prototype that is nearest to every row, in blocks: memory is linear in N and in K.

    Parameters
    ----------
    rows : Tensor (N, D)
    prototypes : Tensor (K, D)
    metric : {"cosine", "euclidean"}
        The largest cosine, or the smallest distance.
    fixed : Tensor (N,), optional
        Rows whose prototype is known: its number, -1 = find it.

    Returns
    -------
    labels : Tensor (N,) int64
        Of several that are equally near, one of them.
    value : Tensor (N,)
        Its cosine, or its squared distance.

    Notes
    -----
    On a CPU in single precision the search is FAISS's; elsewhere blocks of products.

    Examples
    --------
    >>> labels, value = assign(torch.tensor([[3.0, 0.0], [0.0, 1.0]]), torch.eye(2), fixed=torch.tensor([-1, 0]))
    >>> labels.tolist(), value.tolist()
    ([0, 0], [1.0, 0.0])
    """
    if metric not in ("cosine", "euclidean"):
        raise UsageError(f'metric must be "cosine" or "euclidean", got {metric!r}')
    if rows.ndim != 2 or prototypes.ndim != 2 or rows.shape[1] != prototypes.shape[1] or not len(prototypes):
        raise UsageError(
            f"rows (N, D) and prototypes (K, D) do not fit: {tuple(rows.shape)} and {tuple(prototypes.shape)}"
        )
    prototypes = prototypes.to(rows.dtype)
    cosine = metric == "cosine"
    if cosine:  # the length of a row does not change which prototype is nearest: no copy of all rows
        prototypes = F.normalize(prototypes, dim=1)
    if rows.device.type == "cpu" and rows.dtype == torch.float32:
        labels, value = _assign_faiss(rows, prototypes, cosine)
    else:
        labels, value = _assign_blocks(rows, prototypes, cosine)
    if fixed is not None:
        known = fixed >= 0
        labels = torch.where(known, fixed, labels)
        own, centre = rows[known], prototypes[fixed[known]]
        value[known] = (own * centre).sum(1) if cosine else (own - centre).square().sum(1)
    if cosine:
        value /= torch.linalg.vector_norm(rows, dim=1).clamp_min(1e-12)
    return labels, value


def _assign_faiss(rows: Tensor, prototypes: Tensor, cosine: bool) -> tuple[Tensor, Tensor]:
    import faiss

    index = (faiss.IndexFlatIP if cosine else faiss.IndexFlatL2)(rows.shape[1])
    index.add(prototypes.contiguous().numpy())
    value, labels = index.search(rows.contiguous().numpy(), 1)
    found = torch.from_numpy(value[:, 0].copy())
    return torch.from_numpy(labels[:, 0].copy()), found if cosine else found.clamp_min(0)


def _assign_blocks(rows: Tensor, prototypes: Tensor, cosine: bool) -> tuple[Tensor, Tensor]:
    """The largest ``x . p``, or ``x . p - |p|^2 / 2``; a block is at most `TILE` of them."""
    bias = None if cosine else prototypes.square().sum(1) / -2
    step = max(TILE // len(prototypes), 1)
    parts = []
    for x in rows.split(step):
        scores = x @ prototypes.T if bias is None else torch.addmm(bias, x, prototypes.T)
        parts.append(scores.max(1))
    if not parts:
        return torch.zeros(0, dtype=torch.int64, device=rows.device), rows.new_zeros(0)
    labels = torch.cat([p.indices for p in parts])
    if cosine:
        return labels, torch.cat([p.values for p in parts])
    return labels, (rows - prototypes[labels]).square().sum(1)


def split(prototypes: Tensor, which: Tensor, halves: Tensor) -> tuple[Tensor, Tensor]:
    """Some prototypes become two each: the first takes the place of the old one, the second is added at the end.

    Parameters
    ----------
    prototypes : Tensor (K, D)
    which : Tensor (S,)
        Numbers of those that are split, each once.
    halves : Tensor (S, 2, D)

    Returns
    -------
    prototypes : Tensor (K + S, D)
    parent : Tensor (K + S,)
        The old number of every one.

    Examples
    --------
    >>> split(torch.zeros(2, 1), torch.tensor([0]), torch.tensor([[[1.0], [2.0]]]))
    (tensor([[1.],
            [0.],
            [2.]]), tensor([0, 1, 0]))
    """
    found = prototypes.clone()
    found[which] = halves[:, 0]
    parent = torch.cat([torch.arange(len(prototypes), device=which.device), which])
    return torch.cat([found, halves[:, 1]]), parent


def merge(prototypes: Tensor, pairs: Tensor, count: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Some pairs of prototypes become one each.

    Parameters
    ----------
    prototypes : Tensor (K, D)
    pairs : Tensor (M, 2)
        Numbers; no prototype is in two pairs.
    count : Tensor (K,), optional
        How many samples each has: the new one is their mean. Default: the plain mean of the two.

    Returns
    -------
    prototypes : Tensor (K - M, D)
        In the old order, without the second of every pair.
    place : Tensor (K,)
        The new number of every old one.

    Raises
    ------
    UsageError
        If a prototype is named twice.

    Examples
    --------
    >>> merge(torch.tensor([[0.0], [9.0], [4.0]]), torch.tensor([[0, 2]]))
    (tensor([[2.],
            [9.]]), tensor([0, 1, 0]))
    """
    if len(pairs.flatten().unique()) != pairs.numel():
        raise UsageError("a prototype can be merged with one other only: a number stands in two pairs")
    first, second = pairs.unbind(1)
    share = torch.full((len(pairs), 1), 0.5, dtype=prototypes.dtype, device=prototypes.device)
    if count is not None:
        both = (count[first] + count[second]).clamp_min(1)
        share = (count[first] / both).to(prototypes.dtype).unsqueeze(1)
    found = prototypes.clone()
    found[first] = share * prototypes[first] + (1 - share) * prototypes[second]
    stays = torch.ones(len(prototypes), dtype=torch.bool, device=prototypes.device)
    stays[second] = False
    place = stays.cumsum(0) - 1
    place[second] = place[first]
    return found[stays], place


@torch.no_grad()
def ema_update(prototypes: Tensor, embeddings: Tensor, labels: Tensor, momentum: float) -> Tensor:
    """Move prototypes towards the samples, one after the other, then normalise once (CAPro 5.7, closed form).

    After the samples z_1 .. z_n of class c in batch order::

        z^c <- m^n z^c + (1 - m) sum_k m^(n-k) z_k,   then every row is scaled to length one

    Parameters
    ----------
    prototypes : Tensor (C, D)
    embeddings : Tensor (N, D)
        In the order in which they count; the last weighs most.
    labels : Tensor (N,)
        Integers in [0, C).
    momentum : float
        m in [0, 1]. 1 changes nothing, 0 leaves the last sample of each class.

    Returns
    -------
    Tensor (C, D)
        New prototypes; the input is left as it was.

    Examples
    --------
    >>> ema_update(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]), torch.tensor([0]), 0.5)
    tensor([[0.7071, 0.7071]])
    """
    if not 0 <= momentum <= 1:
        raise UsageError(f"momentum must be in [0, 1], got {momentum}")
    embeddings = embeddings.to(prototypes.dtype)
    one_hot = F.one_hot(labels, prototypes.shape[0])
    count = one_hot.sum(0)
    later = (count - one_hot.cumsum(0)).gather(1, labels.unsqueeze(1)).squeeze(1)  # samples of the class still to come
    m = torch.tensor(momentum, dtype=prototypes.dtype, device=prototypes.device)
    moved = prototypes * (m**count).unsqueeze(1)
    moved.index_add_(0, labels, embeddings * ((1 - m) * m**later).unsqueeze(1))
    return F.normalize(moved, dim=1)


def density_temperature(
    distance: Tensor, count: Tensor, before: Tensor, *, low: float = 0.02, high: float = 1.0
) -> Tensor:
    """A temperature for every prototype from how densely its samples lie (FoPro 13): small where they are many and close.

    ``T_c = distance_c / (count_c ln(count_c + 10) + 1e-7)``

    Parameters
    ----------
    distance : Tensor (C,)
        Sum of the distances of the samples of each class to its prototype.
    count : Tensor (C,)
        Number of them.
    before : Tensor (C,)
        Kept for classes without a sample, where the formula would give 0 and infinite logits.
    low, high : float
        Bounds that the paper's code does not have; they keep logits finite.

    Returns
    -------
    Tensor (C,)

    Examples
    --------
    >>> density_temperature(torch.tensor([50.0, 0.0]), torch.tensor([100.0, 0.0]), torch.tensor([0.1, 0.1]))
    tensor([0.1064, 0.1000])
    """
    fresh = (distance / (count * (count + 10).log() + 1e-7)).clamp(low, high)
    return torch.where(count > 0, fresh, before)


def prototype_logits(embeddings: Tensor, prototypes: Tensor, temperature: float | Tensor) -> Tensor:
    """Similarity to every prototype over the temperature (one, or one per prototype), (N, C).

    Examples
    --------
    >>> prototype_logits(torch.tensor([[1.0, 0.0]]), torch.eye(2), 0.5)
    tensor([[2., 0.]])
    """
    return embeddings @ prototypes.T / temperature


def reduce_scores(
    scores: Tensor, class_of: Tensor, num_classes: int, *, how: Literal["max", "mean", "logmeanexp"] = "max"
) -> Tensor:
    """One score per class from those of its several prototypes.

    Parameters
    ----------
    scores : Tensor (N, K)
        As from `prototype_logits`.
    class_of : Tensor (K,)
        The class of every prototype, in [0, num_classes).
    num_classes : int
        C.
    how : {"max", "mean", "logmeanexp"}
        "logmeanexp" is a soft maximum: ``log mean exp``, in the scale of the scores.

    Returns
    -------
    Tensor (N, C)
        Minus infinity for a class without a prototype. Carries gradient.

    Examples
    --------
    >>> reduce_scores(torch.tensor([[1.0, 3.0, 2.0]]), torch.tensor([0, 0, 1]), 3, how="mean")
    tensor([[2., 2., -inf]])
    """
    if how not in ("max", "mean", "logmeanexp"):
        raise UsageError(f'how must be "max", "mean" or "logmeanexp", got {how!r}')
    count = torch.bincount(class_of, minlength=num_classes)
    place = class_of.expand(len(scores), -1)
    lowest = scores.new_full((len(scores), num_classes), -torch.inf)
    if how == "mean":
        total = scores.new_zeros(lowest.shape).index_add(1, class_of, scores)
        return torch.where(count > 0, total / count.clamp_min(1), lowest)
    largest = lowest.scatter_reduce(1, place, scores, "amax")
    if how == "max":
        return largest
    pivot = largest.detach()
    total = scores.new_zeros(lowest.shape).index_add(1, class_of, (scores - pivot.gather(1, place)).exp())
    there = count > 0
    found = (total / count.clamp_min(1)).masked_fill(~there, 1.0).log() + pivot.masked_fill(~there, 0.0)
    return torch.where(there, found, lowest)


def densities(
    distance: Tensor, count: Tensor, *, target: float, alpha: float = 10.0, clip: tuple[float, float] = (0.1, 0.9)
) -> Tensor:
    """A temperature for every prototype, relative to the others (PCL, arXiv 2005.04966, eq. 12; GPC 4i).

    ``phi_k = mean distance / ln(count + alpha)``, the largest for prototypes with at most one sample; clipped to quantiles,
    then scaled so that their mean is `target`.

    Parameters
    ----------
    distance : Tensor (K,)
        Sum of the Euclidean distances of its samples to each prototype.
    count : Tensor (K,)
        Number of them.
    target : float
        The temperature on average.
    alpha : float
        Keeps small clusters from becoming very sharp.
    clip : (float, float)
        Quantiles in [0, 1].

    Returns
    -------
    Tensor (K,)

    See Also
    --------
    density_temperature : FoPro's, whose scale is absolute.

    Examples
    --------
    >>> densities(torch.tensor([4.0, 8.0]), torch.tensor([10, 10]), target=0.2, clip=(0, 1))
    tensor([0.1333, 0.2667])
    """
    number = count.to(distance.dtype)
    phi = distance / (number.clamp_min(1) * (number + alpha).log())
    several = count > 1
    if not several.any():
        return torch.full_like(phi, target)
    phi = torch.where(several, phi, phi[several].max())
    low, high = torch.quantile(phi, torch.tensor(clip, dtype=phi.dtype, device=phi.device))
    phi = phi.clamp(low, high)
    mean = phi.mean()
    return target * phi / mean if mean > 0 else torch.full_like(phi, target)
