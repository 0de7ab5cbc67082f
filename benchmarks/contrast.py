"""The contrast engine beside plain PyTorch and other libraries: time and memory of value and gradient.

    python benchmarks/contrast.py [out.json]            # goes on where it stopped
    python benchmarks/contrast.py --tiles               # time by size of tile

Three losses over batches of N pairs (D = 256, single precision): InfoNCE and CLIP on N x N, NT-Xent on 2 N rows. Every form is a
process of its own that waits for its turn; turns go round, so that whatever else the machine does disturbs all alike. A turn is
forward and backward from raw rows, as often as 0.2 s need, each with fresh gradients. Medians over rounds, of wall and of CPU
time; `floor` are the products alone that the loss needs (three of N x N x D for InfoNCE, four for CLIP, two of 2 N x 2 N x D for
NT-Xent), timed in the same rounds. Memory is the most that a turn takes beyond its inputs.

Peers: `plain` is the cross-entropy of the matrix, as a few lines of PyTorch; lightly, pytorch-metric-learning, solo-learn
(NT-Xent) and open_clip (CLIP) where they are installed; who is not there, or needs more than `LIMIT_GIB` of memory, has a row
that says so.
"""

import argparse
import gc
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from contralto.losses import contrast, pairs, tiled
from contralto.pipelines.outputs import environment

DIM, TEMPERATURE = 256, 0.1
SIZES = [64, 256, 512, 1024, 2048, 4096, 8192, 16384]
LARGE = 65536
ROUNDS, TURN, LIMIT_GIB = 7, 0.2, 8
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def plain_info_nce(a, b):
    return F.cross_entropy(F.normalize(a, dim=1) @ F.normalize(b, dim=1).T / TEMPERATURE, torch.arange(len(a)))


def plain_clip(a, b):
    logits = F.normalize(a, dim=1) @ F.normalize(b, dim=1).T / TEMPERATURE
    target = torch.arange(len(a))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def plain_nt_xent(a, b):
    z = F.normalize(torch.cat([a, b]), dim=1)
    logits = (z @ z.T / TEMPERATURE).fill_diagonal_(-torch.inf)
    return F.cross_entropy(logits, torch.arange(len(z)).roll(len(a)))


def dense(function) -> Loss:
    """The engine with the whole matrix."""
    contrast.TILED_FROM = pairs.SYMMETRIC_FROM = sys.maxsize
    return lambda a, b: function(a, b, temperature=TEMPERATURE)


def tiles(function) -> Loss:
    """The engine in tiles, at every size."""
    contrast.TILED_FROM = pairs.SYMMETRIC_FROM = 0
    return lambda a, b: function(a, b, temperature=TEMPERATURE)


def lightly_nt_xent() -> Loss:
    from lightly.loss import NTXentLoss

    return NTXentLoss(temperature=TEMPERATURE)


def pml_nt_xent() -> Loss:
    from pytorch_metric_learning.losses import NTXentLoss, SelfSupervisedLoss

    return SelfSupervisedLoss(NTXentLoss(temperature=TEMPERATURE))


def solo_nt_xent() -> Loss:
    from solo.losses.simclr import simclr_loss_func

    n = {}

    def loss(a, b):
        if len(a) not in n:
            n[len(a)] = torch.arange(len(a)).repeat(2)
        return simclr_loss_func(torch.cat([a, b]), indexes=n[len(a)], temperature=TEMPERATURE)

    import inspect

    if "z2" in inspect.signature(simclr_loss_func).parameters:
        return lambda a, b: simclr_loss_func(a, b, temperature=TEMPERATURE)
    return loss


def open_clip_loss() -> Loss:
    from open_clip.loss import ClipLoss

    loss = ClipLoss()
    scale = torch.tensor(1 / TEMPERATURE)
    return lambda a, b: loss(F.normalize(a, dim=1), F.normalize(b, dim=1), scale)


def floor(products: float, rows: int):
    """Only the products, on matrices of the largest size that is handy, scaled."""

    def run(a, b):
        n = len(a) * rows
        x = torch.cat([a, b]).detach()[:n] if rows == 2 else a.detach()
        y = x if rows == 2 else b.detach()
        step = tiled.tile_rows(n, 4)
        tile, back, forth = torch.empty(min(step, n), n), torch.empty(min(step, n), DIM), torch.zeros(n, DIM)
        count = 0.0
        for start in range(0, n, step):
            part = x[start : start + step]
            torch.mm(part, y.T, out=tile[: len(part)])
            if products == 4:
                torch.mm(part, y.T, out=tile[: len(part)])
            if products > 2 or start < n / 2:  # two of a symmetric matrix: half of the first, half of both others
                torch.mm(tile[: len(part)], y, out=back[: len(part)])
                forth.addmm_(tile[: len(part)].T, part)
        return count

    return run


