"""TMV-HLP as an estimator: scikit-learn's own checks, the method written out, zero-shot on a made-up shift, and bad input."""

from itertools import pairwise

import numpy as np
import pytest
from scipy.special import log_softmax
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.utils.estimator_checks import estimator_checks_generator

from contralto.encoders.described import describe
from contralto.errors import UsageError
from contralto.systems.zeroshot.semantics import (
    adapt_prototypes,
    attribute_probabilities,
    direct_attribute_prediction,
    nearest_prototype,
    predicted_words,
)
from contralto.systems.zeroshot.tmv_hlp import TMVHLP

SMALL = {"k": 6, "times": 2, "hyper_k": 6, "hyper_times": 2}
# In the first, -1 is a class; here it marks what has no label, as in scikit-learn's LabelSpreading. The second is for an option.
KNOWN = ("check_classifiers_classes", "check_array_api_input")


@pytest.mark.parametrize(
    ("estimator", "check"),
    [(e, c) for e, c in estimator_checks_generator(TMVHLP()) if c.func.__name__ not in KNOWN],
    ids=lambda x: getattr(getattr(x, "func", None), "__name__", ""),
)
@pytest.mark.filterwarnings("ignore")
def test_it_is_an_estimator_of_scikit_learn(estimator, check):
    check(estimator)


def digits(n=300, seed=0):
    x, y = load_digits(return_X_y=True)
    rows = np.random.default_rng(seed).permutation(len(y))[:n]
    pictures = x[rows].reshape(-1, 8, 8) / 16
    return [describe(pictures, name) for name in ("pixels", "fourier", "gradients")], y[rows]


def few(y, shots):
    return np.where(np.array([(y[:i] == c).sum() < shots for i, c in enumerate(y)]), y, -1)


def shifted(seed=0, n=40, classes=5):
    """Target classes in two semantic spaces, whose predictions are biased, and features that are not."""
    rng = np.random.default_rng(seed)
    y = np.repeat(np.arange(classes), n)
    words, attributes = rng.normal(size=(classes, 12)), (rng.random((classes, 10)) > 0.5).astype(float)
    centres = rng.normal(size=(classes, 8))
    x = 2 * centres[y] + rng.normal(size=(len(y), 8))
    v = words[y] + 1.2 * rng.normal(size=(len(y), 12)) + 2 * rng.normal(size=12)
    a = attributes[y] + 0.7 * rng.normal(size=(len(y), 10)) + rng.normal(size=10)
    return [x, v, a], [None, words, attributes], y


