"""The report of a run: one HTML file that needs no network and trusts nothing that came from the web.

Text from the web reaches the page in two ways only: through Jinja's escaping, or inside a JSON block from which the script
takes it with `textContent`. A content security policy allows the one style sheet and the one script of the page by their
hashes, data: images, and nothing else.
"""

import base64
import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import markupsafe
import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
from PIL import Image

from contralto.data.manifest import Manifest
from contralto.errors import DataError
from contralto.evaluation.classification import per_class_accuracy
from contralto.evaluation.noise import risk_coverage
from contralto.files import naming, write_atomically
from contralto.review.charts import bar_pairs, curve, heat_map, scatter
from contralto.systems.registry import SYSTEMS, get_job, get_system

__all__ = ["page_assets", "render", "safe_json", "sheets_of", "shown_text", "thumbnail_of", "write_report"]

SHEET = 100
OPEN_SET_SIDE = 64
SMALLEST = 400  # characters that a picture takes in the page, thumbnail and all, at the very least
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def write_report(
    run: str | Path,
    *,
    read_image: Callable[[int], npt.NDArray[np.uint8]],
    out: str | Path | None = None,
    thumbnail: int = 48,
    max_bytes: int = 15 * 2**20,
) -> Path:
    """Write `report.html` of a run.

    Parameters
    ----------
    run : path
        Run folder with at least `manifest/`, `config.json`, `cleaned.parquet` and `metrics.json`.
    read_image : function
        Row of the manifest -> uint8 (H, W, 3).
    out : path, optional
        Default: `report.html` in the run folder.
    thumbnail : int
        Side of the thumbnails in pixels.
    max_bytes : int
        Size of the whole page; thumbnails get smaller and coarser, and at last fewer, to keep it. What is left out is said.

    Returns
    -------
    Path

    Raises
    ------
    DataError
        If the run is not finished.
    """
    run = Path(run)
    for needed in ("config.json", "cleaned.parquet", "metrics.json"):
        if not (run / needed).is_file():
            raise DataError(f"there is no {needed} yet: the run is not finished", file=str(run))
    with naming(run):  # files that can be read may still not fit together
        html = _page(run, read_image, thumbnail, max_bytes)
    target = Path(out) if out is not None else run / "report.html"
    write_atomically(target, lambda path: path.write_text(html, encoding="utf-8"))
    return target


def _page(run: Path, read_image: Callable[[int], npt.NDArray[np.uint8]], thumbnail: int, max_bytes: int) -> str:
    manifest = Manifest.load(run / "manifest")
    config = _json(run / "config.json")
    system = SYSTEMS[config["system"]]
    metrics = {"test": None, "noise": None, "anchors": None, "labels": None, "list": None} | _json(run / "metrics.json")
    if metrics["test"] is not None:
        metrics["test"] = {"plain": None, "difference": None} | metrics["test"]
    rows = _table(run / "cleaned.parquet").to_pylist()
    name = "report_sets" if get_job(system.name).multilabel else "report"
    page = page_assets(name) | {
        "config": config,
        "system": system,
        "environment": _json(run / "environment.json") if (run / "environment.json").exists() else {},
        "metrics": metrics,
        "classes": manifest.class_names,
        "data": _data_section(manifest, rows),
        "curves": _curve_charts(run, get_system(system.name).stages),
        "run_name": run.name,
    }
    parts, items_of = (_sets_parts, _set_items) if name == "report_sets" else (_label_parts, _items)
    page |= parts(run, manifest, system.title, metrics, rows, read_image)
    fixed = len(render(name, page, items="", sheets=[], thumbnail=thumbnail, left_out=0).encode())
    budget = max_bytes - fixed - 200_000
    items, sheets, size, left_out = _gallery(rows, manifest, read_image, thumbnail, budget, items_of)
    return render(
        name,
        page,
        items=markupsafe.Markup(safe_json(items)),  # noqa: S704 (escaped by safe_json)
        sheets=sheets,
        thumbnail=size,
        left_out=left_out,
    )


def page_assets(name: str) -> dict[str, Any]:
    """Style and script of a page, with the hashes by which its policy allows them."""
    templates = resources.files("contralto.review").joinpath("templates")
    style, shared, own = (templates.joinpath(f).read_text("utf-8") for f in ("report.css", "page.js", f"{name}.js"))
    script = shared + own
    return {"style": style, "script": script, "style_hash": _policy_hash(style), "script_hash": _policy_hash(script)}


