"""One round of clustering: assignment to 10,000 prototypes and their update, beside an iteration of FAISS's own k-means.

    python benchmarks/prototypes.py [out.json] [--rows 1000000] [--prototypes 10000] [--dim 256] [--rounds 3]

Rows are unit vectors in clusters, in memory. Both sides start from the same prototypes and do the same work: find the nearest
one for every row, set every prototype to the mean of its rows (`spherical`: scaled to length one). In turns, medians; `memory` is
what the process takes at its peak beside the rows. Checked besides: both give the same prototypes.
"""

import argparse
import json
import resource
import statistics
import time
from pathlib import Path

import faiss
import torch
from torch.nn import functional as F

from contralto.files import write_json
from contralto.pipelines.outputs import environment
from contralto.prototypes.bank import assign, means


def make(n: int, k: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows (n, dim) around k centres, and the prototypes to start with: k of the rows."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(k, dim, generator=generator)
    rows = torch.empty(n, dim)
    for part in rows.split(100_000):
        part.copy_(centres[torch.randint(k, (len(part),), generator=generator)])
        part += 0.8 * torch.randn(part.shape, generator=generator)
        part.copy_(F.normalize(part, dim=1))
    return rows, rows[torch.randperm(n, generator=generator)[:k]].clone()


def ours(rows: torch.Tensor, start: torch.Tensor, spherical: bool) -> torch.Tensor:
    """One round by the prototype bank."""
    labels, _ = assign(rows, start, metric="cosine" if spherical else "euclidean")
    return means(rows, labels, len(start), before=start, normalize=spherical)


def faiss_round(rows: torch.Tensor, start: torch.Tensor, spherical: bool) -> torch.Tensor:
    """One iteration of FAISS's k-means."""
    engine = faiss.Kmeans(
        rows.shape[1], len(start), niter=1, spherical=spherical, min_points_per_centroid=1,
        max_points_per_centroid=len(rows),
    )  # fmt: skip
    engine.train(rows.numpy(), init_centroids=start.numpy())
    return torch.from_numpy(engine.centroids)


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="?", type=Path)
    for name, value in (("rows", 1_000_000), ("prototypes", 10_000), ("dim", 256), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    rows, start = make(args.rows, args.prototypes, args.dim)
    sides = {"contralto": ours, "faiss": faiss_round}
    found: dict[str, object] = {"rows": args.rows, "prototypes": args.prototypes, "dim": args.dim, "cases": []}
    before = peak_mib()
    for spherical in (False, True):
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        memory, results = {}, {}
        for turn in range(args.rounds):
            for name, side in list(sides.items())[:: 1 if turn % 2 == 0 else -1]:
                started = time.perf_counter()
                results[name] = side(rows, start, spherical)
                seconds[name].append(round(time.perf_counter() - started, 2))
                memory.setdefault(name, round(peak_mib() - before))
        case = {
            "spherical": spherical,
            "seconds": seconds,
            "median": {name: statistics.median(s) for name, s in seconds.items()},
            "ratio": round(statistics.median(a / b for a, b in zip(*seconds.values(), strict=True)), 3),
            "cosine": float(F.cosine_similarity(results["contralto"], results["faiss"]).mean()),
            "peak_mib_so_far": memory,
        }
        found["cases"].append(case)  # type: ignore[attr-defined]
        print(json.dumps(case))
    if args.out:
        write_json(args.out, found | {"environment": environment()})


if __name__ == "__main__":
    main()
