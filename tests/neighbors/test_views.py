"""Graphs over several views: against the released code's numbers, against dense algebra, and what must hold of them."""

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from scipy.sparse import csr_array
from sklearn.cross_decomposition import CCA
from sklearn.semi_supervised import LabelSpreading

from contralto.errors import ContraltoError, UsageError
from contralto.neighbors import hypergraph
from contralto.neighbors.cca import MultiViewCCA, check_views
from contralto.neighbors.hypergraph import (
    heterogeneous_hyperedges,
    hypergraph_similarity,
    knn_graph,
    memberships,
    multigraph,
    nearest_others,
    view_agreement,
)
from contralto.neighbors.propagation import propagate, seed_labels

REFERENCE = np.load(Path(__file__).parents[1] / "reference" / "tmv_hlp.npz", allow_pickle=False)
KEEP = np.repeat([4, 8], [24, 3])  # prototypes keep twice as many
CLOSE = {"rtol": 1e-8, "atol": 1e-10}


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def standard(x):
    return (x - x.mean(0)) / x.std(0, ddof=1)


@pytest.fixture
def nodes():
    return [unit(REFERENCE[f"graph__view{i}"]) for i in (1, 2, 3)]


@pytest.fixture
def views():
    return [standard(REFERENCE["in__v1"]), REFERENCE["in__v2"], REFERENCE["in__v3"]]


def test_the_common_space_is_that_of_the_released_code(views):
    cca = MultiViewCCA().fit(views)
    np.testing.assert_allclose(cca.eigenvalues_, REFERENCE["cca__eigenvalues"], **CLOSE)
    embedded = cca.transform(views)
    for i, j in ((0, 0), (0, 1), (1, 2)):
        np.testing.assert_allclose(embedded[i] @ embedded[j].T, REFERENCE[f"cca__gram{i + 1}{j + 1}"], **CLOSE)
    for i, ours in enumerate(embedded, 1):  # up to a sign per direction
        np.testing.assert_allclose(np.abs(ours), np.abs(REFERENCE[f"cca__Pv{i}"]), **CLOSE)


def test_graphs_and_hyperedges_are_those_of_the_released_code(nodes):
    np.testing.assert_allclose(knn_graph(nodes[0], KEEP).toarray(), REFERENCE["graph__knn_view1"], **CLOSE)
    np.testing.assert_allclose(view_agreement(nodes), REFERENCE["graph__view_weights"], **CLOSE)
    edges = heterogeneous_hyperedges(nodes, KEEP)
    np.testing.assert_allclose(edges.toarray(), REFERENCE["graph__hyperedges"], **CLOSE)
    similar = hypergraph_similarity(edges, clip=False) @ np.eye(27)
    np.testing.assert_allclose(similar, REFERENCE["graph__hypergraph_similarity"], **CLOSE)
    fused = 0.25 * multigraph(nodes, KEEP, prior=[1, 1.5, 1]).toarray() + 0.75 * similar
    np.testing.assert_allclose(fused, REFERENCE["graph__fused"], **CLOSE)
    older = multigraph(nodes, KEEP, by_volume=True)
    np.testing.assert_allclose(older.toarray(), REFERENCE["graph__blp_fused"], **CLOSE)


def test_similarities_between_views_are_standardised_as_in_the_released_code(nodes):
    z = REFERENCE["graph__zscored_12"]
    kept = memberships(nodes[0], nodes[1], np.full(27, 26), drop_first=False).toarray()  # all but the smallest of a row
    gone = np.argmin(z, axis=1)
    z = z.copy()
    z[np.arange(27), gone] = 0
    np.testing.assert_allclose(kept, (z + z.T) / 2, **CLOSE)