def written_out(views, prototypes, y, k, times, alpha, top, prior):
    """The method by dense algebra, in the order of the paper."""
    X = (views[0] - views[0].mean(0)) / views[0].std(0, ddof=1)
    Z = [X, *views[1:]]
    widths = [z.shape[1] for z in Z]
    C = np.cov(np.hstack(Z).T) + 1e-4 * np.eye(sum(widths))
    B, start = np.zeros_like(C), np.cumsum([0, *widths])
    for low, high in pairwise(start):
        B[low:high, low:high] = C[low:high, low:high]
    values, vectors = np.linalg.eig(np.linalg.solve(B, C))
    values, vectors = values.real, vectors.real
    vectors = vectors / np.sqrt(np.einsum("ij,ik,kj->j", vectors, B, vectors))
    W = [vectors[low:high] * values**4 for low, high in pairwise(start)]
    own = []
    for z, p in zip(Z[1:], prototypes[1:], strict=True):
        cosine = p @ z.T / np.linalg.norm(p, axis=1)[:, None] / np.linalg.norm(z, axis=1)
        own.append(np.stack([z[np.argsort(-c)[:top]].mean(0) for c in cosine]))
    b = [p @ w for p, w in zip(own, W[1:], strict=True)]
    nodes = [np.vstack([z @ w, p]) for z, w, p in zip(Z, W, [(b[0] + b[1]) / 2, *b], strict=True)]
    nodes = [u / np.linalg.norm(u, axis=1, keepdims=True) for u in nodes]
    n, N = len(X), len(nodes[0])
    keep = np.where(np.arange(N) < n, k, times * k)

    def kernel(a, b):
        d = ((a[:, None] - b[None]) ** 2).sum(2)
        return np.exp(-d / np.median(d))

    def kept(M):
        out = np.zeros_like(M)
        for i, row in enumerate(M):
            chosen = np.argsort(-row)[1 : 1 + keep[i]]
            out[i, chosen] = row[chosen]
        return (out + out.T) / 2

    def z(S):
        S = (S - S.mean(1, keepdims=True)) / S.std(1, ddof=1, keepdims=True)
        return (S - S.mean(0)) / S.std(0, ddof=1)

    sim = np.zeros((3, 3))
    for i in range(3):
        for j in range(3):
            if i != j:
                t = 1 / np.linalg.norm(nodes[i] - nodes[j], axis=1)
                sim[i, j] = t[t > 1 / np.sqrt(2)].sum()
    P = sim.sum(1) / sim.sum()
    G = sum(p * o * kept(kernel(u, u)) for p, o, u in zip(P, prior, nodes, strict=True))
    pairs = [(0, 1), (1, 0), (0, 2), (2, 0), (1, 2), (2, 1)]
    H = np.maximum(np.vstack([kept(z(kernel(nodes[i], nodes[j]))) for i, j in pairs]), 0)
    delta = H.sum(1) / (H > 0).sum(1)
    s = np.sqrt((delta[:, None] * H**2).sum(0))
    fused = 0.25 * G + 0.75 * (H / s).T @ np.diag(delta) @ (H / s)
    D = np.diag(1 / np.sqrt(fused.sum(1)))
    Y = np.zeros((N, len(own[0])))
    Y[n:] = 2 * np.eye(len(own[0])) - 1
    for i in np.flatnonzero(y >= 0):
        Y[i] = -1
        Y[i, y[i]] = 1
    return (1 - alpha) * np.linalg.inv(np.eye(N) - alpha * D @ fused @ D) @ Y, P


def test_zero_shot_is_the_method_written_out():
    views, prototypes, _ = shifted()
    model = TMVHLP(**SMALL, prior=(1, 1.5, 1)).fit(views, prototypes=prototypes)
    F, P = written_out(views, prototypes, np.full(200, -1), 6, 2, 0.35, 32, (1, 1.5, 1))
    np.testing.assert_allclose(model.view_weights_, P, atol=1e-7)
    np.testing.assert_array_equal(model.transduction_, F[:200].argmax(1))
    total = F.sum(1, keepdims=True) / (2 - F.shape[1])  # of what a seed of 1 and 0 gives
    np.testing.assert_allclose(model.node_distributions_, (F + total) / 2 / total, atol=1e-6)


def test_prototypes_that_views_have_in_common_do_not_count_as_agreement():
    views, prototypes, _ = shifted()
    samples = TMVHLP(**SMALL).fit(views, np.arange(200) % 5).view_weights_
    for own in ([None, None, prototypes[2]], [None, prototypes[1], None]):
        np.testing.assert_array_equal(TMVHLP(**SMALL).fit(views, prototypes=own).view_weights_, samples)
    assert samples.min() > 0.2


def test_it_repairs_a_shift_that_the_nearest_prototype_does_not():
    gains = []
    for seed in range(5):
        views, prototypes, truth = shifted(seed)
        found = TMVHLP(**SMALL).fit_predict(views, prototypes=prototypes)
        plain = max((nearest_prototype(v, p) == truth).mean() for v, p in zip(views[1:], prototypes[1:], strict=True))
        gains.append((found == truth).mean() - plain)
    assert np.mean(gains) > 0.1


def test_few_labels_beside_prototypes_help_and_names_are_kept():
    views, prototypes, truth = shifted(3)
    names = np.array(["ant", "bee", "cat", "dog", "elk"])
    seen = few(truth, 3)
    labels = np.where(seen >= 0, names[seen], "")
    model = TMVHLP(**SMALL).fit(views, labels, prototypes=prototypes, classes=names)
    without = TMVHLP(**SMALL).fit(views, prototypes=prototypes, classes=names)
    asked = seen < 0
    assert set(model.transduction_) <= set(names)
    assert (model.transduction_ == names[truth])[asked].mean() >= (without.transduction_ == names[truth])[asked].mean()


