"""Two views of each picture per second, beside the loaders of other libraries on the same pictures.

    CONTRALTO_DATA=... python benchmarks/augmentation.py [out.json] [--rounds 3]

SimCLR's views (crop of 8 to 100 %, flip, colours, grey, from 64 pixels on a blur half the time, normalised) of three kinds of
pictures: CIFAR-10 as an array in memory, as torchvision's data set holds it; photographs of 64 pixels and of 500 x 375 as JPEG
files, the latter seen at 224 (mosaics of CamVid frames, as in `reading.py`). Each side loads them its own way:

- lightly: `SimCLRTransform` on `LightlyDataset`; solo-learn: its transform for each kind on its `ImageFolder` with index;
- kornia: pictures of one size stacked in the loader, its modules on the batch;
- ours: canvases of the pictures' own size and `DrawViews`; `cached` has decoded them before (that time is told too, and not
  counted), `decoding` decodes them in every epoch. solo-learn resizes bicubically, and so does `cached, bicubic`.

Every loader is a process of its own with 0, 1 or 2 workers, whichever is fastest in a first try; its turn is one epoch, and turns
go round, so that whatever else the machine does disturbs all alike. Medians of wall time, and of CPU time with that of
the workers. `left` says where our own time goes, in one process and one thread.
"""

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image
from reading import cpu_seconds, mosaic
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import ImageFolder

from contralto.data.canvas import CanvasDataset, as_it_is
from contralto.data.dataset import EpochSampler
from contralto.data.images import decode_image
from contralto.pipelines.outputs import environment
from contralto.views import batched, colour
from contralto.views.batched import DrawViews
from contralto.views.presets import simclr_pair

# Name, pictures, side of the view, of the canvas, batch, strength of the colours, probability of the blur.
CASES: dict[str, tuple[int, int, int, int, float, float]] = {
    "CIFAR-10, 32 x 32": (6144, 32, 32, 256, 0.5, 0.0),
    "photographs 64 x 64": (3072, 64, 64, 128, 1.0, 0.5),
    "photographs 500 x 375": (384, 224, 500, 32, 1.0, 0.5),
}
ARMS = ("lightly", "solo-learn", "kornia", "cached", "cached, bicubic", "decoding")
WORKERS = (0, 1, 2)


def write_pictures(case: str, folder: Path, data: Path) -> None:
    """An array, or a folder with one of classes, as ImageFolder wants it."""
    count = CASES[case][0]
    rng = np.random.default_rng(0)
    if case.startswith("CIFAR"):
        table = pq.read_table(data / "cifar10n/train.parquet", columns=["image"]).column(0)
        np.save(folder / "pictures.npy", np.stack([decode_image(table[i].as_py()) for i in range(count)]))
        return
    if "64" in case:
        table = pq.read_table(data / "tiny_imagenet100/tiny_imagenet100.parquet", columns=["image"]).column(0)
        pictures = [table[int(i)].as_py() for i in rng.permutation(len(table))[:count]]
    else:
        table = pq.read_table(data / "camvid/camvid240.parquet", columns=["image"]).column(0)
        frames = [Image.fromarray(decode_image(table[i].as_py())) for i in range(len(table))]
        pictures = [mosaic(frames, (500, 375), rng) for _ in range(count)]
    (folder / "all").mkdir()
    for i, picture in enumerate(pictures):
        (folder / "all" / f"{i:05d}.jpg").write_bytes(picture)


class ArrayDataset(Dataset[Any]):
    """An array in memory, as torchvision's CIFAR-10."""

    def __init__(self, folder: Path, transform: Callable[[Image.Image], Any]) -> None:
        self.data, self.transform = np.load(folder / "pictures.npy"), transform

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.transform(Image.fromarray(self.data[index])), 0


def make_loader(arm: str, case: str, folder: Path, workers: int) -> DataLoader:
    """The loader of one side, and what makes views of its batches."""
    _, size, _, batch, strength, blur = CASES[case]
    options: dict[str, Any] = {"num_workers": workers, "persistent_workers": workers > 0}
    if arm in ("lightly", "solo-learn"):
        dataset = (lightly_dataset if arm == "lightly" else solo_dataset)(folder, size, strength, blur)
        return DataLoader(dataset, batch, shuffle=True, drop_last=True, **options)
    if arm == "kornia":
        dataset = ArrayDataset(folder, np.asarray) if "CIFAR" in case else ImageFolder(folder, np.asarray)
        return DataLoader(dataset, batch, shuffle=True, collate_fn=KorniaViews(size, strength, blur), **options)
    dataset = canvases(arm, case, folder)
    views = simclr_pair(size, strength, blur=blur)
    if arm.endswith("bicubic"):
        views = [replace(view, interpolation="bicubic") for view in views]
    sampler = EpochSampler(len(dataset), seed=0)
    return DataLoader(dataset, batch, sampler=sampler, collate_fn=DrawViews(views, seed=0), **options)


