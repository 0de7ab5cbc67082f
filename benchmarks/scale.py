"""Time and memory of the whole job, by stage, for 1,000, 10,000 and 100,000 pictures; ends in a picture.

    CONTRALTO_DATA=... python benchmarks/scale.py [N ...] [--out results/scale.json] [--picture docs/scale.png] [--work FOLDER]

Pictures are random crops of tiny_imagenet100's photographs, brought to 96 x 96 (no two alike), of 100 classes, in Parquet
shards, with the name of the right class in nine of ten texts; 30 % of the labels are wrong and 5 % of the pictures are for
testing. The job is `fit_capro` with the `small` preset, in a process of its own, with the plain baseline.

`features` is the time in which pictures become features, whichever stage asked for them; it is not counted there again. Peak
memory is that of the process, for each stage alone. Interrupted, the same command goes on in the same `--work` folder:
with the next shard, the next stage or epoch, the next size.
"""

import argparse
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageEnhance

from contralto.files import write_atomically
from contralto.pipelines.capro import CAProJob, fit_capro
from contralto.pipelines.job import load_preset
from contralto.pipelines.outputs import environment

SIZES = [1_000, 10_000, 100_000]
SHARD, SIDE, WRONG, TEST = 1000, 96, 0.3, 0.05
STAGES = (
    "ingest", "features", "plain", "vanilla", "matching", "reconciling", "capro", "cleaning", "finetune", "evaluation", "report",
)  # fmt: skip


def make_pictures(n: int, data: Path, folder: Path) -> None:
    """Shards of new pictures; those that are there stay."""
    folder.mkdir(parents=True, exist_ok=True)
    columns = ["image", "label", "class_name"]
    source = pq.read_table(data / "tiny_imagenet100/tiny_imagenet100.parquet", columns=columns).to_pydict()
    names = dict(zip(source["label"], source["class_name"], strict=True))
    for start in range(0, n, SHARD):
        path = folder / f"{start // SHARD:05d}.parquet"
        if path.exists():
            continue
        rows = [one_picture(i, source, names) for i in range(start, min(start + SHARD, n))]
        write_atomically(
            path, lambda part, rows=rows: pq.write_table(pa.Table.from_pylist(rows), part, row_group_size=250)
        )


