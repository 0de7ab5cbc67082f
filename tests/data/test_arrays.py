"""Pictures in NumPy archives: what is found, read row by row, and what is refused before anything is inflated."""

import contextlib
import io
import os
import pickle
import struct
import tracemalloc
import zipfile
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from contralto.cli import main
from contralto.data import arrays
from contralto.data.arrays import find_pictures, read_members, read_pictures, read_rows
from contralto.data.images import decode_image
from contralto.data.ingest import ingest
from contralto.data.sources import find_blocks, read_block, read_records
from contralto.errors import ContraltoError, DataError

OMNIGLOT = Path(os.environ.get("CONTRALTO_DATA", "")) / "omniglot" / "omniglot28.npz"
PIXELS = np.random.default_rng(0).integers(0, 256, (30, 20, 24, 3), dtype=np.uint8)
LABELS = np.arange(30) % 3
LOOSE = {"min_side": 8, "blank_share": None}
SAVES = {"stored": np.savez, "packed": np.savez_compressed}


@pytest.mark.parametrize("save", SAVES)
@pytest.mark.parametrize("pixels", [PIXELS, PIXELS[..., 0], PIXELS[..., :1]], ids=["colour", "grey", "channel"])
def test_pixels_and_columns_come_back_as_they_were_saved(tmp_path, save, pixels):
    names = np.array(["wheel", "leaf", "cup"])
    SAVES[save](
        tmp_path / "a.npz", images=pixels, labels=LABELS, label_names=names, id=[f"n{i}" for i in range(30)],
        group=np.arange(30) // 2, split=np.where(np.arange(30) < 20, "train", "test"), unrelated=np.eye(4),
    )  # fmt: skip
    manifest = ingest(str(tmp_path / "a.npz"), **LOOSE)
    assert [manifest.class_names[c] for c in manifest.labels] == names[LABELS].tolist()
    assert manifest.column("id").tolist() == [f"n{i}" for i in range(30)]
    assert manifest.column("group").tolist() == [str(i // 2) for i in range(30)]
    assert manifest.column("split").tolist() == ["train"] * 20 + ["test"] * 10
    for row in np.random.default_rng(1).permutation(30):
        read = decode_image(manifest.read_bytes(int(row)))
        assert np.array_equal(read, np.broadcast_to(pixels.reshape(30, 20, 24, -1)[row], (20, 24, 3)))


def test_transparent_pictures_lie_on_white(tmp_path):
    pixels = np.zeros((2, 10, 10, 4), np.uint8)
    pixels[1, ..., 3] = 255
    np.savez(tmp_path / "a.npz", x=pixels, y=[0, 1])
    manifest = ingest(str(tmp_path / "a.npz"), **LOOSE)
    assert [decode_image(manifest.read_bytes(i)).max() for i in range(2)] == [255, 0]


@pytest.mark.parametrize(
    ("picture_name", "label_name"),
    [("images", "labels"), ("x", "y"), ("data", "target"), ("X", "y"), ("mine", "label")],
)
def test_members_are_found_by_their_usual_names(tmp_path, picture_name, label_name):
    np.savez(tmp_path / "a.npz", **{picture_name: PIXELS, label_name: LABELS})
    assert ingest(str(tmp_path / "a.npz"), **LOOSE).labels.tolist() == LABELS.tolist()


def test_members_of_other_names_are_named(tmp_path):
    np.savez(tmp_path / "a.npz", first=PIXELS, second=PIXELS[:, ::-1], kind=LABELS, when=LABELS + 5)
    with pytest.raises(DataError, match="name them with --image_column"):
        ingest(str(tmp_path / "a.npz"))
    manifest = ingest(str(tmp_path / "a.npz"), image_column="second", label_column="kind", group_column="when", **LOOSE)
    assert manifest.labels.tolist() == LABELS.tolist()
    assert set(manifest.column("group")) == {"5", "6", "7"}
    assert np.array_equal(decode_image(manifest.read_bytes(4)), PIXELS[4, ::-1])
    with pytest.raises(DataError, match="no column 'weather'"):
        ingest(str(tmp_path / "a.npz"), image_column="second", label_column="weather", **LOOSE)


@pytest.mark.parametrize("save", SAVES)
@pytest.mark.parametrize(
    "names",
    [("x_train", "y_train", "x_test", "y_test"), ("train_images", "train_labels", "test_images", "test_labels")],
)
def test_parts_of_the_data_become_splits(tmp_path, save, names):
    values = (PIXELS[:20], LABELS[:20, None], PIXELS[20:], LABELS[20:, None])
    SAVES[save](tmp_path / "a.npz", **dict(zip(names, values, strict=True)), class_names=["a", "b", "c"])
    manifest = ingest(str(tmp_path / "a.npz"), **LOOSE)
    assert manifest.column("split").tolist() == ["train"] * 20 + ["test"] * 10
    assert manifest.class_names == ["a", "b", "c"]
    assert manifest.labels.tolist() == LABELS.tolist()
    assert np.array_equal(decode_image(manifest.read_bytes(25)), PIXELS[25])
    assert len(set(manifest.column("id"))) == 30


def test_minus_one_and_nan_say_that_there_is_no_label(tmp_path):
    for labels in (np.where(LABELS == 2, -1, LABELS), np.where(LABELS == 2, np.nan, LABELS)):
        np.savez(tmp_path / "a.npz", x=PIXELS, y=labels)
        assert ingest(str(tmp_path / "a.npz"), **LOOSE).labels.tolist() == [0, 1, -1] * 10


def test_a_number_without_a_meaning_is_named_with_array_and_row(tmp_path):
    np.savez(tmp_path / "a.npz", x=PIXELS, y=LABELS, class_names=["a", "b"])
    with pytest.raises(DataError, match=r"a\.npz, row 2: 2 in 'y' has no entry in class_names"):
        ingest(str(tmp_path / "a.npz"))


def test_a_folder_of_archives_and_another_file_system(tmp_path):
    for n in range(2):
        np.savez(tmp_path / f"{n}.npz", images=PIXELS[15 * n : 15 * n + 15], labels=LABELS[15 * n : 15 * n + 15])
    manifest = ingest(str(tmp_path), **LOOSE)
    assert manifest.labels.tolist() == LABELS.tolist()
    assert np.array_equal(decode_image(manifest.read_bytes(20)), PIXELS[20])
    fsspec.filesystem("memory").pipe("/arrays/a.npz", (tmp_path / "0.npz").read_bytes())
    manifest = ingest("memory://arrays/a.npz", **LOOSE)
    assert np.array_equal(decode_image(manifest.read_bytes(3)), PIXELS[3])


def test_blocks_hold_what_all_of_them_hold_and_a_packed_array_is_one(tmp_path):
    for save, sizes in (("stored", [12, 12, 6]), ("packed", [30])):
        SAVES[save](tmp_path / "a.npz", x=PIXELS, y=LABELS)
        data = str(tmp_path / "a.npz")
        found = [list(read_block(block)) for block in find_blocks(data, rows=12)]
        assert [len(part) for part in found] == sizes
        assert [r for part in found for r in part] == list(read_records(data))


@pytest.mark.parametrize("save", SAVES)
def test_pictures_are_read_a_few_at_a_time(tmp_path, save):
    pixels = np.zeros((500, 128, 128, 3), np.uint8)  # 24 MB
    pixels[np.arange(500), np.arange(500) % 128] = 200
    SAVES[save](tmp_path / "a.npz", x=pixels, y=np.arange(500), text=["x" * 2000] * 500)
    with (tmp_path / "a.npz").open("rb") as file:
        (found,) = find_pictures(read_members(file, "a"), "a")
        tracemalloc.start()
        n = sum(pixels[row].max() == picture.max() for row, picture, _ in read_pictures(file, "a", found))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert n == 500
    assert peak < 8 * 2**20


def test_rows_from_the_middle_of_both(tmp_path):
    for save in SAVES.values():
        save(tmp_path / "a.npz", y=np.arange(400_000))
        with (tmp_path / "a.npz").open("rb") as file:
            member = read_members(file, "a")["y"]
            assert read_rows(file, "a", member, 300_000, 3).tolist() == [300_000, 300_001, 300_002]
            with pytest.raises(DataError, match="has no entries 399999 to 400001"):
                read_rows(file, "a", member, 399_999, 2)


class Canary:
    def __reduce__(self):
        return (os.mkdir, (os.environ["CANARY"],))


def test_objects_are_never_unpickled(tmp_path, monkeypatch):
    monkeypatch.setenv("CANARY", str(tmp_path / "canary"))
    objects = np.empty(30, object)
    objects[:] = Canary()
    np.savez(tmp_path / "a.npz", x=PIXELS, unrelated=objects)
    assert len(ingest(str(tmp_path / "a.npz"), unlabelled=True, **LOOSE)) == 30
    for name in ("y", "images"):
        np.savez(tmp_path / "a.npz", x=PIXELS, **{name: objects})
        with contextlib.suppress(DataError):
            ingest(str(tmp_path / "a.npz"), image_column=None if name == "y" else name)
    np.savez(tmp_path / "a.npz", x=PIXELS, y=objects)
    with pytest.raises(DataError, match="never unpickled"):
        ingest(str(tmp_path / "a.npz"))
    with zipfile.ZipFile(tmp_path / "b.npz", "w") as archive:
        archive.writestr("images.npy", pickle.dumps(Canary()))
    with pytest.raises(DataError, match=r"b\.npz: array 'images' cannot be read"):
        ingest(str(tmp_path / "b.npz"))
    assert not (tmp_path / "canary").exists()


def header(shape, descr="|u1", fortran=False):
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": descr, "fortran_order": fortran, "shape": shape})
    return buffer.getvalue()


@pytest.mark.parametrize("kind", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("shape", [(10**9, 1000, 1000), (10**30, 8, 8), (-5, 8, 8), (4, 8, 8)])
def test_a_header_that_promises_other_than_what_is_there(tmp_path, kind, shape):
    with zipfile.ZipFile(tmp_path / "a.npz", "w", kind) as archive:
        archive.writestr("images.npy", header(shape) + bytes(300))
    with pytest.raises(DataError, match=r"a\.npz: array 'images' cannot be read \(ValueError: its header asks for"):
        ingest(str(tmp_path / "a.npz"))


def test_a_bomb_is_refused_by_its_headers(tmp_path):
    with (
        zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("images.npy", "w") as file,
    ):
        file.write(header((200, 1024, 1024)))
        for _ in range(200):
            file.write(bytes(2**20))
    assert (tmp_path / "a.npz").stat().st_size < 300_000
    tracemalloc.start()
    with pytest.raises(DataError, match="asks for 209715328 bytes, too many"):
        ingest(str(tmp_path / "a.npz"))
    assert tracemalloc.get_traced_memory()[1] < 4 * 2**20
    tracemalloc.stop()


def test_a_packed_array_that_would_not_fit_into_memory_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(arrays, "MAX_PACKED", 10_000)
    np.savez_compressed(tmp_path / "a.npz", images=PIXELS, labels=LABELS)
    with pytest.raises(DataError, match=r"save it with numpy\.savez, not"):
        ingest(str(tmp_path / "a.npz"))
    np.savez(tmp_path / "a.npz", images=PIXELS, labels=LABELS)
    assert len(ingest(str(tmp_path / "a.npz"), **LOOSE)) == 30


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (
            {"images": PIXELS.astype(float), "labels": LABELS},
            r"no array can be pictures: .* it holds images \(30, 20, 24, 3\) float64",
        ),
        ({"frames": np.zeros((5, 8, 28, 28), np.uint8)}, "no array can be pictures"),
        (
            {"images": PIXELS, "labels": LABELS[:-1]},
            r"a\.npz: labels \(29,\) int64: it must hold .* of the 30 pictures",
        ),
        ({"images": PIXELS, "label": np.eye(3)[LABELS]}, "a number or a short text for each"),
        ({"images": np.asfortranarray(PIXELS)}, "Fortran order"),
        ({"images": PIXELS, "labels": np.zeros(30, complex)}, "a number or a short text"),
        ({}, "it holds nothing"),
    ],
)
def test_arrays_that_do_not_fit_are_named(tmp_path, content, told):
    np.savez(tmp_path / "a.npz", **content)
    with pytest.raises(DataError, match=told):
        ingest(str(tmp_path / "a.npz"))


def test_a_damaged_picture_is_named_by_file_array_and_row(tmp_path):
    np.savez(tmp_path / "a.npz", images=PIXELS)
    whole = (tmp_path / "a.npz").read_bytes()
    np.savez_compressed(tmp_path / "b.npz", images=PIXELS)
    with zipfile.ZipFile(tmp_path / "b.npz") as archive:
        place = archive.getinfo("images.npy").header_offset + 20_000
    damaged = bytearray((tmp_path / "b.npz").read_bytes())
    damaged[place : place + 50] = bytes(50)
    (tmp_path / "b.npz").write_bytes(damaged)
    with pytest.raises(DataError, match=r"b\.npz, row 0: array 'images' cannot be read"):
        ingest(str(tmp_path / "b.npz"))
    (tmp_path / "c.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"c\.npz: is no archive of NumPy arrays"):
        ingest(str(tmp_path / "c.npz"))


def test_pictures_that_changed_after_ingest_are_noticed(tmp_path):
    for save in SAVES.values():
        save(tmp_path / "a.npz", images=PIXELS, labels=LABELS)
        manifest = ingest(str(tmp_path / "a.npz"), **LOOSE)
        save(tmp_path / "a.npz", images=PIXELS[:10], labels=LABELS[:10])
        with pytest.raises(DataError, match="has changed"):
            manifest.read_bytes(20)
        save(tmp_path / "a.npz", images=PIXELS[:, :15], labels=LABELS)
        with pytest.raises(DataError, match="has changed"):
            replace(manifest).read_bytes(2)  # another reader, that has kept nothing


def test_arrays_are_no_sounds(tmp_path):
    np.savez(tmp_path / "a.npz", images=PIXELS)
    with pytest.raises(DataError, match="not as sounds"):
        list(read_records(str(tmp_path / "a.npz"), kind="sound"))


def whole(save):
    buffer = io.BytesIO()
    SAVES[save](buffer, images=PIXELS, labels=LABELS, label_names=["a", "b", "c"], text=["some text"] * 30)
    return buffer.getvalue()


WHOLE = {save: whole(save) for save in SAVES}


@pytest.mark.parametrize("save", SAVES)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    changes=st.lists(st.tuples(st.floats(0, 1), st.booleans(), st.binary(min_size=1, max_size=8)), max_size=12),
    cut=st.floats(0, 1) | st.just(1.0),
)
def test_damaged_archives_raise_only_our_errors(tmp_path, save, changes, cut):
    data = bytearray(WHOLE[save])
    headers = [i for i in range(len(data) - 3) if data[i : i + 2] == b"PK"]
    for place, at_a_header, piece in changes:
        start = int(place * (len(data) - 1))
        if at_a_header:  # what is parsed
            start = headers[int(place * (len(headers) - 1))] + start % 180
        data[start : start + len(piece)] = piece
    path = tmp_path / "a.npz"
    path.write_bytes(bytes(data[: int(cut * len(data))]))
    with contextlib.suppress(ContraltoError):
        manifest = ingest(str(path), **LOOSE)
        for row in range(len(manifest)):
            manifest.read_bytes(row)


VALUES = st.none() | st.integers() | st.text(max_size=4) | st.sampled_from(["|u1", "<U3", "|O", "<i8"])
NESTED = st.recursive(
    VALUES,
    lambda inner: (
        st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.sampled_from(["descr", "shape", "fortran_order"]), inner)
    ),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None)
