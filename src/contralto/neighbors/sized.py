"""k-means with bounds on the size of every cluster: no cluster runs empty, none takes all."""

from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize
from scipy.special import logsumexp

from contralto.errors import UsageError
from contralto.neighbors.kmeans import KMeans, cluster_sums, kmeans, rows_of

__all__ = ["sized_assignment", "sized_kmeans"]

Array = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]
Prices = npt.NDArray[np.float64]
BLOCK = 1 << 22
"""Distances that are held at a time."""


def sized_kmeans(
    features: npt.ArrayLike,
    k: int,
    *,
    smallest: int = 1,
    largest: int | None = None,
    seed: int = 0,
    iterations: int = 30,
    restarts: int = 4,
    normalize: bool = True,
) -> KMeans:
    """Cluster rows into clusters of at least and at most so many rows.

    From the centres of k-means without bounds, rows are assigned under the bounds and centres moved to their means in turn.

    Parameters
    ----------
    features : array (N, D)
    k : int
    smallest, largest : int
        Rows of a cluster; by default no upper bound. Both ``N / k``, rounded down and up, make clusters of one size.
    seed, restarts, normalize
        As in `kmeans`.
    iterations : int
        At most.

    Returns
    -------
    KMeans
        Its `labels` keep the bounds; `assign` knows none.

    Examples
    --------
    >>> found = sized_kmeans([[0.0], [0.1], [0.2], [0.3], [9.0]], 2, smallest=2, normalize=False)
    >>> sorted(np.bincount(found.labels).tolist())
    [2, 3]
    """
    data = rows_of(features, normalize)
    bounds = _bounds(len(data), k, smallest, largest)
    centroids = kmeans(data, k, seed=seed, restarts=restarts, normalize=False).centroids
    labels, prices = np.full(len(data), -1, np.int64), None
    for _ in range(max(iterations, 1)):
        found, prices = _assigned(data, centroids, *bounds, prices)
        if np.array_equal(found, labels):
            break
        labels = found
        count = np.bincount(labels, minlength=k)[:, None]
        means = (cluster_sums(data, labels, k) / np.maximum(count, 1)).astype(np.float32)
        centroids = np.where(count > 0, means, centroids)
    inertia = ((data - centroids[labels]) ** 2).sum(1).mean(dtype=np.float64)
    return KMeans(centroids, labels, float(inertia), normalize)


def sized_assignment(
    features: npt.ArrayLike, centroids: npt.ArrayLike, *, smallest: int = 1, largest: int | None = None
) -> Labels:
    """Assign rows to centres so that the sum of squared distances is as small as the bounds on the sizes allow, or nearly.

    Every centre has a price that is added to the squared distances; the prices that keep the bounds are the dual variables of
    a transport problem, whose smoothed dual is concave and of K variables alone. The few rows that it leaves over are moved
    where that costs least. Distances are computed a block at a time, so memory is linear in the rows.

    Parameters
    ----------
    features : array (N, D)
    centroids : array (K, D)
    smallest, largest : int

    Returns
    -------
    array (N,) int64

    Examples
    --------
    >>> sized_assignment([[0.0], [0.1], [0.2], [0.3]], [[0.0], [9.0]], smallest=2).tolist()
    [0, 0, 1, 1]
    """
    data, centres = rows_of(features, False), rows_of(centroids, False)
    return _assigned(data, centres, *_bounds(len(data), len(centres), smallest, largest), None)[0]


def _bounds(n: int, k: int, smallest: int, largest: int | None) -> tuple[int, int]:
    largest = n if largest is None else largest
    if k < 1 or smallest < 0 or not k * smallest <= n <= k * largest:
        raise UsageError(
            f"{n} rows cannot be in {k} clusters of {smallest} to {largest} rows: smallest is at most {n // max(k, 1)} and "
            f"largest at least {-(-n // max(k, 1))}"
        )
    return smallest, largest


def _assigned(
    data: Array, centroids: Array, smallest: int, largest: int, prices: Prices | None
) -> tuple[Labels, Prices]:
    """Labels within the bounds, and the prices that led to them; those of a similar assignment are a good start."""
    k = len(centroids)
    label, cost, _ = _cheapest(data, centroids, np.zeros(k))
    count = np.bincount(label, minlength=k)
    if smallest <= count.min() and count.max() <= largest:
        return label, np.zeros(k)
    if prices is None:
        prices = np.zeros(k)
    prices = _dual_prices(data, centroids, smallest, largest, prices, 0.03 * float(cost.mean()) + 1e-12)
    label, cost, second = _cheapest(data, centroids, prices)
    label = _shrink(data, centroids, prices, label, second - cost, largest)
    return _grow(data, centroids, label, smallest), prices


