"""Columns and roles, labels and classes, ids, texts and duplicates of the manifest."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from contralto.data.ingest import find_columns, ingest
from contralto.data.inspect import inspect_data
from contralto.data.manifest import ClassInfo, Manifest
from contralto.errors import DataError

from tests.conftest import picture


def write(path, **columns):
    n = len(next(iter(columns.values())))
    images = [picture((40 * i % 255, 90, 200 - 20 * i), i) for i in range(n)]
    pq.write_table(pa.table({"image": columns.pop("image", images), **columns}), path)
    return str(path)


def test_named_columns_win_and_missing_ones_are_named():
    there = ["image", "Query", "title", "alt", "query"]
    assert find_columns(there, {"text": "title, alt", "label": "Query"})["text"] == ["title", "alt"]
    assert find_columns(there, {})["label"] == ["query"]
    with pytest.raises(DataError, match="no column 'nope' for the label; the columns are image, Query"):
        find_columns(there, {"label": "nope"})


def test_clean_labels_out_of_set_and_unknown(tmp_path):
    path = write(tmp_path / "a.parquet", query=["cat", "dog", "cat", None], label=["cat", "cat", None, "bird"])
    manifest = ingest(path)
    assert manifest.class_names == ["cat", "dog"]
    assert manifest.labels.tolist() == [0, 1, 0, -1]
    assert manifest.column("clean_label").tolist() == [0, 0, -1, -1]
    without = ingest(write(tmp_path / "b.parquet", query=["cat", "dog"]))
    assert without.column("clean_label").tolist() == [-2, -2]


def test_labels_as_numbers_of_given_classes_and_unknown_ones(tmp_path):
    classes = [ClassInfo("cat"), ClassInfo("dog")]
    path = write(tmp_path / "a.parquet", label=[0, 1, 1])
    assert ingest(path, classes=classes).labels.tolist() == [0, 1, 1]
    with pytest.raises(DataError, match="given labels 7 are not among the 2 classes"):
        ingest(write(tmp_path / "b.parquet", label=[0, 7]), classes=classes)
    with pytest.raises(DataError, match="row 1: several labels"):
        ingest(write(tmp_path / "c.parquet", label=[None, ["a", "b"]]))


def test_missing_labels_and_texts_are_no_error_but_no_labels_at_all_is(tmp_path):
    manifest = ingest(write(tmp_path / "a.parquet", label=["cat", None, ""], text=[None, "x", ""]))
    assert manifest.labels.tolist() == [0, -1, -1]
    assert manifest.texts == ["", "x", ""]
    with pytest.raises(DataError, match="no given labels were found"):
        ingest(write(tmp_path / "b.parquet", text=["x", "y"]))


def test_texts_are_bounded_and_lose_direction_and_control_signs(tmp_path):
    text = "a\x00b\u202ec" + "x" * 50_000
    manifest = ingest(write(tmp_path / "a.parquet", label=["cat"], text=[text]), max_text=100)
    assert manifest.texts[0].startswith("abcx")
    assert len(manifest.texts[0]) == 100


def test_ids_stay_unique_when_the_data_repeat_them(tmp_path):
    path = write(tmp_path / "a.parquet", label=["cat"] * 4, id=["a", "a", "a#2", "a"])
    ids = ingest(path).column("id").tolist()
    assert len(set(ids)) == 4
    assert ids[0] == "a"
    assert ids[2] == "a#2"


def test_near_duplicates_are_grouped_and_leaks_into_the_test_part_reported(tmp_path):
    import io

    from PIL import Image

    shape = np.zeros((64, 64, 3), np.uint8)
    shape[10:30, 5:50] = 255
    other = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)

    def encode(array, quality):
        buffer = io.BytesIO()
        Image.fromarray(array).save(buffer, "JPEG", quality=quality)
        return buffer.getvalue()

    images = [encode(shape, 95), encode(other, 95), encode(shape, 60)]
    path = write(tmp_path / "a.parquet", image=images, label=["cat"] * 3, split=["train", "train", "test"])
    assert ingest(path).column("duplicate_group").tolist() == [0, 1, 0]
    result = inspect_data(path)
    assert result["leaks"] == 1
    assert any("nearly repeat a test picture" in w for w in result["warnings"])


def test_a_manifest_survives_saving_and_its_fingerprint_ignores_clean_labels(tmp_path):
    path = write(tmp_path / "a.parquet", query=["cat", "dog"], label=["cat", "cat"])
    manifest = ingest(path)
    manifest.save(tmp_path / "m")
    loaded = Manifest.load(tmp_path / "m")
    assert loaded.table.equals(manifest.table)
    assert loaded.classes == manifest.classes
    assert loaded.root == manifest.root
    other = ingest(write(tmp_path / "b.parquet", query=["cat", "dog"], label=["dog", "dog"]))
    assert len({manifest.fingerprint(), loaded.fingerprint()}) == 1
    at = manifest.table.schema.get_field_index("clean_label")
    changed = manifest.table.set_column(at, "clean_label", pa.array([1, 1], pa.int32()))
    assert Manifest(changed, manifest.classes, manifest.root).fingerprint() == manifest.fingerprint()
    at = manifest.table.schema.get_field_index("label")
    changed = manifest.table.set_column(at, "label", pa.array([1, 1], pa.int32()))
    assert Manifest(changed, manifest.classes, manifest.root).fingerprint() != manifest.fingerprint()
    assert other.class_names == manifest.class_names
    with pytest.raises(DataError, match=r"no manifest\.parquet"):
        Manifest.load(tmp_path)
