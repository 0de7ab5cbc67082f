"""TMV-HLP: classes of all unlabelled samples at once, from several views of them and a description or a few labels per class.

Views of the same sample (features, predicted words, predicted attributes) are brought into one space by multi-view CCA on the
target samples themselves, which repairs what a regression learnt on other classes gets systematically wrong. There, a graph of
neighbours within the views and hyperedges from view to view carry labels from the class prototypes, or from labelled samples,
to all others.

Paper: Transductive Multi-view Zero-Shot Learning, TPAMI 2015, arXiv 1501.04560. Nothing is trained by gradients.

Where this differs from the released code, and on purpose: labels are propagated once, by a solver (the code repeats it and keeps
the best iteration by the test labels); the prior of the views is 1 for all unless given (the code's, 1, 1.5, 1, was found on
one data set); memberships below zero count as none (`clip`).
"""

import warnings
from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from sklearn.base import BaseEstimator, ClassifierMixin

from contralto.errors import UsageError
from contralto.neighbors.cca import MultiViewCCA, check_views
from contralto.neighbors.hypergraph import (
    heterogeneous_hyperedges,
    hypergraph_similarity,
    multigraph,
    nearest_others,
    view_agreement,
)
from contralto.neighbors.propagation import propagate, seed_labels
from contralto.systems.zeroshot.semantics import adapt_prototypes

__all__ = ["TMVHLP"]

Array = npt.NDArray[np.float64]