def one_picture(i: int, source: dict, names: dict[int, str]) -> dict[str, object]:
    """Picture i, a function of its number alone."""
    rng = np.random.default_rng([0, i])
    row = int(rng.integers(len(source["image"])))
    right = source["label"][row]
    given = int(rng.integers(len(names))) if rng.random() < WRONG else right
    named = right if rng.random() < 0.9 else int(rng.integers(len(names)))
    image = Image.open(io.BytesIO(source["image"][row])).convert("RGB")
    side = rng.uniform(0.6, 1.0) * min(image.size)
    left, top = rng.uniform(0, image.width - side), rng.uniform(0, image.height - side)
    image = image.resize((SIDE, SIDE), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    for enhance in (ImageEnhance.Brightness, ImageEnhance.Color):
        image = enhance(image).enhance(rng.uniform(0.8, 1.2))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return {
        "image": buffer.getvalue(),
        "id": f"{i:07d}",
        "query": names[given],
        "title": f"{names[named]} {rng.choice(['photo', 'picture', 'for sale', 'in the wild', 'close up'])} {i}",
        "clean_label": names[right],
        "split": "test" if rng.random() < TEST else "train",
    }


def run_job(data: Path, out: Path) -> None:
    """In a process of its own: the job, with time in `features` and peak memory of every stage kept beside it."""
    path = out.with_suffix(".json")
    told: dict[str, dict[str, float]] = json.loads(path.read_text()) if path.exists() else {}
    timed, features = CAProJob._timed, CAProJob.features

    def add(stage: str, seconds: float, peak: float) -> None:
        before = told.get(stage, {"seconds": 0.0, "peak_gib": 0.0})
        told[stage] = {
            "seconds": round(before["seconds"] + seconds, 2), "peak_gib": max(before["peak_gib"], peak),
        }  # fmt: skip
        write_atomically(path, lambda part: part.write_text(json.dumps(told)))

    inside = [0.0]

    @contextmanager
    def measured(job, name, text):
        reset_peak()
        inside[0], started = 0.0, time.perf_counter()
        with timed(job, name, text):
            yield
        add(name, time.perf_counter() - started - inside[0], peak_gib())

    def counted(job, *arguments):
        before = peak_gib()
        started = time.perf_counter()
        result = features(job, *arguments)
        seconds = time.perf_counter() - started
        inside[0] += seconds
        add("features", seconds, max(before, peak_gib()))
        return result

    CAProJob._timed, CAProJob.features = measured, counted  # type: ignore[method-assign]
    started = time.perf_counter()
    fit_capro(str(data), out, **load_preset("small"), progress=False)
    add("total", time.perf_counter() - started, 0.0)


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def peak_gib() -> float:
    return round(int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 2**20, 2)


def one_size(n: int, data: Path, work: Path) -> dict[str, object]:
    pictures, out = work / f"pictures-{n}", work / f"run-{n}"
    make_pictures(n, data, pictures)
    subprocess.run([sys.executable, __file__, "--job", str(pictures), str(out)], check=True)
    told = json.loads(out.with_suffix(".json").read_text())
    metrics = json.loads((out / "metrics.json").read_text())
    folders = {"pictures": pictures, "run": out}
    return {
        "n": n,
        "total_s": round(sum(told[s]["seconds"] for s in STAGES if s in told), 1),
        "peak_gib": max(told[s]["peak_gib"] for s in STAGES if s in told),
        "stages": {s: told[s] for s in STAGES if s in told},
        "disk_mb": {
            k: round(sum(p.stat().st_size for p in f.rglob("*") if p.is_file()) / 1e6) for k, f in folders.items()
        },
        "accuracy": {k: round(metrics["test"][k]["accuracy"], 4) for k in ("plain", "model")},
        "environment": environment(),
    }


def draw(rows: list[dict], path: Path) -> None:
    """Time a picture, stacked by stage, and the peak of memory."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), width_ratios=[3, 2], layout="constrained")
    colours = [*plt.get_cmap("tab10").colors, (0.25, 0.25, 0.25)]
    labels = [f"{r['n']:,}" for r in rows]
    bottom = np.zeros(len(rows))
    for stage, colour in zip(STAGES, colours, strict=True):
        height = np.array([1000 * r["stages"].get(stage, {"seconds": 0})["seconds"] / r["n"] for r in rows])
        left.bar(labels, height, 0.55, bottom=bottom, color=colour, label=stage)
        bottom += height
    for i, row in enumerate(rows):
        minutes = row["total_s"] / 60
        told = (
            f"{row['total_s']:.0f} s"
            if minutes < 2
            else f"{minutes:.0f} min"
            if minutes < 120
            else f"{minutes / 60:.1f} h"
        )
        left.annotate(told, (i, bottom[i]), (0, 4), textcoords="offset points", ha="center", weight="bold")
    left.set(ylabel="milliseconds per picture", xlabel="pictures", title="From nothing to the report: time by stage")
    left.set_ylim(0, 1.12 * bottom.max())
    handles, names = left.get_legend_handles_labels()
    left.legend(handles[::-1], names[::-1], frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=9)
    right.plot([r["n"] for r in rows], [r["peak_gib"] for r in rows], "o-", color="black")
    for row in rows:
        place = (row["n"], row["peak_gib"])
        right.annotate(f"{row['peak_gib']:.1f}", place, (0, 7), textcoords="offset points", ha="center")
    right.set(xscale="log", xlabel="pictures", ylabel="GiB", title="Peak memory")
    right.set_xticks([r["n"] for r in rows], labels)
    right.minorticks_off()
    right.margins(x=0.15)
    right.set_ylim(0, 1.25 * max(r["peak_gib"] for r in rows))
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main(sizes: list[int], out: Path, picture: Path, work: Path) -> None:
    rows = json.loads(out.read_text())["rows"] if out.exists() else []
    for n in sizes:
        if all(r["n"] != n for r in rows):
            row = one_size(n, Path(os.environ["CONTRALTO_DATA"]), work)
            print(json.dumps(row), flush=True)
            rows = sorted([*rows, row], key=lambda r: r["n"])
            result = {"command": "python benchmarks/scale.py", "preset": "small", "rows": rows}
            text = json.dumps(result, indent=1) + "\n"
            write_atomically(out, lambda part, text=text: part.write_text(text, encoding="utf-8"))
    if rows:
        draw(rows, picture)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--job"]:
        run_job(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        parser = argparse.ArgumentParser()
        parser.add_argument("sizes", nargs="*", type=int, default=SIZES)
        parser.add_argument("--out", type=Path, default=Path("results/scale.json"))
        parser.add_argument("--picture", type=Path, default=Path("docs/scale.png"))
        parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "contralto-scale")
        a = parser.parse_args()
        main(a.sizes, a.out, a.picture, a.work)