def test_the_order_of_samples_and_that_of_views_change_nothing():
    views, y = digits()
    seen = few(y, 2)
    model = TMVHLP(**SMALL, standardise="all").fit(views, seen)
    order = np.random.default_rng(1).permutation(len(y))
    again = TMVHLP(**SMALL, standardise="all").fit([v[order] for v in views], seen[order])
    np.testing.assert_allclose(again.label_distributions_, model.label_distributions_[order], atol=1e-6)
    turned = TMVHLP(**SMALL, standardise="all").fit(views[::-1], seen)
    np.testing.assert_allclose(turned.label_distributions_, model.label_distributions_, atol=1e-6)


def test_views_side_by_side_are_views_in_a_list():
    views, y = digits(150)
    seen = few(y, 2)
    one = TMVHLP([64, 40, 128], **SMALL).fit(np.hstack(views), seen)
    np.testing.assert_array_equal(one.label_distributions_, TMVHLP(**SMALL).fit(views, seen).label_distributions_)
    assert clone(one).get_params()["widths"] == [64, 40, 128]
    np.testing.assert_array_equal(one.predict(np.hstack(views)[:7]), one.predict([v[:7] for v in views]))


def test_digits_with_few_labels_and_new_digits():
    views, y = digits(500)
    seen = few(y[:400], 5)
    model = TMVHLP(standardise="all", k=10, hyper_k=10, times=3, hyper_times=3, regulariser=1.0, power=1.0)
    model.fit([v[:400] for v in views], seen)
    assert (model.transduction_ == y[:400])[seen < 0].mean() > 0.85
    new = [v[400:] for v in views]
    assert (model.predict(new) == y[400:]).mean() > 0.8
    shares = model.predict_proba(new)
    np.testing.assert_allclose(shares.sum(1), 1)
    np.testing.assert_allclose(model.predict_proba([v[:1] for v in new]), shares[:1])  # whoever else is asked


def test_alpha_zero_leaves_samples_undecided_and_prototypes_as_they_are():
    views, prototypes, _ = shifted()
    model = TMVHLP(**SMALL, alpha=0.0).fit(views, prototypes=prototypes)
    np.testing.assert_array_equal(model.label_distributions_, 0)
    np.testing.assert_allclose(model.node_distributions_[200:], np.eye(5), atol=1e-12)


def test_attributes_are_found_from_samples_by_their_cosine_in_the_common_space():
    rng = np.random.default_rng(0)
    there = (rng.random((200, 6)) > 0.5).astype(float)
    attributes = there + 0.1 * rng.normal(size=(200, 6)) - 0.5
    features = attributes @ rng.normal(size=(6, 9)) + 0.1 * rng.normal(size=(200, 9))
    model = TMVHLP(**SMALL, standardise="none").fit([features, attributes], np.arange(200) % 2)
    found, cosine = model.rank(features, 0, 1, best=2)
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in model.cca_.transform([features, np.eye(6)]))
    np.testing.assert_array_equal(found, np.argsort(-a @ b.T, axis=1, kind="stable")[:, :2])
    np.testing.assert_allclose(cosine, np.sort(a @ b.T, axis=1)[:, ::-1][:, :2])
    some = there.sum(1) >= 2  # of those who have two attributes, the two that are listed are most often among them
    assert np.take_along_axis(there, found, 1)[some].mean() > 0.95
    back, _ = model.rank(np.eye(6)[:1], 1, 0, candidates=features, best=20)  # and samples by an attribute
    assert there[back[0], 0].mean() > 0.95


def test_adapted_prototypes_are_means_of_the_nearest_and_too_many_mix_classes():
    views, prototypes, _ = shifted()
    v, words = views[1], prototypes[1]
    cosine = (words @ v.T) / np.linalg.norm(words, axis=1)[:, None] / np.linalg.norm(v, axis=1)
    by_hand = np.stack([v[np.argsort(-row, kind="stable")[:7]].mean(0) for row in cosine])
    np.testing.assert_allclose(adapt_prototypes(v, words, 7), by_hand)
    everything = adapt_prototypes(v, words, len(v))
    np.testing.assert_allclose(everything, np.tile(v.mean(0), (5, 1)))
    with pytest.raises(UsageError, match="top"):
        adapt_prototypes(v, words, 201)


