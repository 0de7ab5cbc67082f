"""What several tests share: a tiny collection of pictures with texts, and headless Chromium."""

import io
import os
import shutil
import signal
import socket
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}  # of the processes that tests start, too


def refuse_network(event, words):
    """No test may reach beyond this machine; Unix sockets and loopback are how processes here talk."""
    if event == "socket.connect" and isinstance(words[1], tuple):
        host = str(words[1][0])
        if host not in ("localhost", "::1", "0.0.0.0") and not host.startswith("127."):
            raise AssertionError(f"a test wants to connect to {words[1]}")
    if event == "socket.getaddrinfo" and str(words[0]) not in (
        "localhost",
        "127.0.0.1",
        "::1",
        "None",
        "",
        socket.gethostname(),
    ):
        raise AssertionError(f"a test asks for the address of {words[0]!r}")


sys.addaudithook(refuse_network)
torch.set_num_threads(1)  # two test processes share two cores
os.environ["OMP_NUM_THREADS"] = (
    "1"  # so do the programs that tests start: bits are the same for the same number of threads
)

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # started in the background: Ctrl-C is tested all the same
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def same_draws():
    """What a test draws does not hang on the tests before it."""
    torch.manual_seed(0)


COLOURS = {"red": (200, 30, 40), "green": (30, 180, 60), "blue": (40, 60, 210)}


def picture(colour, seed, side=40, kind="PNG"):
    """A square of noisy colour with a bright patch, as encoded bytes."""
    rng = np.random.default_rng(seed)
    array = np.clip(np.array(colour) + rng.normal(0, 25, (side, side, 3)), 0, 255).astype(np.uint8)
    top, left = rng.integers(0, side // 2, 2)
    array[top : top + 6, left : left + 6] = 250
    return encode(Image.fromarray(array), kind)


def encode(image, kind, **options):
    """A picture as encoded bytes."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def bomb(side):
    """A PNG whose header promises far more pixels than its few bytes."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )


def tiny_rows(per_class=16, test_per_class=6, seed=0):
    """Rows of a collection of three colours; a quarter of the web labels is wrong, texts tell the truth mostly."""
    rng = np.random.default_rng(seed)
    names = list(COLOURS)
    rows = []
    for split, count in (("train", per_class), ("test", test_per_class)):
        for c, name in enumerate(names):
            for i in range(count):
                wrong = split == "train" and i % 4 == 3
                right = names[(c + 1) % 3] if wrong else name
                words = rng.choice(["paint", "wall", "bright", "old", "nice"], 3)
                rows.append(
                    {
                        "id": f"{split}-{name}-{i}",
                        "image": picture(COLOURS[right], len(rows) + 1000 * seed),
                        "text": f"{right} colour {' '.join(words)}",
                        "query": name if split == "train" else None,
                        "label": right,
                        "split": split,
                    }
                )
    return rows


def write_collection(path, rows, query):
    """Rows as a Parquet file, with definitions beside it in which a colour is searched by `query` of its name."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), path)
    lines = [f"{name}: {{query: {query(name)}, definition: The colour {name} of paint.}}" for name in COLOURS]
    path.with_name("classes.yaml").write_text("\n".join(lines))
    return path


@pytest.fixture(scope="session")
def tiny_parquet(tmp_path_factory):
    """The tiny collection as a Parquet file, with its definitions beside it."""
    return write_collection(tmp_path_factory.mktemp("tiny") / "tiny.parquet", tiny_rows(), str)


def tagged_rows(train=54, test=18):
    """Pictures of one or two of the colours with tags that name them, some glued, some wrong, one that names none."""
    rng = np.random.default_rng(0)
    names = list(COLOURS)
    out = []
    for i in range(train + test):
        pair = [names[k] for k in rng.choice(3, 2)]
        tags = [f"{c}{'photo' if i % 3 == 0 else ''}" for c in dict.fromkeys(pair)]
        if i % 6 == 5:
            tags = [names[(names.index(pair[0]) + 1) % 3]]
        if i == 7:
            tags = ["holiday"]
        out.append(
            {
                "id": f"p{i}", "image": two_colours(*pair, i), "tags": f"{' '.join(tags)} nice day", "colours": sorted(set(pair)),
                "shape": "square", "split": "train" if i < train else "test",
            }
        )  # fmt: skip
    return out


def two_colours(a, b, seed):
    """Left half of one colour, right half of another, with noise."""
    rng = np.random.default_rng(seed)
    pixels = np.zeros((40, 40, 3))
    pixels[:, :20], pixels[:, 20:] = COLOURS[a], COLOURS[b]
    noisy = np.clip(pixels + rng.normal(0, 20, pixels.shape), 0, 255).astype(np.uint8)
    return encode(Image.fromarray(noisy), "PNG")


@pytest.fixture(scope="session")
def tagged_parquet(tmp_path_factory):
    """The pictures with tags as a Parquet file, with their definitions beside it."""
    path = tmp_path_factory.mktemp("tags") / "tags.parquet"
    return write_collection(path, tagged_rows(), lambda name: f"[{name}, {name}ish]")


@pytest.fixture(scope="session")
def data_folder():
    """The folder of the larger data sets, for tests marked `data`."""
    folder = os.environ.get("CONTRALTO_DATA", "")
    if not folder or not Path(folder).is_dir():
        pytest.skip("CONTRALTO_DATA does not name the folder of the data sets")
    return Path(folder)


@pytest.fixture(scope="session")
def browser():
    """Headless Chromium; its absence is an error in CI and a skip with a reason elsewhere."""
    program = next((p for p in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if p), None)
    if program is None:
        if os.environ.get("CI"):
            pytest.fail("CI must have Chromium: the report is tested in it")
        pytest.skip("NO BROWSER: install chromium to test the report in it")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
        instance = playwright.chromium.launch(executable_path=program, args=flags)
        yield instance
        instance.close()


def pytest_terminal_summary(terminalreporter):
    """What was skipped is said loudly, with its reason."""
    skipped = terminalreporter.stats.get("skipped", [])
    if skipped:
        terminalreporter.section("SKIPPED", sep="!")
        for reason in sorted(
            {str(r.longrepr[2]) if isinstance(r.longrepr, tuple) else str(r.longrepr) for r in skipped}
        ):
            terminalreporter.write_line(reason)