def canvases(arm: str, case: str, folder: Path) -> CanvasDataset:
    cache = folder / "canvases.npy" if arm.startswith("cached") else None
    side = CASES[case][2]
    if "CIFAR" in case:
        array = np.load(folder / "pictures.npy")
        return CanvasDataset(lambda row: array[row], {}, count=len(array), side=side, cache=cache, progress=False)
    paths = sorted((folder / "all").iterdir())
    return CanvasDataset(
        lambda row: paths[row].read_bytes(), {}, count=len(paths), side=side, cache=cache, progress=False
    )


def lightly_dataset(folder: Path, size: int, strength: float, blur: float) -> Dataset[Any]:
    from lightly.data import LightlyDataset
    from lightly.transforms import SimCLRTransform

    transform = SimCLRTransform(size, cj_strength=strength, gaussian_blur=blur)
    if (folder / "pictures.npy").exists():
        return LightlyDataset.from_torch_dataset(ArrayDataset(folder, transform))
    return LightlyDataset(str(folder), transform=transform)


def solo_dataset(folder: Path, size: int, strength: float, blur: float) -> Dataset[Any]:
    s = strength
    transform = solo().prepare_transform(
        {32: "cifar10", 64: "custom", 224: "imagenet"}[size],
        brightness=0.8 * s, contrast=0.8 * s, saturation=0.8 * s, hue=0.2 * s, gaussian_prob=blur, crop_size=size,
    )  # fmt: skip
    pair = solo().prepare_n_crop_transform([transform], [2])
    if (folder / "pictures.npy").exists():
        return solo().dataset_with_index(ArrayDataset)(folder, pair)
    return solo().dataset_with_index(ImageFolder)(folder, pair)


def solo() -> ModuleType:
    """solo-learn's loaders, without the rest of it, which wants an old lightning."""
    package = importlib.util.find_spec("solo")
    assert package is not None, "solo-learn is not installed"
    assert package.submodule_search_locations
    path = Path(package.submodule_search_locations[0]) / "utils" / "pretrain_dataloader.py"
    spec = importlib.util.spec_from_file_location("solo_loaders", path)
    assert spec is not None
    assert spec.loader is not None
    if "solo_loaders" not in sys.modules:
        sys.modules["solo_loaders"] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules["solo_loaders"]


