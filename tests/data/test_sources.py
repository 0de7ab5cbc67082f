"""One collection in every form that people have gives one manifest; what is hostile or broken is refused and listed."""

import csv
import io
import json
import os
import pickle
import tarfile

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from contralto.data.images import decode_image
from contralto.data.ingest import ingest
from contralto.data.sources import ByteReader, detect_form, find_blocks, read_block, read_records
from contralto.errors import DataError

from tests.conftest import COLOURS, picture

ROWS = [
    {"class": name, "key": f"{name}{i}", "text": f"a {name} thing, nr {i}", "data": picture(colour, 10 * c + i)}
    for c, (name, colour) in enumerate(COLOURS.items())
    for i in range(4)
]


def as_folder(root):
    for r in ROWS:
        (root / r["class"]).mkdir(parents=True, exist_ok=True)
        (root / r["class"] / f"{r['key']}.png").write_bytes(r["data"])
        (root / r["class"] / f"{r['key']}.txt").write_text(r["text"])
    return root


def as_folder_with_metadata(root):
    as_folder(root)
    for path in root.rglob("*.txt"):
        path.unlink()
    with (root / "metadata.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["file_name", "text"])
        writer.writeheader()
        writer.writerows({"file_name": f"{r['class']}/{r['key']}.png", "text": r["text"]} for r in ROWS)
    return root


def as_shards(root):
    for i, r in enumerate(ROWS):
        folder = root / f"{i // 6:05d}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{i:09d}.png").write_bytes(r["data"])
        (folder / f"{i:09d}.txt").write_text(r["text"])
        (folder / f"{i:09d}.json").write_text(json.dumps({"class": r["class"], "status": "success"}))
    return root


def add(archive, name, data):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    archive.addfile(info, io.BytesIO(data))


def as_tar(root):
    root.mkdir(parents=True, exist_ok=True)
    for shard in range(2):
        with tarfile.open(root / f"{shard:05d}.tar", "w") as archive:
            for r in ROWS[6 * shard : 6 * shard + 6]:
                add(archive, f"{r['key']}.json", json.dumps({"class": r["class"]}).encode())
                add(archive, f"{r['key']}.png", r["data"])
                add(archive, f"{r['key']}.txt", r["text"].encode())
    return root


def as_parquet(root, bytes_struct=False):
    root.mkdir(parents=True, exist_ok=True)
    image = [{"bytes": r["data"], "path": None} if bytes_struct else r["data"] for r in ROWS]
    table = pa.table({"image": image, "class": [r["class"] for r in ROWS], "text": [r["text"] for r in ROWS]})
    pq.write_table(table, root / "data.parquet", row_group_size=5)
    return root / "data.parquet"


def as_table(root, kind):
    root.mkdir(parents=True, exist_ok=True)
    rows = []
    for r in ROWS:
        (root / f"{r['key']}.png").write_bytes(r["data"])
        rows.append({"path": f"{r['key']}.png", "class": r["class"], "text": r["text"]})
    target = root / f"data.{kind}"
    if kind == "csv":
        with target.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        target.write_text("\n".join(json.dumps(r) for r in rows))
    return target


