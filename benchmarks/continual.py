"""Small photographs in five tasks of two classes: every learner of a stream with its preset `small`, on the same pictures.

    python benchmarks/continual.py RUNS [out.json] [--picture matrices.png] [--seeds 3]

CIFAR-10 (`cifar10n` in CONTRALTO_DATA, right labels): the first 100 training and 100 test pictures of each class. The seed draws
the order of classes, the views and the order of pictures; the same for all learners, which share the features of the frozen
encoder. "class means" is `prd` with `--lr 0`: prototypes follow the means of their classes, nothing else learns. Runs are kept
in RUNS, and are not done again.
"""

import argparse
import json
import os
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from contralto.files import write_json
from contralto.pipelines.job import load_preset
from contralto.pipelines.outputs import environment
from contralto.systems.registry import get_job

EACH = 100
LEARNERS: dict[str, tuple[str, dict[str, Any]]] = {
    "finetune": ("finetune", {}),
    "lwf": ("lwf", {}),
    "prd": ("prd", {}),
    "class means": ("prd", {"lr": 0.0}),
    "replay": ("replay", {}),
    "joint": ("joint", {}),
}


def first_of_each(name: str) -> pa.Table:
    """The first pictures of every class of a part of CIFAR-10."""
    path = Path(os.environ["CONTRALTO_DATA"]) / "cifar10n" / f"{name}.parquet"
    table = pq.read_table(path, columns=["image", "class_name", "index"])
    names = table.column("class_name").to_numpy(zero_copy_only=False)
    rows = np.sort(np.concatenate([np.flatnonzero(names == c)[:EACH] for c in np.unique(names)]))
    ids = [f"{name} {index}" for index in table.column("index").to_numpy()[rows]]
    return pa.table(
        {"image": table.column("image").take(rows), "label": names[rows], "split": [name] * len(rows), "id": ids}
    )


def compare(runs: Path, seeds: int) -> dict[str, Any]:
    """Scores of all learners, seed by seed, with their mean."""
    runs.mkdir(parents=True, exist_ok=True)
    data, found = runs / "cifar10.parquet", {}
    if not data.exists():
        pq.write_table(pa.concat_tables([first_of_each("train"), first_of_each("test")]), data)
    for seed in range(seeds):
        for name, (system, more) in LEARNERS.items():
            preset = load_preset("small", system) | more
            run = get_job(system).fit(
                str(data), runs / f"{name} {seed}", **preset, seed=seed, tasks=5, cache=str(runs / "features"),
                probe=False, workers=0, progress=False,
            )  # fmt: skip
            scores = json.loads((run / "metrics.json").read_text(encoding="utf-8"))["scores"]
            for score, told in scores.items():
                found.setdefault(name, {}).setdefault(score, []).append(round(told["value"], 4))
            print(seed, name, {k: f"{v['value']:.1%}" for k, v in scores.items()}, flush=True)
    return {
        name: {score: {"mean": round(statistics.mean(v), 4), "seeds": v} for score, v in scores.items()}
        for name, scores in found.items()
    }


def draw(runs: Path, picture: Path) -> None:
    """The accuracy matrices of seed 0."""
    import matplotlib.pyplot as plt

    shown = ("finetune", "lwf", "prd", "replay")
    figure, axes = plt.subplots(2, len(shown), figsize=(11, 6), layout="constrained", sharex=True, sharey=True)
    for column, name in zip(axes.T, shown, strict=True):
        told = json.loads((runs / f"{name} 0" / "metrics.json").read_text(encoding="utf-8"))
        for axis, (protocol, matrix) in zip(column, told["matrix"].items(), strict=True):
            values = np.array(matrix, dtype=float)
            axis.imshow(values, vmin=0, vmax=1, cmap="Blues", extent=(0.5, 5.5, 5.5, 0.5))
            for i, j in zip(*np.tril_indices(len(values)), strict=True):
                colour = "white" if values[i, j] > 0.6 else "black"
                axis.text(j + 1, i + 1, f"{100 * values[i, j]:.0f}", color=colour, ha="center", va="center")
            axis.set(title=f"{name}, {protocol}", xlabel="test of task", ylabel="after task")
    for axis in axes.flat:
        axis.label_outer()
    figure.savefig(picture, dpi=110, bbox_inches="tight")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path)
    parser.add_argument("out", type=Path, nargs="?", default=Path("results/continual.json"))
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    told = {"command": "python benchmarks/continual.py RUNS", "seeds": arguments.seeds, "environment": environment()}
    write_json(arguments.out, told | {"learners": compare(arguments.runs, arguments.seeds)})
    if arguments.picture:
        draw(arguments.runs, arguments.picture)