def render(name: str, page: dict[str, Any], **more: Any) -> str:
    """The page of a template, with everything escaped that is not markup already."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("contralto.review"), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["percent"] = lambda x, digits=1: "\u2013" if x is None or x != x else f"{100 * x:.{digits}f} %"
    return environment.get_template(f"{name}.html.j2").render(page, **more)


def _label_parts(
    run: Path,
    manifest: Manifest,
    title: str,
    metrics: dict[str, Any],
    rows: list[dict[str, Any]],
    read_image: Callable[[int], npt.NDArray[np.uint8]],
) -> dict[str, Any]:
    """What only the page for one label per picture has."""
    clean = manifest.column("clean_label").astype(int)
    known = bool((clean[[r["index"] for r in rows]] != -2).any())
    return {
        "known": known,
        "accuracy": _accuracy_chart(run, manifest, title),
        "coverage": _coverage(rows, clean, manifest.class_names, known),
        "map": _map_chart(run, manifest, rows),
        "flow": _flow_chart(rows, manifest.class_names),
        "open_set": _open_set(run, metrics, manifest, read_image),
    }


def _sets_parts(
    run: Path,
    manifest: Manifest,
    title: str,
    metrics: dict[str, Any],
    rows: list[dict[str, Any]],
    read_image: Callable[[int], npt.NDArray[np.uint8]],
) -> dict[str, Any]:
    """What only the page for several labels per picture has: average precision by class."""
    test = metrics["test"]
    if test is None:
        return {"accuracy": ""}
    ours, plain = test["model"]["by_class"], (test["plain"] or {}).get("by_class")
    order = sorted((c for c, v in enumerate(ours) if v is not None), key=lambda c: ours[c])
    bars = [(manifest.class_names[c], None if plain is None else plain[c], ours[c]) for c in order]
    return {"accuracy": bar_pairs(bars, names=("plain training", title))}


def _json(path: Path) -> Any:
    with naming(path):
        return json.loads(path.read_text(encoding="utf-8"))


def _table(path: Path) -> Any:
    with naming(path):
        return pq.read_table(path)


def _policy_hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def safe_json(value: Any) -> str:
    """JSON that cannot end its script block or be taken for markup."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text