class TMVHLP(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """Transductive multi-view hypergraph label propagation.

    Parameters
    ----------
    widths : sequence of int, optional
        Where the views come as one array (N, P), how many columns each has; default: one view. A list of arrays needs none.
    standardise : {"first", "all", "none"}
        Which views are brought to mean 0 and standard deviation 1 per column: the paper's low-level features are, semantic views
        are not.
    embed : bool
        Bring the views into a common space by CCA. `False`: leave them as they are.
    regulariser, power, components
        Of `MultiViewCCA`.
    k : int
        Neighbours of a sample in the pairwise graphs.
    times : int
        Prototypes and labelled samples have so many times more.
    hyper_k, hyper_times : int
        The same for hyperedges.
    prior : sequence of float, optional
        Weight of every view in the pairwise graph, beside its agreement with the others; default: 1 for all.
    pairwise : float
        Share of the pairwise graph, the rest being that of the hyperedges: 1 leaves hyperedges out.
    homogeneous : bool
        Hyperedges within every view instead of from view to view (ablation).
    drop_first : bool
        Hyperedges leave out the best match, as in the released code; `False` keeps it.
    clip : bool
        See `hypergraph_similarity`.
    alpha : float
        Share of the neighbours in the propagation, in [0, 1).
    top : float
        How many samples adapt a prototype (self-training), as a share of N / C. 0 leaves prototypes as they are; much more than 1
        mixes classes.

    Attributes
    ----------
    classes_ : array (C,)
    transduction_ : array (N,)
        The class of every sample.
    label_distributions_ : array (N, C)
        What reached a sample from every class, as shares; rows of 0 where nothing did.
    view_weights_ : array (m,)
        Agreement of every view with the others.
    embedded_ : list of array (N, D)
        Unit rows.
    prototypes_ : list of array (C, D) or None
        Adapted and embedded.
    cca_ : MultiViewCCA
        Only with `embed`.

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> from contralto.encoders.described import describe
    >>> x, y = load_digits(return_X_y=True)
    >>> views = [describe(x[:300].reshape(-1, 8, 8), name) for name in ("pixels", "fourier", "gradients")]
    >>> few = np.where(np.arange(300) < 30, y[:300], -1)  # labels of the first thirty
    >>> model = TMVHLP(k=10, hyper_k=10, times=3, hyper_times=3, standardise="all")
    >>> bool((model.fit_predict(views, few) == y[:300])[30:].mean() > 0.85)
    True
    """

    def __init__(
        self,
        widths: Sequence[int] | None = None,
        *,
        standardise: str = "first",
        embed: bool = True,
        regulariser: float = 1e-4,
        power: float = 4.0,
        components: int | None = None,
        k: int = 30,
        times: int = 9,
        hyper_k: int = 30,
        hyper_times: int = 9,
        prior: Sequence[float] | None = None,
        pairwise: float = 0.25,
        homogeneous: bool = False,
        drop_first: bool = True,
        clip: bool = True,
        alpha: float = 0.35,
        top: float = 0.8,
    ) -> None:
        self.widths = widths
        self.standardise = standardise
        self.embed = embed
        self.regulariser = regulariser
        self.power = power
        self.components = components
        self.k = k
        self.times = times
        self.hyper_k = hyper_k
        self.hyper_times = hyper_times
        self.prior = prior
        self.pairwise = pairwise
        self.homogeneous = homogeneous
        self.drop_first = drop_first
        self.clip = clip
        self.alpha = alpha
        self.top = top

    def fit(
        self,
        X: Any,
        y: npt.ArrayLike | None = None,
        *,
        prototypes: Sequence[npt.ArrayLike | None] | None = None,
        classes: npt.ArrayLike | None = None,
    ) -> Self:
        """Find the classes of all samples without a label.

        Parameters
        ----------
        X : sequence of array (N, p_i), or array (N, P)
            The views of the target samples; side by side with `widths`.
        y : array (N,), optional
            Labels; -1 (of texts: "") marks what has none.
        prototypes : sequence of array (C, p_i) or None, optional
            A description of every class in the semantic views, None for a view without one.
        classes : array (C,), optional
            What the rows of the prototypes are called; default: their numbers.

        Raises
        ------
        UsageError
            If the arguments do not fit, or there is neither a label nor a prototype.
        """
        self._check()
        views = self._views(X, reset=True)
        n = len(views[0])
        labels = self._labels(y, n, prototypes, classes)
        given = self._prototypes(prototypes, views)
        self._standardise(views)
        views = self._standardised(views)
        if self.embed:
            if sum(self.widths_) >= n and self.regulariser < 0.01:
                warnings.warn(
                    f"the views have {sum(self.widths_)} columns for {n} samples: they agree by chance in the common space. "
                    f"Take fewer columns, or a larger regulariser (1 for standardised columns)",
                    stacklevel=2,
                )
            self.cca_ = MultiViewCCA(self.regulariser, self.power, self.components).fit(views)
        elif len({x.shape[1] for x in views}) > 1 and self.pairwise < 1 and not self.homogeneous:
            raise UsageError(
                "without embed, hyperedges from view to view need views of the same width; or take pairwise=1"
            )
        self.embedded_ = [_unit(x) for x in self._embed(views)]
        self.prototypes_ = self._embed_prototypes(given, views, n)
        nodes = self.embedded_
        seeds = seed_labels(labels, len(self.classes_), others=0.0)
        if self.prototypes_ is not None:
            nodes = [np.concatenate(x) for x in zip(nodes, self.prototypes_, strict=True)]
            seeds = np.concatenate([seeds, np.eye(len(self.classes_))])
        own = [p is not None for p in given or ()]
        in_common = not all(own) and (sum(own) == 1 or len(own) - sum(own) > 1)  # the same one would agree without end
        self.view_weights_ = self._agreement(self.embedded_ if in_common else nodes)
        known = np.flatnonzero(seeds.any(1))
        spread = propagate(self._graph(nodes, known), seeds, alpha=self.alpha)
        self.nodes_, self.node_distributions_ = nodes, _as_shares(spread)
        self.label_distributions_ = self.node_distributions_[:n]
        self.transduction_ = self.classes_[self.label_distributions_.argmax(1)]
        return self

    def fit_predict(self, X: Any, y: npt.ArrayLike | None = None, **more: Any) -> npt.NDArray[Any]:
        """`fit`, and the class of every sample (N,)."""
        return np.asarray(self.fit(X, y, **more).transduction_)

    def predict(self, X: Any) -> npt.NDArray[Any]:
        """Classes (M,) of samples that were not there, from the nearest ones that were."""
        found = self.predict_proba(X).argmax(1)
        return np.asarray(self.classes_[found])

    def predict_proba(self, X: Any) -> Array:
        """Shares (M, C) of the classes among the nearest nodes of new samples, weighed by likeness and agreement of the views."""
        from sklearn.utils.validation import check_is_fitted

        check_is_fitted(self)
        views = [_unit(x) for x in self._embed(self._standardised(self._views(X, reset=False)))]
        weights = self.view_weights_ * self._prior(len(views))
        k = min(self.k, len(self.node_distributions_))
        found = np.zeros((len(views[0]), len(self.classes_)))
        for x, nodes, weight in zip(views, self.nodes_, weights, strict=True):
            found += weight * (nearest_others(x, nodes, k) @ self.node_distributions_)
        return _as_shares(found, empty=1 / len(self.classes_))

    def rank(
        self, queries: npt.ArrayLike, view: int, other: int, *, candidates: npt.ArrayLike | None = None, best: int = 10
    ) -> tuple[npt.NDArray[np.int64], Array]:
        """What is nearest to some rows of one view among rows of another, by the cosine in the common space (step 12).

        Annotation of a sample: its features against attributes. Description of a class: its word vector against attributes. A
        class that nobody has seen: a list of attributes against the word vectors of class names.

        Parameters
        ----------
        queries : array (Q, p_view)
        view, other : int
            Numbers of the views.
        candidates : array (M, p_other), optional
            Default: every column of the view by itself, which is one attribute each.
        best : int

        Returns
        -------
        index : array (Q, best)
            Of the candidates, the nearest first.
        cosine : array (Q, best)

        Examples
        --------
        >>> x = np.random.default_rng(0).normal(size=(60, 3))
        >>> model = TMVHLP(k=5, times=1, standardise="none").fit([x, 2 * x], np.arange(60) % 2)
        >>> model.rank([[0.0, 5.0, 0.0]], 0, 1, best=1)[0].tolist()
        [[1]]
        """
        if not hasattr(self, "cca_"):
            raise UsageError("views can be compared with each other after fit, with embed=True")
        rows = (
            np.eye(len(self.cca_.weights_[other])) if candidates is None else np.asarray(candidates, dtype=np.float64)
        )
        found = _unit(self.cca_.project(queries, view)) @ _unit(self.cca_.project(rows, other)).T
        order = np.argsort(-found, axis=1, kind="stable")[:, :best]
        return order, np.take_along_axis(found, order, 1)

    # What the steps need.

    def _check(self) -> None:
        if self.standardise not in ("first", "all", "none"):
            raise UsageError(f'standardise must be "first", "all" or "none", got {self.standardise!r}')
        for name in ("k", "times", "hyper_k", "hyper_times"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.pairwise <= 1:
            raise UsageError(f"pairwise is a share in [0, 1], got {self.pairwise}")
        if self.top < 0:
            raise UsageError(f"top must not be negative, got {self.top}")

    def _views(self, X: Any, *, reset: bool) -> list[Array]:
        """The views, checked; those of a list, or the columns of one array."""
        from sklearn.utils.validation import validate_data

        if isinstance(X, list | tuple) and X and all(np.ndim(x) == 2 for x in X):
            views = check_views(X)
            widths = [x.shape[1] for x in views]
            if reset:
                self.n_features_in_ = sum(widths)
        else:
            together = np.asarray(
                validate_data(self, X, reset=reset, dtype=np.float64, ensure_min_samples=2 if reset else 1)
            )
            widths = [together.shape[1]] if self.widths is None else list(self.widths)
            if sum(widths) != together.shape[1] or min(widths) < 1:
                raise UsageError(
                    f"widths must be numbers above 0 that add up to the columns, {together.shape[1]}; got {widths}"
                )
            views = np.split(together, np.cumsum(widths)[:-1], axis=1)
        if reset:
            self.widths_ = widths
        elif widths != self.widths_:
            raise UsageError(f"the views must have {self.widths_} columns, as in fit; got {widths}")
        return views

    def _labels(self, y: Any, n: int, prototypes: Any, classes: Any) -> npt.NDArray[np.int64]:
        """Numbers of the classes (N,), -1 where there is none; sets `classes_`."""
        from sklearn.utils.multiclass import check_classification_targets
        from sklearn.utils.validation import column_or_1d

        if y is None and prototypes is None:
            raise UsageError("requires y to be passed, but the target y is None; or prototypes of the classes")
        names = np.full(n, -1) if y is None else np.asarray(column_or_1d(y, warn=True))
        if len(names) != n:
            raise UsageError(f"y must have a label for each of the {n} samples, -1 for none; got {len(names)}")
        check_classification_targets(names)
        unknown = names == ("" if names.dtype.kind in "OU" else -1)
        if prototypes is not None:
            first = next((p for p in prototypes if p is not None), None)
            if first is None:
                raise UsageError("at least one view needs prototypes")
            rows = len(np.asarray(first))
            self.classes_ = np.arange(rows) if classes is None else np.asarray(classes)
            if len(self.classes_) != rows or len(set(self.classes_.tolist())) != rows:
                raise UsageError(f"classes must be {rows} different names, one per prototype; got {len(self.classes_)}")
        else:
            self.classes_ = np.unique(names[~unknown])
            if not len(self.classes_):
                raise UsageError("no sample has a label: give some, or prototypes of the classes")
        place = {name: i for i, name in enumerate(self.classes_.tolist())}
        foreign = next((name for name in names[~unknown].tolist() if name not in place), None)
        if foreign is not None:
            raise UsageError(f"the label {foreign!r} is none of the classes")
        return np.array([-1 if u else place[name] for name, u in zip(names.tolist(), unknown, strict=True)], np.int64)

    def _prototypes(self, prototypes: Sequence[Any] | None, views: list[Array]) -> list[Array | None] | None:
        if prototypes is None:
            return None
        if len(prototypes) != len(views):
            raise UsageError(f"prototypes must be a list of {len(views)}, one or None per view; got {len(prototypes)}")
        found: list[Array | None] = []
        for i, (p, x) in enumerate(zip(prototypes, views, strict=True)):
            rows = None if p is None else np.asarray(p, dtype=np.float64)
            if rows is not None and (rows.shape != (len(self.classes_), x.shape[1]) or not np.isfinite(rows).all()):
                expected = (len(self.classes_), x.shape[1])
                raise UsageError(
                    f"prototypes of view {i} must be finite and of shape {expected}, got shape {rows.shape}"
                )
            found.append(rows)
        return found

    def _standardise(self, views: list[Array]) -> None:
        last = {"first": 1, "all": len(views), "none": 0}[self.standardise]
        self.means_ = [x.mean(0) if i < last else np.zeros(x.shape[1]) for i, x in enumerate(views)]
        scales = [x.std(0, ddof=1) if i < last else np.ones(x.shape[1]) for i, x in enumerate(views)]
        self.scales_ = [np.where(s > 1e-12, s, 1.0) for s in scales]

    def _standardised(self, views: Sequence[Array]) -> list[Array]:
        return [(x - mean) / scale for x, mean, scale in zip(views, self.means_, self.scales_, strict=True)]

    def _embed(self, views: Sequence[Array]) -> list[Array]:
        return self.cca_.transform(views) if self.embed else list(views)

    def _embed_prototypes(self, given: list[Array | None] | None, views: list[Array], n: int) -> list[Array] | None:
        """Standardised as their view, adapted to the samples, embedded; a view without its own has the mean of the others'."""
        if given is None:
            return None
        top = round(self.top * n / len(self.classes_))
        found: list[Array | None] = []
        for i, rows in enumerate(given):
            if rows is None:
                found.append(None)
                continue
            own = (rows - self.means_[i]) / self.scales_[i]
            if self.top > 0:
                own = adapt_prototypes(views[i], own, min(max(top, 1), n))
            found.append(self.cca_.project(own, i) if self.embed else own)
        there = [p for p in found if p is not None]
        if not self.embed and len(there) < len(found):
            raise UsageError("without embed, every view needs prototypes of its own")
        mean = sum(there[1:], there[0]) / len(there)
        return [_unit(mean if p is None else p) for p in found]

    def _agreement(self, views: list[Array]) -> Array:
        if len({x.shape[1] for x in views}) > 1:  # views as they are cannot be compared
            return np.full(len(views), 1 / len(views))
        return view_agreement(views)

    def _prior(self, m: int) -> Array:
        return np.ones(m) if self.prior is None else np.asarray(self.prior, dtype=np.float64)

    def _graph(self, nodes: list[Array], known: npt.NDArray[np.int64]) -> Any:
        """The pairwise graph and that of the hyperedges, as one operator (steps 5 to 9)."""
        from scipy.sparse.linalg import aslinearoperator

        n = len(nodes[0])

        def keep(k: int, times: int) -> npt.NDArray[np.int64]:
            counts = np.full(n, k)
            counts[known] = times * k
            return counts

        pairwise = aslinearoperator(
            multigraph(nodes, keep(self.k, self.times), prior=self._prior(len(nodes)), agreement=self.view_weights_)
        )
        if self.pairwise == 1 or (len(nodes) == 1 and not self.homogeneous):
            return pairwise
        edges = heterogeneous_hyperedges(
            nodes, keep(self.hyper_k, self.hyper_times), drop_first=self.drop_first, homogeneous=self.homogeneous
        )
        return self.pairwise * pairwise + (1 - self.pairwise) * hypergraph_similarity(edges, clip=self.clip)


def _unit(x: Array) -> Array:
    """Rows of length one; a zero row stays."""
    length = np.linalg.norm(x, axis=1, keepdims=True)
    return np.asarray(x / np.where(length > 1e-300, length, 1.0))


def _as_shares(x: Array, *, empty: float = 0.0) -> Array:
    positive = np.maximum(x, 0.0)
    total = positive.sum(1, keepdims=True)
    return np.where(total > 0, positive / np.where(total > 0, total, 1.0), empty)
