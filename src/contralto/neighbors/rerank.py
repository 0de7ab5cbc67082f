"""k-reciprocal re-ranking (Zhong et al. 2017), batched: distances that look at who shares whose neighbours.

The algorithm is CAPro's (3.2), on the set X = [probes; gallery] of n rows: squared Euclidean distances, every column
divided by its maximum, then transposed (a); reciprocal neighbours (b) and their expansion (c); Gaussian weights (d); mean
over the k2 nearest (e); Jaccard distance (f); mixed with the original distance (g).
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from contralto.errors import UsageError
from contralto.neighbors.knn import knn, unit_rows
from contralto.neighbors.streamed import knn_streamed

__all__ = ["neighbour_graph", "rerank", "rerank_lists"]


def rerank(
    probe: npt.ArrayLike, gallery: npt.ArrayLike, *, k1: int = 20, k2: int = 6, weight: float = 0.3
) -> npt.NDArray[Any]:
    """Re-ranked distance of every probe to every row of a gallery.

    Parameters
    ----------
    probe : array (P, D)
        Unit rows.
    gallery : array (G, D)
        Unit rows.
    k1, k2 : int
        Neighbours that must be mutual, and neighbours averaged over.
    weight : float
        lambda, the share of the original distance in [0, 1].

    Returns
    -------
    array (P, G)
        Small is near.

    Notes
    -----
    Takes about ``5 (P + G)^2`` numbers of memory up to 4,000 rows. Above, each probe is compared only with the 4,000 rows
    of the gallery that are nearest to it; the others follow in the order of their distance, behind those.

    Examples
    --------
    >>> rerank([[1.0, 0.0]], [[0.0, 1.0], [1.0, 0.0]]).argmin()
    np.int64(1)
    """
    probes = torch.as_tensor(np.asarray(probe))
    rows = torch.as_tensor(np.asarray(gallery))
    _check(k1, k2, weight)
    if len(probes) + len(rows) <= _LARGEST:
        distance = _local_distance(torch.cat([probes, rows])[None], len(probes), k1, k2, weight)[0]
        return np.asarray(distance.numpy())
    out = np.empty((len(probes), len(rows)), np.asarray(probe).dtype)
    keep = _LARGEST - 1
    for i, row in enumerate(probes):  # one probe is one class text; all of its gallery is handled at once
        order = torch.argsort(((rows - row) ** 2).sum(1), stable=True).numpy()
        near = rows[torch.from_numpy(order[:keep])]
        head = _local_distance(torch.cat([row[None], near])[None], 1, k1, k2, weight)[0, 0].numpy()
        out[i, order[:keep]] = head
        out[i, order[keep:]] = head.max() + np.arange(1, len(order) - keep + 1) / len(order)
    return out


_LARGEST = 4000


def rerank_lists(
    probe: npt.ArrayLike, lists: npt.ArrayLike, *, k1: int = 20, k2: int = 6, weight: float = 0.3, chunk: int = 512
) -> npt.NDArray[Any]:
    """Re-rank many short neighbour lists, each within itself (CAPro 3.2: one probe, its k0 rows).

    Parameters
    ----------
    probe : array (B, D)
        Unit rows.
    lists : array (B, k, D)
        The rows of each list.
    chunk : int
        Lists handled at once.

    Returns
    -------
    array (B, k)
        Distance of each probe to the rows of its own list.
    """
    _check(k1, k2, weight)
    probes, rows = torch.as_tensor(np.asarray(probe)), torch.as_tensor(np.asarray(lists))
    parts = [
        _local_distance(torch.cat([probes[i : i + chunk, None], rows[i : i + chunk]], 1), 1, k1, k2, weight)[:, 0]
        for i in range(0, len(probes), chunk)
    ]
    return np.asarray(torch.cat(parts).numpy())


def neighbour_graph(
    features: npt.ArrayLike,
    *,
    candidates: int = 20,
    k: int = 5,
    use_rerank: bool = True,
    k1: int = 20,
    k2: int = 6,
    weight: float = 0.3,
    search: str = "exact",
    seed: int = 0,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """The k nearest of each sample after re-ranking (CAPro 3.1 to 3.3; without re-ranking 3.6).

    Parameters
    ----------
    features : array (N, D)
    candidates : int
        Neighbours found by cosine, the sample itself included, that are re-ranked.
    k : int
        Neighbours kept.
    use_rerank : bool
        `False`: the k nearest by cosine, distance 1 - cosine clipped to [0, 1].
    k1, k2, weight
        Of the re-ranking.
    search, seed
        How the candidates are found, as in `contralto.neighbors.knn.knn`; or "streamed": by `knn_streamed`, and never are all
        rows in memory.

    Returns
    -------
    index : array (N, k)
    distance : array (N, k) float32

    Examples
    --------
    >>> index, _ = neighbour_graph(np.eye(6), candidates=4, k=2)
    >>> index.shape
    (6, 2)
    """
    rows: Any = features if search == "streamed" else np.asarray(features)
    n = len(rows)

    def nearest(count: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
        if search == "streamed":
            return knn_streamed(rows, min(count, n), seed=seed)
        return knn(rows, min(count, n), search=search, seed=seed)

    if not use_rerank:
        similarity, index = nearest(k)
        return index, 1 - similarity.clip(0, 1)
    _, index = nearest(candidates)
    unit = None if search == "streamed" else unit_rows(rows)  # only now, when the search has let go of its copies
    distance = np.empty(index.shape, np.float32)
    for start in range(0, n, 2048):  # the gathered rows of a part are the largest array here
        part = slice(start, start + 2048)
        if unit is None:
            needed, place = np.unique(index[part], return_inverse=True)  # sorted: read in the order of the file
            own, lists = unit_rows(rows[part]), unit_rows(rows[needed])[place.reshape(index[part].shape)]
        else:
            own, lists = unit[part], unit[index[part]]
        distance[part] = rerank_lists(own, lists, k1=k1, k2=k2, weight=weight)
    order = np.argsort(distance, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(index, order, 1), np.take_along_axis(distance, order, 1)


def _local_distance(x: Tensor, probes: int, k1: int, k2: int, weight: float) -> Tensor:
    """Distances (B, probes, n - probes) within B sets of n rows (B, n, D)."""
    n = x.shape[1]
    # a. Squared distances; the column's maximum divides it; transposed, so that rows are divided by theirs.
    square = (x * x).sum(2)
    D = (square[:, :, None] + square[:, None, :] - 2 * x @ x.transpose(1, 2)).clamp_min(0)
    D = (D / D.amax(1, keepdim=True).clamp_min(1e-30)).transpose(1, 2)
    R = D.argsort(dim=2, stable=True)
    rank = R.argsort(dim=2)  # rank[i, j]: place of j among the neighbours of i
    # b. k1-reciprocal sets as masks.
    base = _reciprocal(rank, k1)
    # c. Expansion by the half-size sets of the members that mostly lie inside.
    half = _reciprocal(rank, round(k1 / 2)).to(x.dtype)
    overlap = base.to(x.dtype) @ half.transpose(1, 2)  # |R_c and base(i)|, (B, i, c)
    accepted = base & (overlap > 2 / 3 * half.sum(2)[:, None, :])
    expanded = base | ((accepted.to(x.dtype) @ half) > 0)
    # d. Gaussian weights on the expanded set.
    V = torch.where(expanded, torch.exp(-D), torch.zeros((), dtype=x.dtype))
    V = V / V.sum(2, keepdim=True)
    # e. Local query expansion.
    if k2 > 1:
        nearest = (rank < k2).to(x.dtype)
        V = nearest @ V / nearest.sum(2, keepdim=True)
    # f. Jaccard distance of the probes to the rest.
    shared = torch.stack([torch.minimum(V[:, i, None], V[:, probes:]).sum(2) for i in range(probes)], 1)
    jaccard = 1 - shared / (2 - shared)
    # g. The mixture.
    mixed: Tensor = (1 - weight) * jaccard + weight * D[:, :probes, probes:]
    return mixed[:, :, : n - probes]


def _reciprocal(rank: Tensor, k: int) -> Tensor:
    """Mask (B, n, n): j is among the k + 1 first of i and i among those of j."""
    near = rank <= k
    return near & near.transpose(1, 2)


def _check(k1: int, k2: int, weight: float) -> None:
    if k1 < 1 or k2 < 1 or not 0 <= weight <= 1:
        raise UsageError(f"k1 and k2 must be at least 1 and weight in [0, 1], got {k1}, {k2}, {weight}")
