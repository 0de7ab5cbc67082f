"""Ingests what was made to exhaust memory, each in a process of its own; prints what it took and what came of it as JSON.

`python tests/hostile.py FOLDER`: the imports are done once, then every case of `CASES` is made in FOLDER and ingested in
a forked process, whose peak of memory beyond what it began with is measured.
"""

import gzip
import io
import json
import os
import resource
import struct
import sys
import tarfile
import time
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from contralto.data.ingest import ingest
from contralto.data.manifest import ClassInfo
from contralto.data.tags import tag_labels
from contralto.errors import ContraltoError

MIB = 2**20


def picture(side=40, seed=0, **options):
    buffer = io.BytesIO()
    array = np.random.default_rng(seed).integers(0, 255, (side, side, 3), dtype=np.uint8)
    Image.fromarray(array).save(buffer, "PNG", **options)
    return buffer.getvalue()


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(*extra, side=60_000, data=b"\0" * 1000):
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        [chunk(b"IHDR", header), *extra, chunk(b"IDAT", zlib.compress(data)), chunk(b"IEND", b"")]
    )


def folder(root, **files):
    (root / "red").mkdir(parents=True)
    (root / "red" / "good.png").write_bytes(picture())
    for name, data in files.items():
        (root / "red" / name.replace("__", ".")).write_bytes(data)
    return root


def pixel_bombs(root):
    return folder(root, **{f"b{i}__png": png(side=side) for i, side in enumerate((60_000, 30_000, 8_000))})


def text_bombs(root):
    """Text, colour profile and embedded text that unpack to 200 MB each."""
    packed = zlib.compress(b"\0" * 200 * MIB, 9)
    kinds = {
        "t__png": (b"zTXt", b"k\0\0" + packed), "p__png": (b"iCCP", b"k\0\0" + packed),
        "i__png": (b"iTXt", b"k\0\1\0\0\0" + packed),
    }  # fmt: skip
    return folder(root, **{name: png(chunk(*kind), side=64) for name, kind in kinds.items()})


def tiff_chains(root):
    """A directory that points at itself, and one with a tag that claims four billion values."""

    def tags(*entries, after):
        return (
            struct.pack("<H", len(entries))
            + b"".join(struct.pack("<HHII", *e) for e in entries)
            + struct.pack("<I", after)
        )

    size = ((256, 3, 1, 64), (257, 3, 1, 64))
    start = b"II*\0" + struct.pack("<I", 8)
    many = b"".join(tags(*size, after=8 + 30 * (i + 1)) for i in range(100_000))
    return folder(root, loop__tif=start + tags(*size, after=8), claim__tif=start + tags(*size, (270, 2, 2**32 - 1, 8), after=0),
                  long__tif=start + many)  # fmt: skip


def gzip_bomb(root):
    folder(root)
    with gzip.open(root / "rows.jsonl.gz", "wb") as file:
        for _ in range(300):
            file.write(b" " * MIB)
    return root / "rows.jsonl.gz"


