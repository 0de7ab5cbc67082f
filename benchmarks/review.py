"""How quick the review page is with 100,000 pictures: a real server, a client that acts as a person's browser does.

    CONTRALTO_DATA=... python benchmarks/review.py [--n 100000] [--actions 400] [--out results/review.json]

The run folder is made for it: tiny_imagenet100's photographs over and over, texts of some words, random verdicts (30 % flagged)
and embeddings of 128 numbers. First the start of the server, then what one person waits for, each from click to last byte:

first page      the list as it opens, and the same with all its thumbnails
actions         a decision (or undo, every tenth) and the page that comes after it, with its pictures (large and neighbours)
alone           the same without the pictures, which a browser fetches while the page can be seen and used already
filters         the list by class, by words, by probability, pages far behind
batch           all pictures of a class decided at once
history         the page of all actions and the agreement of reviewers
two             the actions again, while a second person acts without pause

Medians, 95th percentiles and maxima in milliseconds.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq

from contralto.data.manifest import MANIFEST_SCHEMA, SKIPPED_SCHEMA, ClassInfo, Manifest
from contralto.files import write_atomically, write_json
from contralto.pipelines.outputs import environment

SHARD, CLASSES, WIDTH = 1000, 100, 128
WORDS = (
    "old",
    "photo",
    "for",
    "sale",
    "wild",
    "large",
    "red",
    "by",
    "the",
    "sea",
    "new",
    "close",
    "up",
    "in",
    "street",
)


def make_run(n: int, data: Path, run: Path) -> None:
    """A run folder with all that the page reads."""
    columns = ["image", "label", "class_name"]
    source = pq.read_table(data / "tiny_imagenet100/tiny_imagenet100.parquet", columns=columns)
    names = dict(zip(source["label"].to_pylist(), source["class_name"].to_pylist(), strict=True))
    rng = np.random.default_rng(0)
    rows = rng.integers(len(source), size=n)
    labels, right = rng.integers(CLASSES, size=n), source["label"].to_numpy()[rows]
    pictures = run / "pictures"
    pictures.mkdir(parents=True)
    for start in range(0, n, SHARD):
        part = pa.table({"image": source["image"].take(pa.array(rows[start : start + SHARD]))})
        pq.write_table(part, pictures / f"{start // SHARD:05d}.parquet", row_group_size=250)
    index = np.arange(n)
    ids = [f"{i:07d}" for i in index]
    texts = [f"{names[int(c)]} {' '.join(rng.choice(WORDS, 5))} {i}" for i, c in enumerate(right)]
    same = {"container": "parquet", "member": "image", "format": "JPEG", "sha256": "", "split": "train", "group": ""}
    length = pa.compute.binary_length(source["image"]).to_numpy()[rows]
    table = pa.table(
        {
            "index": index, "id": ids, "source": [f"pictures/{i // SHARD:05d}.parquet" for i in index],
            "offset": index % SHARD, "length": length, "width": np.full(n, 64), "height": np.full(n, 64),
            "phash": index, "duplicate_group": index, "label": labels, "text": texts, "clean_label": np.full(n, -2),
            **{name: pa.repeat(value, n) for name, value in same.items()},
        }
    ).select(MANIFEST_SCHEMA.names)  # fmt: skip
    classes = tuple(ClassInfo(names[c], (names[c],), f"What is called {names[c]}.") for c in range(CLASSES))
    skipped = pa.Table.from_pylist([], schema=SKIPPED_SCHEMA)
    Manifest(table.cast(MANIFEST_SCHEMA), classes, str(run.resolve()), skipped).save(run / "manifest")
    verdict = rng.choice(["kept", "corrected", "off-topic", "anchor"], n, p=[0.6, 0.2, 0.1, 0.1])
    new = np.where(verdict == "corrected", rng.integers(CLASSES, size=n), labels)
    cleaned = {
        "index": index, "id": ids, "given": [names[int(c)] for c in labels], "verdict": verdict.tolist(),
        "new": ["" if v == "off-topic" else names[int(c)] for v, c in zip(verdict, new, strict=True)],
        "p_wrong": rng.random(n).astype(np.float32),
    }  # fmt: skip
    pq.write_table(pa.table(cleaned), run / "cleaned.parquet")
    np.save(run / "embedding.npy", rng.standard_normal((n, WIDTH)).astype(np.float16))
    write_json(run / "config.json", {"system": "capro"})


class Visitor:
    """A person with a browser: keeps a connection and cookies, follows a form to the page after it, fetches its pictures."""

    def __init__(self, address: str, name: str) -> None:
        parts = urlsplit(address)
        self.client = httpx.Client(base_url=f"{parts.scheme}://{parts.netloc}", timeout=60, follow_redirects=True)
        self.client.headers["origin"] = str(self.client.base_url).rstrip("/")
        self.key = re.search(r'name="key" value="(\w+)"', self.send("/enter", name=name).text)[1]

    def send(self, path: str, **form: object) -> httpx.Response:
        answer = self.client.post(path, data=form | ({"key": self.key} if hasattr(self, "key") else {}))
        answer.raise_for_status()
        return answer

    def open(self, path: str, **query: object) -> httpx.Response:
        answer = self.client.get(path, params=query)
        answer.raise_for_status()
        return answer

    def pictures(self, page: httpx.Response) -> int:
        found = sorted(set(re.findall(r'<img[^>]*src="([^"]+)"', page.text)))
        for path in found:
            assert self.client.get(path).content[:3] == b"\xff\xd8\xff"
        return len(found)

    def act(self, page: httpx.Response, step: int) -> httpx.Response:
        """One decision about the picture of a page, every tenth time an undo; the page that comes after it."""
        if step % 10 == 9:
            return self.send("/undo")
        n = page.url.path.removeprefix("/picture/")
        return self.send("/decide", n=n, action=("keep", "accept", "off-topic")[step % 3])


def actions(visitor: Visitor, count: int, *, pictures: bool) -> list[float]:
    """Seconds of a row of actions, from the worst picture on."""
    first = re.search(r'href="(/picture/\d+)', visitor.open("/").text)[1]
    page, seconds = visitor.open(first), []
    for step in range(count):
        started = time.perf_counter()
        page = visitor.act(page, step)
        if pictures:
            visitor.pictures(page)
        seconds.append(time.perf_counter() - started)
    return seconds


def timed(function, *arguments, **more) -> float:
    started = time.perf_counter()
    function(*arguments, **more)
    return time.perf_counter() - started


def told(seconds: list[float]) -> dict[str, float]:
    """Median, 95th percentile and maximum, in milliseconds."""
    ms = 1000 * np.array(seconds)
    values = {"median": np.median(ms), "p95": np.quantile(ms, 0.95), "max": ms.max()}
    return {k: round(float(v), 1) for k, v in values.items()} | {"n": len(ms)}


def measure(run: Path, count: int) -> dict[str, object]:
    started = time.perf_counter()
    command = [sys.executable, "-c", "from contralto.cli import main; main()", "review", str(run), "--port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        address = re.search(r"open (\S+) in", server.stdout.readline())[1]
        ada = Visitor(address, "ada")
        out: dict[str, object] = {"start_s": round(time.perf_counter() - started, 2)}
        out["first page"] = told([timed(ada.open, "/")])
        out["first page with pictures"] = told([timed(lambda: ada.pictures(ada.open("/")))])
        out["list again"] = told([timed(ada.open, "/") for _ in range(20)])
        out["actions"] = told(actions(ada, count, pictures=True))
        out["actions alone"] = told(actions(ada, count, pictures=False))
        names = Manifest.load(run / "manifest").class_names
        searches = ("sea", "wild red", "12345", "no such")
        filters = [
            *({"label": name} for name in names[:10]), *({"words": w, "verdict": "any"} for w in searches),
            *({"least": x, "order": "class"} for x in (0.5, 0.9)), *({"page": p, "verdict": "any"} for p in (10, 1000)),
        ]  # fmt: skip
        out["filters"] = told([timed(ada.open, "/", **f) for f in filters])
        sizes, batches = [], []
        for name in names[:10]:
            page = ada.open("/", label=name)
            count_shown = re.search(r'name="count" value="(\d+)"', page.text)[1]
            sizes.append(int(count_shown))
            batches.append(timed(ada.send, "/batch", label=name, action="accept", count=count_shown))
        out["batch"] = told(batches) | {"pictures": int(np.median(sizes))}
        bob, ended = Visitor(address, "bob"), threading.Event()

        def go_on() -> None:
            while not ended.is_set():
                actions(bob, 20, pictures=True)

        other = threading.Thread(target=go_on)
        other.start()
        out["two"] = told(actions(ada, count, pictures=True))
        ended.set()
        other.join()
        out["history"] = told([timed(ada.open, "/reviewers") for _ in range(10)])
        status = Path(f"/proc/{server.pid}/status")
        if status.exists():
            out["server_gib"] = round(int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]) / 2**20, 2)
        return out
    finally:
        server.terminate()
        server.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=100_000)
    parser.add_argument("--actions", type=int, default=400)
    parser.add_argument("--out", type=Path, default=Path("results/review.json"))
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        make_run(a.n, Path(os.environ["CONTRALTO_DATA"]), run)
        found = {"command": "python benchmarks/review.py", "pictures": a.n, "milliseconds": measure(run, a.actions)}
    text = json.dumps(found | {"environment": environment()}, indent=1) + "\n"
    a.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(a.out, lambda path: path.write_text(text, encoding="utf-8"))
    print(text)


if __name__ == "__main__":
    main()
