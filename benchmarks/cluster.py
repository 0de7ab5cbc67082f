"""What every pass over a crawl costs per picture, here and on a local Ray cluster of two workers; and what ten million would.

    CONTRALTO_DATA=... python benchmarks/cluster.py [results/cluster.json] [--pictures 4000] [--work FOLDER]

Photographs are mosaics of CamVid frames, 500 x 375 at quality 88 (as in reading.py), in tars of 250 with a class and a title of
fashion_web each. Every measurement is a process of its own with one thread per worker, all of one priority; interrupted, the same
command goes on with the next one. `here` is one process, `ray` is `ray.init(num_cpus=2)`, whose start (`start_s`) is not counted.
`cpu_ms` is the CPU time of all processes together, of workers from their first import on, per picture: what a core must do, also
on a machine that does other things (`load`: processes that ran when it began); `wall_ms` is what a clock says.

- ingest: read, decode, filter, hash, manifest. features: read, decode, EfficientNet-Lite0 at 96 px, one view (features_resnet50:
  ResNet-50 at 224 px). predict: read, decode, the model of a run with the same encoder. texts: MiniLM over the titles.
- duplicates: groups of near duplicates among random hashes, in one place whatever the cluster.
- blocks: blocks that need no work, which is what dealing them out costs.

`ten_million_hours_by_cores` multiplies; what does not grow with the number of pictures alone says so in docs/ten_million.md.
"""

import argparse
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

CLASSES, SHARD = 20, 250
THREADS = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}


def make_tars(count: int, folder: Path, data: Path) -> None:
    """Tars of photographs, once."""
    from PIL import Image
    from reading import mosaic

    frames = pq.read_table(data / "camvid/camvid240.parquet", columns=["image"]).column(0).to_pylist()
    decoded = [Image.open(io.BytesIO(f)).convert("RGB") for f in frames]
    titles = titles_of(data)
    folder.mkdir(parents=True, exist_ok=True)
    for start in range(0, count, SHARD):
        path = folder / f"{start // SHARD:05d}.tar"
        if path.exists():
            continue
        with tarfile.open(path.with_suffix(".part"), "w") as archive:
            for i in range(start, start + SHARD):
                title, picture = titles[i % len(titles)], mosaic(decoded, (500, 375), np.random.default_rng([0, i]))
                about = json.dumps({"class": f"class{i % CLASSES}", "caption": f"{title} {i}"}).encode()
                for name, content in ((f"{i:08d}.jpg", picture), (f"{i:08d}.json", about)):
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))
        path.with_suffix(".part").rename(path)


def titles_of(data: Path) -> list[str]:
    return pq.read_table(data / "fashion_web/fashion_web.parquet", columns=["text"]).column(0).to_pylist()


def connect(on: str | None) -> float:
    if on is None:
        return 0.0
    import ray
    import ray.data

    started = time.perf_counter()
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    return time.perf_counter() - started


def one(name: str, on: str | None, folder: Path, count: int) -> dict[str, float]:
    """One measurement, in this process."""
    import torch

    torch.set_num_threads(1)
    load = os.getloadavg()[0]
    start_s = connect(on)
    prepare, work = MEASUREMENTS[name]
    prepared = prepare(folder, on)
    cpu, started = cpu_seconds(), time.perf_counter()
    n, more = work(prepared, folder, on, count)
    seconds, cpu = time.perf_counter() - started, cpu_seconds() - cpu
    per = {"wall_ms": round(1000 * seconds / n, 4), "cpu_ms": round(1000 * cpu / n, 4)}
    return {"n": n, "seconds": round(seconds, 2), "start_s": round(start_s, 2), "load": round(load, 1)} | per | more


