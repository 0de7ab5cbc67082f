"""Neighbours, re-ranking, smoothing and matching against the official values, slow references and invariants."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from contralto.errors import UsageError
from contralto.neighbors import rerank as rerank_module
from contralto.neighbors.graph import adjacency, smooth
from contralto.neighbors.knn import knn
from contralto.neighbors.matching import match_texts, select_anchors
from contralto.neighbors.rerank import neighbour_graph, rerank, rerank_lists

REFERENCE = np.load(Path(__file__).parents[1] / "reference" / "capro_neighbors.npz", allow_pickle=False)


def unit(rng, *shape, dtype=np.float64):
    x = rng.normal(size=shape).astype(dtype)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def slow_rerank(probe, gallery, k1, k2, weight):
    """Steps a to g of CAPro 3.2, one element at a time."""
    X = np.concatenate([probe, gallery])
    n, p = len(X), len(probe)
    D = np.array([[((a - b) ** 2).sum() for b in X] for a in X])
    D = (D / D.max(0)).T
    R = np.argsort(D, axis=1, kind="stable")

    def reciprocal(i, k):
        return {j for j in R[i, : k + 1] if i in R[j, : k + 1]}

    V = np.zeros((n, n))
    for i in range(n):
        base = reciprocal(i, k1)
        full = set(base)
        for c in base:
            Rc = reciprocal(c, round(k1 / 2))
            if len(Rc & base) > 2 / 3 * len(Rc):
                full |= Rc
        for j in full:
            V[i, j] = np.exp(-D[i, j])
        V[i] /= V[i].sum()
    if k2 > 1:
        V = np.array([V[R[i, :k2]].mean(0) for i in range(n)])
    J = np.zeros((p, n))
    for i in range(p):
        for j in range(n):
            m = sum(min(V[i, k], V[j, k]) for k in range(n))
            J[i, j] = 1 - m / (2 - m)
    return ((1 - weight) * J + weight * D[:p])[:, p:]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("k1", "k2"), [(20, 6), (5, 3), (3, 1), (7, 2)])
def test_rerank_equals_the_slow_reference(seed, k1, k2):
    rng = np.random.default_rng(seed)
    probe, gallery = unit(rng, 2, 5), unit(rng, 14, 5)
    np.testing.assert_allclose(
        rerank(probe, gallery, k1=k1, k2=k2), slow_rerank(probe, gallery, k1, k2, 0.3), atol=1e-10
    )


def test_rerank_equals_the_official_code():
    out = rerank(REFERENCE["kr_dist_a__query"], REFERENCE["kr_dist_a__gallery"], k1=5, k2=3, weight=0.3)
    np.testing.assert_allclose(out, REFERENCE["kr_dist_a__out"], atol=1e-5)


def test_lists_are_reranked_each_within_itself():
    rng = np.random.default_rng(1)
    probe, lists = unit(rng, 7, 4), unit(rng, 7, 9, 4)
    expected = np.concatenate([slow_rerank(p[None], g, 20, 6, 0.3) for p, g in zip(probe, lists, strict=True)])
    np.testing.assert_allclose(rerank_lists(probe, lists, chunk=3), expected, atol=1e-10)


def test_a_large_gallery_keeps_the_order_of_its_nearest(monkeypatch):
    rng = np.random.default_rng(2)
    probe, gallery = unit(rng, 2, 6), unit(rng, 60, 6)
    monkeypatch.setattr(rerank_module, "_LARGEST", 30)
    out = rerank(probe, gallery)
    for i in range(2):
        order = np.argsort(((gallery - probe[i]) ** 2).sum(1), kind="stable")
        expected = slow_rerank(probe[i : i + 1], gallery[order[:29]], 20, 6, 0.3)[0]
        np.testing.assert_allclose(out[i, order[:29]], expected, atol=1e-10)
        assert (np.diff(out[i, order[29:]]) > 0).all()
        assert out[i, order[29]] > expected.max()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(3, 25))
def test_rerank_invariants(seed, n):
    rng = np.random.default_rng(seed)
    probe, gallery = unit(rng, 1, 4), unit(rng, n, 4)
    X = np.concatenate([probe, gallery])
    D = ((X[:, None] - X[None]) ** 2).sum(2)
    np.testing.assert_allclose(rerank(probe, gallery, weight=1.0), (D / D.max(0)).T[:1, 1:], atol=1e-9)
    gallery[n // 2] = probe[0]
    assert rerank(probe, gallery)[0].argmin() == n // 2


def test_knn_is_exact_and_has_the_sample_itself_first():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(50, 8))
    x[[3, 9, 20]] = x[30]  # exact duplicates tie with themselves
    similarity, index = knn(x, 6)
    unit_x = x / np.linalg.norm(x, axis=1, keepdims=True)
    expected = np.sort(unit_x @ unit_x.T, axis=1)[:, ::-1][:, :6]
    np.testing.assert_allclose(similarity, expected, atol=1e-5)
    assert (index[:, 0] == np.arange(50)).all()
    assert all(len(set(row)) == 6 for row in index)
    crowded = np.ones((10, 3))
    assert (knn(crowded, 2)[1][:, 0] == np.arange(10)).all()


def clustered(n, dim=32, classes=20, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(classes, dim))[rng.integers(0, classes, n)] + 0.6 * rng.normal(size=(n, dim))


@pytest.mark.parametrize(("search", "least"), [("ivf", 0.95), ("IVF32,SQ8", 0.9), ("HNSW16", 0.8)])
def test_an_index_finds_nearly_all_with_the_sample_itself_first(search, least):
    x = clustered(2000)
    x[100:140] = x[100]  # more duplicates than neighbours
    x[7] = 0.0
    similarity, index = knn(x, 10, search=search, probes=8)
    exact_similarity, exact = knn(x, 10)
    assert (index[:, 0] == np.arange(2000)).all()
    assert all(len(set(row)) == 10 for row in index)
    rows = np.r_[8:100, 140:2000]
    assert np.mean([len(set(a) & set(b)) / 10 for a, b in zip(index[rows], exact[rows], strict=True)]) > least
    assert set(index[120]) <= set(range(100, 140))
    np.testing.assert_allclose(similarity[:, 0], exact_similarity[:, 0], atol=0.02)
    again = knn(x, 10, search=search, probes=8)
    if not search.startswith("HNSW"):  # which is built by several threads at once
        assert np.array_equal(index, again[1])
        assert np.array_equal(similarity, again[0])


def test_an_index_with_all_cells_probed_is_exact_and_short_cells_are_made_up_for():
    x = clustered(500)
    for probes, k in ((10_000, 12), (1, 200)):
        similarity, index = knn(x, k, search="ivf", probes=probes)
        expected = knn(x, k)
        assert (index >= 0).all()
        rows = slice(None) if probes > 1 else (np.diff(similarity, axis=1) <= 1e-6).all(1)
        assert (similarity[rows] <= expected[0][rows] + 1e-5).all()
        if probes > 1:
            assert np.array_equal(index, expected[1])


def test_auto_is_exact_up_to_a_size_and_an_index_above(monkeypatch):
    import importlib

    module = importlib.import_module("contralto.neighbors.knn")
    x = clustered(500, classes=500)  # so loose that one cell does not hold all neighbours
    assert np.array_equal(knn(x, 5, search="auto", probes=1)[1], knn(x, 5)[1])
    monkeypatch.setattr(module, "AUTO_EXACT", 499)
    assert np.array_equal(knn(x, 5, search="auto", probes=1)[1], knn(x, 5, search="ivf", probes=1)[1])
    assert not np.array_equal(knn(x, 5, search="auto", probes=1)[1], knn(x, 5)[1])


def test_queries_of_an_index_and_a_graph_made_with_it():
    x = clustered(1500)
    similarity, index = knn(x, 3, queries=x[:50], search="ivf")
    assert (index[:, 0] == np.arange(50)).all()
    np.testing.assert_allclose(similarity[:, 0], 1, atol=1e-5)
    graph, exact = (neighbour_graph(x, candidates=10, k=4, search=s)[0] for s in ("ivf", "exact"))
    assert np.mean([len(set(a) & set(b)) / 4 for a, b in zip(graph, exact, strict=True)]) > 0.95
    for wrong in ({"search": "nonsense"}, {"search": "ivf", "probes": 0}):
        with pytest.raises(UsageError):
            knn(x, 3, **wrong)


def test_neighbour_graph_without_reranking_is_plain_knn():
    x = unit(np.random.default_rng(3), 30, 5)
    index, distance = neighbour_graph(x, k=4, use_rerank=False)
    similarity, expected = knn(x, 4)
    assert (index == expected).all()
    np.testing.assert_allclose(distance, 1 - similarity.clip(0, 1))


@pytest.mark.parametrize(("case", "self_weight", "degree"), [("sgc_default", 0, 1), ("sgc_self2", 1.0, 2)])
def test_smoothing_equals_the_official_code(case, self_weight, degree):
    graph = adjacency(REFERENCE[f"{case}__neighbours"], REFERENCE[f"{case}__sims"], edge="distance")
    out = smooth(REFERENCE[f"{case}__text"], graph, edge="distance", self_weight=self_weight, degree=degree)
    np.testing.assert_allclose(out, REFERENCE[f"{case}__out"], atol=1e-5)


def test_smoothing_in_the_papers_form():
    rng = np.random.default_rng(0)
    index = np.array([rng.choice(11, 4, replace=False) for _ in range(11)] + [[11, 11, 11, 11]])
    distance = rng.random((12, 4))
    A = np.zeros((12, 12))
    for i in range(12):
        for j, d in zip(index[i], distance[i], strict=True):
            if i != j:
                A[i, j] = np.clip(1 - d, 1e-3, 1 - 1e-3)
    A = np.maximum(A, A.T)
    texts = rng.normal(size=(12, 3))
    loops = A + np.eye(12)
    d = 1 / np.sqrt(loops.sum(1))
    np.testing.assert_allclose(smooth(texts, adjacency(index, distance)), (d[:, None] * loops * d) @ texts)
    row = smooth(texts, adjacency(index, distance), normalisation="row", self_weight=2.0)
    B = A / np.maximum(A.sum(1, keepdims=True), 1e-300)
    B = B + 2 * np.eye(12)
    np.testing.assert_allclose(row, (B / B.sum(1, keepdims=True)) @ texts)
    np.testing.assert_allclose(row[11], texts[11])


@pytest.mark.parametrize("self_weight", [None, 0.0, 1.0, 3.0])
@pytest.mark.parametrize("normalisation", [None, "row", "symmetric"])
def test_an_isolated_image_keeps_its_text_and_degree_0_does_nothing(self_weight, normalisation):
    texts = np.random.default_rng(0).normal(size=(4, 3))
    graph = adjacency(np.arange(4)[:, None], np.zeros((4, 1)))
    np.testing.assert_allclose(smooth(texts, graph, self_weight=self_weight, normalisation=normalisation), texts)
    assert smooth(texts, graph, degree=0) is texts
    assert not smooth(texts, graph, edge="distance").any()  # the released code's form


def test_row_weights_sum_to_one():
    rng = np.random.default_rng(0)
    index, distance = neighbour_graph(unit(rng, 20, 4), candidates=8, k=3)
    ones = np.ones((20, 1))
    np.testing.assert_allclose(smooth(ones, adjacency(index, distance), normalisation="row"), ones)


@pytest.mark.parametrize("method", ["rerank", "cosine", "discriminative"])
def test_matching_finds_the_planted_texts(method):
    rng = np.random.default_rng(0)
    classes = unit(rng, 3, 16)
    labels = np.repeat([0, 1, 2, -1], 20)
    right = np.tile(np.arange(20) < 8, 4) & (labels >= 0)
    texts = unit(rng, 80, 16)
    texts[right] = classes[labels[right]] + 0.3 * unit(rng, right.sum(), 16)
    texts[5] = 0
    m = match_texts(texts, classes, labels, method=method)
    anchors = select_anchors(m, labels, 5)
    assert anchors.sum() == 15
    assert right[anchors].all()
    assert (m.rank[labels < 0] == -1).all()
    np.testing.assert_allclose(m.probability.sum(1), 1, rtol=1e-5)
    np.testing.assert_allclose(m.probability[5], 1 / 3)
    for c in range(3):
        members = labels == c
        assert sorted(m.rank[members]) == list(range(20))
        order = np.argsort(m.rank[members])
        assert (np.diff(m.distance[members][order]) >= 0).all()


def test_random_anchors_come_from_the_generator():
    labels = np.repeat([0, 1], 30)
    m = match_texts(np.eye(60), np.eye(2, 60), labels)
    one, two = (select_anchors(m, labels, -7, generator=np.random.default_rng(s)) for s in (0, 0))
    assert (one == two).all()
    assert one[:30].sum() == one[30:].sum() == 7
    assert (one != select_anchors(m, labels, -7, generator=np.random.default_rng(1))).any()
    with pytest.raises(UsageError, match="generator"):
        select_anchors(m, labels, -7)


def test_wrong_arguments_are_named():
    with pytest.raises(UsageError, match="k must"):
        knn(np.eye(3), 9)
    with pytest.raises(UsageError, match="weight"):
        rerank(np.eye(3), np.eye(3), weight=2)
    with pytest.raises(UsageError, match="match must"):
        match_texts(np.eye(3), np.eye(3), np.zeros(3, int), method="x")
    with pytest.raises(UsageError, match="edge"):
        adjacency(np.zeros((1, 1), int), np.zeros((1, 1)), edge="x")