FORMS = {
    "folder": as_folder,
    "metadata": as_folder_with_metadata,
    "shards": as_shards,
    "tar": as_tar,
    "parquet": as_parquet,
    "struct": lambda root: as_parquet(root, bytes_struct=True),
    "csv": lambda root: as_table(root, "csv"),
    "jsonl": lambda root: as_table(root, "jsonl"),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_pictures_labels_and_texts(tmp_path, form):
    manifest = ingest(str(FORMS[form](tmp_path / "data")))
    found = {
        (manifest.class_names[label], text, sha)
        for label, text, sha in zip(manifest.labels, manifest.texts, manifest.column("sha256"), strict=True)
    }
    import hashlib

    assert found == {(r["class"], r["text"], hashlib.sha256(r["data"]).hexdigest()) for r in ROWS}
    assert manifest.skipped.num_rows == 0
    assert len(set(manifest.column("id"))) == len(ROWS)


@pytest.mark.parametrize("form", FORMS)
def test_every_picture_can_be_read_again_by_its_place(tmp_path, form):
    manifest = ingest(str(FORMS[form](tmp_path / "data")))
    reader = ByteReader(manifest.root)
    by_text = {r["text"]: r["data"] for r in ROWS}
    for row in np.random.default_rng(0).permutation(len(manifest)):
        place = (
            manifest.table.slice(row, 1).select(["source", "container", "member", "offset", "length"]).to_pylist()[0]
        )
        assert reader.read(**place) == by_text[manifest.texts[row]]


def test_an_address_of_another_file_system(tmp_path):
    memory = fsspec.filesystem("memory")
    for r in ROWS:
        memory.pipe(f"/crawl/{r['class']}/{r['key']}.png", r["data"])
        memory.pipe(f"/crawl/{r['class']}/{r['key']}.txt", r["text"].encode())
    manifest = ingest("memory://crawl")
    assert len(manifest) == len(ROWS)
    place = manifest.table.slice(0, 1).select(["source", "container", "member", "offset", "length"]).to_pylist()[0]
    assert decode_image(ByteReader(manifest.root).read(**place)).shape == (40, 40, 3)


def test_planted_faults_are_each_counted_with_their_reason(tmp_path):
    root = as_folder(tmp_path / "data")
    good = ROWS[0]["data"]
    faults = {
        "red/empty.png": (b"", "empty file"),
        "red/html.jpg": (b"<!DOCTYPE html><p>404", "not an image"),
        "red/cut.png": (good[: len(good) // 2], "truncated"),
        "red/small.png": (picture((9, 9, 9), 0, side=8), "too small"),
        "green/blank.png": (blank(), "blank"),
        "green/long.png": (banner(), "extreme aspect"),
    }
    for name, (data, _) in faults.items():
        (root / name).write_bytes(data)
    manifest = ingest(str(root))
    assert len(manifest) == len(ROWS)
    found = {r["source"]: r["reason"] for r in manifest.skipped.to_pylist()}
    for name, (_, reason) in faults.items():
        assert found[name] == reason or (reason == "truncated" and found[name] in ("truncated", "broken image"))
    assert len(ingest(str(root), image_filter=False)) == len(ROWS) + 3


def blank():
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (50, 50), (255, 255, 255)).save(buffer, "PNG")
    return buffer.getvalue()


def banner():
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 600, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


class Canary:
    def __reduce__(self):
        return (os.mkdir, (os.environ["CANARY"],))


def test_hostile_tars_neither_leave_the_folder_nor_are_unpickled(tmp_path, monkeypatch):
    monkeypatch.setenv("CANARY", str(tmp_path / "canary"))
    root = as_tar(tmp_path / "data")
    secret = tmp_path / "secret.png"
    secret.write_bytes(ROWS[0]["data"])
    with tarfile.open(root / "zzz.tar", "w") as archive:
        add(archive, "../../secret.png", ROWS[0]["data"])
        add(archive, "/etc/passwd.png", ROWS[0]["data"])
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, str(secret)
        archive.addfile(link)
        add(archive, "bomb.pyd", pickle.dumps(Canary()))
        add(archive, "bomb.png", ROWS[1]["data"])
        add(archive, "bomb.json", b'{"class": "red"}')
        add(archive, "badjson.json", b"{" * 100_000)
        add(archive, "badjson.png", ROWS[1]["data"])
    manifest = ingest(str(root))
    reasons = {r["id"]: r["reason"] for r in manifest.skipped.to_pylist()}
    assert sum("unsafe member" in r for r in reasons.values()) == 3
    assert any("not valid JSON" in r for r in reasons.values())
    assert len(manifest) == len(ROWS) + 1
    assert not (tmp_path / "canary").exists()


def test_a_table_cannot_name_files_outside_its_folder_unless_allowed(tmp_path):
    secret = tmp_path / "secret.png"
    secret.write_bytes(ROWS[0]["data"])
    target = as_table(tmp_path / "data", "csv")
    (target.parent / "link.png").symlink_to(secret)
    with target.open("a") as file:
        file.write(
            f"../secret.png,red,x\n{secret},red,x\nlink.png,red,x\nhttp://example.org/a.png,red,x\nmissing.png,red,x\n"
        )
    manifest = ingest(str(target))
    reasons = [r["reason"] for r in manifest.skipped.to_pylist()]
    assert reasons == ["leads outside the data folder"] * 4 + ["file is missing"]
    assert len(manifest) == len(ROWS)
    rows = target.read_text().splitlines()
    target.write_text("\n".join([*rows[:-5], rows[-5], rows[-4]]))
    assert len(ingest(str(target), allow_outside=True)) == len(ROWS) + 2


def test_a_folder_with_a_link_to_elsewhere_is_not_followed(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "x.png").write_bytes(ROWS[0]["data"])
    root = as_folder(tmp_path / "data")
    (root / "red" / "link.png").symlink_to(tmp_path / "elsewhere" / "x.png")
    assert ingest(str(root)).skipped.to_pylist()[0]["reason"] == "leads outside the data folder"


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("data.jsonl", '{"path": "a.png"}\nnot json', "row 1: is not valid JSON"),
        ("data.jsonl", "[1, 2]", "row 0: is not a JSON object"),
        ("data.csv", "caption,class\nx,y\n", "no column with paths was found; its columns are caption, class"),
        ("data.parquet", "PAR1 not really", "is not a Parquet file"),
        ("data.tar", "not a tar", "is not a plain tar"),
        ("data.tar.gz", "x", "unpack it to a plain .tar first"),
        ("data.bin", "x", "this kind of file is not known"),
    ],
)
def test_files_that_cannot_be_read_are_named_with_row_and_reason(tmp_path, name, content, told):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=told) as caught:
        list(read_records(str(tmp_path / name)))
    assert name in str(caught.value)