@given(text=st.text(max_size=80) | NESTED.map(repr), version=st.sampled_from([(1, 0), (2, 0), (3, 0), (9, 9)]))
def test_any_header_of_an_array(text, version):
    told = text.encode("utf-8", errors="replace")
    size = struct.pack("<H" if version == (1, 0) else "<I", len(told))
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("images.npy", b"\x93NUMPY" + bytes(version) + size + told + bytes(100))
    with contextlib.suppress(ContraltoError):
        for pictures in find_pictures(read_members(buffer, "a"), "a"):
            list(read_pictures(buffer, "a", pictures))


def test_the_command_line_learns_from_an_archive_and_names_what_is_wrong(tmp_path, capsys):
    large = PIXELS.repeat(2, 1).repeat(2, 2)
    np.savez_compressed(tmp_path / "digits.npz", x_train=large, y_train=LABELS, x_test=large, y_test=LABELS)
    data, run = str(tmp_path / "digits.npz"), str(tmp_path / "run")
    assert main(["inspect", data, "--json"]) == 0
    assert '"form": "arrays"' in capsys.readouterr().out
    words = [
        "--image_encoder",
        "resnet18-small",
        "--image_size",
        "16",
        "--epochs",
        "1",
        "--batch_size",
        "10",
        "--workers",
        "0",
    ]
    assert main(["fit", "simclr", data, "--out", run, *words, "--json"]) == 0
    assert main(["embed", run, data, "--out", str(tmp_path / "e.parquet")]) == 0
    assert len(set(pq.read_table(tmp_path / "e.parquet")["id"].to_pylist())) == 60
    np.savez(tmp_path / "bad.npz", x=PIXELS.astype(float))
    assert main(["fit", "simclr", str(tmp_path / "bad.npz"), "--out", str(tmp_path / "run2")]) == 2
    told = capsys.readouterr().err
    assert "bad.npz" in told
    assert "uint8" in told


@pytest.mark.skipif(not OMNIGLOT.is_file(), reason="CONTRALTO_DATA holds no omniglot")
def test_omniglot_as_it_is():
    manifest = ingest(str(OMNIGLOT), **LOOSE)
    whole = np.load(OMNIGLOT, allow_pickle=False)
    assert len(manifest) == 4840
    assert [int(manifest.class_names[c]) for c in manifest.labels] == whole["character"].tolist()
    assert manifest.column("group").tolist() == whole["alphabet_names"][whole["alphabet"]].tolist()
    for row in range(0, 4840, 97):
        assert np.array_equal(decode_image(manifest.read_bytes(row))[..., 0], whole["images"][row])
    with pytest.raises(DataError, match="no array can be pictures"):
        ingest(str(OMNIGLOT.with_name("strokes8x28.npz")))