class KorniaViews:
    """SimCLR's views by kornia: its own distribution where that differs (no antialias, one order of colours for a batch)."""

    def __init__(self, size: int, strength: float, blur: float) -> None:
        from kornia import augmentation as K

        s, kernel = strength, 2 * max(1, size // 20) + 1
        steps = [
            K.RandomResizedCrop((size, size), scale=(0.08, 1.0)),
            K.RandomHorizontalFlip(),
            K.ColorJitter(0.8 * s, 0.8 * s, 0.8 * s, 0.2 * s, p=0.8),
            K.RandomGrayscale(p=0.2),
        ]
        if blur:
            steps.append(K.RandomGaussianBlur((kernel, kernel), (0.1, 2.0), p=blur))
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        self.view = torch.nn.Sequential(*steps, K.Normalize(mean, std))

    def __call__(self, samples: list[tuple[np.ndarray, int]]) -> list[torch.Tensor]:
        pictures = torch.from_numpy(np.stack([picture for picture, _ in samples]))
        batch = pictures.permute(0, 3, 1, 2).float().div_(255)
        with torch.no_grad():
            return [self.view(batch) for _ in range(2)]


def work(arm: str, case: str, folder: str) -> None:
    """The fastest number of workers; then one epoch for every line of the input."""
    tried: dict[int, tuple[float, DataLoader]] = {}
    for workers in WORKERS:
        loader = make_loader(arm, case, Path(folder), workers)
        one_epoch(loader, case, 0, most=2)  # starts the workers
        tried[workers] = one_epoch(loader, case, 1)[0], loader
    workers = min(tried, key=lambda w: tried[w][0])
    speeds = {str(w): round(1 / seconds, 1) for w, (seconds, _) in tried.items()}
    loader = tried[workers][1]
    tried.clear()  # ends the others' workers
    print(json.dumps({"workers": workers, "tried_images_per_s": speeds}), flush=True)
    for epoch, _ in enumerate(sys.stdin, 2):
        print(json.dumps(one_epoch(loader, case, epoch)), flush=True)


def one_epoch(loader: DataLoader, case: str, epoch: int, most: int = 2**31) -> tuple[float, float]:
    """Seconds and CPU seconds per picture."""
    if isinstance(loader.sampler, EpochSampler):
        loader.sampler.set_epoch(epoch)
    pictures = 0
    cpu, started = cpu_seconds(loader) if loader._iterator else time.process_time(), time.perf_counter()
    for batch in islice(loader, most):
        views = batch["views"] if isinstance(batch, dict) else batch
        while isinstance(views[0], list) or len(views) == 3:  # with index, label or file name
            views = next(part for part in views if isinstance(part, list) and isinstance(part[0], torch.Tensor))
        assert len(views) == 2
        assert views[0].shape[1:] == (3, CASES[case][1], CASES[case][1]), views[0].shape
        pictures += len(views[0])
    seconds = time.perf_counter() - started
    return seconds / pictures, (cpu_seconds(loader) - cpu) / pictures


class Process:
    """A loader in a process of its own."""

    def __init__(self, arm: str, case: str, folder: Path) -> None:
        command = [sys.executable, __file__, "--work", arm, case, str(folder)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.told = self.read()

    def read(self) -> Any:
        assert self.process.stdout
        return json.loads(self.process.stdout.readline())

    def turn(self) -> list[float]:
        assert self.process.stdin
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return list(self.read())

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def run(case: str, folder: Path, rounds: int) -> dict[str, Any]:
    row: dict[str, Any] = {"case": case} | dict(
        zip(("pictures", "side", "canvas", "batch", "strength", "blur"), CASES[case], strict=True)
    )
    started = time.perf_counter()
    canvases("cached", case, folder)
    row["fill_ms_per_picture"] = round(1000 * (time.perf_counter() - started) / CASES[case][0], 3)
    processes = {arm: Process(arm, case, folder) for arm in ARMS}
    row |= {arm: process.told for arm, process in processes.items()}
    told: dict[str, list[list[float]]] = {arm: [] for arm in ARMS}
    for _ in range(rounds):
        for arm, process in processes.items():
            told[arm].append(process.turn())
    for arm, process in processes.items():
        process.close()
        speeds = sorted(1 / wall for wall, _ in told[arm])
        row[arm] |= {
            "images_per_s": round(statistics.median(speeds), 1),
            "lowest": round(speeds[0], 1),
            "highest": round(speeds[-1], 1),
            "cpu_ms_per_image": round(1000 * statistics.median(cpu for _, cpu in told[arm]), 3),
        }
    for peer, arms in {
        "lightly": ("cached", "decoding"),
        "solo-learn": ("cached, bicubic", "cached", "decoding"),
        "kornia": ("cached", "decoding"),
    }.items():
        for arm in arms:
            pairs = list(zip(told[arm], told[peer], strict=True))
            row[f"{arm} over {peer}"] = {
                "wall": round(statistics.median(p[0] / o[0] for o, p in pairs), 2),
                "cpu": round(statistics.median(p[1] / o[1] for o, p in pairs), 2),
            }
    row["left"] = what_is_left(case, folder)
    return row


def what_is_left(case: str, folder: Path) -> dict[str, float]:
    """CPU microseconds a view by part, in one process and one thread; what a part calls counts for that alone."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    spent: dict[str, float] = {}
    inside: list[float] = []

    def timed(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            inside.append(0.0)
            started = time.process_time()
            try:
                return function(*arguments, **named)
            finally:
                seconds = time.process_time() - started
                spent[part] = spent.get(part, 0.0) + seconds - inside.pop()
                if inside:
                    inside[-1] += seconds

        return call

    parts = {
        "crop, resize, flip": (batched, "_cut"), "colours": (batched, "change_colours"), "hue": (colour, "adjust_hue"),
        "blur": (batched, "_blur"), "drawing": (batched, "draw_parameters"), "uniform numbers": (batched, "uniforms"),
    }  # fmt: skip
    kept = {part: getattr(*place) for part, place in parts.items()}
    _, size, _, batch, strength, blur = CASES[case]
    views = DrawViews(simclr_pair(size, strength, blur=blur), seed=0)
    dataset = canvases("cached", case, folder)
    loader = DataLoader(dataset, batch, sampler=EpochSampler(len(dataset), seed=0), collate_fn=as_it_is)

    def epoch() -> None:
        for part in timed("reading canvases", lambda: list(loader))():
            timed("all else", views)(part)

    try:
        for part, (module, name) in parts.items():
            setattr(module, name, timed(part, kept[part]))
        epoch()
        spent.clear()
        epoch()
    finally:
        for part, (module, name) in parts.items():
            setattr(module, name, kept[part])
        torch.set_num_threads(threads)
    return {part: round(1e6 * seconds / (2 * len(dataset)), 1) for part, seconds in spent.items()}


def main(out: Path, rounds: int, cases: list[str]) -> None:
    data = Path(os.environ["CONTRALTO_DATA"])
    rows = []
    for case in cases:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / "pictures"
            folder.mkdir()
            write_pictures(case, folder, data)
            rows.append(run(case, folder, rounds))
            print(json.dumps(rows[-1]), flush=True)
    text = json.dumps(
        {
            "command": f"python benchmarks/augmentation.py --rounds {rounds}",
            "rounds": rounds,
            "environment": environment(),
            "rows": rows,
        },
        indent=1,
    )
    out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        work(*sys.argv[2:5])
    else:
        parser = argparse.ArgumentParser()
        parser.add_argument("out", nargs="?", default="results/augmentation.json", type=Path)
        parser.add_argument("--rounds", default=3, type=int)
        parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
        a = parser.parse_args()
        main(a.out, a.rounds, a.cases)