def gzip_rows(root):
    """Rows that name no picture, which pack very well."""
    folder(root)
    with gzip.open(root / "rows.jsonl.gz", "wb") as file:
        for _ in range(50):
            file.write(b'{"path": null, "class": "red"}\n' * (MIB // 31))
    return root / "rows.jsonl.gz"


def add(archive, name, data):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    archive.addfile(info, io.BytesIO(data))


def many_members(root):
    """A hundred thousand members, half of them of one key."""
    root.mkdir()
    with tarfile.open(root / "a.tar", "w") as archive:
        add(archive, "good.png", picture())
        add(archive, "good.cls", b"red")
        for i in range(50_000):
            add(archive, f"one.x{i}", b"")
            add(archive, f"{i}.txt", b"")
    return root


def long_header(root):
    """A header that says it is two gigabytes long, in a file with a hole."""
    root.mkdir()
    with tarfile.open(root / "a.tar", "w") as archive:
        add(archive, "good.png", picture())
        add(archive, "good.cls", b"red")
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 2**31
    with (root / "a.tar").open("r+b") as file:
        end = 512 * (2 + -(-len(picture()) // 512) + 1)
        file.truncate(end)
        file.seek(end)
        file.write(info.tobuf(tarfile.GNU_FORMAT))
        file.truncate(end + 2**31 + 4096)
    return root


def large_cells(root):
    """One value of 60 MB, stored once and repeated in 100 rows."""
    folder(root)
    values = [picture(), bytes(60 * MIB)]
    table = pa.table(
        {
            "image": pa.DictionaryArray.from_arrays(
                pa.array([0] + [1] * 100, pa.int32()), pa.array(values, pa.binary())
            ),
            "class": ["red"] * 101,
        }
    )
    pq.write_table(
        table.cast(pa.schema([("image", pa.dictionary(pa.int32(), pa.binary())), ("class", pa.string())])),
        root / "a.parquet",
    )
    return root / "a.parquet"


def large_texts(root):
    """Fifty texts of 10 MB in a table, with NUL, lone surrogates and marks of direction."""
    text = "\x00\u202e\ud800ab " * 100_000 + "z" * 10 * MIB
    folder(root)
    with (root / "a.jsonl").open("w") as file:
        for _ in range(50):
            file.write(json.dumps({"path": "red/good.png", "class": "red", "text": text}) + "\n")
    return root / "a.jsonl"


def large_files(root):
    """Forty pictures of 60 MB that are none, in a row."""
    folder(root)
    for i in range(40):
        with (root / "red" / f"{i}.jpg").open("wb") as file:
            file.truncate(60 * MIB)
    return root


def long_line(root):
    folder(root)
    (root / "a.csv").write_bytes(b"path,class\nred/good.png,red\n" + b"," * (200 * MIB))
    return root / "a.csv"


def large_tags(root):
    """Tags without end: lists of a million, words of ten million letters, ten thousand letters of words glued together."""
    folder(root)
    glued = "".join(np.random.default_rng(0).choice(["blue", "sky", "sunset", "red"], 60_000))
    words = [" ".join(glued[i : i + 200] for i in range(shift, len(glued) - 200, 200)) for shift in range(40)]
    tags = [
        ["red", "x"] * 500_000,
        "z" * 10 * MIB,
        [["red"] * 1000] * 1000,
        {"red": ["red"] * 100_000},
        "\u202e\x00\ud800red",
        *words,
    ]
    with (root / "a.jsonl").open("w") as file:
        for value in tags:
            file.write(json.dumps({"path": "red/good.png", "tags": value, "right": value}) + "\n")
    return root / "a.jsonl"


CASES = [pixel_bombs, text_bombs, tiff_chains, gzip_bomb, gzip_rows, many_members, long_header, large_cells, large_texts,
         large_files, long_line, large_tags]  # fmt: skip
WITH_TAGS = [large_tags]
SEVERAL = {"multilabel": True, "classes": [ClassInfo("red"), ClassInfo("blue sky", ("bluesky",))]}


def memory():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def measured(case, several):
    """In a process of its own: memory, pictures, or the error; `several` labels are sought in the texts, too."""
    before, started = memory(), time.perf_counter()
    try:
        manifest = ingest(str(case), **(SEVERAL if several else {}))
        result = {
            "pictures": len(manifest),
            "skipped": manifest.skipped.num_rows,
            "longest": max(map(len, manifest.texts)),
        }
        if several:
            result["named"] = tag_labels(manifest.texts, manifest.classes).sum(0).tolist()
    except ContraltoError as error:
        result = {"error": str(error)}
    except Exception as error:
        result = {"foreign": repr(error)}
    result["seconds"] = round(time.perf_counter() - started, 1)
    result["mib"] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before) // MIB
    return result


def main():
    torch.set_num_threads(1)
    root, results = Path(sys.argv[1]), {}
    first = ingest(str(folder(root / "first")))  # what is imported late
    tag_labels(["bluesky"], first.classes)
    for make in CASES:
        made = root / f"{make.__name__}.json"
        if os.fork() == 0:
            place = make(root / make.__name__)
            made.write_text(str(place))
            os._exit(0)
        os.wait()
        if os.fork() == 0:
            made.write_text(json.dumps(measured(made.read_text(), make in WITH_TAGS)))
            os._exit(0)
        os.wait()
        results[make.__name__] = json.loads(made.read_text())
    print(json.dumps(results))


if __name__ == "__main__":
    main()
