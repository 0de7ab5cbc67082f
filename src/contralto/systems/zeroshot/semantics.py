"""From features to what they mean: projections learnt on auxiliary classes, and the plain ways to recognise new classes by them.

All of it is what TMV-HLP starts from (its steps 1 and 4) or is compared with (its step 13).
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from contralto.encoders.image import imagenet_classes
from contralto.encoders.text import TextEncoder
from contralto.errors import UsageError
from contralto.neighbors.knn import unit_rows

__all__ = [
    "adapt_prototypes",
    "attribute_probabilities",
    "direct_attribute_prediction",
    "imagenet_prototypes",
    "imagenet_words",
    "nearest_prototype",
    "predicted_words",
]

Array = npt.NDArray[np.float64]


def predicted_words(
    features: npt.ArrayLike,
    labels: npt.NDArray[np.int64],
    words: npt.ArrayLike,
    targets: npt.ArrayLike,
    *,
    penalty: float = 1.0,
) -> Array:
    """Semantic vectors of some samples by a ridge regression learnt on samples of other classes (step 1, view V).

    Parameters
    ----------
    features : array (N, D)
        Of the auxiliary samples.
    labels : array (N,)
        Their classes, rows of `words`.
    words : array (C, S)
        Semantic vectors of the auxiliary classes.
    targets : array (M, D)
        Features of the samples in question.
    penalty : float
        On standardised features, per auxiliary sample.

    Returns
    -------
    array (M, S)

    Examples
    --------
    >>> predicted_words([[0.0], [1.0]], np.array([0, 1]), [[0.0, 0.0], [1.0, 2.0]], [[0.5]], penalty=0.0).tolist()
    [[0.5, 1.0]]
    """
    from sklearn.linear_model import Ridge
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    x, vectors = np.asarray(features, dtype=np.float64), np.asarray(words, dtype=np.float64)
    model = make_pipeline(StandardScaler(), Ridge(penalty * len(x))).fit(x, vectors[labels])
    return np.asarray(model.predict(np.asarray(targets, dtype=np.float64)))


def imagenet_words(features: npt.ArrayLike, text: TextEncoder) -> Array:
    """What pictures mean, without auxiliary pictures: the names of ImageNet's classes, weighed by their probabilities.

    Parameters
    ----------
    features : array (N, 1280)
        By "efficientnet-lite0".
    text : TextEncoder

    Returns
    -------
    array (N, S)

    Raises
    ------
    MissingExtraError
        If the weights are not installed.
    """
    from scipy.special import softmax

    names, weight, bias = imagenet_classes()
    logits = np.asarray(features, dtype=np.float64) @ weight.double().numpy().T + bias.double().numpy()
    return np.asarray(softmax(logits, axis=1) @ text.encode(names).astype(np.float64))


def imagenet_prototypes(words: npt.ArrayLike, text: TextEncoder, *, penalty: float = 0.1) -> Array:
    """Where classes are to be expected among features: a ridge regression from ImageNet's names to rows of its classifier.

    Parameters
    ----------
    words : array (C, S)
        Of the class texts, by the same encoder.
    text : TextEncoder
    penalty : float

    Returns
    -------
    array (C, 1280)
        Directions around the mean of the features of "efficientnet-lite0": only their cosine to centred features says something.
    """
    from sklearn.linear_model import Ridge

    names, weight, _ = imagenet_classes()
    rows = weight.double().numpy()
    model = Ridge(penalty).fit(text.encode(names).astype(np.float64), rows - rows.mean(0))
    return np.asarray(model.predict(np.asarray(words, dtype=np.float64)))


def attribute_probabilities(
    features: npt.ArrayLike,
    labels: npt.NDArray[np.int64],
    signatures: npt.ArrayLike,
    targets: npt.ArrayLike,
    *,
    C: float = 1.0,
) -> Array:
    """Probability of every attribute by logistic regressions learnt on samples of other classes (step 1, view A).

    Parameters
    ----------
    features : array (N, D)
        Of the auxiliary samples.
    labels : array (N,)
        Their classes, rows of `signatures`.
    signatures : array (C, A)
        Which attributes the auxiliary classes have: above 0.5 counts.
    targets : array (M, D)
        Features of the samples in question.
    C : float
        Inverse strength of the penalty, as in scikit-learn.

    Returns
    -------
    array (M, A)
        An attribute that all auxiliary samples have, or none of them, keeps its share.

    Examples
    --------
    >>> x, y = np.array([[0.0], [1.0], [10.0], [11.0]]), np.array([0, 0, 1, 1])
    >>> attribute_probabilities(x, y, [[0, 1], [1, 1]], [[-5.0], [20.0]]).round().tolist()
    [[0.0, 1.0], [1.0, 1.0]]
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    x, there = np.asarray(features, dtype=np.float64), (np.asarray(signatures) > 0.5)[labels]
    scaler = StandardScaler().fit(x)
    known, asked = scaler.transform(x), scaler.transform(np.asarray(targets, dtype=np.float64))
    out = np.tile(there.mean(0), (len(asked), 1))
    for a in np.flatnonzero(there.any(0) & ~there.all(0)):  # an attribute is a classifier of its own
        out[:, a] = LogisticRegression(C=C, max_iter=1000).fit(known, there[:, a]).predict_proba(asked)[:, 1]
    return out