def test_nothing_depends_on_the_size_of_the_blocks(nodes, monkeypatch):
    whole = heterogeneous_hyperedges(nodes, KEEP).toarray(), multigraph(nodes, KEEP).toarray()
    monkeypatch.setattr(hypergraph, "BLOCK", 100)  # three rows at a time
    parts = heterogeneous_hyperedges(nodes, KEEP).toarray(), multigraph(nodes, KEEP).toarray()
    for a, b in zip(whole, parts, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)


def test_directions_are_of_length_one_and_their_values_add_up(views):
    cca = MultiViewCCA().fit(views)
    W, together = np.vstack(cca.weights_), np.hstack(views)
    C = np.cov(together.T) + 1e-4 * np.eye(15)
    edges = [slice(0, 6), slice(6, 11), slice(11, 15)]
    B = np.zeros_like(C)
    for part in edges:
        B[part, part] = C[part, part]
    np.testing.assert_allclose(W.T @ B @ W, np.eye(15), atol=1e-9)
    assert cca.eigenvalues_.sum() == pytest.approx(15, abs=1e-9)
    assert (np.diff(cca.eigenvalues_) <= 1e-12).all()


def test_the_same_view_three_times_has_the_value_three():
    x = np.random.default_rng(0).normal(size=(200, 4))
    values = MultiViewCCA().fit([x, x, x]).eigenvalues_
    np.testing.assert_allclose(values[:4], 3, atol=1e-2)
    np.testing.assert_allclose(values[4:], 0, atol=1e-2)


def test_two_views_give_the_canonical_correlations_of_scikit_learn():
    rng = np.random.default_rng(0)
    shared = rng.normal(size=(400, 2))
    a = shared @ rng.normal(size=(2, 3)) + rng.normal(size=(400, 3))
    b = shared @ rng.normal(size=(2, 3)) + rng.normal(size=(400, 3))
    ours = MultiViewCCA(1e-9).fit([a, b]).eigenvalues_[:3] - 1
    x, y = CCA(3, max_iter=5000, tol=1e-12).fit_transform(a, b)
    theirs = [np.corrcoef(x[:, i], y[:, i])[0, 1] for i in range(3)]
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_a_column_without_variance_disturbs_nothing(views):
    plain = MultiViewCCA().fit(views)
    constant = [np.hstack([views[0], np.ones((24, 1))]), *views[1:]]
    more = MultiViewCCA().fit(constant)
    np.testing.assert_allclose(np.sort(more.eigenvalues_), np.sort([*plain.eigenvalues_, 1.0]), atol=1e-9)


def test_fewer_directions_are_the_first_of_all(views):
    few, every = (MultiViewCCA(components=c).fit(views) for c in (3, None))
    np.testing.assert_allclose(few.eigenvalues_, every.eigenvalues_[:3], rtol=1e-9)
    np.testing.assert_allclose(
        np.abs(few.transform(views)[1]), np.abs(every.transform(views)[1][:, :3]), rtol=1e-6, atol=1e-9
    )


def test_the_hypergraph_has_ones_on_the_diagonal_and_is_symmetric(nodes):
    for clip in (True, False):
        similar = hypergraph_similarity(heterogeneous_hyperedges(nodes, KEEP), clip=clip) @ np.eye(27)
        np.testing.assert_allclose(similar, similar.T, atol=1e-12)
        np.testing.assert_allclose(np.diag(similar), 1, atol=1e-12)
    graph = multigraph(nodes, KEEP).toarray()
    assert (graph >= 0).all()
    np.testing.assert_array_equal(graph, graph.T)


def test_a_node_that_no_hyperedge_binds_is_like_none_and_nothing_is_divided_by_zero():
    edges = csr_array(np.array([[1.0, 0.5, 0.0, -2.0], [0.0, 0.0, 0.0, -1.0], [0.0, 0.0, 0.0, 0.0]]))
    for clip in (True, False):
        with np.errstate(all="raise"):
            similar = hypergraph_similarity(edges, clip=clip) @ np.eye(4)
        assert np.isfinite(similar).all()
        np.testing.assert_array_equal(similar[2:], 0)


