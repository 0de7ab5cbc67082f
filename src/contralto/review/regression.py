"""The page of a regression: what is told against what is right, the samples that are farthest off, the course of the training."""

import json
from pathlib import Path
from typing import Any

import markupsafe
import numpy as np
import pyarrow.parquet as pq

from contralto.errors import DataError
from contralto.files import naming, write_atomically
from contralto.review.charts import agreement, curve
from contralto.review.report import page_assets, render, safe_json, shown_text
from contralto.systems.registry import SYSTEMS

__all__ = ["write_regression_report"]

SHOWN, WORST = 1000, 20


def write_regression_report(run: str | Path, *, out: str | Path | None = None, seed: int = 0) -> Path:
    """Write `report.html` of a finished regression.

    Parameters
    ----------
    run : path
        Folder of the run, with `config.json`, `environment.json`, `metrics.json` and `predictions.parquet`.
    out : path, optional
        Default: `report.html` in the run folder.
    seed : int
        Of the samples that are drawn.

    Returns
    -------
    Path

    Raises
    ------
    DataError
        If the run is not finished, or damaged.
    """
    run = Path(run)
    for name in ("config.json", "environment.json", "metrics.json", "predictions.parquet"):
        if not (run / name).is_file():
            raise DataError(f"there is no {name}: the run is not finished", file=str(run))
    with naming(run):
        config, environment, metrics = (
            json.loads((run / f"{n}.json").read_text(encoding="utf-8")) for n in ("config", "environment", "metrics")
        )
        table = pq.read_table(run / "predictions.parquet").to_pydict()
        number, told = np.array(table["number"], float), np.array(table["told"], float)
        rows = np.sort(np.random.default_rng(seed).permutation(len(number))[:SHOWN])
        shown = {
            title: np.array(table[key], float)[rows]
            for key, title in (("told", config["system"]), ("baseline", "least absolute error"))
            if key in table
        }
        every = np.concatenate([number[rows], *shown.values()])
        limits = float(every.min()), float(every.max())
        charts = [{"title": title, "svg": _chart(number[rows], t, title, limits)} for title, t in shown.items()]
        worst = [
            {"id": shown_text(str(table["id"][i]), 80), "number": number[i], "told": told[i]}
            for i in np.argsort(-np.abs(number - told), kind="stable")[:WORST]
        ]
    page = page_assets("report_regression") | {
        "config": config,
        "system": SYSTEMS[config["system"]],
        "environment": environment,
        "metrics": metrics | {"time": metrics["seconds"]},
        "run_name": run.name,
        "target": shown_text(str(metrics["target"]), 60),
        "classes": [],
        "shown": len(rows),
        "charts": charts,
        "worst": worst,
        "curves": _curves(run / "training" / "metrics.jsonl"),
    }
    items = markupsafe.Markup(safe_json([]))  # noqa: S704 (escaped by safe_json)
    html = render("report_regression", page, items=items, sheets=[], thumbnail=0)
    target = Path(out) if out is not None else run / "report.html"
    write_atomically(target, lambda path: path.write_text(html, encoding="utf-8"))
    return target


def _chart(number: Any, told: Any, title: str, limits: tuple[float, float]) -> str:
    points = list(zip(number.tolist(), told.tolist(), strict=True))
    label = f"right and told, {title}"
    return agreement(points, label=label, x_label="right", y_label="told", limits=limits)


def _curves(path: Path) -> list[dict[str, Any]]:
    """Losses over the epochs."""
    if not path.exists():
        return []
    with naming(path):
        epochs = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    keys = [k for k in epochs[-1] if k not in ("epoch", "lr")]
    series = [(k, [(e["epoch"], e[k]) for e in epochs if e.get(k) is not None]) for k in keys]
    svg = curve(series, label="losses", x_label="epoch")
    return [{"title": "losses", "svg": svg, "legend": [(k, f"s{i % 8}") for i, (k, _) in enumerate(series)]}]