def cpu_seconds() -> float:
    """Of this process and all below it, with those that have ended there."""
    parents, ticks = {}, {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # ended meanwhile
            continue
        pid = int(stat.parent.name)
        parents[pid], ticks[pid] = int(fields[1]), sum(map(int, fields[11:15]))
    total = 0
    for pid in ticks:
        above = pid
        while above not in (0, 1, os.getpid()):
            above = parents.get(above, 0)
        total += ticks[pid] if above == os.getpid() else 0
    return total / os.sysconf("SC_CLK_TCK")


def nothing(folder: Path, on: str | None) -> None:
    return None


def run_ingest(_, folder: Path, on: str | None, count: int):
    from contralto.data.ingest import ingest

    manifest = ingest(str(folder), on=on, workers=1)
    with tempfile.TemporaryDirectory() as out:
        manifest.save(out)
        size = sum(p.stat().st_size for p in Path(out).iterdir())
    pictures = sum(p.stat().st_size for p in folder.glob("*.tar"))
    sizes = {"manifest_bytes": size, "manifest_memory_bytes": manifest.table.nbytes, "picture_bytes": pictures}
    return len(manifest), {k: round(v / len(manifest), 1) for k, v in sizes.items()}


def ready_features(folder: Path, on: str | None, name: str = "efficientnet-lite0", size: int = 96):
    from contralto.data.ingest import ingest
    from contralto.encoders.image import image_encoder
    from contralto.views.image import EvalView

    encoder = image_encoder(name, pretrained=False, size=size)
    view = EvalView(size, 1.0, encoder.mean, encoder.std)
    return ingest(str(folder), image_filter=False, workers=2), encoder, view


def ready_resnet50(folder: Path, on: str | None):
    return ready_features(folder, on, "resnet50", 224)


def run_features(prepared, folder: Path, on: str | None, count: int):
    from contralto.cluster import map_blocks
    from contralto.encoders.features import EncodePictures
    from contralto.encoders.pictures import picture_blocks

    manifest, encoder, view = prepared
    blocks = picture_blocks(manifest, np.arange(min(count, len(manifest))))
    done = list(map_blocks(EncodePictures, blocks, on=on, setup=(encoder, "cpu", manifest.root, view)))
    return sum(map(len, done)), {"feature_bytes": done[0].nbytes / len(done[0])}


def ready_predict(folder: Path, on: str | None):
    from contralto.encoders.image import image_encoder
    from contralto.systems.classifier import Classifier

    encoder = image_encoder("efficientnet-lite0", size=96)
    config = {
        "encoder": "efficientnet-lite0", "num_features": encoder.num_features, "size": 96, "crop": 1.0,
        "mean": list(encoder.mean), "std": list(encoder.std), "classes": [f"class{i}" for i in range(CLASSES)],
        "hidden": 512, "dim": 128, "temperature": 0.1,
    }  # fmt: skip
    return Classifier(config, encoder).eval()


def run_predict(model, folder: Path, on: str | None, count: int):
    from contralto.pipelines.applying import apply_model

    with tempfile.TemporaryDirectory() as out:
        return apply_model(model, str(folder), Path(out) / "p.parquet", on=on).n, {}


def ready_texts(folder: Path, on: str | None):
    from contralto.encoders.text import text_encoder

    return text_encoder("minilm")


def run_texts(encoder, folder: Path, on: str | None, count: int):
    from contralto.encoders import text

    text.TEXTS = 512
    titles = titles_of(Path(os.environ["CONTRALTO_DATA"]))
    texts = sorted({f"{titles[i % len(titles)]} {i}" for i in range(count)})
    rows = text.encode_texts(encoder, texts, on=on)
    return len(rows), {"text_bytes": rows.nbytes / len(rows), "words": float(np.mean([len(t.split()) for t in texts]))}


def run_duplicates(_, folder: Path, on: str | None, count: int):
    from contralto.data.images import duplicate_groups

    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**64, count, dtype=np.uint64)
    names = np.array([f"{h:016x}" * 4 for h in hashes])
    duplicate_groups(hashes, names)
    return count, {}


def run_blocks(_, folder: Path, on: str | None, count: int):
    from contralto.cluster import map_blocks

    return sum(1 for _ in map_blocks(abs, range(count), on=on)), {}


MEASUREMENTS = {
    "ingest": (nothing, run_ingest),
    "features": (ready_features, run_features),
    "features_resnet50": (ready_resnet50, run_features),
    "predict": (ready_predict, run_predict),
    "texts": (ready_texts, run_texts),
    "duplicates": (nothing, run_duplicates),
    "blocks": (nothing, run_blocks),
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", nargs="?", type=Path, default=Path("results/cluster.json"))
    parser.add_argument("--pictures", type=int, default=4000)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "contralto_cluster")
    parser.add_argument("--one", nargs=3, metavar=("NAME", "ON", "COUNT"))
    a = parser.parse_args()
    folder = a.work / str(a.pictures)
    if a.one:
        name, on, count = a.one
        print(json.dumps(one(name, None if on == "here" else on, folder, int(count))))
        return
    from contralto.files import write_json
    from contralto.pipelines.outputs import environment

    make_tars(a.pictures, folder, Path(os.environ["CONTRALTO_DATA"]))
    wanted = [(n, on, a.pictures) for n in ("ingest", "features", "predict", "texts") for on in ("here", "ray")]
    wanted += [
        ("features", "ray", a.pictures // 4),
        ("texts", "ray", a.pictures // 4),
        ("features_resnet50", "here", 256),
    ]
    wanted += [("duplicates", "here", n) for n in (100_000, 1_000_000, 5_000_000)] + [("blocks", "ray", 1000)]
    rows, kept = [], a.work / f"{a.pictures}.jsonl"
    done = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    for name, on, count in wanted:
        row = next((r for r in done if (r["measurement"], r["on"], r["n"]) == (name, on, count)), None)
        if row is None:
            what = ["--one", name, on, str(count)]
            command = [sys.executable, __file__, "--pictures", str(a.pictures), "--work", str(a.work), *what]
            told = subprocess.run(
                command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | THREADS
            ).stdout
            row = {"measurement": name, "on": on} | json.loads(told.splitlines()[-1])
            with kept.open("a") as file:
                file.write(json.dumps(row) + "\n")
        rows.append(row)
        print(row, file=sys.stderr)
    whole, part = ({(r["measurement"], r["on"]): r for r in rows if r["n"] == n} for n in (a.pictures, a.pictures // 4))
    # On a cluster what does not grow is the start of workers: what three quarters of the pictures add is what one takes.
    added = {
        name: round((whole[name, "ray"]["cpu_ms"] - part[name, "ray"]["cpu_ms"] / 4) * 4 / 3, 3)
        for name in ("features", "texts")
    }
    per_picture = {
        r["measurement"]: r["cpu_ms"] for r in rows if r["on"] == "here" and r["measurement"] != "duplicates"
    }
    hours = {name: {str(c): round(ms * 1e7 / 3.6e6 / c, 1) for c in (1, 16, 64)} for name, ms in per_picture.items()}
    result = {
        "command": "python benchmarks/cluster.py", "pictures": "500 x 375, JPEG", "rows": rows,
        "cpu_ms_on_ray_but_for_the_start": added,
        "ten_million_hours_by_cores": hours, "environment": environment(),
    }  # fmt: skip
    write_json(a.out, result)


if __name__ == "__main__":
    main()
