"""Gaussian clusters: values of the released code, sums over points by a loop, what splits and merges must keep."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from contralto.errors import UsageError
from contralto.prototypes.gaussian import (
    Moments,
    fitted_psi,
    log_evidence,
    log_split_ratio,
    moments,
    niw_prior,
    pooled,
    posterior,
    split_and_merge,
    two_means,
)

REFERENCE = Path(__file__).parents[1] / "reference" / "gpc.npz"


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def blobs(counts, centres, spread=0.1, seed=0):
    """Points around centres, and which centre is whose."""
    rng = np.random.default_rng(seed)
    owner = np.repeat(np.arange(len(counts)), counts)
    centres = np.asarray(centres, float)
    return torch.from_numpy(centres[owner] + spread * rng.normal(size=(len(owner), centres.shape[1]))), owner


@pytest.mark.parametrize(("case", "kappa", "nu", "psi"), [("niw_0", 1e-4, 7.0, 0.005), ("niw_1", 1.0, 9.0, 0.5)])
def test_values_of_the_released_code(case, kappa, nu, psi):
    with np.load(REFERENCE, allow_pickle=False) as file:
        ref = {k.removeprefix(case + "__"): torch.from_numpy(file[k]) for k in file if k.startswith(case)}
    x, labels = ref["X"], ref["labels"]
    prior = niw_prior(x, kappa=kappa, nu=nu, psi=psi)
    each, whole = moments(x, labels, 2), moments(x, torch.zeros_like(labels), 1)
    wanted = torch.stack([ref["loglik_cluster0"], ref["loglik_cluster1"]])
    torch.testing.assert_close(log_evidence(each, prior), wanted, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(log_evidence(whole, prior)[0], ref["loglik_all"], rtol=1e-6, atol=1e-6)
    mean, covariance = posterior(each, prior)
    torch.testing.assert_close(mean, ref["post_mu"], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(covariance[1], ref["post_cov_cluster1"], rtol=1e-6, atol=1e-6)
    ratio = log_split_ratio(moments(x, labels, 1), moments(x, 1 - labels, 1), prior)
    assert bool(ratio > 0) == bool(ref["split_positive"])
    assert bool(-ratio > 0) == bool(ref["merge_positive"])


def test_evidence_is_that_of_predicting_point_after_point():
    """The chain rule: the product of Student t densities of every point given those before it."""
    from scipy.stats import multivariate_t

    dim, kappa, nu = 3, 0.7, 6.0
    x = torch.randn(9, dim, generator=seeded(), dtype=torch.float64)
    prior = niw_prior(x, kappa=kappa, nu=nu, psi=0.4)
    total, m, psi = 0.0, prior.mean.numpy(), prior.psi.numpy()
    for point in x.numpy():
        free = nu - dim + 1
        total += multivariate_t(m, psi * (kappa + 1) / (kappa * free), df=free).logpdf(point)
        psi = psi + kappa / (kappa + 1) * np.outer(point - m, point - m)
        m, kappa, nu = (kappa * m + point) / (kappa + 1), kappa + 1, nu + 1
    found = log_evidence(moments(x, torch.zeros(9, dtype=torch.long), 1), prior)
    assert found.item() == pytest.approx(total, rel=1e-12)


def test_evidence_knows_no_order_and_no_place():
    x = torch.randn(30, 4, generator=seeded(), dtype=torch.float64)
    labels = torch.arange(30) % 3
    found = log_evidence(moments(x, labels, 3), niw_prior(x))
    order = torch.randperm(30, generator=seeded(1))
    torch.testing.assert_close(log_evidence(moments(x[order], labels[order], 3), niw_prior(x)), found)
    far = x + torch.tensor([3.0, -70.0, 0.5, 9.0], dtype=torch.float64)
    torch.testing.assert_close(log_evidence(moments(far, labels, 3), niw_prior(far)), found, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("dim", [1, 3, 40])
def test_moments_are_sums_over_the_points(dim):
    x = torch.randn(70, dim, generator=seeded()).float()
    labels = torch.randint(-1, 6, (70,), generator=seeded(1))
    labels[labels == 4] = 9  # an empty cluster, and rows of none
    found = moments(x, labels, 6)
    assert found.mean.dtype == found.scatter.dtype == torch.float64
    for k in range(6):
        own = x[labels == k].double()
        assert found.count[k] == len(own)
        mean = own.mean(0) if len(own) else torch.zeros(dim, dtype=torch.float64)
        torch.testing.assert_close(found.mean[k], mean)
        torch.testing.assert_close(found.scatter[k], (own - mean).T @ (own - mean))


def test_pooled_moments_are_those_of_the_union():
    x, labels = torch.randn(40, 5, generator=seeded(), dtype=torch.float64), torch.arange(40) % 4
    labels[labels == 3] = 1  # sets 0 and 2 against 1 and none
    a = moments(x, torch.where(labels == 0, 0, torch.where(labels == 2, 1, -1)), 2)
    b = moments(x, torch.where(labels == 1, 0, -1), 2)
    found = pooled(a, b)
    wanted = moments(x, torch.where(labels <= 1, 0, 1), 2)
    for name in ("count", "mean", "scatter"):
        torch.testing.assert_close(getattr(found, name), getattr(wanted, name))


def test_splitting_is_the_reverse_of_merging_and_by_the_formula():
    x = torch.randn(20, 3, generator=seeded(), dtype=torch.float64)
    prior, labels = niw_prior(x, psi=0.3), torch.arange(20) // 13
    a, b = moments(x, labels, 1), moments(x, 1 - labels, 1)
    whole = moments(x, torch.zeros(20, dtype=torch.long), 1)
    split = log_split_ratio(a, b, prior, alpha=2.0)
    wanted = math.log(2.0) + math.lgamma(13) + math.lgamma(7) - math.lgamma(20)
    wanted += float(log_evidence(a, prior) + log_evidence(b, prior) - log_evidence(whole, prior))
    assert split.item() == pytest.approx(wanted)
    torch.testing.assert_close(log_split_ratio(b, a, prior, alpha=2.0), split)
    empty = moments(x, torch.full((20,), -1), 1)
    assert log_split_ratio(a, empty, prior).item() == -math.inf


def test_far_blobs_are_two_and_one_blob_is_one():
    x, owner = blobs([60, 60], [[0, 0, 0], [5, 5, 5]])
    prior, side = niw_prior(x, psi=0.01), torch.from_numpy(owner)
    assert log_split_ratio(moments(x, side, 1), moments(x, 1 - side, 1), prior) > 0
    one, _ = blobs([120], [[0, 0, 0]])
    half = two_means(one, torch.zeros(120, dtype=torch.long), 1, generator=seeded())
    ratio = log_split_ratio(moments(one, half, 1), moments(one, 1 - half, 1), niw_prior(one, psi=0.01))
    assert ratio < 0


def test_halves_are_those_of_k_means_on_every_cluster():
    from sklearn.cluster import KMeans

    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(5), [40, 1, 2, 30, 50])
    x = rng.normal(size=(len(labels), 3)) + 6 * rng.integers(2, size=(len(labels), 1))
    half = two_means(torch.from_numpy(x), torch.from_numpy(labels), 6, generator=seeded()).numpy()
    for c in (0, 3, 4):
        other = KMeans(2, n_init=10, random_state=0).fit_predict(x[labels == c])
        assert (half[labels == c] == other).mean() in (0.0, 1.0)
    again = two_means(torch.from_numpy(x), torch.from_numpy(labels), 6, generator=seeded())
    assert np.array_equal(half, again.numpy())


def test_a_round_splits_what_is_two_and_merges_what_is_one():
    x, owner = blobs([50, 50, 40, 40, 30], [[0, 0], [9, 0], [0, 9], [9, 9], [20, 20]])
    rng = np.random.default_rng(1)
    labels = np.where(owner >= 2, owner - 1, 0)  # blobs 0 and 1 are one cluster, and 4 is two
    labels[(owner == 4) & (rng.random(len(owner)) < 0.5)] = 4
    found = split_and_merge(x, torch.from_numpy(labels), 5, niw_prior(x, psi=0.01), generator=seeded())
    assert (found.splits, found.merges, len(found.centres)) == (1, 1, 5)
    for c in range(5):
        assert len(set(found.labels[owner == c].tolist())) == 1
    assert len(found.labels.unique()) == 5


def test_every_pair_is_merged_once_and_no_cluster_twice():
    # Three pieces of one blob: each wishes for another one, one pair is taken, its centre is the plain mean of the two.
    x, _ = blobs([90], [[0.0, 0.0]])
    order = x[:, 0].argsort().argsort()
    labels = (order >= 20).long() + (order >= 60).long()
    prior = niw_prior(x, psi=0.01)
    found = split_and_merge(x, labels, 3, prior, generator=seeded())
    assert (found.splits, found.merges, len(found.centres)) == (0, 1, 2)
    centre = posterior(moments(x, labels, 3), prior)[0]
    means = [(centre[a] + centre[b]) / 2 for a, b in ((0, 1), (1, 2), (0, 2))]
    assert sum(bool((found.centres - m).abs().amax(1).lt(1e-12).any()) for m in means) == 1
    two, owner = blobs([40, 40], [[0.0, 0.0], [0.0, 0.0]])  # a mutual pair gives one centre, not two
    found = split_and_merge(two, torch.from_numpy(owner), 2, niw_prior(two, psi=0.01), generator=seeded())
    assert (found.merges, len(found.centres)) == (1, 1)


def test_labelled_points_stay_and_their_clusters_are_neither_split_nor_merged():
    x, owner = blobs([40, 40, 40, 40], [[0, 0], [7, 0], [0.1, 0.1], [0, 7]])
    owner = torch.from_numpy(owner)
    labels = torch.where(owner == 1, 0, torch.where(owner >= 2, owner - 1, 0))  # cluster 0 is two blobs
    fixed = torch.full((160,), -1)
    fixed[:10] = 0
    fixed[40:45] = 0
    fixed[80:90] = 1  # beside cluster 0, which it would be merged with
    for seed in range(3):
        found = split_and_merge(
            x, labels, 3, niw_prior(x, psi=0.01), generator=seeded(seed), fixed=fixed, coin=1.0, smallest=1
        )
        assert torch.equal(found.labels[fixed >= 0], fixed[fixed >= 0])
        assert found.merges == 0  # only one cluster is free
        prior_mean = x.double().mean(0)
        for c in (0, 1):  # the labelled come first, drawn towards the prior by kappa
            own = x[labels == c]
            wanted = (own.sum(0) + 1e-4 * prior_mean) / (len(own) + 1e-4)
            torch.testing.assert_close(found.centres[c], wanted)
    distance = torch.cdist(x, found.centres)
    free = fixed < 0
    assert torch.equal(found.labels[free], distance[free].argmin(1))


def test_small_clusters_are_not_split_and_a_coin_overrules():
    x, owner = blobs([5, 6], [[0, 0], [9, 9]], spread=0.01)
    labels, prior = torch.zeros(11, dtype=torch.long), niw_prior(x, psi=0.001)
    assert split_and_merge(x, labels, 1, prior, generator=seeded()).splits == 0
    assert split_and_merge(x, labels, 1, prior, generator=seeded(), smallest=4).splits == 1
    one, _ = blobs([100], [[0.0, 0.0]])
    zero = torch.zeros(100, dtype=torch.long)
    tossed = [
        split_and_merge(one, zero, 1, niw_prior(one, psi=0.01), generator=seeded(s), coin=0.3).splits for s in range(60)
    ]
    assert 8 <= sum(tossed) <= 28  # 18 on average
    assert tossed[0] == split_and_merge(one, zero, 1, niw_prior(one, psi=0.01), generator=seeded(0), coin=0.3).splits
    assert owner.sum() == 6


def test_empty_clusters_are_dropped():
    x, owner = blobs([30, 30], [[0, 0], [9, 9]])
    found = split_and_merge(x, 2 * torch.from_numpy(owner), 4, niw_prior(x, psi=0.01), generator=seeded())
    assert len(found.centres) == 2


def test_what_cannot_be_is_said():
    x = torch.randn(6, 3)
    with pytest.raises(UsageError, match=r"nu above D - 1 = 2, got 0\.0001 and 1\.5"):
        niw_prior(x, nu=1.5)
    with pytest.raises(UsageError, match="psi must be a positive"):
        niw_prior(x, psi=-torch.eye(3))
    with pytest.raises(UsageError, match="coin"):
        split_and_merge(x, torch.zeros(6, dtype=torch.long), 1, niw_prior(x), generator=seeded(), coin=2.0)
    with pytest.raises(UsageError, match=r"number in \[0, 2\)"):
        split_and_merge(x, torch.arange(6), 2, niw_prior(x), generator=seeded())
    fixed = torch.tensor([1, -1, -1, -1, -1, -1])
    with pytest.raises(UsageError, match="class 0 has no labelled row"):
        split_and_merge(x, torch.tensor([1, 0, 0, 0, 0, 0]), 2, niw_prior(x), generator=seeded(), fixed=fixed)
    with pytest.raises(UsageError, match="differ from fixed"):
        split_and_merge(x, torch.zeros(6, dtype=torch.long), 2, niw_prior(x), generator=seeded(), fixed=fixed)
    one = Moments(torch.ones(1), torch.zeros(1, 3), torch.zeros(1, 3, 3))
    with pytest.raises(UsageError, match="alpha"):
        log_split_ratio(one, one, niw_prior(x), alpha=0.0)


CORNERS = 8 * np.eye(4)


@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])
def test_the_fitted_psi_keeps_labelled_classes_as_they_are_at_any_scale(scale):
    x, owner = blobs([40, 60, 50, 45, 55, 40], scale * np.vstack([CORNERS, -CORNERS[:2]]), spread=scale)
    labels = torch.from_numpy(np.where(owner < 4, owner, -1))
    psi = fitted_psi(x, labels)
    prior, known = niw_prior(x, psi=psi), labels >= 0
    half = two_means(x[known], labels[known], 4, generator=seeded(0))
    split = log_split_ratio(
        *(moments(x[known], torch.where(half == side, labels[known], -1), 4) for side in (0, 1)), prior
    )
    each = moments(x, labels, 4)
    for a in range(4):
        assert split[a] < 0
        for b in range(a):
            pair = (Moments(each.count[[c]], each.mean[[c]], each.scatter[[c]]) for c in (a, b))
            assert log_split_ratio(*pair, prior) > 0
    assert psi == pytest.approx(scale**2 * fitted_psi(x / scale, labels), rel=1e-6)
    found = split_and_merge(x, torch.from_numpy(owner), 6, prior, generator=seeded(), fixed=labels)
    assert (found.splits, found.merges) == (0, 0)


def test_psi_is_fitted_to_two_classes_at_least():
    with pytest.raises(UsageError, match="two labelled classes at least, there are 1"):
        fitted_psi(torch.randn(9, 2), torch.tensor([0] * 4 + [-1] * 5))
    with pytest.raises(UsageError, match="class 1 has no labelled row"):
        fitted_psi(torch.randn(3, 2), torch.tensor([0, 2, -1]))
