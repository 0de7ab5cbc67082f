"""The page of a stream of tasks: the accuracy matrices, how accuracy went over the stream, and pictures that were forgotten.

One file as `review.report`'s: no network, a strict policy, nothing of what came from outside is trusted.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import markupsafe
import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from contralto.data.images import decode_image
from contralto.data.manifest import Manifest
from contralto.data.sounds import load_sounds
from contralto.errors import DataError
from contralto.files import naming, write_atomically
from contralto.review.charts import curve, share_map
from contralto.review.report import page_assets, render, safe_json, sheets_of, shown_text, thumbnail_of
from contralto.systems.registry import SYSTEMS

__all__ = ["PROTOCOLS", "write_continual_report"]

PROTOCOLS = {"right": "class-incremental", "right_in_task": "task-incremental"}
"""Columns of the answers: whether they are right without knowing the task of a picture, and knowing it."""
MOST = 300
"""Pictures in the page."""


def write_continual_report(run: str | Path, *, out: str | Path | None = None, thumbnail: int = 64) -> Path:
    """Write `report.html` of a stream of tasks.

    Parameters
    ----------
    run : path
        Folder of the finished run.
    out : path, optional
        Default: `report.html` in the run folder.
    thumbnail : int
        Side of the thumbnails in pixels.

    Returns
    -------
    Path

    Raises
    ------
    DataError
        If the run is not finished or damaged.
    """
    run = Path(run)
    for needed in ("config.json", "metrics.json", "tasks"):
        if not (run / needed).exists():
            raise DataError(f"there is no {needed}: the run is not finished", file=str(run))
    with naming(run):
        config, metrics = (json.loads((run / f"{name}.json").read_text("utf-8")) for name in ("config", "metrics"))
        items, pictures = _forgotten(run, _look(run), len(metrics["tasks"]))
    tasks = [t | {"classes": [shown_text(c, 60) for c in t["classes"]]} for t in metrics["tasks"]]
    page = page_assets("report_continual") | {
        "config": config,
        "system": SYSTEMS[config["system"]],
        "environment": json.loads((run / "environment.json").read_text(encoding="utf-8")),
        "metrics": metrics | {"time": metrics["seconds"]},
        "run_name": run.name,
        "things": "recordings" if (run / "sounds").exists() else "pictures",
        "classes": [],
        "tasks": tasks,
        "matrices": [_matrix(name, matrix, tasks) for name, matrix in metrics["matrix"].items()],
        "curves": _over_the_stream(metrics["matrix"]) + _losses(run, len(tasks)),
    }
    html = render(
        "report_continual",
        page,
        items=markupsafe.Markup(safe_json(items)),  # noqa: S704 (escaped by safe_json)
        sheets=sheets_of([thumbnail_of(p, thumbnail) for p in pictures], thumbnail, 70),
        thumbnail=thumbnail,
    )
    target = Path(out) if out is not None else run / "report.html"
    write_atomically(target, lambda path: path.write_text(html, encoding="utf-8"))
    return target


def _matrix(name: str, matrix: list[list[float | None]], tasks: list[dict[str, Any]]) -> dict[str, str]:
    columns = [shown_text(t["name"], 40) for t in tasks]
    return {"name": name, "svg": share_map(matrix, [f"after {c}" for c in columns], columns, label=f"{name} accuracy")}


def _over_the_stream(matrices: dict[str, list[list[float | None]]]) -> list[dict[str, Any]]:
    """Mean accuracy over the tasks so far, after every task; and that of every task as it went on."""
    charts = []
    series: list[tuple[str, list[tuple[float, float]]]] = []
    for name, matrix in matrices.items():
        series.append(
            (name, [(i + 1, float(np.mean([v for v in row if v is not None]))) for i, row in enumerate(matrix)])
        )
    charts.append(_chart("accuracy, mean over the tasks so far", series, x_label="task", percent=True))
    for name, matrix in matrices.items():
        lines: list[tuple[str, list[tuple[float, float]]]] = [
            (f"task {j + 1}", [(i + 1, float(row[j] or 0.0)) for i, row in enumerate(matrix) if row[j] is not None])
            for j in range(min(len(matrix), 8))
        ]
        charts.append(_chart(f"{name} accuracy of single tasks", lines, x_label="after task", percent=True))
    return charts


def _losses(run: Path, tasks: int) -> list[dict[str, Any]]:
    """Losses over the epochs of all tasks."""
    series: dict[str, list[tuple[float, float]]] = {}
    epoch = 0
    for number in range(1, tasks + 1):
        path = run / "tasks" / f"task{number}" / "metrics.jsonl"
        if not path.exists():
            continue
        with naming(path):
            lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for line in lines:
            for key, value in line.items():
                if key not in ("epoch", "lr", "probe", "knn"):
                    series.setdefault(key, []).append((epoch + line["epoch"], value))
        epoch += len(lines)
    return [_chart("losses over all tasks", list(series.items()), x_label="epoch", percent=False)] if series else []


def _chart(title: str, series: list[tuple[str, list[tuple[float, float]]]], *, x_label: str, percent: bool) -> Any:
    svg = curve(series, label=title, percent=percent, x_label=x_label)
    return {"title": title, "svg": svg, "legend": [(name, f"s{i % 8}") for i, (name, _) in enumerate(series)]}


def _look(run: Path) -> Callable[[int], npt.NDArray[np.uint8]]:
    """How a test sample looks: a picture, or the spectrogram of a recording."""
    if not (run / "sounds").exists():
        manifest = Manifest.load(run / "manifest")
        return lambda row: decode_image(manifest.read_bytes(row))
    from contralto.review.spectrograms import spectrogram_picture

    sounds = load_sounds(run / "sounds")
    return lambda row: spectrogram_picture(sounds, row)


def _forgotten(
    run: Path, look: Callable[[int], npt.NDArray[np.uint8]], tasks: int
) -> tuple[list[dict[str, Any]], list[Any]]:
    """Test samples that were right, not knowing the task, after their own task, and are not after the last one."""
    said = [
        pq.read_table(run / "tasks" / f"task{number}" / "answers.parquet").to_pylist() for number in range(1, tasks + 1)
    ]
    at_first = {row["index"]: row["right"] for number, rows in enumerate(said) for row in rows if row["task"] == number}
    lost = [row for row in said[-1] if at_first.get(row["index"]) and not row["right"]]
    drawn = np.sort(np.random.default_rng(0).permutation(len(lost))[:MOST])
    items, pictures = [], []
    for place in drawn.tolist():
        row = lost[place]
        items.append(
            {
                "id": shown_text(row["id"]), "t": shown_text(row["label"], 60), "p": shown_text(row["predicted"], 60),
                "k": row["task"] + 1,
            }
        )  # fmt: skip
        pictures.append(look(row["index"]))
    return items, pictures
