"""k-NN, re-ranking, smoothing and matching beside FAISS's own exact search of the same data; exact and by an index.

    [CONTRALTO_DATA=...] python benchmarks/neighbours.py [out.json] [N ...]

Clustered random features (384-d), texts (384-d), 100 classes of equal size, 20 candidates, 5 kept. Each class has 24
directions of its own in which its members differ, so that neighbours are more than chance. A process of its own for each
size and kind of search, so that peak memory is its own. Up to 100,000 the exact search is measured whole; above, 20,000
queries are, and the time of all is scaled from them (`scaled`). Recall is the share of the 20 exact neighbours of 1,000
rows that the index finds too. A million is extrapolated by the growth between the two largest sizes.

`streamed` is `knn_streamed`, alone: rows in half precision on the disk, an IVF-PQ index, true cosines of four times as many
candidates. Its peak memory counts the pages of the file that are in memory, which the system takes back when it needs them.

What stands in the file already is not measured again: delete it to start afresh.

With CONTRALTO_DATA, recall is also measured on features of real photographs: the frozen Lite0 on tiny_imagenet100.
"""

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import faiss
import numpy as np

from contralto.neighbors.graph import adjacency, smooth
from contralto.neighbors.knn import knn
from contralto.neighbors.matching import match_texts
from contralto.neighbors.rerank import neighbour_graph
from contralto.neighbors.streamed import default_index, knn_streamed
from contralto.pipelines.outputs import environment

DIM, CLASSES, SAMPLE = 384, 100, 20_000
SIZES = [10_000, 30_000, 100_000, 300_000]


def timed(function):
    started = time.perf_counter()
    result = function()
    return result, round(time.perf_counter() - started, 2)


def make(n: int):
    """Labels, centres, features and texts of n pictures."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, CLASSES, n)
    centres = rng.standard_normal((CLASSES, DIM), np.float32)
    features, texts = (centres[labels] + s * rng.standard_normal((n, DIM), np.float32) for s in (0.3, 2.0))
    for c in range(CLASSES):
        rows = np.flatnonzero(labels == c)
        directions = rng.standard_normal((24, DIM), np.float32) / math.sqrt(24)
        features[rows] += 2 * rng.standard_normal((len(rows), 24), np.float32) @ directions
    return labels, centres, features, texts


def bare_search(features, queries):
    """Seconds of FAISS alone."""
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)

    def search():
        index = faiss.IndexFlatIP(DIM)
        index.add(unit)
        index.search(unit[queries], 20)

    return timed(search)[1]


def recall(features, search: str, **options) -> float:
    rows = np.random.default_rng(1).permutation(len(features))[:1000]
    exact = knn(features, 20, queries=features[rows])[1]
    return shared(exact, knn(features, 20, queries=features[rows], search=search, **options)[1])


def shared(exact, found) -> float:
    return round(float(np.mean([len(set(a) & set(b)) / 20 for a, b in zip(exact, found, strict=True)])), 4)


def streamed(n: int) -> dict[str, object]:
    """Neighbours of rows on the disk, in this process; another one makes them."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "features.npy"
        subprocess.run([sys.executable, __file__, "--make", str(n), str(path)], check=True)
        features = np.load(path, mmap_mode="r")
        (_, found), seconds = timed(lambda: knn_streamed(features, 20))
        row = {"n": n, "search": "streamed", "index": default_index(n, DIM), "knn_s": seconds, "peak_gib": peak_gib()}
        rows = np.random.default_rng(1).permutation(n)[:1000]
        return row | {"recall": shared(knn(features, 20, queries=features[rows])[1], found[rows])}


def one(n: int, search: str) -> dict[str, object]:
    """One size in this process."""
    if search == "streamed":
        return streamed(n)
    labels, centres, features, texts = make(n)
    row: dict[str, object] = {"n": n, "search": search}
    if search == "exact":
        queries = np.arange(n) if n <= 100_000 else np.random.default_rng(1).permutation(n)[:SAMPLE]
        row["faiss_search_s"] = round(bare_search(features, queries) * n / len(queries), 2)
        row["scaled"] = len(queries) < n
        if row["scaled"]:
            return row | {"peak_gib": peak_gib()}
    _, row["knn_s"] = timed(lambda: knn(features, 20, search=search))
    (index, distance), row["knn_and_rerank_s"] = timed(lambda: neighbour_graph(features, search=search))
    enhanced, row["smoothing_s"] = timed(lambda: smooth(texts, adjacency(index, distance)))
    _, row["matching_s"] = timed(lambda: match_texts(enhanced, centres, labels, method="rerank"))
    row["total_s"] = round(sum(row[k] for k in ("knn_and_rerank_s", "smoothing_s", "matching_s")), 2)
    row["peak_gib"] = peak_gib()
    if search == "exact":
        row["total_over_faiss"] = round(row["total_s"] / row["faiss_search_s"], 2)
    else:
        row["recall"] = recall(features, search)
    return row


