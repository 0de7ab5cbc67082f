"""k-NN, re-ranking, smoothing and matching beside FAISS's own exact search of the same data, in one run.

    python benchmarks/neighbours.py [out.json] [N ...]

Clustered random features (384-d), texts (384-d), 100 classes of equal size, 20 candidates, 5 kept.
Peak memory is that of the process.
"""

import json
import resource
import sys
import time
from pathlib import Path

import faiss
import numpy as np

from contralto.neighbors.graph import adjacency, smooth
from contralto.neighbors.knn import knn
from contralto.neighbors.matching import match_texts
from contralto.neighbors.rerank import neighbour_graph
from contralto.pipelines.outputs import environment

DIM, CLASSES = 384, 100


def timed(function):
    started = time.perf_counter()
    result = function()
    return result, round(time.perf_counter() - started, 2)


def main(out: Path, sizes: list[int]) -> None:
    rows = []
    for n in sizes:
        rng = np.random.default_rng(0)
        labels = rng.integers(0, CLASSES, n)
        centres = rng.normal(size=(CLASSES, DIM)).astype(np.float32)
        features = centres[labels] + 1.5 * rng.normal(size=(n, DIM)).astype(np.float32)
        texts = centres[labels] + 2.0 * rng.normal(size=(n, DIM)).astype(np.float32)
        unit = features / np.linalg.norm(features, axis=1, keepdims=True)

        def search(unit=unit):
            index = faiss.IndexFlatIP(DIM)
            index.add(unit)
            return index.search(unit, 20)

        _, bare = timed(search)
        _, ours = timed(lambda f=features: knn(f, 20))
        (index, distance), graph = timed(lambda f=features: neighbour_graph(f))
        enhanced, smoothing = timed(lambda i=index, d=distance, t=texts: smooth(t, adjacency(i, d)))
        _, matching = timed(lambda e=enhanced, c=centres, y=labels: match_texts(e, c, y, method="rerank"))
        total = graph + smoothing + matching
        row = {
            "n": n, "dim": DIM, "classes": CLASSES, "faiss_search_s": bare, "knn_s": ours, "knn_and_rerank_s": graph,
            "smoothing_s": smoothing, "matching_s": matching, "total_over_faiss": round(total / bare, 2),
            "peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        }  # fmt: skip
        rows.append(row)
        print(*(f"{k} {v}" for k, v in row.items()), flush=True)
    text = json.dumps(
        {"command": "python benchmarks/neighbours.py", "environment": environment(), "rows": rows}, indent=1
    )
    out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(
        Path(sys.argv[1] if len(sys.argv) > 1 else "results/neighbours.json"),
        [int(a) for a in sys.argv[2:]] or [10_000, 30_000, 100_000],
    )