def shown_text(text: str, limit: int = 300) -> str:
    """A text from the web as pages show it: without control and direction marks, and not longer than `limit` characters.

    Examples
    --------
    >>> shown_text("a\u202eb" + 10 * "c", 6)
    'abccc…'
    """
    text = _CONTROL.sub("", text[: 4 * limit])
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _gallery(
    rows: list[dict[str, Any]],
    manifest: Manifest,
    read_image: Callable[[int], npt.NDArray[np.uint8]],
    side: int,
    budget: int,
    items_of: Callable[[list[dict[str, Any]], list[str]], list[dict[str, Any]]],
) -> tuple[list[dict[str, Any]], list[str], int, int]:
    """Items for the script and sprite sheets of their thumbnails within the budget (characters of the page)."""
    texts = manifest.texts
    most = max(1, budget // SMALLEST)  # no more than these can fit, so no more are decoded
    order = sorted(_most_suspicious(rows, most), key=lambda r: (r["given"], -r["p_wrong"]))
    thumbs = [thumbnail_of(read_image(r["index"]), side) for r in order]
    for scale, quality in ((1.0, 70), (1.0, 50), (0.75, 50), (0.67, 35)):
        size = round(side * scale)
        sheets = sheets_of(thumbs, size, quality)
        items = items_of(order, texts)
        if sum(map(len, sheets)) + len(safe_json(items).encode()) <= budget or (scale, quality) == (0.67, 35):
            break
    total = sum(map(len, sheets)) + len(safe_json(items).encode())
    if total > budget:  # the most suspicious of all stay
        keep = max(1, int(len(order) * budget / total * 0.95))
        chosen = sorted(sorted(range(len(order)), key=lambda i: -order[i]["p_wrong"])[:keep])
        order, thumbs = [order[i] for i in chosen], [thumbs[i] for i in chosen]
        sheets, items = sheets_of(thumbs, size, quality), items_of(order, texts)
    return items, sheets, size, len(rows) - len(order)


def _most_suspicious(rows: list[dict[str, Any]], most: int) -> list[dict[str, Any]]:
    return rows if len(rows) <= most else sorted(rows, key=lambda r: -r["p_wrong"])[:most]


def thumbnail_of(image: npt.NDArray[np.uint8], side: int) -> Image.Image:
    """A picture (H, W, 3) within a white square."""
    picture = Image.fromarray(image)
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    canvas = Image.new("RGB", (side, side), (255, 255, 255))
    canvas.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return canvas


def sheets_of(thumbs: list[Image.Image], side: int, quality: int) -> list[str]:
    """Thumbnails as data addresses of sheets of ten by ten."""
    sheets = []
    for start in range(0, len(thumbs), SHEET):
        part = thumbs[start : start + SHEET]
        sheet = Image.new("RGB", (10 * side, 10 * side), (255, 255, 255))
        for i, thumb in enumerate(part):
            sheet.paste(thumb if thumb.width == side else thumb.resize((side, side)), (i % 10 * side, i // 10 * side))
        buffer = io.BytesIO()
        sheet.crop((0, 0, 10 * side, -(-len(part) // 10) * side)).save(buffer, "WEBP", quality=quality)
        sheets.append("data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode())
    return sheets


def _items(order: list[dict[str, Any]], texts: list[str]) -> list[dict[str, Any]]:
    scores = ("classifier", "auxiliary", "prototype", "fused")
    return [
        {
            "id": shown_text(r["id"], 120), "g": r["given"], "v": r["verdict"], "n": r["new"], "t": shown_text(texts[r["index"]]),
            "p": round(r["p_wrong"], 3), "m": None if r["text_match"] is None else round(r["text_match"], 3), "r": r["text_rank"],
            "a": [round(r[f"given_{s}"], 2) for s in scores], "b": [round(r[f"new_{s}"], 2) for s in scores],
            "k": r["nearest_prototypes"],
        }
        for r in order
    ]  # fmt: skip


def _set_items(order: list[dict[str, Any]], texts: list[str]) -> list[dict[str, Any]]:
    return [
        {
            "id": shown_text(r["id"], 120), "g": r["given"], "a": r["added"], "r": r["removed"], "i": r["ignored"],
            "t": shown_text(texts[r["index"]]), "p": round(r["p_wrong"], 3),
        }
        for r in order
    ]  # fmt: skip


def _data_section(manifest: Manifest, rows: list[dict[str, Any]]) -> dict[str, Any]:
    reasons = Counter(manifest.skipped.column("reason").to_pylist())
    examples: dict[str, list[str]] = {}
    for r in manifest.skipped.to_pylist():
        examples.setdefault(r["reason"], [])
        if len(examples[r["reason"]]) < 3:
            examples[r["reason"]].append(shown_text(r["id"], 60))
    groups = manifest.column("duplicate_group")
    splits = Counter(manifest.column("split").tolist())
    per_class: dict[str, Counter[str]] = {name: Counter() for name in manifest.class_names}
    for r in rows:
        if "added" in r:  # several labels
            for kind in ("given", "added", "removed"):
                for name in r[kind]:
                    per_class[name][kind] += 1
        else:
            per_class[r["given"]][r["verdict"]] += 1
    return {
        "pictures": len(manifest),
        "splits": dict(splits.most_common()),
        "skipped": [(reason, n, examples[reason]) for reason, n in reasons.most_common()],
        "skipped_total": manifest.skipped.num_rows,
        "duplicates": len(groups) - len(np.unique(groups)),
        "without_text": sum(not t.strip() for t in manifest.texts),
        "per_class": [(c, per_class[c.name]) for c in manifest.classes],
        "trained": len(rows),
    }


def _accuracy_chart(run: Path, manifest: Manifest, title: str) -> str:
    path = run / "test_predictions.parquet"
    if not path.exists():
        return ""
    table = _table(path)
    labels, count = table.column("label").to_numpy(), len(manifest.classes)
    ours = per_class_accuracy(labels, table.column("predicted").to_numpy(), count)
    plain = (
        per_class_accuracy(labels, table.column("plain").to_numpy(), count) if "plain" in table.column_names else None
    )
    order = [int(i) for i in np.argsort(ours) if not np.isnan(ours[i])]
    rows = [(manifest.class_names[i], None if plain is None else float(plain[i]), float(ours[i])) for i in order]
    return bar_pairs(rows, names=("plain training", title))


def _coverage(
    rows: list[dict[str, Any]], clean: npt.NDArray[np.int64], names: list[str], known: bool
) -> dict[str, Any]:
    p = np.array([r["p_wrong"] for r in rows])
    wrong = None
    if known:
        number = {n: i for i, n in enumerate(names)}
        wrong = np.array([number[r["given"]] != clean[r["index"]] for r in rows])
    series = []
    x, y = risk_coverage(p)
    step = max(1, len(x) // 200)
    if wrong is not None:
        x, truth = risk_coverage(p, wrong)
        series.append(("measured", list(zip(x[::step].tolist(), truth[::step].tolist(), strict=True))))
        y = truth
    else:
        series.append(("estimated", list(zip(x[::step].tolist(), y[::step].tolist(), strict=True))))
    wanted = [t for t in (0.8, 0.9, 0.95, 0.99) if y[0] < t]
    targets = [(t, float(x[int(np.argmax(y >= t - 1e-12))])) for t in wanted]
    return {
        "chart": curve(series, label="share of right labels after looking at the most suspicious", percent=True,
                       x_label="share of images looked at", width=420, height=220),
        "targets": targets, "start": float(y[0]), "measured": known, "n": len(rows),
    }  # fmt: skip


def _open_set(
    run: Path,
    metrics: dict[str, Any],
    manifest: Manifest,
    read_image: Callable[[int], npt.NDArray[np.uint8]],
) -> dict[str, Any] | None:
    """Curves over the threshold of "unknown", and up to 100 test pictures from the surest to the least sure."""
    if metrics["test"] is None or not (run / "open_set.parquet").exists():
        return None
    found = metrics["test"]["open_set"]
    told = {"rejected_known": "pictures of the classes rejected", "rejected_unknown": "pictures of no class rejected"}
    told["accepted_right"] = "right among the accepted"
    series = [
        (name, [(x, y) for x, y in zip(found["thresholds"], found[key], strict=True) if y is not None])
        for key, name in told.items()
    ]
    series = [s for s in series if s[1]]
    table = _table(run / "open_set.parquet").sort_by("confidence")
    step = max(1.0, table.num_rows / SHEET)
    rows = table.take([int(i * step) for i in range(int(table.num_rows / step))]).to_pylist()
    data = {
        "sheet": sheets_of([thumbnail_of(read_image(r["index"]), OPEN_SET_SIDE) for r in rows], OPEN_SET_SIDE, 60)[0],
        "side": OPEN_SET_SIDE,
        "curve": {k: found[k] for k in ("thresholds", *told)},
        "items": [
            {
                "p": round(r["confidence"], 3), "n": manifest.class_names[r["predicted"]], "right": r["right"],
                "known": r["known"], "id": shown_text(manifest.column("id")[r["index"]], 120),
            }
            for r in rows
        ],
    }  # fmt: skip
    return {
        "chart": curve(
            series, label="what a threshold rejects", percent=True, x_label="threshold", width=420, height=220
        ),
        "legend": [(name, f"s{i % 8}") for i, (name, _) in enumerate(series)],
        "unknown": found["unknown"],
        "start": round(found["best"], 2) if found["unknown"] else 0.3,
        "data": markupsafe.Markup(safe_json(data)),  # noqa: S704 (escaped by safe_json)
    }


def _map_chart(run: Path, manifest: Manifest, rows: list[dict[str, Any]]) -> str:
    if not (run / "map.parquet").exists():
        return ""
    by_index = {r["index"]: r for r in rows}
    number = {n: i for i, n in enumerate(manifest.class_names)}
    points, prototypes = [], []
    for r in _table(run / "map.parquet").to_pylist():
        if r["index"] < 0:
            c = -1 - r["index"]
            prototypes.append((r["x"], r["y"], c, manifest.class_names[c]))
        else:
            row = by_index[r["index"]]
            points.append((r["x"], r["y"], number[row["new"] or row["given"]], row["verdict"]))
    return scatter(points, prototypes)


def _curve_charts(run: Path, stages: Sequence[str]) -> list[dict[str, Any]]:
    charts: list[dict[str, Any]] = []
    for stage in stages:
        path = run / "stages" / stage / "metrics.jsonl"
        if not path.exists():
            continue
        with naming(path):
            epochs = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            keys = [k for k in epochs[-1] if k.startswith("loss_")]
        for title, wanted, percent in (("losses", keys, False), ("kept and corrected", ["kept", "corrected"], True)):
            series = [(k, [(e["epoch"], e[k]) for e in epochs if k in e]) for k in wanted]
            series = [s for s in series if s[1]]
            if series:
                told = [(n.removeprefix("loss_"), f"s{i % 8}") for i, (n, _) in enumerate(series)]
                charts.append(
                    {
                        "title": f"{stage}: {title}",
                        "svg": curve(series, label=f"{stage} {title}", percent=percent, x_label="epoch"),
                        "legend": told,
                    }
                )
    return charts


def _flow_chart(rows: list[dict[str, Any]], names: list[str]) -> str:
    flow = Counter((r["given"], r["new"] or "off-topic") for r in rows if r["verdict"] in ("corrected", "off-topic"))
    if not flow:
        return ""
    number = {n: i for i, n in enumerate([*names, "off-topic"])}
    given = Counter(dict.fromkeys(names, 0))
    for (a, _), n in flow.items():
        given[a] += n
    shown = [n for n, c in given.most_common(40) if c]
    columns = [*shown, "off-topic"] if len(names) > 40 else [*names, "off-topic"]
    matrix = [[flow.get((a, b), 0) for b in columns] for a in shown]
    assert all(n in number for n in columns)
    return heat_map(matrix, shown, columns, label="flow of labels: given (rows) to new (columns)")
