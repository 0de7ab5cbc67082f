"""The contrast engine beside plain PyTorch and other libraries: time and memory of value and gradient.

    python benchmarks/contrast.py [out.json]            # goes on where it stopped
    python benchmarks/contrast.py --draw docs/contrast.png
    python benchmarks/contrast.py --tiles               # time by size of tile
    python benchmarks/contrast.py --device cuda         # the fused form: rate, and a batch of a million

Three losses over batches of N pairs (D = 256, single precision): InfoNCE and CLIP on N x N, NT-Xent on 2 N rows. Every form is a
process of its own that waits for its turn; turns go round, so that whatever else the machine does disturbs all alike. A turn is
forward and backward from raw rows, as often as 0.2 s need, each with fresh gradients. Medians over rounds, of wall and of CPU
time, and of their ratios within a round; `floor` are the products alone that the loss needs (three of N x N x D for InfoNCE; for
CLIP three while the matrix fits one tile and four from there on; two of 2 N x 2 N x D for NT-Xent). Memory is the most that one
turn takes beyond its inputs. The largest size is run once, for its memory.

Peers: `plain` is the cross-entropy of the matrix, as a few lines of PyTorch; lightly, pytorch-metric-learning, solo-learn
(NT-Xent) and open_clip (CLIP) where they are installed; who is not there, or needs more than `LIMIT_GIB` of memory, has a row
that says so.
"""

import argparse
import ctypes
import gc
import importlib.util
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

from contralto.losses import pairs, tiled
from contralto.losses.contrast import contrast
from contralto.pipelines.outputs import environment

DIM, TEMPERATURE = 256, 0.1
SIZES = [64, 256, 512, 1024, 2048, 4096, 8192, 16384]
LARGE = 65536
ROUNDS, TURN, LIMIT_GIB = 5, 0.2, 8
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


def ours(function) -> Loss:
    return lambda a, b: function(a, b, temperature=TEMPERATURE)


def engine(a, b):
    """InfoNCE by the general form, which takes any positives, weights and temperatures."""
    return contrast(a, b, positives=torch.arange(len(a)), temperature=TEMPERATURE)


def lightly_nt_xent() -> Loss:
    from lightly.loss import NTXentLoss

    return NTXentLoss(temperature=TEMPERATURE)


def pml_nt_xent() -> Loss:
    from pytorch_metric_learning.losses import NTXentLoss, SelfSupervisedLoss

    return SelfSupervisedLoss(NTXentLoss(temperature=TEMPERATURE))


def solo_nt_xent() -> Loss:
    package = importlib.util.find_spec("solo")
    if package is None:
        raise ModuleNotFoundError("No module named 'solo'")
    # The file alone: the package imports trainers of older versions of Lightning.
    where = Path(package.submodule_search_locations[0], "losses", "simclr.py")
    spec = importlib.util.spec_from_file_location("solo_simclr", where)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return lambda a, b: module.simclr_loss_func(a, b, temperature=TEMPERATURE)


def open_clip_loss() -> Loss:
    from open_clip.loss import ClipLoss

    loss = ClipLoss()
    scale = torch.tensor(1 / TEMPERATURE)
    return lambda a, b: loss(F.normalize(a, dim=1), F.normalize(b, dim=1), scale)


def floor(loss: str):
    """The products alone, in the tiles that the engine takes."""
    kept: dict[int, list[torch.Tensor]] = {}

    def run(a, b):
        n = len(a) * (2 if loss == "nt_xent" else 1)
        step = min(tiled.tile_rows(n, 4), n)
        if n not in kept:
            kept[n] = [
                torch.randn(n, DIM),
                torch.randn(n, DIM),
                torch.rand(step, n),
                torch.empty(n, DIM),
                torch.empty(n, DIM),
            ]
        x, y, tile, back, forth = kept[n]
        for start in range(0, n, step):
            part = x[start : start + step]
            share = tile[: len(part)]
            torch.mm(part, y.T, out=share)
            if loss == "clip" and step < n:
                torch.mm(part, y.T, out=share)
            torch.mm(share, y, out=back[start : start + step])
            if loss != "nt_xent":
                forth.addmm_(share.T, part)

    return run


