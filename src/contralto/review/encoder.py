"""The report of a pretraining: what the encoder finds alike, a map, the course of the training; one file as `review.report`'s."""

import base64
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import markupsafe
import numpy as np
import numpy.typing as npt

from contralto.evaluation.representation import effective_rank, uniformity
from contralto.files import naming, write_atomically
from contralto.neighbors.knn import knn
from contralto.review.charts import curve, scatter
from contralto.review.report import page_assets, render, safe_json, sheets_of, thumbnail_of
from contralto.systems.registry import SYSTEMS

__all__ = ["enlarged", "picture_address", "write_encoder_report"]

NEIGHBOURS = 24


def write_encoder_report(
    run: str | Path,
    embeddings: npt.NDArray[np.float32],
    pictures: Sequence[npt.NDArray[np.uint8]],
    names: Sequence[str],
    labels: Sequence[str],
    *,
    out: str | Path | None = None,
    thumbnail: int = 64,
    seed: int = 0,
    template: str = "report_encoder",
    more: Mapping[str, Any] | None = None,
) -> Path:
    """Write `report.html` of a pretraining.

    Parameters
    ----------
    run : path
        Folder of the finished run.
    embeddings : array (N, F)
        Of some of its pictures, at least three.
    pictures : sequence of uint8 arrays (H, W, 3)
    names, labels : sequence of str
        Ids and given labels; "" where there is none.
    out : path, optional
        Default: `report.html` in the run folder.
    thumbnail : int
        Side of the thumbnails in pixels.
    seed : int
        Of the map.
    template : str
        Of the page: one that extends `report_encoder`, with what it wants in `more`.
    more : mapping, optional

    Returns
    -------
    Path
    """
    run = Path(run)
    with naming(run / "config.json"):
        config = json.loads((run / "config.json").read_text(encoding="utf-8"))
    with naming(run / "metrics.json"):
        metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    n = len(embeddings)
    index = knn(embeddings, min(NEIGHBOURS + 1, n))[1][:, 1:]
    items = [{"id": i, "t": t, "n": row.tolist()} for i, t, row in zip(names, labels, index, strict=True)]
    classes = sorted(set(labels) - {""})
    page = (
        page_assets("report_encoder")
        | {
            "config": config,
            "system": SYSTEMS[config["system"]],
            "environment": json.loads((run / "environment.json").read_text(encoding="utf-8")),
            "metrics": metrics | {"time": metrics["seconds"]},
            "run_name": run.name,
            "classes": classes,
            "labelled": bool(classes),
            "shown": n,
            "width": embeddings.shape[1],
            "uniformity": uniformity(embeddings),
            "effective_rank": effective_rank(embeddings),
            "map": _map(embeddings, labels, classes, seed),
            "curves": _curves(run / "training" / "metrics.jsonl"),
            "episode": picture_address(run / "episodes.png"),
        }
        | dict(more or {})
    )
    sheets = sheets_of([thumbnail_of(enlarged(p, thumbnail), thumbnail) for p in pictures], thumbnail, 70)
    html = render(
        template,
        page,
        items=markupsafe.Markup(safe_json(items)),  # noqa: S704 (escaped by safe_json)
        sheets=sheets,
        thumbnail=thumbnail,
    )
    target = Path(out) if out is not None else run / "report.html"
    write_atomically(target, lambda path: path.write_text(html, encoding="utf-8"))
    return target


def enlarged(picture: npt.NDArray[np.uint8], side: int) -> npt.NDArray[np.uint8]:
    """A small picture, by whole pixels."""
    times = max(side // max(picture.shape[:2]), 1)
    return picture.repeat(times, 0).repeat(times, 1)


def picture_address(path: Path) -> str | None:
    """A PNG as a data address, where there is one."""
    if not path.exists():
        return None
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def _map(embeddings: npt.NDArray[np.float32], labels: Sequence[str], classes: list[str], seed: int) -> str:
    """Embeddings in two dimensions, and the middles of the classes with their names."""
    from sklearn.manifold import TSNE

    perplexity = min(30.0, (len(embeddings) - 1) / 3)
    places = TSNE(metric="cosine", init="random", perplexity=perplexity, random_state=seed).fit_transform(embeddings)
    number = {name: i for i, name in enumerate(classes)}
    points = [(float(x), float(y), number.get(t, 6), "kept") for (x, y), t in zip(places, labels, strict=True)]
    middles = []
    for name, c in list(number.items())[:24]:
        x, y = np.median(places[[t == name for t in labels]], axis=0)
        middles.append((float(x), float(y), c, name[:40]))
    return scatter(points, middles)


def _curves(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    with naming(path):
        epochs = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    charts = []
    losses = [k for k in epochs[-1] if k not in ("epoch", "lr", "probe", "knn")]
    for title, keys, percent in (
        ("losses", losses, False),
        ("accuracy beside the training", ["probe", "knn"], True),
        ("learning rate", ["lr"], False),
    ):
        series = [(k, [(e["epoch"], e[k]) for e in epochs if e.get(k) is not None]) for k in keys]
        series = [s for s in series if s[1]]
        if series:
            svg = curve(series, label=title, percent=percent, x_label="epoch")
            charts.append({"title": title, "svg": svg, "legend": [(k, f"s{i % 8}") for i, (k, _) in enumerate(series)]})
    return charts
