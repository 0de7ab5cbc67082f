"""The claim of TMV-HLP: in the common space, hyperedges from view to view help the pairwise graph with few labels.

    contralto reproduce tmv_hlp

Handwritten digits (8 x 8), 400 of them per seed, three views computed from each: pixels, magnitudes of the Fourier transform,
histograms of gradient directions; all standardised. One or three of each class have a label; the classes of all others are
found at once, by one propagation. Accuracy is that on those that have no label in any arm. Nothing is trained, so 20 seeds are
cheap: each is another draw of digits and of labels.

Arms, all with k = 15, three times as many for labelled samples, alpha = 0.5: *pairwise*, the multi-graph in the common space;
*full*, 0.25 of it and 0.75 heterogeneous hyperedges; *best match kept*, the same with the nearest node of the other view, which
the released code leaves out; *homogeneous*, hyperedges within views; *raw views*, the multi-graph on the views as they are.
Beside them *nearest*, the class of the nearest labelled sample over all views side by side, which looks at no unlabelled one.
*Tuned* arms have k, alpha, regulariser and power of their own, each the best of the same grid on seeds 100 to 104.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from contralto.claims.digits import SIDE
from contralto.encoders.described import DESCRIPTIONS, describe
from contralto.systems.zeroshot.semantics import nearest_prototype
from contralto.systems.zeroshot.tmv_hlp import TMVHLP

__all__ = ["draw_views", "run"]

Array = npt.NDArray[Any]
NO_SETTINGS = ("samples", "held", "shots", "nearest")


def draw_views(seed: int, *, samples: int) -> tuple[list[Array], Array, Array]:
    """Views of some digits drawn by the seed, their classes, and their places within their class: the first ones are shots.

    Examples
    --------
    >>> views, truth, place = draw_views(100, samples=200)
    >>> [x.shape[1] for x in views], sorted(truth[place < 1].tolist())
    ([64, 40, 128], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9])
    """
    from sklearn.datasets import load_digits

    found = load_digits()
    rows = np.random.default_rng([seed, 7]).permutation(len(found.target))[:samples]
    truth, pictures = found.target[rows], found.data[rows].reshape(-1, SIDE, SIDE) / 16
    place = np.zeros(len(truth), np.int64)
    for c in range(10):
        place[truth == c] = np.arange((truth == c).sum())
    return [describe(pictures, name) for name in DESCRIPTIONS], truth, place


def run(
    arm: Mapping[str, Any],
    *,
    seed: int,
    data: str,
    budget: Mapping[str, Any],
    device: str = "cpu",
    progress: Callable[[float], None] | None = None,
) -> dict[str, Any]:
    """Find the classes of the unlabelled digits of one draw by one arm.

    Parameters
    ----------
    arm : mapping
        `shots`; `nearest: true`, or arguments of `TMVHLP`.
    seed : int
    data : {"digits"}
    budget : mapping
        `samples`, `held` (so many of each class are not tested), and arguments of `TMVHLP` of all arms that have no other.
    device : str
        Not used: all is linear algebra on the CPU.
    progress : function, optional
        Not used.

    Returns
    -------
    dict
        `right` (N,) per tested digit, and `labels`.
    """
    settings = {k: v for k, v in (dict(budget) | dict(arm)).items() if k not in NO_SETTINGS}
    views, truth, place = draw_views(seed, samples=int(budget["samples"]))
    known, tested = place < int(arm["shots"]), place >= int(budget["held"])
    if arm.get("nearest"):
        together = np.hstack(views)
        together = (together - together.mean(0)) / np.maximum(together.std(0), 1e-12)
        found = truth[known][nearest_prototype(together, together[known])]
    else:
        found = TMVHLP(standardise="all", **settings).fit_predict(views, np.where(known, truth, -1))
    return {"right": (found == truth)[tested].astype(float), "labels": truth[tested]}