def peak_gib() -> float:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return round(int(status.split("VmHWM:")[1].split()[0]) / 2**20, 2)


def on_photographs(data: Path) -> list[dict[str, object]]:
    """Recall and seconds on features of the frozen Lite0."""
    import pyarrow.parquet as pq
    import torch

    from contralto.encoders.image import image_encoder
    from contralto.views.image import EvalView, draw_views

    encoder = image_encoder("efficientnet-lite0", pretrained=True, size=96).eval()
    pictures = (
        pq.read_table(data / "tiny_imagenet100/tiny_imagenet100.parquet", columns=["image"]).column(0).to_pylist()
    )
    view = EvalView(96, 1.0, encoder.mean, encoder.std)
    parts = []
    with torch.inference_mode():
        for start in range(0, len(pictures), 64):
            pixels = [draw_views(p, [view], [None])[0] for p in pictures[start : start + 64]]
            parts.append(encoder(torch.stack(pixels)).numpy())
    features = np.concatenate(parts)
    rows = []
    for search, probes in (("exact", 1), ("ivf", 8), ("ivf", 16), ("ivf", 32), ("ivf", 64), ("IVF256,SQ8", 16)):
        seconds = timed(lambda s=search, p=probes: knn(features, 20, search=s, probes=p))[1]
        row: dict[str, object] = {"n": len(features), "dim": features.shape[1], "search": search, "knn_s": seconds}
        if search != "exact":
            row |= {"probes": probes, "recall": recall(features, search, probes=probes)}
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


def in_a_process(n: int, search: str) -> dict[str, object]:
    command = [sys.executable, __file__, "--one", str(n), search]
    row = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    print(json.dumps(row), flush=True)
    return row


def at_a_million(rows: list[dict[str, object]]) -> list[dict[str, object]]:
    """By the power law through the two largest sizes of each column."""
    out = []
    for search, columns in (("exact", ["faiss_search_s"]), ("ivf", ["knn_s", "total_s", "peak_gib"])):
        last = [r for r in rows if r["search"] == search][-2:]
        if len(last) == 2:
            row: dict[str, object] = {"n": 1_000_000, "search": search, "extrapolated": True}
            for column in columns:
                power = math.log(last[1][column] / last[0][column]) / math.log(last[1]["n"] / last[0]["n"])
                row[column] = round(last[1][column] * (1_000_000 / last[1]["n"]) ** power, 2)
                row[f"{column}_grows_with_n_to_the"] = round(power, 2)
            out.append(row)
    return out


def main(out: Path, sizes: list[int]) -> None:
    result = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {"rows": []}
    result |= {"command": "python benchmarks/neighbours.py", "dim": DIM, "classes": CLASSES}
    for n, search in ((n, search) for n in sizes for search in ("exact", "ivf", "streamed")):
        if any((r["n"], r["search"]) == (n, search) for r in result["rows"]):
            continue  # measured before
        result["rows"].append(in_a_process(n, search) | {"environment": environment()})
        result["million"] = at_a_million(result["rows"])
        out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if "photographs" not in result and "CONTRALTO_DATA" in os.environ:
        result["photographs"] = {
            "rows": on_photographs(Path(os.environ["CONTRALTO_DATA"])), "environment": environment(),
        }  # fmt: skip
        out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(one(int(sys.argv[2]), sys.argv[3])))
    elif sys.argv[1:2] == ["--make"]:
        np.save(sys.argv[3], make(int(sys.argv[2]))[2].astype(np.float16))
    else:
        main(
            Path(sys.argv[1] if len(sys.argv) > 1 else "results/neighbours.json"),
            [int(a) for a in sys.argv[2:]] or SIZES,
        )
