"""Witnesses weighed against each other: planted truths are found, worthless and misleading texts do no harm."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from contralto.errors import UsageError
from contralto.systems.webly import reconcile as module
from contralto.systems.webly.reconcile import reconcile, soft_targets

NAMES = ["crane", "drum", "nail", "pitch"]
WORDS = ["bird", "music", "hammer", "field"]


def planted(n=800, wrong=0.35, off=0.15, texts_off=0.0, seed=0):
    """Pictures of four classes; web labels err towards the next class; some pictures show none of them.

    Text features are a noisy pointer to the class; definitions are the axes. `texts_off` of the texts belong to other pictures.
    """
    rng = np.random.default_rng(seed)
    truth = rng.integers(4, size=n)
    outside = rng.random(n) < off
    web = np.where(rng.random(n) < wrong, (truth + 1) % 4, truth)
    looks = np.eye(4)[truth] + rng.normal(0, 0.35, (n, 4))
    looks[outside] = rng.normal(0, 0.35, (outside.sum(), 4))
    text = np.pad(np.eye(4)[truth], ((0, 0), (0, 6))) + rng.normal(0, 0.15, (n, 10))
    text[outside, :4] = rng.normal(0, 0.15, (outside.sum(), 4))
    text[outside, 4:] += rng.normal(0, 0.6, (outside.sum(), 6))
    words = [
        f"{'' if o else WORDS[c]} {rng.choice(['old', 'new', 'red'])} {i % 50}"
        for i, (c, o) in enumerate(zip(truth, outside, strict=True))
    ]
    moved = np.flatnonzero(rng.random(n) < texts_off)
    to = rng.permutation(moved)
    text[moved] = text[to]
    for a, b in zip(moved, [words[j] for j in to], strict=True):
        words[a] = b
    return truth, outside, web, looks, words, text


def run(data, **options):
    _, _, web, looks, words, text = data
    return reconcile(looks, words, text, np.eye(4, 10), NAMES, web, **options)


def test_truth_is_found_and_probabilities_are_probabilities():
    data = planted()
    truth, outside, web = data[:3]
    found = run(data)
    total = found.posterior.sum(1) + found.off_topic
    np.testing.assert_allclose(total, 1, atol=5e-4)  # of four decimals
    assert (found.posterior >= 0).all()
    inside = ~outside
    assert (web == truth)[inside].mean() < 0.7
    assert (found.posterior.argmax(1) == truth)[inside].mean() > 0.95
    assert found.off_topic[outside].mean() > 3 * found.off_topic[inside].mean()
    assert found.trust > 0.85


def test_half_the_texts_belonging_to_other_pictures_still_helps():
    data = planted(texts_off=0.5, off=0.0)
    truth, _, web = data[:3]
    found = run(data)
    assert (found.posterior.argmax(1) == truth).mean() > (web == truth).mean() + 0.1


def test_texts_that_say_nothing_are_no_witness():
    truth, outside, web, looks, words, text = planted()
    rng = np.random.default_rng(1)
    assert run((truth, outside, web, looks, words, rng.normal(size=text.shape))) is None
    assert run((truth, outside, web, looks, [""] * len(web), np.zeros_like(text))) is None


def test_the_same_input_gives_the_same_posterior_and_order_of_classes_does_not_matter():
    data = planted()
    first, second = run(data), run(data)
    assert np.array_equal(first.posterior, second.posterior)
    _, _, web, looks, words, text = data
    order = np.array([2, 0, 3, 1])  # new class k is old class order[k]
    moved = reconcile(looks, words, text, np.eye(4, 10)[order], [NAMES[i] for i in order], np.argsort(order)[web])
    assert np.abs(moved.posterior - first.posterior[:, order]).max() < 0.02


def test_pictures_with_one_text_are_never_judged_by_a_classifier_that_saw_that_text():
    texts = [f"text {i // 3}" for i in range(300)] + [""] * 30
    fold = module._deal(texts, 2, 5, 0)
    for name in set(texts) - {""}:
        assert len({fold[i] for i, t in enumerate(texts) if t == name}) == 1
    assert len({fold[i] for i, t in enumerate(texts) if t == ""}) == 5


def test_a_text_that_came_with_a_whole_class_does_not_hide_the_class():
    truth, _, web, looks, _, text = planted(off=0.0)
    assert len(set(module._deal([f"about {c}" for c in truth], 4, 5, 0)[truth == 2])) == 5
    found = reconcile(looks, [f"about {WORDS[c]}" for c in truth], text, np.eye(4, 10), NAMES, web)
    assert (found.posterior.argmax(1) == truth).mean() > 0.95


def test_judges_are_those_of_a_plain_loop():
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.normal(size=(60, 5)), np.ones((60, 1))], 1)
    target = rng.dirichlet(np.ones(3), 60)
    fold = np.arange(60) % 5
    told = module._judge_unseen(x, target, fold, 1e-2)
    from scipy.optimize import minimize
    from scipy.special import log_softmax, softmax

    mass = target.sum(0)
    weight = [sum(target[i, c] / mass[c] for c in range(3)) for i in range(60)]
    for f in range(5):
        learn = [i for i in range(60) if fold[i] != f]
        total = sum(weight[i] for i in learn)

        def loss(flat, learn=learn, total=total):
            w = flat.reshape(6, 3)
            fit = sum(weight[i] / total * -(target[i] @ log_softmax(x[i].astype(float) @ w)) for i in learn)
            return fit + 1e-2 / 2 * (w[:-1] ** 2).sum()

        w = minimize(loss, np.zeros(18), method="BFGS").x.reshape(6, 3)
        for i in range(60):
            if fold[i] == f:
                np.testing.assert_allclose(told[i], softmax(x[i] @ w), atol=2e-3)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1000), st.booleans())
def test_soft_targets_are_the_two_step_draw(seed, balanced):
    rng = np.random.default_rng(seed)
    posterior = rng.dirichlet(np.ones(5), 12)[:, :4]
    target, share = soft_targets(posterior, balanced=balanced)
    np.testing.assert_allclose(share.sum(), 1)
    np.testing.assert_allclose(target.sum(1), 1, atol=1e-6)
    for i in range(12):
        for c in range(4):
            of_class = posterior[i, c] / posterior[:, c].sum()
            joint = of_class / 4 if balanced else posterior[i, c] / posterior.sum()
            assert share[i] * target[i, c] == pytest.approx(joint, abs=1e-6)


def test_lengths_that_do_not_fit_are_named():
    with pytest.raises(UsageError, match="as many rows"):
        reconcile(np.zeros((3, 2)), ["a"], np.zeros((3, 2)), np.zeros((2, 2)), ["a", "b"], np.zeros(3, int))