def _dual_prices(data: Array, centroids: Array, smallest: int, largest: int, start: Prices, smooth: float) -> Prices:
    """Prices at which the soft sizes of all clusters are within the bounds."""
    n, k = len(data), len(centroids)

    def negative_dual(both: Prices) -> tuple[float, Prices]:
        dear, cheap = both[:k], both[k:]
        value, size = 0.0, np.zeros(k)
        for _, cost in _costs(data, centroids, dear - cheap):
            part = logsumexp(-cost / smooth, axis=1, keepdims=True)
            value -= smooth * float(part.sum())
            size += np.exp(-cost / smooth - part).sum(0)
        value += smallest * cheap.sum() - largest * dear.sum()
        return -value / n, np.concatenate([largest - size, size - smallest]) / n

    first = np.concatenate([np.maximum(start, 0), np.maximum(-start, 0)])
    found: Any = minimize(
        negative_dual, first, jac=True, method="L-BFGS-B", bounds=[(0, None)] * (2 * k), options={"maxiter": 100}
    )
    prices: Prices = found.x[:k] - found.x[k:]
    return prices


def _shrink(data: Array, centroids: Array, prices: Prices, label: Labels, regret: Prices, largest: int) -> Labels:
    """Move rows out of clusters that are too large, those for which another is nearly as good, into clusters with room."""
    label, k = label.copy(), len(centroids)
    order = np.lexsort((-regret, label))
    place = np.empty_like(label)
    place[order] = _places(label[order])
    moving = np.flatnonzero(place >= largest)
    room = largest - np.bincount(np.delete(label, moving), minlength=k)
    while len(moving):  # every pass fills a cluster, or is the last one
        wish, cost, _ = _cheapest(data[moving], centroids, np.where(room > 0, prices, np.inf))
        order = np.lexsort((cost, wish))
        fits = _places(wish[order]) < room[wish[order]]
        label[moving[order[fits]]] = wish[order[fits]]
        room -= np.bincount(wish[order[fits]], minlength=k)
        moving = np.sort(moving[order[~fits]])
    return label


def _grow(data: Array, centroids: Array, label: Labels, smallest: int) -> Labels:
    """Move rows into clusters that are too small, those that lose least, out of clusters that can spare them."""
    label, k = label.copy(), len(centroids)
    for small in np.flatnonzero(np.bincount(label, minlength=k) < smallest):
        spare = np.maximum(np.bincount(label, minlength=k) - smallest, 0)
        others = np.flatnonzero(spare[label] > 0)
        own = ((data[others] - centroids[label[others]]) ** 2).sum(1)
        loss = ((data[others] - centroids[small]) ** 2).sum(1) - own
        order = np.lexsort((loss, label[others]))
        may = order[_places(label[others][order]) < spare[label[others][order]]]
        chosen = may[np.argsort(loss[may], kind="stable")[: smallest - int((label == small).sum())]]
        label[others[chosen]] = small
    return label


def _places(labels: Labels) -> Labels:
    """Place of every row within the run of its label; equal labels stand together."""
    start = np.flatnonzero(np.r_[True, labels[1:] != labels[:-1]])
    return np.arange(len(labels)) - np.repeat(start, np.diff(np.r_[start, len(labels)]))


def _cheapest(data: Array, centroids: Array, prices: Prices) -> tuple[Labels, Prices, Prices]:
    """The cheapest cluster of every row, what it costs, and what the next one would."""
    label, cost, second = np.empty(len(data), np.int64), np.empty(len(data)), np.full(len(data), np.inf)
    for rows, costs in _costs(data, centroids, prices):
        label[rows] = costs.argmin(1)
        if costs.shape[1] > 1:
            cost[rows], second[rows] = np.partition(costs, 1, axis=1)[:, :2].T
        else:
            cost[rows] = costs[:, 0]
    return label, cost, second


def _costs(data: Array, centroids: Array, prices: Prices) -> Any:
    """Blocks of rows with their squared distances to all centres, plus prices."""
    length = (centroids.astype(np.float64) ** 2).sum(1)
    size = max(BLOCK // len(centroids), 1)
    for start in range(0, len(data), size):
        rows = slice(start, start + size)
        part = data[rows].astype(np.float64)
        yield rows, np.maximum((part**2).sum(1)[:, None] - 2 * (part @ centroids.T) + length, 0) + prices
