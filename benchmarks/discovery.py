"""New classes among photographs: protogcd and gpc (`--preset frozen`) beside k-means that knows the labels, on several draws.

    python benchmarks/discovery.py [out.json] [--sets tiny cifar] [--seeds 0 1 2]

*tiny*: 20 of the classes of Tiny ImageNet with 400 pictures, 10 of them old; 600 labelled pictures and 1,800 without a label.
*cifar*: CIFAR-10, 5 of 10 classes old, as many pictures. A seed draws which classes are old and which pictures have labels, and
is that of the runs. Methods: *protogcd*, with the number of classes estimated; *gpc*, which looks for it while it learns; and
beside each semi-supervised *k-means* of as many clusters on the same features. `all`, `old`, `new`: accuracy of the unlabelled
pictures, clusters matched to classes once. Needs CONTRALTO_DATA and `contralto[pretrained]`; minutes for every draw.
"""

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from contralto.evaluation.discovery import cluster_accuracy
from contralto.files import write_json
from contralto.neighbors.kmeans import semi_supervised_kmeans
from contralto.pipelines.job import load_preset
from contralto.pipelines.outputs import environment
from contralto.systems.registry import get_job

SETS = {
    "tiny": ("tiny_imagenet100/tiny_imagenet100.parquet", 400, 10, 10, 600, 1800),
    "cifar": ("cifar10n/train.parquet", 1, 5, 5, 600, 1800),
}
"""Table, pictures that a class must have, old and new classes, pictures with and without labels."""


def draw(name: str, seed: int, folder: Path) -> tuple[Path, Path, dict[str, int], int, int]:
    """Tables of labelled and of unlabelled pictures, the classes of the latter (old ones first), and how many are old and new."""
    path, least, old, new, labelled, unlabelled = SETS[name]
    table = pq.read_table(Path(os.environ["CONTRALTO_DATA"]) / path)
    if "split" in table.column_names:
        table = table.filter(np.array(table["split"].to_pylist()) == "train")
    rng, kind = np.random.default_rng(seed), np.array(table["class_name"].to_pylist())
    kinds, count = np.unique(kind, return_counts=True)
    kinds = rng.permutation(kinds[count >= least])[: old + new]
    order = rng.permutation(np.flatnonzero(np.isin(kind, kinds)))
    shown = np.concatenate([order[kind[order] == k][: labelled // old] for k in kinds[:old]])
    rest = rng.permutation(np.setdiff1d(order, shown))[:unlabelled]
    ids = pa.array([f"{row:05d}" for row in range(len(kind))])
    files = folder / "labelled.parquet", folder / "unlabelled.parquet"
    for file, rows in zip(files, (shown, rest), strict=True):
        label = {"class_name": kind[shown].tolist()} if file is files[0] else {}
        pq.write_table(pa.table({"id": ids.take(rows), "image": table["image"].take(rows), **label}), file)
    numbers = {k: c for c, k in enumerate([*sorted(kinds[:old]), *sorted(kinds[old:])])}
    return *files, {ids[row].as_py(): numbers[kind[row]] for row in rest.tolist()}, old, new


def measure(name: str, seed: int) -> list[dict[str, Any]]:
    """All methods on one draw."""
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        labelled, unlabelled, right, old, new = draw(name, seed, folder)

        def add(method: str, truth: list[int], clusters: np.ndarray, **more: Any) -> None:
            value = cluster_accuracy(truth, clusters, range(old), resamples=100)
            percent = {
                k: round(100 * v.value, 1) for k, v in (("all", value.all), ("old", value.old), ("new", value.new))
            }
            found.append({"set": name, "seed": seed, "method": method} | percent | more)
            print(json.dumps(found[-1]), flush=True)

        for system in ("protogcd", "gpc"):
            job, out = get_job(system), folder / system
            arguments = load_preset("frozen", system) | {"seed": seed, "probe": False, "progress": False}
            job.fit(str(labelled), out, unlabelled=str(unlabelled), cache=str(folder / "cache"), **arguments)
            metrics = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
            table, hidden = pq.read_table(out / "discovered.parquet"), job.labels < 0
            number = {k: c for c, k in enumerate(pq.read_table(out / "classes.parquet")["class"].to_pylist())}
            clusters = np.array([number[k] for k in table["found"].to_pylist()])[hidden]
            ids = np.array(table["id"].to_pylist())[hidden]  # without pictures that are there twice
            truth = [right[i] for i in ids]
            told = {"new_classes": metrics["new_classes"], "right": new}
            more: dict[str, Any] = {"seconds": round(sum(metrics["seconds"].values()))}
            if system == "protogcd":  # for gpc it is where it starts
                more["interval"] = [max(metrics["estimate"][k] - old, 0) for k in ("low", "high")]
            add(system, truth, clusters, **told, **more)
            plain = semi_supervised_kmeans(job.counted, job.labels, old + metrics["new_classes"], seed=seed)
            add(f"k-means beside {system}", truth, plain.labels[hidden], **told)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="?", type=Path)
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    if args.out and args.out.exists():  # other draws that are there already
        rows = json.loads(args.out.read_text(encoding="utf-8"))["rows"]
    for name in args.sets:
        for seed in args.seeds:
            rows = [r for r in rows if (r["set"], r["seed"]) != (name, seed)] + measure(name, seed)
            if args.out:
                write_json(
                    args.out, {"command": "python benchmarks/discovery.py", "rows": rows, "environment": environment()}
                )


if __name__ == "__main__":
    main()