FORMS: dict[str, dict[str, Callable[[], Any]]] = {
    "info_nce": {
        "floor": lambda: floor("info_nce"), "plain": lambda: plain_info_nce,
        "contralto": lambda: ours(pairs.info_nce), "contrast": lambda: engine,
    },
    "clip": {
        "floor": lambda: floor("clip"), "plain": lambda: plain_clip,
        "contralto": lambda: ours(pairs.clip), "open_clip": open_clip_loss,
    },
    "nt_xent": {
        "floor": lambda: floor("nt_xent"), "plain": lambda: plain_nt_xent,
        "contralto": lambda: ours(pairs.nt_xent), "lightly": lightly_nt_xent,
        "pytorch-metric-learning": pml_nt_xent, "solo-learn": solo_nt_xent,
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
        once() if n < LARGE else None  # what is set up once
        a.grad = b.grad = None
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak begins anew
        before, started = peak_bytes(), time.perf_counter()
        value = once()
        row = {"value": value, "extra_mib": round((peak_bytes() - before) / 2**20, 1)}
        if n >= LARGE:
            row["wall_ms"] = round(1000 * (time.perf_counter() - started), 1)
    except (RuntimeError, MemoryError) as error:
        row = {"failed": str(error).partition("\n")[0][:120]}
    print(json.dumps(row), flush=True)
    for _ in sys.stdin:
        wall, cpu, count = time.perf_counter(), time.process_time(), 0
        while count == 0 or time.perf_counter() - wall < TURN:
            once()
            count += 1
        told = [(time.perf_counter() - wall) / count, (time.process_time() - cpu) / count]
        print(json.dumps(told), flush=True)


def used_address_space() -> int:
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()


def measure(loss: str, n: int, rounds: int) -> list[dict[str, Any]]:
    """All forms of a loss at one size, in turns."""
    forms = [form for form in FORMS[loss] if n < LARGE or form != "floor"]
    rows, timed, started = [], {}, {}
    for k, form in enumerate(forms):
        for ahead in forms[
            k : len(forms) if n <= 2048 else k + 1
        ]:  # small ones begin together: they take long to import
            if ahead not in started:
                started[ahead] = subprocess.Popen(
                    [sys.executable, __file__, "--worker", loss, ahead, str(n)],
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                )  # fmt: skip
        process = started[form]
        first = process.stdout.readline()
        rows.append({"loss": loss, "form": form, "n": n})
        if first:
            rows[-1] |= json.loads(first)
        else:
            rows[-1]["failed"] = (process.stderr.read().strip().splitlines() or ["ended"])[-1][:120]
        if "failed" in rows[-1] or n >= LARGE:
            process.stdin.close()
            process.wait()
        else:
            timed[form] = (process, rows[-1], [])
    for _ in range(rounds):
        for process, _, times in timed.values():
            process.stdin.write("\n")
            process.stdin.flush()
            times.append(json.loads(process.stdout.readline()))
    for form, (process, row, times) in timed.items():
        process.stdin.close()
        process.wait()
        for k, name in enumerate(("wall", "cpu")):
            values = sorted(t[k] for t in times)
            row[f"{name}_ms"] = round(1000 * statistics.median(values), 3)
            row[f"{name}_ms_range"] = [round(1000 * values[0], 3), round(1000 * values[-1], 3)]
            for peer in ("floor", "plain"):
                if peer in timed and form != peer:
                    ratios = [t[k] / p[k] for t, p in zip(times, timed[peer][2], strict=True)]
                    row[f"{name}_over_{peer}"] = round(statistics.median(ratios), 3)
    for row in rows:
        print(json.dumps(row), flush=True)
    return rows


def by_tile() -> None:
    """CPU time of InfoNCE by the size of a tile."""
    for n in (2048, 8192, 16384):
        for mib in (1, 2, 4, 8, 16, 24, 32, 48):
            tiled.TILE_BYTES = mib * 2**20
            a, b = torch.randn(n, DIM, requires_grad=True), torch.randn(n, DIM, requires_grad=True)
            times = []
            for _ in range(4):
                started = time.process_time()
                pairs.info_nce(a, b).backward()
                times.append(time.process_time() - started)
            print(f"N {n}, tiles of {mib} MiB: {1000 * min(times):.0f} ms")


def on_cuda(out: Path) -> None:
    """The fused form on one card: share of the rate of a plain product, and the largest batch."""
    torch.manual_seed(0)
    large = [torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    rate = 2 * 8192**3 / seconds_on_cuda(lambda: large[0] @ large[1])
    rows = []
    for n in (8192, 32768, 131072, 1048576):
        a, b = (torch.randn(n, DIM, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(2))

        def once(a=a, b=b) -> None:
            a.grad = b.grad = None
            pairs.info_nce(a, b, temperature=TEMPERATURE).backward()

        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        took = seconds_on_cuda(once, 10 if n < 500_000 else 1)
        rows.append(
            {
                "n": n, "ms": round(1000 * took, 3), "extra_mib": (torch.cuda.max_memory_allocated() - before) / 2**20,
                "of_matmul_rate": round(3 * 2 * n * n * DIM / took / rate, 3),
            }
        )  # fmt: skip
        print(json.dumps(rows[-1]), flush=True)
    n = 4096
    x = torch.nn.functional.normalize(torch.randn(2, n, DIM, device="cuda"), dim=2).bfloat16()
    found = []
    for form, dtype in (("fused", torch.bfloat16), ("dense", torch.float64)):
        a, b = (y.to(dtype).requires_grad_() for y in x)
        loss = contrast(a, b, positives=torch.arange(n, device="cuda"), normalize=False, form=form)
        loss.backward()
        found.append([loss.detach().double(), a.grad.double(), b.grad.double()])
    errors = [float((f - d).norm() / d.norm()) for f, d in zip(*found, strict=True)]
    result = {
        "card": torch.cuda.get_device_name(),
        "bf16_matmul_tflops": round(rate / 1e12, 1),
        "rows": rows,
        "relative_errors": dict(zip(("loss", "query", "key"), errors, strict=True)),
        "environment": environment(),
    }
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def seconds_on_cuda(function: Callable[[], Any], repeats: int = 20) -> float:
    """Seconds of one call, after one for warming up."""
    function()
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        function()
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop) / 1000 / repeats


NAMES = {"info_nce": "InfoNCE", "clip": "CLIP", "nt_xent": "NT-Xent"}
COLOURS = {
    "contralto": "#c2185b", "contrast": "#f48fb1", "plain": "#555555", "floor": "#bbbbbb", "open_clip": "#1f77b4",
    "lightly": "#2ca02c", "pytorch-metric-learning": "#ff7f0e", "solo-learn": "#9467bd",
}  # fmt: skip


LABELS = {
    "floor": "the products alone", "plain": "plain PyTorch", "contrast": "contralto, general form",
    "pytorch-metric-learning": "pytorch-metric-learning (beyond the scale)",
}  # fmt: skip


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Time over that of the plain form, and memory, by the number of pairs."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(12, 7), sharex=True, sharey="row", layout="constrained")
    for (loss, name), (time_axis, memory_axis) in zip(NAMES.items(), axes.T, strict=True):
        for form in COLOURS:
            mine = [r for r in rows if (r["loss"], r["form"]) == (loss, form)]
            timed = [r for r in mine if "wall_over_floor" in r or (form == "floor" and "wall_ms_range" in r)]
            there = [r for r in mine if "extra_mib" in r and form != "floor"]
            style = {"color": COLOURS[form], "marker": "o", "ms": 4, "lw": 2.4 if form == "contralto" else 1.4}
            ratios = [r.get("wall_over_floor", 1.0) for r in timed]
            time_axis.plot([r["n"] for r in timed], ratios, label=LABELS.get(form, form), **style)
            memory_axis.plot([r["n"] for r in there], [r["extra_mib"] for r in there], **style)
            ended = [r for r in mine if "failed" in r]
            if there and ended:
                memory_axis.plot([there[-1]["n"]], [there[-1]["extra_mib"]], "x", color=COLOURS[form], ms=9, mew=2)
            if not mine:
                time_axis.lines[-1].remove()
        time_axis.set(xscale="log", yscale="log", title=name)
        time_axis.axhline(1.35, color="black", lw=0.8, ls=":")
        memory_axis.set(xscale="log", yscale="log", xlabel="pairs")
        time_axis.set_ylim(0.9, 30)
        time_axis.set_yticks([1, 2, 5, 10, 20], ["1", "2", "5", "10", "20"])
        time_axis.legend(frameon=False, fontsize=8)
        for axis in (time_axis, memory_axis):
            axis.grid(alpha=0.3, which="major")
            axis.spines[["top", "right"]].set_visible(False)
            axis.minorticks_off()
    sizes = sorted({r["n"] for r in rows})
    for axis in axes[1]:
        axis.set_xticks(sizes, [f"{n:,}" for n in sizes], rotation=45)
    axes[0, 0].set_ylabel("time, over that of the products alone")
    axes[1, 0].set_ylabel("memory beyond the inputs, MiB")
    figure.savefig(path, dpi=130)


def table(rows: list[dict[str, Any]]) -> str:
    """The table of docs/contrast.md: the engine, and how many times as long and how much memory others take."""
    head = "| loss | pairs | contralto, ms (range) | over the products | MiB | plain PyTorch: times as long, memory | others |"
    lines = [head, "|---|--:|--:|--:|--:|--:|---|"]
    for loss, name in NAMES.items():
        for n in sorted({r["n"] for r in rows}):
            here = {r["form"]: r for r in rows if (r["loss"], r["n"]) == (loss, n)}
            if "contralto" not in here:
                continue
            ours, products = here["contralto"], here.get("floor")
            spread = "-".join(_short(x) for x in ours.get("wall_ms_range", []))
            cells = [
                f"{_short(ours['wall_ms'])} ({spread})" if spread else _short(ours["wall_ms"]),
                f"{ours['wall_over_floor']:.2f}" if products else "",
                f"{ours['extra_mib']:,.0f}",
                _beside(here["plain"], ours),
                "; ".join(
                    f"{form} {_beside(r, ours)}"
                    for form, r in here.items()
                    if form not in ("floor", "plain", "contralto", "contrast")
                ),
            ]
            lines.append(f"| {name} | {n:,} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _beside(row: dict[str, Any], ours: dict[str, Any]) -> str:
    if "failed" in row:
        return "not installed" if "No module" in row["failed"] else f"over {LIMIT_GIB} GiB"
    ratio = row["wall_over_floor"] / ours["wall_over_floor"]
    return (
        f"{ratio:.2f} x, {row['extra_mib']:,.0f} MiB" if ratio < 10 else f"{ratio:.0f} x, {row['extra_mib']:,.0f} MiB"
    )


def _short(x: float) -> str:
    return f"{x:,.3g}" if x < 1000 else f"{x:,.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "out", nargs="?", type=Path, help="default: results/contrast.json, contrast_cuda.json with --device cuda"
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=[*SIZES, LARGE])
    parser.add_argument("--losses", choices=FORMS, nargs="+", default=list(FORMS))
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--tiles", action="store_true", help="time by size of tile")
    parser.add_argument("--draw", type=Path, help="draw what was measured into this file, and print the table")
    a = parser.parse_args()
    out = a.out or Path(f"results/contrast{'_cuda' if a.device == 'cuda' else ''}.json")
    if a.tiles:
        by_tile()
        return
    if a.device == "cuda":
        on_cuda(out)
        return
    result = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {"rows": []}
    if a.draw:
        draw(result["rows"], a.draw)
        print(table(result["rows"]))
        return
    result |= {
        "command": "python benchmarks/contrast.py",
        "dim": DIM,
        "temperature": TEMPERATURE,
        "limit_gib": LIMIT_GIB,
    }
    for loss in a.losses:
        for n in a.sizes:
            if any((r["loss"], r["n"]) == (loss, n) for r in result["rows"]):
                continue
            result["rows"] += measure(loss, n, ROUNDS if n <= 4096 else 3)
            result["environment"] = environment()
            out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(sys.argv[2], sys.argv[3], int(sys.argv[4]))
    else:
        main()
