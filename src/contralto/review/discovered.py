"""The page of discovered classes: what is in the unlabelled pictures, class by class, for a person to name.

One file as `review.report`'s: no network, a strict policy, nothing of what came from outside is trusted. Names that a person
types stay in the page until they are downloaded as `names.json`; `contralto review RUN` saves them at once.
"""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import markupsafe
import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from contralto.data.images import decode_image
from contralto.data.manifest import Manifest
from contralto.data.names import called, read_names
from contralto.errors import DataError
from contralto.files import naming, write_atomically
from contralto.review.charts import curve, scatter
from contralto.review.report import page_assets, render, safe_json, sheets_of, shown_text, thumbnail_of
from contralto.systems.registry import SYSTEMS

__all__ = ["Discoveries", "is_discovery", "write_discovery_report"]

FOUND, CLASSES, MAP = "discovered.parquet", "classes.parquet", "map.parquet"
MOST = 3000
"""Thumbnails in a page, whatever the number of classes."""
Array = npt.NDArray[Any]


def is_discovery(run: str | Path) -> bool:
    """Whether a folder holds what a discovery of classes found.

    Examples
    --------
    >>> is_discovery("nowhere")
    False
    """
    return (Path(run) / FOUND).is_file()


class Discoveries:
    """What a finished discovery found, class by class.

    Parameters
    ----------
    run : path

    Attributes
    ----------
    classes : list of str
        What the machine calls the classes: old ones first.
    is_new : array (K,) bool
    nearest : list of list of (str, float)
        The old classes that a class is most like, with the cosine of their prototypes.
    ids, given : list of str
        Of every picture; "" where no label was given.
    found : array (N,)
        The class of every picture, by number.
    confidence : array (N,)

    Raises
    ------
    DataError
        If the run is not finished or damaged.
    """

    def __init__(self, run: str | Path) -> None:
        self.run = Path(run)
        for needed in ("config.json", FOUND, CLASSES, "manifest"):
            if not (self.run / needed).exists():
                raise DataError(f"there is no {needed}: the run is not finished", file=str(run))
        with naming(self.run):
            table, classes = pq.read_table(self.run / FOUND), pq.read_table(self.run / CLASSES)
            self.classes: list[str] = classes.column("class").to_pylist()
            self.is_new = classes.column("is_new").to_numpy(zero_copy_only=False)
            names, cosines = classes.column("nearest").to_pylist(), classes.column("similarity").to_pylist()
            self.nearest = [list(zip(n, c, strict=True)) for n, c in zip(names, cosines, strict=True)]
            number = {name: k for k, name in enumerate(self.classes)}
            self.ids: list[str] = table.column("id").to_pylist()
            self.given: list[str] = [g or "" for g in table.column("given").to_pylist()]
            self.found = np.array([number[f] for f in table.column("found").to_pylist()], np.int64)
            self.confidence = table.column("confidence").to_numpy().astype(np.float64)
            self._part, self._index = table.column("part").to_numpy(), table.column("index").to_numpy()
            parts = [self.run / "manifest", self.run / "unlabelled"]
            self._manifests: list[Manifest] = [
                Manifest.load(p) for p in parts[: 1 + (self.run / "unlabelled").is_dir()]
            ]
        self._given = Counter(self.given)
        self._unlabelled = np.array([not g for g in self.given], bool)
        self._order = np.lexsort((-self.confidence, self.found))
        self._start = np.searchsorted(self.found[self._order], np.arange(len(self.classes) + 1))

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def names(self) -> dict[str, str]:
        """Names that people gave, as they are in the run folder now; what is no class of this run is left out."""
        found = read_names(self.run)
        return {c: found[c] for c in self.new_classes if c in found}

    @property
    def new_classes(self) -> list[str]:
        """Those that a person may name."""
        return [c for c, new in zip(self.classes, self.is_new, strict=True) if new]

    def members(self, k: int) -> Array:
        """The unlabelled pictures of a class, the surest first."""
        inside = self._order[self._start[k] : self._start[k + 1]]
        return np.asarray(inside[self._unlabelled[inside]])

    def labelled(self, k: int) -> int:
        """How many pictures were given a class as their label."""
        return self._given[self.classes[k]]

    def places(self, sha256: Array) -> Array:
        """Positions of pictures by the hashes of their bytes (M,); -1 for what is not in the run."""
        hashes = np.empty(len(self), object)
        for part, manifest in enumerate(self._manifests):
            inside = self._part == part
            hashes[inside] = manifest.column("sha256")[self._index[inside]]
        place = {h: n for n, h in reversed(list(enumerate(hashes.tolist())))}
        return np.array([place.get(h, -1) for h in sha256.tolist()], np.int64)

    def read_bytes(self, n: int) -> bytes:
        """The encoded picture."""
        manifest: Manifest = self._manifests[self._part[n]]
        return manifest.read_bytes(int(self._index[n]))

    def shown(self, k: int, count: int) -> tuple[Array, Array]:
        """Typical pictures of a class, and half as many of those that it is least sure of."""
        inside = self.members(k)
        typical = inside[:count]
        return typical, inside[len(typical) :][::-1][: count // 2]

    def summary(self, k: int) -> dict[str, Any]:
        """Number, size and neighbours of a class."""
        inside = self.members(k)
        return {
            "k": k,
            "size": len(inside),
            "labelled": self.labelled(k),
            "confidence": float(self.confidence[inside].mean()) if len(inside) else 0.0,
            "nearest": self.nearest[k],
            "is_new": bool(self.is_new[k]),
        }

    def by_size(self) -> list[int]:
        """Numbers of the classes: new ones first, the largest first."""
        size = np.array([len(self.members(k)) for k in range(len(self.classes))])
        return [int(k) for k in np.lexsort((-size, ~self.is_new))]


def write_discovery_report(
    run: str | Path, *, out: str | Path | None = None, thumbnail: int = 64, per_class: int = 24
) -> Path:
    """Write `report.html` of a discovery.

    Parameters
    ----------
    run : path
        Folder of the finished run.
    out : path, optional
        Default: `report.html` in the run folder.
    thumbnail : int
        Side of the thumbnails in pixels.
    per_class : int
        Typical pictures of a class, and half as many that it is least sure of; fewer where there are very many classes, and of
        those beyond a thousand none. What is left out is said.

    Returns
    -------
    Path

    Raises
    ------
    DataError
        If the run is not finished or damaged.
    """
    found = Discoveries(run)
    with naming(run):
        html = _page(found, thumbnail, per_class)
    target = Path(out) if out is not None else found.run / "report.html"
    write_atomically(target, lambda path: path.write_text(html, encoding="utf-8"))
    return target


def _page(found: Discoveries, thumbnail: int, per_class: int) -> str:
    run = found.run
    config, metrics = _json(run / "config.json"), _json(run / "metrics.json")
    names = found.names
    told = called(found.classes, names)
    order = found.by_size()
    shown = order[: MOST // 3]
    count = max(2, min(per_class, 2 * MOST // (3 * max(len(shown), 1))))
    pictures: list[int] = []
    cards = []
    for k in shown:
        card = found.summary(k)
        parts = []
        for part in found.shown(k, count):
            parts.append(list(range(len(pictures), len(pictures) + len(part))))
            pictures += part.tolist()
        cards.append(
            {
                "c": found.classes[k], "new": card["is_new"], "size": card["size"],
                "given": card["labelled"], "p": round(card["confidence"], 3), "typical": parts[0], "unsure": parts[1],
                "near": [[shown_text(name, 60), round(cosine, 2)] for name, cosine in card["nearest"]],
            }
        )  # fmt: skip
    items = [{"id": shown_text(found.ids[n], 120), "p": round(float(found.confidence[n]), 2)} for n in pictures]
    open_names = [[c, names.get(c, "")] for c in found.new_classes]
    page = page_assets("report_discovered") | {
        "config": config,
        "system": SYSTEMS[config["system"]],
        "environment": _json(run / "environment.json"),
        "metrics": metrics | {"time": metrics["seconds"]},
        "run_name": run.name,
        "classes": found.classes,
        "left_out": len(order) - len(shown),
        "map": _map(found, told),
        "numbers": _numbers(metrics),
        "curves": _curves(run / "training" / "metrics.jsonl"),
        "names": markupsafe.Markup(safe_json(open_names)),  # noqa: S704 (escaped by safe_json)
        "cards": markupsafe.Markup(safe_json(cards)),  # noqa: S704 (as above)
    }
    thumbs = [thumbnail_of(_enlarged(decode_image(found.read_bytes(n)), thumbnail), thumbnail) for n in pictures]
    return render(
        "report_discovered",
        page,
        items=markupsafe.Markup(safe_json(items)),  # noqa: S704 (escaped by safe_json)
        sheets=sheets_of(thumbs, thumbnail, 60),
        thumbnail=thumbnail,
    )


def _json(path: Path) -> Any:
    with naming(path):
        return json.loads(path.read_text(encoding="utf-8"))


def _map(found: Discoveries, told: list[str]) -> str:
    """Pictures in two dimensions, those of new classes in full colour, and the prototypes with their names."""
    if not (found.run / MAP).exists():
        return ""
    points, prototypes = [], []
    for row in pq.read_table(found.run / MAP).to_pylist():
        if row["row"] < 0:
            k = -1 - row["row"]
            prototypes.append((row["x"], row["y"], k, shown_text(told[k], 40)))
        else:
            k = int(found.found[row["row"]])
            points.append((row["x"], row["y"], k, "kept" if found.is_new[k] else "off-topic"))
    return scatter(points, prototypes if len(prototypes) <= 60 else [p for p in prototypes if found.is_new[p[2]]][:60])


def _numbers(metrics: dict[str, Any]) -> list[dict[str, Any]]:
    """How the number of classes came about: scores of the numbers that were tried, and the number over the training."""
    charts = []
    estimate = metrics.get("estimate")
    if estimate and estimate["tried"]:
        tried = sorted((int(k), float(v)) for k, v in estimate["tried"].items())
        label = "score of every number of classes that was tried"
        share = all(0 <= v <= 1 for _, v in tried)
        charts.append(
            {"title": label, "svg": curve([(label, tried)], label=label, percent=share, x_label="classes, old and new")}
        )
    numbers = metrics.get("numbers") or []
    if len(set(numbers)) > 1:
        label = "number of classes over the training"
        line = [(float(e), float(k)) for e, k in enumerate(numbers)]
        charts.append({"title": label, "svg": curve([(label, line)], label=label, x_label="epoch")})
    return charts


def _curves(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    with naming(path):
        epochs = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    keys = [k for k in epochs[-1] if k not in ("epoch", "lr", "probe", "knn")]
    charts = []
    for title, wanted in (("losses and what else was logged", keys), ("learning rate", ["lr"])):
        series = [(k, [(e["epoch"], e[k]) for e in epochs if e.get(k) is not None]) for k in wanted]
        series = [s for s in series if s[1]]
        if series:
            svg = curve(series, label=title, x_label="epoch")
            charts.append({"title": title, "svg": svg, "legend": [(k, f"s{i % 8}") for i, (k, _) in enumerate(series)]})
    return charts


def _enlarged(picture: npt.NDArray[np.uint8], side: int) -> npt.NDArray[np.uint8]:
    """A small picture, by whole pixels."""
    times = max(side // max(picture.shape[:2]), 1)
    return picture.repeat(times, 0).repeat(times, 1)
