"""Pictures per second from JPEG files to batches, beside torchvision's ImageFolder, in interleaved rounds.

    CONTRALTO_DATA=... python benchmarks/reading.py [out.json] [--rounds 7] [--pictures 768]

Both sides read the same files with two worker processes, batch 64, each at its own random crops of the same distribution:
the weak view (crop of 80 to 100 %, flip, normalisation), the strong one (crop of 20 to 100 %, flip, grey, colour jitter,
normalisation; ours adds its lighting noise), or both of one picture. torchvision runs in both of its idioms, on PIL images
and on tensors (`ToImage` first), and the faster one counts. Files are small enough to stay in the page cache.

Photographs are mosaics of 4 x 4 CamVid frames (street scenes), brought to typical sizes of the web and saved at quality 88;
`fashion` are the product pictures of fashion_web as they are. CPU time is that of the process and its workers.
`left` says where our time goes, by cProfile in one process without workers; `transport` is what workers add to that.
"""

import argparse
import cProfile
import io
import json
import os
import pstats
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from contralto.data.dataset import EpochSampler, ImageDataset
from contralto.data.sources import ByteReader
from contralto.pipelines.outputs import environment
from contralto.views.image import strong_view, weak_view

BATCH, WORKERS = 64, 2
HALF = (0.5, 0.5, 0.5)
# name of the files, side of the output, views
CASES = (
    ("photographs 500 x 375", 224, "weak"),
    ("photographs 500 x 375", 224, "strong"),
    ("photographs 500 x 375", 224, "both"),
    ("photographs 500 x 375", 96, "both"),
    ("photographs 1024 x 768", 224, "both"),
    ("fashion 72 x 72", 64, "both"),
)
# Where the time goes: functions, of which cProfile's cumulative time counts.
PARTS = {
    "reading bytes": ("read",),
    "header": ("open_image", "oriented_size"),
    "decoding": ("load_image",),
    "cropping and resizing": ("cut", "_cut_reduced"),
    "colour and normalising": ("finish",),
    "drawing": ("view_generator", "place"),
    "collating": ("default_collate",),
}


def write_files(name: str, count: int, root: Path, data: Path) -> Path:
    """A folder per class, as ImageFolder wants it."""
    folder = root / name.replace(" ", "_")
    if folder.exists():
        return folder
    rng = np.random.default_rng(0)
    if name.startswith("fashion"):
        table = pq.read_table(data / "fashion_web/fashion_web.parquet", columns=["image"]).column(0).to_pylist()
        pictures = [table[i] for i in rng.permutation(len(table))[:count]]
    else:
        size = tuple(int(n) for n in name.split()[1::2])
        frames = pq.read_table(data / "camvid/camvid240.parquet", columns=["image"]).column(0).to_pylist()
        decoded = [Image.open(io.BytesIO(f)).convert("RGB") for f in frames]
        pictures = [mosaic(decoded, size, rng) for _ in range(count)]
    for i, data_of_one in enumerate(pictures):
        path = folder / f"class{i % 10}" / f"{i:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data_of_one)
    return folder