def test_direct_attribute_prediction_by_loops():
    rng = np.random.default_rng(0)
    p, a, share = rng.random((6, 4)), (rng.random((3, 4)) > 0.5).astype(int), rng.random(4)
    for prior in (None, share):
        expected = np.zeros((6, 3))
        for i in range(6):
            for c in range(3):
                for k in range(4):
                    expected[i, c] += np.log(p[i, k] if a[c, k] else 1 - p[i, k])
                    if prior is not None:
                        expected[i, c] -= np.log(share[k] if a[c, k] else 1 - share[k])
        found = direct_attribute_prediction(p, a, prior)
        np.testing.assert_allclose(log_softmax(found, 1), log_softmax(expected, 1), atol=1e-9)
    assert np.isfinite(direct_attribute_prediction([[0.0, 1.0]], [[1, 0]])).all()


def test_projections_learnt_on_some_classes_serve_others():
    rng = np.random.default_rng(0)
    meaning, mixing = rng.normal(size=(30, 6)), rng.normal(size=(6, 20))
    y = np.repeat(np.arange(30), 20)
    x = meaning[y] @ mixing + 0.3 * rng.normal(size=(600, 20))
    aux, new = y < 24, y >= 24
    words = predicted_words(x[aux], y[aux], meaning, x[new], penalty=0.01)
    assert (nearest_prototype(words, meaning[24:]) + 24 == y[new]).mean() > 0.9
    signs = (meaning > 0).astype(int)
    p = attribute_probabilities(x[aux], y[aux], signs, x[new])
    assert ((p > 0.5) == signs[y[new]]).mean() > 0.75


def test_more_columns_than_samples_is_told():
    x = np.random.default_rng(0).normal(size=(20, 15))
    with pytest.warns(UserWarning, match="30 columns for 20 samples"):
        TMVHLP(**SMALL).fit([x, x**2], np.arange(20) % 2)


@pytest.mark.parametrize(
    ("options", "call", "told"),
    [
        ({}, lambda m, v, p: m.fit(v), "y is None"),
        ({}, lambda m, v, p: m.fit(v, np.full(200, -1)), "no sample has a label"),
        ({}, lambda m, v, p: m.fit(v, np.zeros(3, int)), "200 samples"),
        ({}, lambda m, v, p: m.fit(v, prototypes=p[:2]), "list of 3"),
        ({}, lambda m, v, p: m.fit(v, prototypes=[None] * 3), "at least one view"),
        ({}, lambda m, v, p: m.fit(v, prototypes=[None, p[1], p[2][:3]]), "view 2"),
        ({}, lambda m, v, p: m.fit(v, prototypes=p, classes=["a", "a", "b", "c", "d"]), "different names"),
        ({}, lambda m, v, p: m.fit(v, np.full(200, 9), prototypes=p), "9 is none"),
        ({}, lambda m, v, p: m.fit([v[0], v[1][:5]], prototypes=p[:2]), "view 1 has 5"),
        ({"embed": False}, lambda m, v, p: m.fit(v, prototypes=p), "without embed"),
        ({"widths": [3, 4]}, lambda m, v, p: m.fit(v[0], np.arange(200) % 2), "add up"),
        ({"standardise": "some"}, lambda m, v, p: m.fit(v, prototypes=p), "standardise"),
        ({"pairwise": 1.5}, lambda m, v, p: m.fit(v, prototypes=p), "pairwise"),
        ({"alpha": 1.0}, lambda m, v, p: m.fit(v, prototypes=p), "alpha"),
        ({"k": 0}, lambda m, v, p: m.fit(v, prototypes=p), "k must be"),
        ({"top": -1.0}, lambda m, v, p: m.fit(v, prototypes=p), "top"),
        ({}, lambda m, v, p: m.fit(v, prototypes=p).predict([v[0][:, :3], v[1], v[2]]), "as in fit"),
        ({"embed": False, "pairwise": 1.0}, lambda m, v, p: m.fit(v, np.arange(200) % 2).rank(v[0], 0, 1), "embed=True"),
    ],
)  # fmt: skip
def test_bad_input_is_named(options, call, told):
    views, prototypes, _ = shifted()
    with pytest.raises(UsageError, match=told):
        call(TMVHLP(**(SMALL | options)), views, prototypes)
