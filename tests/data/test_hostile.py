"""Data made to do harm: memory stays bounded, nothing outside the root is opened, nothing is executed."""

import json
import os
import pickle
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from contralto.data.ingest import ingest

from tests.conftest import picture
from tests.data.test_sources import add, as_folder, as_table

TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    program = [sys.executable, TESTS / "hostile.py", tmp_path_factory.mktemp("hostile")]
    result = subprocess.run(program, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-2000:]
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.xdist_group("hostile")  # measured once
@pytest.mark.parametrize(
    ("case", "mib", "pictures", "told"),
    [
        ("pixel_bombs", 100, 1, ""),
        ("text_bombs", 100, 1, ""),
        ("tiff_chains", 100, 1, ""),
        ("gzip_bomb", 200, 0, "a line has"),
        ("gzip_rows", 300, 0, "too many for the size of the file"),
        ("many_members", 100, 1, ""),
        ("long_header", 100, 1, ""),
        ("large_cells", 1000, 1, ""),
        ("large_texts", 200, 50, ""),
        ("large_files", 700, 1, ""),
        ("long_line", 300, 0, "a line has"),
        ("large_tags", 300, 45, ""),
    ],
)
def test_memory_is_bounded(measured, case, mib, pictures, told):
    found = measured[case]
    assert found["mib"] < mib
    if told:
        assert told in found["error"]
        assert ", row " in found["error"]
    else:
        assert found["pictures"] == pictures
        assert found["longest"] <= 10_000


@pytest.mark.slow
@pytest.mark.xdist_group("hostile")
def test_tags_without_end_are_read_as_far_as_they_count(measured):
    found = measured["large_tags"]
    assert found["named"][0] >= 40  # what is glued into words of at most 200 letters is found
    assert found["seconds"] < 60  # the search in a word is bounded by its length


WATCHED = """
import json, os, sys
from contralto.cli import main
from contralto.data.ingest import ingest
first, hostile, log = sys.argv[1:]
ingest(first)  # what is imported late is no part of what is watched
touched, changed = set(), set()

def watch(event, words):
    if event == "open" and isinstance(words[0], (str, bytes)):
        writes = isinstance(words[1], str) and set(words[1]) & set("wax+") or (words[2] or 0) & (os.O_WRONLY | os.O_RDWR)
        (changed if writes else touched).add(os.fsdecode(words[0]))
    elif event in ("os.listdir", "os.scandir"):
        touched.add(os.fsdecode(words[0]))
    elif event in ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.chmod", "os.truncate"):
        changed.update(os.fsdecode(w) for w in words if isinstance(w, (str, bytes)))
    elif event in ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "socket.connect", "pickle.find_class"):
        changed.add(event)

watching = [True]
sys.addaudithook(lambda event, words: watch(event, words) if watching else None)
told = []
for name in ("folder", "parquet", "table/data.jsonl", "tar"):
    try:
        told.append([name, len(ingest(os.path.join(hostile, name)))])
    except Exception as error:
        told.append([name, repr(error)])
watching.clear()
json.dump({"touched": sorted(touched), "changed": sorted(changed), "told": told}, open(log, "w"))
"""


class Canary:
    def __reduce__(self):
        return (os.mkdir, (os.environ["CANARY"],))


def hostile_trees(root, secret):
    """All forms, each with names, links and values that lead elsewhere or hold a pickle."""
    good, bomb = picture((200, 30, 40), 1), pickle.dumps(Canary())
    outside = [
        "../../secret.png", str(secret), "/etc/passwd", f"file://{secret}", "~/x.png", "a/../../../secret.png",
        "..\\..\\secret.png", "red/../../../secret.png", "memory://x.png", "x\x00.png", "\u202egnp.x", "CON.png", "a" * 300,
    ]  # fmt: skip
    tree = as_folder(root / "folder")
    (tree / "red" / "link.png").symlink_to(secret)
    (tree / "green" / "link.txt").symlink_to(secret)
    (tree / "green" / "link.png").write_bytes(good)
    (tree / "linked").symlink_to(secret.parent / "elsewhere")
    (tree / "\u202egnp.x").mkdir()
    (tree / "\u202egnp.x" / "a b\n.png").write_bytes(good)
    (tree / "red" / "model.pkl").write_bytes(bomb)
    (tree / "red" / "array.npy").write_bytes(bomb)
    rows = [json.dumps({"file_name": name, "text": "x"}) for name in outside]
    (tree / "metadata.jsonl").write_text("\n".join(rows))
    (root / "tar").mkdir()
    with tarfile.open(root / "tar" / "a.tar", "w") as archive:
        for name in outside:
            add(archive, name.replace("\x00", "0"), good)
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
            link = tarfile.TarInfo(f"link{kind.decode()}.png")
            link.type, link.linkname = kind, str(secret)
            archive.addfile(link)
        for suffix in ("pkl", "pyd", "pth", "npy", "pt", "pickle", "json", "cls", "txt"):
            add(archive, f"good.{suffix}", bomb)
        add(archive, "good.png", good)
        add(archive, "fine.png", good)
        add(archive, "fine.cls", b"red")
    table = as_table(root / "table", "jsonl")
    with table.open("a") as file:
        file.writelines("\n" + json.dumps({"path": name, "class": "red"}) for name in outside)
    (root / "table" / "linked.png").symlink_to(secret)
    with table.open("a") as file:
        file.write('\n{"path": "linked.png", "class": "red"}')
    (root / "parquet").mkdir()
    cells = [{"bytes": good, "path": None}, *({"bytes": None, "path": p} for p in outside)]
    columns = {"image": cells, "class": ["red"] * len(cells), "pickled": [bomb] * len(cells)}
    pq.write_table(pa.table(columns), root / "parquet" / "a.parquet")


def test_nothing_outside_the_root_is_opened_and_nothing_is_unpickled(tmp_path, monkeypatch):
    monkeypatch.setenv("CANARY", str(tmp_path / "canary"))
    secret = tmp_path / "secret.png"
    secret.write_bytes(picture((1, 2, 3), 2))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "x.png").write_bytes(picture((1, 2, 3), 3))
    root = tmp_path / "root"
    root.mkdir()
    hostile_trees(root, secret)
    first, log, canary = as_folder(tmp_path / "first"), tmp_path / "log.json", tmp_path / "canary"
    program = [sys.executable, "-c", WATCHED, str(first), str(root), str(log)]
    done = subprocess.run(program, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(log.read_text())
    assert all(isinstance(number, int) and number > 0 for _, number in found["told"]), found["told"]
    ours = [p for p in found["touched"] if not p.startswith((sys.prefix, sys.base_prefix, "/proc", "/sys"))]
    assert any(p.endswith("red0.png") for p in ours)  # the watch sees what is opened
    assert [p for p in ours if not Path(p).resolve().is_relative_to(root)] == []
    assert found["changed"] == []
    assert not canary.exists()


def test_fewer_shards_than_workers_is_no_hang(tmp_path):
    (tmp_path / "data").mkdir()
    with tarfile.open(tmp_path / "data" / "a.tar", "w") as archive:
        for i in range(3):
            add(archive, f"{i}.png", picture((90, 60, 30 * i), i))
            add(archive, f"{i}.cls", b"red")
    assert len(ingest(str(tmp_path / "data"), workers=16)) == 3
    np.testing.assert_array_equal(ingest(str(tmp_path / "data"), workers=1).labels, [0, 0, 0])