def test_identical_views_agree_without_bound_and_opposite_ones_do_not_at_all():
    x = unit(np.random.default_rng(0).normal(size=(20, 5)))
    y = unit(x + 0.5 * np.random.default_rng(1).normal(size=(20, 5)))
    weights = view_agreement([x, x, y])
    assert np.isfinite(weights).all()
    assert weights.sum() == pytest.approx(1)
    assert weights[0] > 0.499
    np.testing.assert_array_equal(view_agreement([x, -x]), [0.5, 0.5])  # equal where nothing counts
    np.testing.assert_array_equal(view_agreement([x]), [1.0])


def test_the_best_match_is_left_out_only_where_that_is_wanted():
    """Across views the first entry is most often the node itself: the released code drops it."""
    same = unit(np.random.default_rng(0).normal(size=(30, 4)))
    near = unit(same + 0.01)
    dropped, kept = (memberships(same, near, 5, drop_first=d).toarray() for d in (True, False))
    assert (np.diag(dropped) > 0).mean() < 0.1
    assert (np.diag(kept) > 0).mean() > 0.9


def test_one_kernel_width_for_all_pairs_the_zeros_of_nodes_with_themselves_included():
    x = np.array([[0.0], [1.0], [3.0]])
    d = (x - x.T) ** 2
    assert np.median(d) != np.median(d[~np.eye(3, dtype=bool)])
    np.testing.assert_allclose(knn_graph(x, 2).toarray(), np.exp(-d / np.median(d)) * (1 - np.eye(3)), rtol=1e-12)


def test_a_graph_of_one_node_has_no_edge_and_more_neighbours_than_there_are_is_all():
    assert knn_graph(np.ones((1, 2)), 3).nnz == 0
    assert knn_graph(unit(np.random.default_rng(0).normal(size=(4, 2))), 100).nnz == 12


def test_labels_spread_as_by_the_inverse(nodes):
    edges = heterogeneous_hyperedges(nodes, KEEP)
    fused = 0.25 * csr_array(multigraph(nodes, KEEP)).toarray() + 0.75 * (hypergraph_similarity(edges) @ np.eye(27))
    seeds = seed_labels(np.r_[np.full(24, -1), 0, 1, 2], 3)
    scale = np.diag(1 / np.sqrt(fused.sum(1)))
    dense = 0.65 * np.linalg.inv(np.eye(27) - 0.35 * scale @ fused @ scale) @ seeds
    np.testing.assert_allclose(propagate(fused, seeds, alpha=0.35), dense, atol=1e-8)
    known = propagate(fused, np.maximum(seeds, 0), alpha=0.35)
    np.testing.assert_allclose(
        2 * known - known.sum(1, keepdims=True), dense, atol=1e-8
    )  # -1 for others changes no class


def test_labels_spread_as_in_scikit_learn():
    rng = np.random.default_rng(0)
    x, y = np.concatenate([rng.normal(size=(30, 2)), rng.normal(size=(30, 2)) + 3]), np.repeat([0, 1], 30)
    few = np.where(np.arange(60) % 15 == 0, y, -1)
    kernel = np.exp(-((x[:, None] - x[None]) ** 2).sum(2))
    np.fill_diagonal(kernel, 0)  # scikit-learn takes the loops away
    theirs = LabelSpreading(kernel=lambda a, b: kernel, alpha=0.5, tol=1e-12, max_iter=10_000).fit(x, few)
    ours = propagate(kernel, seed_labels(few, 2, others=0.0), alpha=0.5)
    np.testing.assert_allclose(ours / ours.sum(1, keepdims=True), theirs.label_distributions_, atol=1e-6)


def test_without_a_share_of_neighbours_only_seeds_keep_their_label(nodes):
    seeds = seed_labels(np.r_[np.full(24, -1), 0, 1, 2], 3)
    np.testing.assert_array_equal(propagate(multigraph(nodes, KEEP), seeds, alpha=0.0), seeds)