def adapt_prototypes(x: npt.ArrayLike, prototypes: npt.ArrayLike, top: int) -> Array:
    """One step of self-training: every prototype becomes the mean of the rows that are most alike to it (step 4).

    Parameters
    ----------
    x : array (N, S)
        Unlabelled samples in a semantic space.
    prototypes : array (C, S)
        Of the classes in the same space.
    top : int
        Rows by cosine, at most N. Many more than a class has bring in other classes.

    Returns
    -------
    array (C, S)

    Examples
    --------
    >>> adapt_prototypes([[1.0, 0.2], [2.0, 0.0], [0.0, 3.0]], [[1.0, 0.0], [0.0, 1.0]], 1).tolist()
    [[2.0, 0.0], [0.0, 3.0]]
    """
    rows = np.asarray(x, dtype=np.float64)
    if not 1 <= top <= len(rows):
        raise UsageError(f"top must be between 1 and the number of samples, {len(rows)}; got {top}")
    order = np.argsort(-_cosines(prototypes, rows), axis=1, kind="stable")[:, :top]
    return np.asarray(rows[order].mean(1))


def nearest_prototype(x: npt.ArrayLike, prototypes: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """Class (N,) of the prototype with the highest cosine: the plain baseline, in one space or in several side by side.

    Examples
    --------
    >>> nearest_prototype([[2.0, 0.1], [0.0, 1.0]], np.eye(2)).tolist()
    [0, 1]
    """
    return np.asarray(_cosines(x, prototypes).argmax(1), np.int64)


def direct_attribute_prediction(
    probabilities: npt.ArrayLike, signatures: npt.ArrayLike, prior: npt.ArrayLike | None = None
) -> Array:
    """Direct attribute prediction: ``log p(c|x) = sum_a [a_c log p_a + (1 - a_c) log(1 - p_a)] - log prior(c)``.

    Parameters
    ----------
    probabilities : array (N, A)
        Of every attribute.
    signatures : array (C, A)
        Which attributes a class has, in [0, 1].
    prior : array (A,), optional
        How often an attribute is there in the auxiliary data; the prior of a class is their product. Without it: none.

    Returns
    -------
    array (N, C)
        Up to a constant per row.

    Examples
    --------
    >>> direct_attribute_prediction([[0.9, 0.2]], [[1, 0], [0, 1]]).argmax(1).tolist()
    [0]
    """
    p, a = _shares(probabilities), np.asarray(signatures, dtype=np.float64)
    if p.shape[1] != a.shape[1]:
        raise UsageError(f"classes must have as many attributes as samples, got {a.shape[1]} and {p.shape[1]}")
    found = np.log(p) @ a.T + np.log1p(-p) @ (1 - a).T
    if prior is not None:
        share = _shares(prior)
        found -= a @ np.log(share) + (1 - a) @ np.log1p(-share)
    return np.asarray(found)


def _shares(x: npt.ArrayLike) -> Array:
    return np.clip(np.asarray(x, dtype=np.float64), 1e-6, 1 - 1e-6)


def _cosines(a: npt.ArrayLike, b: npt.ArrayLike) -> Any:
    return unit_rows(a) @ unit_rows(b).T
