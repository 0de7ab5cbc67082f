"""The pictures of a run as a person goes through them: filtered, ordered, with what was decided about each."""

import itertools
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
from scipy.stats import binomtest

from contralto.data.decisions import Decision, Decisions
from contralto.data.manifest import Manifest
from contralto.errors import DataError
from contralto.files import naming

__all__ = ["Filter", "Listing"]

STATES = ("open", "own", "decided", "differ", "any")
ORDERS = ("worst", "class")
Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Filter:
    """Which pictures, in which order.

    Attributes
    ----------
    verdict : str
        "flagged", "any", or a verdict as in the cleaned list.
    label : str
        Name of a class that the picture had or would get; "" = any.
    state : {"open", "own", "decided", "differ", "any"}
        Open: nobody decided; own: this reviewer did not; differ: reviewers do not agree.
    words : str
        All of them are in text or id.
    least : float
        Smallest probability of being wrong.
    order : {"worst", "class"}
        By the probability of being wrong, of all or class by class.
    """

    verdict: str = "flagged"
    label: str = ""
    state: str = "open"
    words: str = ""
    least: float = 0.0
    order: str = "worst"


class Listing:
    """All training pictures of a finished run, by position in the cleaned list.

    Parameters
    ----------
    run : path

    Attributes
    ----------
    manifest : Manifest
    decisions : Decisions
    multilabel : bool
        Whether a picture may have several labels.
    ids, texts : list of str
    given, new : list of tuple of str
        Labels before and after the correction by the machine; () = off-topic.
    verdict : list of str
    p_wrong : array (N,)
    flagged : array (N,) bool
        The machine would change the labels.

    Raises
    ------
    DataError
        If the run is not finished or damaged.
    """

    def __init__(self, run: str | Path) -> None:
        run = Path(run)
        for needed in ("config.json", "cleaned.parquet", "manifest"):
            if not (run / needed).exists():
                raise DataError(f"there is no {needed}: only a finished run can be reviewed", file=str(run))
        with naming(run):
            self.manifest = Manifest.load(run / "manifest")
            table = pq.read_table(run / "cleaned.parquet")
            self.multilabel = "added" in table.column_names
            self.rows = table.column("index").to_numpy()
            self.ids: list[str] = table.column("id").to_pylist()
            self.p_wrong = table.column("p_wrong").to_numpy().astype(np.float64)
            given, new = table.column("given").to_pylist(), table.column("new").to_pylist()
            if self.multilabel:
                self.given, self.new = [tuple(g) for g in given], [tuple(n) for n in new]
                self.flagged = np.array([set(g) != set(n) for g, n in zip(given, new, strict=True)], bool)
                self.verdict = ["changed" if f else "kept" for f in self.flagged]
            else:
                self.given, self.new = [(g,) for g in given], [(n,) if n else () for n in new]
                self.verdict = table.column("verdict").to_pylist()
                self.flagged = np.isin(self.verdict, ["corrected", "off-topic"])
            texts = self.manifest.texts
            self.texts = [texts[row] for row in self.rows]
            self._embedding = self._read_embedding(run / "embedding.npy")
        self._lower = [f"{t} {i}".lower() for t, i in zip(self.texts, self.ids, strict=True)]
        self._verdicts = np.array(self.verdict)
        number = {name: c for c, name in enumerate(self.manifest.class_names)}
        self._first_class = np.array([number[g[0]] if g else len(number) for g in self.given])
        self._by_class = _positions([{*g, *n} for g, n in zip(self.given, self.new, strict=True)], number)
        self._orders = {
            "worst": np.argsort(-self.p_wrong, kind="stable"),
            "class": np.lexsort((-self.p_wrong, self._first_class)),
        }
        self._rank = {name: np.argsort(order) for name, order in self._orders.items()}  # the inverse permutation
        self._position = {identity: n for n, identity in enumerate(self.ids)}
        self.decided, self.differ, self.changed = (np.zeros(len(self.ids), bool) for _ in range(3))
        self._by_reviewer: dict[str, Array] = {}
        self.decisions = Decisions(run, changed=self._take_in)
        self.decisions.refresh()

    def __len__(self) -> int:
        return len(self.ids)

    def _read_embedding(self, path: Path) -> Array | None:
        if not path.exists():  # runs of before have none
            return None
        x = np.load(path, allow_pickle=False).astype(np.float32)
        if len(x) != len(self.ids):
            raise DataError(f"has {len(x)} rows for {len(self.ids)} pictures", file=str(path))
        return np.asarray(x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12))

    def _take_in(self, ids: Iterable[str]) -> None:
        for identity in ids:
            n = self._position.get(identity)
            if n is None:
                continue
            last = self.decisions.last(identity)
            said = list(last.values())
            self.decided[n] = bool(said)
            for reviewer in last.keys() - self._by_reviewer.keys():
                self._by_reviewer[reviewer] = np.zeros(len(self.ids), bool)
            for reviewer, seen in self._by_reviewer.items():
                seen[n] = reviewer in last
            self.differ[n] = len({frozenset(d.labels) for d in said}) > 1
            holds = max(said, key=lambda d: d.action, default=None)
            self.changed[n] = holds is not None and set(holds.labels) != set(self.given[n])

    def find(self, chosen: Filter, reviewer: str = "") -> Array:
        """Positions of the pictures that a filter of a reviewer lets through, in its order."""
        self.decisions.refresh()
        mask = self.p_wrong >= chosen.least
        if chosen.verdict == "flagged":
            mask &= self.flagged
        elif chosen.verdict != "any":
            mask &= self._verdicts == chosen.verdict
        if chosen.label:
            inside = np.zeros(len(self), bool)
            inside[self._by_class.get(chosen.label, [])] = True
            mask &= inside
        if chosen.state != "any":
            own = ~self._by_reviewer.get(reviewer, np.zeros(len(self), bool))
            states = {"open": ~self.decided, "own": own, "decided": self.decided, "differ": self.differ}
            mask &= states[chosen.state]
        if chosen.words:
            words = chosen.words.lower().split()
            for n in np.flatnonzero(mask):
                mask[n] = all(w in self._lower[n] for w in words)
        order = self._orders[chosen.order]
        return np.asarray(order[mask[order]])

    def around(self, n: int, chosen: Filter, reviewer: str = "") -> tuple[int | None, int | None, int]:
        """What a filter lets through beside position `n`, in its order.

        Returns
        -------
        tuple
            The picture before it; the one after it, at the end the first one (None if there is none); how many there are.
        """
        found, rank = self.find(chosen, reviewer), self._rank[chosen.order]
        earlier, later = found[rank[found] < rank[n]], found[rank[found] > rank[n]]
        following = later if len(later) else earlier
        before = int(earlier[-1]) if len(earlier) else None
        return before, int(following[0]) if len(following) else None, len(found)

    def neighbours(self, n: int, count: int = 8) -> list[tuple[int, float]]:
        """The pictures that look most like one, with their cosine; none where the run kept no embedding."""
        if self._embedding is None:
            return []
        similarity = self._embedding @ self._embedding[n]
        similarity[n] = -np.inf
        count = min(count, len(self) - 1)
        top = np.argpartition(-similarity, count - 1)[:count] if count else np.zeros(0, int)
        return [(int(i), float(similarity[i])) for i in top[np.argsort(-similarity[top], kind="stable")]]

    def position(self, identity: str) -> int | None:
        """Position of a picture by its id."""
        return self._position.get(identity)

    def decision(self, n: int) -> Decision | None:
        """What holds for a picture."""
        return self.decisions.of(self.ids[n])

    def progress(self) -> dict[str, Any]:
        """How far the review is, and how often the flagged were wrong indeed, with Wilson's 95 % interval.

        Returns
        -------
        dict
            `flagged`, `decided` (of the flagged), `differ`, `wrong` (flagged whose given labels a person did not
            keep), `precision`, `low`, `high`: None while nothing is decided.
        """
        self.decisions.refresh()
        decided, wrong = int((self.decided & self.flagged).sum()), int((self.changed & self.flagged).sum())
        low, high = binomtest(wrong, decided).proportion_ci(method="wilson") if decided else (None, None)
        return {
            "flagged": int(self.flagged.sum()), "decided": decided,
            "differ": int(self.differ.sum()), "wrong": wrong,
            "precision": wrong / decided if decided else None, "low": low, "high": high,
        }  # fmt: skip

    def agreement(self) -> list[dict[str, Any]]:
        """How far each pair of reviewers agrees on the pictures that both decided about.

        Returns
        -------
        list of dict
            `reviewers`, `both` (pictures), `share` that agree, `kappa` (Cohen's; None if it is not defined).
        """
        from sklearn.metrics import cohen_kappa_score

        answers: dict[tuple[str, str], list[tuple[str, str]]] = {}
        for said in self.decisions.every().values():
            told = {reviewer: json.dumps(sorted(d.labels)) for reviewer, d in said.items()}
            for a, b in itertools.combinations(sorted(told), 2):
                answers.setdefault((a, b), []).append((told[a], told[b]))
        out: list[dict[str, Any]] = []
        for reviewers, both in sorted(answers.items()):
            one, two = zip(*both, strict=True)
            defined = len({*one, *two}) > 1
            share = sum(x == y for x, y in both) / len(both)
            kappa = float(cohen_kappa_score(one, two)) if defined else None
            out.append({"reviewers": reviewers, "both": len(both), "share": share, "kappa": kappa})
        return out


def _positions(sets: list[set[str]], number: dict[str, int]) -> dict[str, Array]:
    found: dict[str, list[int]] = {name: [] for name in number}
    for n, names in enumerate(sets):
        for name in names:
            found[name].append(n)
    return {name: np.array(positions, np.int64) for name, positions in found.items()}