def test_isolated_nodes_get_nothing_and_disturb_nothing():
    graph = np.zeros((5, 5))
    graph[:3, :3] = [[0, 1, 0], [1, 0, 1], [0, 1, 0]]
    with np.errstate(all="raise"):
        found = propagate(csr_array(graph), seed_labels([0, -1, -1, -1, 1], 2), alpha=0.9)
    np.testing.assert_array_equal(found[3], 0)
    assert found[:3, 0].min() > 0
    np.testing.assert_allclose(found[4], 0.1 * np.array([-1, 1]))


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: propagate(np.eye(3), np.ones((2, 2))), "seeds"),
        (lambda: propagate(np.eye(2), np.ones((2, 2)), alpha=1.0), "alpha"),
        (lambda: propagate(np.eye(2), [[np.nan], [0.0]]), "row 0"),
        (lambda: propagate(-np.ones((2, 2)), np.ones((2, 1))), "degree"),
        (lambda: seed_labels([0, 3], 3), "below 3"),
        (lambda: seed_labels([0.5], 3), "whole"),
        (lambda: check_views([[[1.0]], [[1.0], [2.0]]]), "view 1 has 2"),
        (lambda: check_views([[[1.0], [np.inf]]]), "row 1 of view 0"),
        (lambda: check_views([["a"]]), "view 0"),
        (lambda: check_views([]), "at least one"),
        (lambda: MultiViewCCA(0.0).fit([np.eye(3)]), "regulariser"),
        (lambda: MultiViewCCA(components=9).fit([np.eye(3)]), "components"),
        (lambda: MultiViewCCA().fit([np.eye(3)]).project(np.eye(2), 0), "3 columns"),
        (lambda: knn_graph(np.eye(3), 0), "at least 1"),
        (lambda: knn_graph(np.eye(3), 1.5), "whole number"),
        (lambda: memberships(np.eye(3), np.eye(2), 1), "same nodes"),
        (lambda: multigraph([np.eye(3)], 1, prior=[1, 2]), "one per view"),
        (lambda: multigraph([np.eye(3)], 1, prior=[-1]), "not below 0"),
        (lambda: nearest_others(np.eye(2), np.eye(2), 3), "number of nodes"),
    ],
)
def test_what_is_wrong_is_named(call, told):
    with pytest.raises(UsageError, match=told):
        call()


def test_a_graph_on_which_labels_do_not_settle_is_an_error():
    rotating = np.array([[0.0, 9.0, -8.0], [-8.0, 0.0, 9.0], [9.0, -8.0, 0.0]])
    with pytest.raises(ContraltoError, match="symmetric"):
        propagate(rotating, np.eye(3), alpha=0.99, tolerance=1e-300)


def test_memory_grows_with_the_kept_neighbours_not_with_all_pairs(monkeypatch):
    """3,000 nodes: one matrix of all pairs would be 72 MB; the median is told of a part, as it is for large data."""
    monkeypatch.setattr(hypergraph, "BLOCK", 2**16)
    monkeypatch.setattr(hypergraph, "MEDIAN_ROWS", 200)
    rng = np.random.default_rng(0)
    views = [unit(rng.normal(size=(3000, 8))) for _ in range(2)]
    tracemalloc.start()
    try:
        edges = heterogeneous_hyperedges(views, 10)
        graph = 0.25 * multigraph(views, 10) + 0.0 * csr_array((3000, 3000))
        seeds = seed_labels(np.where(np.arange(3000) < 50, np.arange(3000) % 5, -1), 5)
        found = propagate(hypergraph_similarity(edges), seeds)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert np.isfinite(found).all()
    assert edges.nnz < 2 * 2 * 3000 * 10 + 1
    assert graph.nnz < 2 * 2 * 3000 * 10 + 1
    assert peak < 20e6