def test_a_value_nested_deeper_than_a_program_can_follow(tmp_path):
    target = as_table(tmp_path / "data", "jsonl")
    deep = "[" * 800 + "]" * 800
    with target.open("a") as file:
        file.write(f'\n{{"path": "red0.png", "class": "red", "text": {deep}, "more": {deep}}}')
    assert len(ingest(str(target))) == len(ROWS) + 1


def test_blocks_are_of_a_size_and_hold_what_all_of_them_hold(tmp_path):
    for form, rows, sizes in (
        ("folder", 5, [5, 5, 2]),
        ("csv", 5, [5, 5, 2]),
        ("parquet", 5, [5, 5, 2]),
        ("tar", 5, [6, 6]),
    ):
        data = str(FORMS[form](tmp_path / form))
        found = [list(read_block(block)) for block in find_blocks(data, rows=rows)]
        assert [len(part) for part in found] == sizes
        assert [r for part in found for r in part] == list(read_records(data))


def test_blocks_of_tables_are_cut_where_they_hold_much_text(tmp_path):
    rows = [{"path": "a.png", "text": "x" * 2**20} for _ in range(10)]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(r) for r in rows))
    assert [len(b.items) for b in find_blocks(str(tmp_path / "a.jsonl"))] == [4, 4, 2]


def test_a_store_that_does_not_answer_says_nothing_about_a_picture(tmp_path, monkeypatch):
    root = as_folder(tmp_path / "data")

    def busy(*_):
        raise TimeoutError("the store is busy")

    monkeypatch.setattr("contralto.data.sources._read_file", busy)
    with pytest.raises(TimeoutError, match="busy"):
        ingest(str(root))


def test_nothing_there_and_nothing_known(tmp_path):
    with pytest.raises(DataError, match="no such file or folder"):
        detect_form(str(tmp_path / "missing"))
    with pytest.raises(DataError, match="nothing here is known"):
        detect_form(str(tmp_path))
    (tmp_path / "a").mkdir()
    with pytest.raises(DataError, match="not one usable picture"):
        ingest(str(tmp_path))


def test_bytes_that_changed_after_ingest_are_noticed(tmp_path):
    manifest = ingest(str(as_folder(tmp_path / "data")))
    place = manifest.table.slice(0, 1).select(["source", "container", "member", "offset", "length"]).to_pylist()[0]
    path = tmp_path / "data" / place["source"]
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError, match="has changed"):
        ByteReader(manifest.root).read(**place)
    path.unlink()
    with pytest.raises(DataError, match="cannot be read any more"):
        ByteReader(manifest.root).read(**place)