FORMS: dict[str, dict[str, Callable[[], Any]]] = {
    "info_nce": {
        "floor": lambda: floor(3, 1), "plain": lambda: plain_info_nce, "dense": lambda: dense(pairs.info_nce),
        "tiled": lambda: tiles(pairs.info_nce), "auto": lambda: lambda a, b: pairs.info_nce(a, b, temperature=TEMPERATURE),
    },
    "clip": {
        "floor": lambda: floor(4, 1), "plain": lambda: plain_clip, "dense": lambda: dense(pairs.clip),
        "tiled": lambda: tiles(pairs.clip),
        "auto": lambda: lambda a, b: pairs.clip(a, b, temperature=TEMPERATURE), "open_clip": open_clip_loss,
    },
    "nt_xent": {
        "floor": lambda: floor(2, 2), "plain": lambda: plain_nt_xent, "dense": lambda: dense(pairs.nt_xent),
        "tiled": lambda: tiles(pairs.nt_xent), "auto": lambda: lambda a, b: pairs.nt_xent(a, b, temperature=TEMPERATURE),
        "lightly": lightly_nt_xent, "pytorch-metric-learning": pml_nt_xent, "solo-learn": solo_nt_xent,
    },
}  # fmt: skip


def peak_bytes() -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def worker(loss: str, form: str, n: int) -> None:
    """Wait for a line, take a turn, say what it took."""
    resource.setrlimit(resource.RLIMIT_AS, (LIMIT_GIB * 2**30 + used_address_space(), resource.RLIM_INFINITY))
    torch.manual_seed(0)
    function = FORMS[loss][form]()
    a, b = torch.randn(n, DIM, requires_grad=True), torch.randn(n, DIM, requires_grad=True)

    def once() -> float | None:
        a.grad = b.grad = None
        value = function(a, b)
        if isinstance(value, torch.Tensor):
            value.backward()
            return value.item()
        return None

    try:
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak begins anew
        before = peak_bytes()
        value = once()
        memory = peak_bytes() - before
        started = time.perf_counter()
        once()
        repeats = max(1, round(TURN / (time.perf_counter() - started)))
    except (RuntimeError, MemoryError) as error:
        print(json.dumps({"failed": str(error).partition("\n")[0][:120]}), flush=True)
        return
    print(json.dumps({"value": value, "extra_mib": round(memory / 2**20, 1)}), flush=True)
    for _ in sys.stdin:
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(repeats):
            once()
        told = [(time.perf_counter() - wall) / repeats, (time.process_time() - cpu) / repeats]
        print(json.dumps(told), flush=True)


def used_address_space() -> int:
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()


def measure(loss: str, n: int, rounds: int) -> list[dict[str, Any]]:
    """All forms of a loss at one size, in turns."""
    processes, rows = {}, []
    for form in FORMS[loss]:
        command = [sys.executable, __file__, "--worker", loss, form, str(n)]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        first = process.stdout.readline()
        row = {"loss": loss, "form": form, "n": n}
        if not first:
            last = process.stderr.read().strip().splitlines()[-1:]
            row["failed"] = last[0][:120] if last else "ended"
        else:
            row |= json.loads(first)
        rows.append(row)
        if "failed" not in row:
            processes[form] = (process, row, [])
    for _ in range(rounds):
        for process, _, times in processes.values():
            process.stdin.write("\n")
            process.stdin.flush()
            times.append(json.loads(process.stdout.readline()))
    for process, row, times in processes.values():
        process.stdin.close()
        process.wait()
        for k, name in enumerate(("wall", "cpu")):
            values = sorted(t[k] for t in times)
            row |= {f"{name}_ms": round(1000 * statistics.median(values), 3)}
            row[f"{name}_ms_range"] = [round(1000 * values[0], 3), round(1000 * values[-1], 3)]
    bare = processes.get("floor")
    for form, (_, row, times) in processes.items():
        for peer in ("floor", "plain"):
            if peer in processes and form != peer and bare is not None:
                ratios = [t[1] / p[1] for t, p in zip(times, processes[peer][2], strict=True)]
                row[f"over_{peer}"] = round(statistics.median(ratios), 3)
    for row in rows:
        print(json.dumps(row), flush=True)
    return rows


def by_tile() -> None:
    """CPU time of InfoNCE by the size of a tile."""
    for n in (2048, 8192):
        for mib in (0.5, 1, 2, 4, 8, 16, 32):
            tiled.TILE_BYTES = int(mib * 2**20)
            function = tiles(pairs.info_nce)
            a, b = torch.randn(n, DIM, requires_grad=True), torch.randn(n, DIM, requires_grad=True)
            times = []
            for _ in range(4):
                started = time.process_time()
                function(a, b).backward()
                times.append(time.process_time() - started)
            print(f"N {n}, tiles of {mib} MiB: {1000 * min(times):.0f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="?", type=Path, default=Path("results/contrast.json"))
    parser.add_argument("--sizes", type=int, nargs="+", default=[*SIZES, LARGE])
    parser.add_argument("--tiles", action="store_true")
    a = parser.parse_args()
    if a.tiles:
        by_tile()
        return
    result = json.loads(a.out.read_text(encoding="utf-8")) if a.out.exists() else {"rows": []}
    result |= {
        "command": "python benchmarks/contrast.py",
        "dim": DIM,
        "temperature": TEMPERATURE,
        "limit_gib": LIMIT_GIB,
    }
    for loss in FORMS:
        for n in a.sizes:
            if any((r["loss"], r["n"]) == (loss, n) for r in result["rows"]):
                continue
            result["rows"] += measure(loss, n, ROUNDS if n <= 8192 else 3 if n <= 16384 else 1)
            result["environment"] = environment()
            a.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(sys.argv[2], sys.argv[3], int(sys.argv[4]))
    else:
        main()
