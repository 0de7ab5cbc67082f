"""What a picture shows, by three witnesses none of whom is trusted: the web label, the text, and the looks.

Each errs in a way of its own. The web label comes from a search, so its errors are structured: the wrong sense of a word can
be the majority. The text may be about something else, or only share a word with the definition. A classifier of the looks has
learnt from the other two. `reconcile` weighs them by how far they agree, without one clean label, in the manner of Dawid
and Skene (1979): the true class is hidden, what the witnesses say of each class is estimated by expectation and
maximisation, and one more hidden class, *off-topic*, holds what fits no class.

- *text* says: definition x words x P(class names in the text | class) x P(fit of the text to its class). Definition is the
  softmax of similarities to all definitions (`neighbors.matching`). A share `trust` of the texts is on the subject; the
  others say nothing. It is estimated from how often the texts agree with web label and looks.
- *web label* says: P(web label | class), its confusion matrix, under a prior that believes the diagonal.
- *looks* says: a multinomial logistic regression on visual features that learnt from text and web label, asked about pictures
  that it did not see (five folds; pictures with one text lie in one fold).
- *words* is the same on text features, but learns from the looks alone, so that "shirts" comes to mean what shirts look like.

Three rounds of looks, words, and expectation and maximisation of the rest; then posterior = sqrt(text x web label) x looks.
The root, because definition, words, names and (through the search) the web label are read off one text: one witness who
speaks several times. Texts that say nothing about the labels at all cannot be a witness: see `MIN_WORTH`.

This is no part of the CAPro paper.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.special import softmax
from torch.nn import functional as F

from contralto.data.text import names_in_texts
from contralto.errors import UsageError
from contralto.neighbors.knn import unit_rows
from contralto.neighbors.matching import match_texts, within_class_rank

__all__ = ["MIN_WORTH", "Reconciled", "reconcile", "soft_targets", "sure_anchors", "unseen_probabilities"]

Array = npt.NDArray[Any]

MIN_WORTH = 0.05
"""Share of the information of the web labels that texts must tell to be heard."""

_DIAGONAL = 0.5  # prior belief that a witness names the right class
_STRAY = 0.03  # prior belief that a text names a class that it is not about
_STRENGTH = 20.0  # the priors weigh as much as so many pictures per class
_OFF_TOPIC = 0.1  # prior share of off-topic pictures; weighs as much as all the data
_DIMS, _TEXT_DIMS = 256, 128
_L2, _TEXT_L2 = 3e-2, 1e-4


@dataclass(frozen=True)
class Reconciled:
    """What `reconcile` found.

    Attributes
    ----------
    posterior : array (N, C) float32
        P(class); rows sum to one minus `off_topic`.
    off_topic : array (N,) float32
        P(the picture shows none of the classes).
    looks : array (N, C) float32
        What the visual classifier alone says of pictures that it did not see; rows sum to at most 1.
    worth : float
        Share of the information of the web labels that the definitions find in the texts, at most 1.
    trust : float
        Estimated share of the texts that are about their picture, 0 to 1.
    """

    posterior: npt.NDArray[np.float32]
    off_topic: npt.NDArray[np.float32]
    looks: npt.NDArray[np.float32]
    worth: float
    trust: float


def reconcile(
    features: Array,
    texts: Sequence[str],
    text_features: Array,
    class_features: Array,
    class_names: Sequence[str],
    labels: npt.NDArray[np.int64],
    *,
    rounds: int = 3,
    folds: int = 5,
    seed: int = 0,
) -> Reconciled | None:
    """Weigh web label, names, text and looks of every picture against each other.

    Parameters
    ----------
    features : array (N, D)
        Visual features.
    texts : sequence of str (N,)
        What came along, as found; "" = nothing.
    text_features : array (N, E)
        Embeddings of the texts; zero rows for empty ones.
    class_features : array (C, E)
        Embeddings of the class texts (name and definition).
    class_names : sequence of str (C,)
    labels : array (N,)
        Given labels in [0, C).
    rounds, folds, seed : int
        Rounds, folds of the looks and words, and the seed that deals pictures to folds.

    Returns
    -------
    Reconciled or None
        None if the texts tell less than `MIN_WORTH` of the labels: there is nothing to reconcile them with.

    Raises
    ------
    UsageError
        If the lengths do not fit.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> right = rng.integers(3, size=300)
    >>> given = np.where(rng.random(300) < 0.3, (right + 1) % 3, right)
    >>> looks = np.eye(3)[right] + rng.normal(0, 0.3, (300, 3))
    >>> names = ["ox", "fox", "box"]
    >>> found = reconcile(looks, [f"a {names[c]}" for c in right], np.eye(3)[right], np.eye(3), names, given)
    >>> bool((found.posterior.argmax(1) == right).mean() > 0.98), bool((given == right).mean() < 0.8)
    (True, True)
    """
    n, classes = len(labels), len(class_names)
    if not len(features) == len(texts) == len(text_features) == n or len(class_features) != classes:
        raise UsageError(
            f"features, texts and labels must have as many rows, class features and names too: got {len(features)}, "
            f"{len(texts)}, {len(text_features)}, {n}; {len(class_features)}, {classes}"
        )
    matching = match_texts(text_features, class_features, labels, method="discriminative")
    worth = _worth(matching.probability, labels)
    if worth < MIN_WORTH:
        return None
    fold = _deal(texts, classes, folds, seed)
    names = names_in_texts(texts, class_names)
    unit_texts = unit_rows(text_features)
    fit = unit_texts @ unit_rows(class_features).T
    has_text = np.abs(fit).max(1) > 1e-6
    definition = np.log(np.concatenate([matching.probability, np.full((n, 1), 1 / classes)], 1))  # (N, C + 1)
    given = np.eye(classes)[labels]
    p = softmax(definition + _log_web(None, labels, given), axis=1)
    p, trust = _settle(p, definition, labels, given, names, fit, has_text, np.ones_like(p))
    visual, words = _components(features, _DIMS), _components(unit_texts, _TEXT_DIMS)
    looks = np.ones_like(p)
    for _ in range(rounds):
        looks = _judge_unseen(visual, p, fold, _L2)
        said = definition + np.log(_judge_unseen(words, looks, fold, _TEXT_L2) + 1e-6)
        p, trust = _settle(p, said, labels, given, names, fit, has_text, looks)
    # Four decimals: what lies below differs between machines.
    posterior = softmax(0.5 * np.log(p + 1e-12) + np.log(looks + 1e-6), axis=1).round(4)
    return Reconciled(
        posterior[:, :classes].astype(np.float32),
        posterior[:, classes].astype(np.float32),
        looks[:, :classes].round(4).astype(np.float32),
        worth,
        trust,
    )


def unseen_probabilities(
    features: Array, labels: npt.NDArray[np.int64], texts: Sequence[str], classes: int, *, folds: int = 5, seed: int = 0
) -> npt.NDArray[np.float64]:
    """Class probabilities (N, C) of pictures by a logistic regression that learnt the given labels of the other folds.

    Parameters
    ----------
    features : array (N, D)
    labels : array (N,)
        Given labels in [0, C); classes weigh alike.
    texts : sequence of str (N,)
        Pictures with one text, such as those of one product, lie in one fold.
    classes : int
        C.
    folds, seed : int

    Examples
    --------
    >>> features = np.eye(2)[np.arange(20) % 2]
    >>> unseen_probabilities(features, np.arange(20) % 2, [""] * 20, 2).argmax(1).tolist() == (np.arange(20) % 2).tolist()
    True
    """
    visual = _components(features, _DIMS)
    return _judge_unseen(visual, np.eye(classes)[labels], _deal(texts, classes, folds, seed), _L2)


def sure_anchors(
    own: Array, labels: npt.NDArray[np.int64], k: int, *, score: Array | None = None
) -> npt.NDArray[np.bool_]:
    """The surest pictures of every class, as anchors.

    Parameters
    ----------
    own : array (N,)
        Posterior of the given label.
    labels : array (N,)
    k : int
        At most so many per class, and none below one half; but always the first.
    score : array (N,), optional
        What they are ranked by, in [0, 1]; default: `own`.

    Returns
    -------
    array (N,) bool

    Examples
    --------
    >>> sure_anchors(np.array([0.9, 0.8, 0.2, 0.3]), np.array([0, 0, 0, 1]), 3).tolist()
    [True, True, False, True]
    """
    rank = within_class_rank(1 - (own if score is None else score), labels)
    return np.asarray((rank == 0) | ((rank < k) & (own >= 0.5)))


def soft_targets(posterior: Array, *, balanced: bool) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float64]]:
    """What a classifier learns from a posterior: a soft label for every picture, and how often it is drawn.

    Parameters
    ----------
    posterior : array (N, C)
        Rows sum to at most 1; what is missing is off-topic.
    balanced : bool
        Every class is drawn equally often: first a class, then one of its pictures in proportion to the posterior.

    Returns
    -------
    target : array (N, C) float32
        Rows sum to 1: P(class drawn | picture drawn).
    share : array (N,)
        Probability that a draw takes this picture; sums to 1.

    Examples
    --------
    >>> target, share = soft_targets(np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 0.5]]), balanced=True)
    >>> share.tolist()
    [0.25, 0.25, 0.5]
    """
    mass = posterior.sum(0, dtype=np.float64)
    joint = posterior / np.maximum(mass, 1e-9) if balanced else posterior.astype(np.float64)
    share = joint.sum(1)
    target = joint / np.maximum(share, 1e-12)[:, None]
    target[share <= 1e-12] = 1 / posterior.shape[1]
    return target.astype(np.float32), share / share.sum()


def _worth(probability: Array, labels: Array) -> float:
    """Mean log-likelihood that the texts give the web labels, above chance, as a share of what a sure text would give."""
    classes = probability.shape[1]
    given = probability[np.arange(len(labels)), labels].astype(np.float64)
    return float(np.log(np.maximum(given * classes, 1e-12)).mean() / np.log(classes))


def _deal(texts: Sequence[str], classes: int, folds: int, seed: int) -> npt.NDArray[np.int64]:
    """A fold for every picture; pictures with one text lie together, so that no text is judged by its own copy.

    Where one text, such as the bare query, came with a large part of a class, the class would be missing when its pictures
    are judged: no more than a tenth of a class's usual size lies together.
    """
    largest = max(len(texts) // (10 * classes), 1)
    seen: Counter[str] = Counter()
    names = []
    for i, text in enumerate(texts):
        names.append(f"{text}\x00{seen[text] // largest}" if text.strip() else f"\x00{i}")
        seen[text] += 1
    _, group = np.unique(np.array(names, dtype=object).astype(str), return_inverse=True)
    order: npt.NDArray[np.int64] = np.random.default_rng(seed).permutation(int(group.max()) + 1)
    return order[group] % folds


def _settle(
    p: Array, said: Array, labels: Array, given: Array, names: Array, fit: Array, has_text: Array, looks: Array
) -> tuple[Array, float]:
    """Ten steps of expectation and maximisation: P(class | text, web label) (N, C + 1), and the trust in texts."""
    k, trust = p.shape[1], 0.9
    for _ in range(10):
        web = _log_web(p, labels, given)
        text = softmax(said + _log_prior(p) + _log_names(p, names) + _log_fit(p, fit) * has_text[:, None], axis=1)
        agreement = k * (text * softmax(web + np.log(looks + 1e-6), axis=1)).sum(1)  # above 1: the others say so too
        on_subject = trust * agreement / (trust * agreement + 1 - trust)
        trust = float((on_subject[has_text].sum() + 1) / (has_text.sum() + 2))
        p = softmax(np.log(trust * text + (1 - trust) / k) + web, axis=1)
    return p, trust


def _log_prior(p: Array) -> Array:
    """All classes alike; off-topic by a share that half the data and half a prior decide."""
    classes = p.shape[1] - 1
    share = (p[:, classes].mean() + _OFF_TOPIC) / 2
    return np.asarray(np.log(np.array([(1 - share) / classes] * classes + [share])))


def _log_names(p: Array, names: Array) -> Array:
    """Every name is in a text or not, independently given the class."""
    classes = names.shape[1]
    prior = np.full((classes + 1, classes), _STRAY)
    np.fill_diagonal(prior, _DIAGONAL)
    chance = (p.T @ names + _STRENGTH * prior) / (p.sum(0)[:, None] + _STRENGTH)
    return np.asarray(names @ np.log(chance).T + ~names @ np.log(1 - chance).T)


def _log_web(p: Array | None, labels: Array, given: Array) -> Array:
    """The confusion matrix of the web label (`given` has it as unit rows), from the posterior or the prior alone."""
    classes = given.shape[1]
    prior = np.full((classes + 1, classes), (1 - _DIAGONAL) / (classes - 1))
    np.fill_diagonal(prior, _DIAGONAL)
    prior[classes] = given.mean(0)
    chance = _STRENGTH * prior + (0 if p is None else p.T @ given)
    chance /= chance.sum(1, keepdims=True)
    return np.asarray(np.log(chance)[:, labels].T)


def _log_fit(p: Array, fit: Array) -> Array:
    """Is a text as near to its likeliest class as texts of that class are? Normal densities of on-topic and off-topic."""
    q, off = p[:, :-1], p[:, -1]
    overall = (q * fit).sum() / q.sum()
    usual = ((q * fit).sum(0) + _STRENGTH * overall) / (q.sum(0) + _STRENGTH)
    residual = fit - usual
    spread = np.sqrt((q * residual**2).sum() / q.sum()) + 1e-6
    best = residual[np.arange(len(fit)), q.argmax(1)]
    # Off-topic texts are expected two spreads below, never above.
    centre = min((off @ best - _STRENGTH * 2 * spread) / (off.sum() + _STRENGTH), 0.0)
    wide = np.sqrt((off @ (best - centre) ** 2 + _STRENGTH * spread**2) / (off.sum() + _STRENGTH)) + 1e-6
    out = np.repeat((-0.5 * (best / spread) ** 2 - np.log(spread))[:, None], p.shape[1], 1)
    out[:, -1] = -0.5 * ((best - centre) / wide) ** 2 - np.log(wide)
    return out


def _judge_unseen(x: Array, target: Array, fold: Array, l2: float) -> npt.NDArray[np.float64]:
    """Probabilities (N, K) by logistic regressions that learnt soft targets from the other folds; classes weigh alike."""
    weight = (target / np.maximum(target.sum(0), 1)).sum(1)
    out = np.zeros(target.shape)
    start = None
    for f in range(int(fold.max()) + 1):
        learn, judge = fold != f, fold == f
        if not judge.any():
            continue
        start = _logistic(x[learn], target[learn], weight[learn], l2, start)
        out[judge] = softmax(x[judge] @ start, axis=1)
    return out


def _logistic(x: Array, target: Array, weight: Array, l2: float, start: Array | None) -> npt.NDArray[np.float64]:
    """Multinomial logistic regression (D, K) on soft targets, which scikit-learn's does not take; the last column is 1."""
    inputs, soft, share = torch.from_numpy(x), torch.from_numpy(target), torch.from_numpy(weight / weight.sum())
    shape = (x.shape[1], target.shape[1])
    first = torch.zeros(shape, dtype=torch.float64) if start is None else torch.from_numpy(start.copy())
    w = first.requires_grad_()
    optimizer = torch.optim.LBFGS([w], max_iter=40, history_size=10, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = -(share * (soft * F.log_softmax(inputs @ w, 1)).sum(1)).sum() + l2 / 2 * (w[:-1] ** 2).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return np.asarray(w.detach().numpy())


def _components(x: Array, dims: int) -> npt.NDArray[np.float64]:
    """Principal components scaled to unit spread over all of them, and a column of ones.

    Double precision from here on: a search amplifies the last bits, and they differ between processes.
    """
    from sklearn.decomposition import PCA

    x = np.asarray(x, dtype=np.float64)
    parts = PCA(min(dims, *x.shape), svd_solver="covariance_eigh" if len(x) >= x.shape[1] else "full").fit_transform(x)
    parts /= max(float(parts.std()), 1e-12)
    return np.concatenate([parts, np.ones((len(x), 1))], 1)