def mosaic(frames: list[Image.Image], size: tuple[int, int], rng: np.random.Generator) -> bytes:
    whole = Image.new("RGB", (960, 720))
    for place, i in enumerate(rng.integers(len(frames), size=16)):
        whole.paste(frames[i], (240 * (place % 4), 180 * (place // 4)))
    out = io.BytesIO()
    whole.resize(size, Image.Resampling.LANCZOS).save(out, "JPEG", quality=88)
    return out.getvalue()


def theirs(folder: Path, size: int, views: str, idiom: str) -> DataLoader:
    def transform(strong: bool):
        colour = [v2.RandomGrayscale(0.2), v2.ColorJitter(0.4, 0.4, 0.4, 0.4)] if strong else []
        crop = v2.RandomResizedCrop(size, scale=(0.2 if strong else 0.8, 1.0), antialias=True)
        pixels = [crop, v2.RandomHorizontalFlip(), *colour]
        steps = [*pixels, v2.ToImage()] if idiom == "PIL" else [v2.ToImage(), *pixels]
        return v2.Compose([*steps, v2.ToDtype(torch.float32, scale=True), v2.Normalize(HALF, HALF)])

    transforms = [transform(s) for s in (False, True) if views in ("both", "strong" if s else "weak")]
    dataset = ImageFolder(folder, lambda image: [t(image) for t in transforms])
    return DataLoader(dataset, BATCH, shuffle=True, num_workers=WORKERS, persistent_workers=True)


def ours(folder: Path, size: int, views: str, workers: int = WORKERS) -> DataLoader:
    paths = sorted(folder.glob("*/*.jpg"))
    places = [(p.relative_to(folder).as_posix(), "file", "", 0, p.stat().st_size) for p in paths]
    reader = ByteReader(str(folder))
    chosen = [
        make(size, HALF, HALF) for n, make in (("weak", weak_view), ("strong", strong_view)) if views in ("both", n)
    ]
    dataset = ImageDataset(lambda i: reader.read(*places[i]), {"label": torch.zeros(len(paths))}, chosen, seed=0)
    sampler = EpochSampler(len(paths), seed=0)
    return DataLoader(dataset, BATCH, sampler=sampler, num_workers=workers, persistent_workers=workers > 0)


def cpu_seconds(loader: DataLoader) -> float:
    """Of this process and the loader's workers."""
    ticks = 0
    for worker in loader._iterator._workers if loader.num_workers else ():
        fields = Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def one_epoch(loader: DataLoader, count: int) -> tuple[float, float]:
    """Pictures per second, CPU milliseconds per picture."""
    cpu, started = cpu_seconds(loader), time.perf_counter()
    for _ in loader:
        pass
    return count / (time.perf_counter() - started), 1000 * (cpu_seconds(loader) - cpu) / count


def what_is_left(folder: Path, size: int, views: str, count: int) -> dict[str, float]:
    """Milliseconds a picture, by part, in one process and one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    loader = ours(folder, size, views, workers=0)
    for _ in loader:
        pass
    profile = cProfile.Profile()
    profile.enable()
    for _ in loader:
        pass
    profile.disable()
    torch.set_num_threads(threads)
    stats = pstats.Stats(profile)
    parts = {
        part: sum(
            cumulative
            for (file, _, function), (_, _, _, cumulative, _) in stats.stats.items()  # type: ignore[attr-defined]
            if function in functions and ("contralto" in file or part == "collating")
        )
        for part, functions in PARTS.items()
    }
    parts["all else"] = max(0.0, stats.total_tt - sum(parts.values()))  # type: ignore[attr-defined]
    return {part: round(1000 * seconds / count, 3) for part, seconds in parts.items()}


def run(files: Path, size: int, views: str, count: int, rounds: int) -> dict[str, object]:
    loaders = {
        "torchvision, PIL": theirs(files, size, views, "PIL"),
        "torchvision, tensor": theirs(files, size, views, "tensor"),
        "contralto": ours(files, size, views),
    }
    for loader in loaders.values():  # starts the workers
        for _ in loader:
            pass
    told: dict[str, list[tuple[float, float]]] = {name: [] for name in loaders}
    for r in range(rounds):
        for name, loader in loaders.items():
            if name == "contralto":
                loader.sampler.set_epoch(r + 1)
            told[name].append(one_epoch(loader, count))
    row: dict[str, object] = {}
    for name, values in told.items():
        speeds = [v for v, _ in values]
        row[name] = {
            "images_per_s": round(statistics.median(speeds), 1),
            "lowest": round(min(speeds), 1),
            "highest": round(max(speeds), 1),
            "cpu_ms_per_image": round(statistics.median(c for _, c in values), 3),
        }
    best = max(list(told)[:2], key=lambda name: statistics.median(v for v, _ in told[name]))
    row["faster_idiom"] = best
    row["ratio"] = round(
        statistics.median(o / t for (o, _), (t, _) in zip(told["contralto"], told[best], strict=True)), 2
    )
    row["cpu_ratio"] = round(
        statistics.median(t / o for (_, o), (_, t) in zip(told["contralto"], told[best], strict=True)), 2
    )
    return row


def main(out: Path, rounds: int, pictures: int) -> None:
    data = Path(os.environ["CONTRALTO_DATA"])
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        for name, size, views in CASES:
            files = write_files(name, pictures, Path(temporary), data)
            sizes = [p.stat().st_size for p in files.rglob("*.jpg")]
            row = {"files": name, "mean_kb": round(sum(sizes) / len(sizes) / 1000, 1), "side": size, "views": views}
            row |= run(files, size, views, pictures, rounds)
            left = what_is_left(files, size, views, pictures)
            total = row["contralto"]["cpu_ms_per_image"]
            left["transport"] = round(max(0.0, total - sum(left.values())), 3)
            row["left"] = left
            rows.append(row)
            print(json.dumps(row), flush=True)
    text = json.dumps(
        {
            "command": f"python benchmarks/reading.py --rounds {rounds} --pictures {pictures}",
            "batch": BATCH, "workers": WORKERS, "pictures": pictures,
            "rounds": rounds, "environment": environment(), "rows": rows,
        },
        indent=1,
    )  # fmt: skip
    out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("out", nargs="?", default="results/reading.json", type=Path)
    parser.add_argument("--rounds", default=7, type=int)
    parser.add_argument("--pictures", default=768, type=int)
    arguments = parser.parse_args()
    main(arguments.out, arguments.rounds, arguments.pictures)
