"""Tables of numbers: what is read, what is left out, and errors that name file and row."""

import gzip
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from contralto.data.tables import NumberTable, is_table, read_numbers
from contralto.errors import DataError

ROWS = [
    {"id": "a", "x": 1.5, "y": -2, "name": "red", "split": "train", "group": "g1", "weight": 10},
    {"id": "b", "x": 2.5, "y": 0, "name": "blue", "split": "test", "group": "g1", "weight": 20.5},
    {"id": "c", "x": None, "y": 1, "name": "red", "split": "train", "group": "g2", "weight": 30},
    {"id": "d", "x": 4, "y": 2, "name": "red", "split": "train", "group": "", "weight": None},
]


def csv_of(rows):
    return "\n".join([",".join(rows[0])] + [",".join("" if v is None else str(v) for v in r.values()) for r in rows])


def write(folder, kind):
    path = folder / f"t.{kind}"
    if kind == "csv":
        path.write_text(csv_of(ROWS))
    elif kind == "jsonl":
        path.write_text("\n".join(map(json.dumps, ROWS)))
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress("\n".join(map(json.dumps, ROWS)).encode()))
    else:
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    return str(path)


@pytest.mark.parametrize("kind", ["csv", "jsonl", "jsonl.gz", "parquet"])
def test_every_form_gives_the_same_table(tmp_path, kind):
    table = read_numbers(write(tmp_path, kind), "weight")
    assert table.columns == ("x", "y")
    assert table.inputs.tolist() == [[1.5, -2], [2.5, 0]]
    assert table.numbers.tolist() == [10, 20.5]
    assert (table.ids.tolist(), table.splits.tolist(), table.groups.tolist()) == (
        ["a", "b"],
        ["train", "test"],
        ["g1"] * 2,
    )
    assert table.skipped == ((2, "no value of 'x'"), (3, "no value of 'weight'"))
    table.save(tmp_path / "kept")
    again = NumberTable.load(tmp_path / "kept")
    assert again.fingerprint() == table.fingerprint()
    assert (again.skipped, again.columns, again.target) == (table.skipped, table.columns, "weight")
    assert (again.groups == table.groups).all()


def test_without_a_target_no_number_is_asked_for(tmp_path):
    table = read_numbers(write(tmp_path, "csv"), None, columns=["x"])
    assert table.inputs.tolist() == [[1.5], [2.5], [4]]
    assert np.isnan(table.numbers).all()
    assert table.target == ""
    with pytest.raises(DataError, match="there is no column 'z'; there are id"):
        read_numbers(write(tmp_path, "csv"), None, columns=["z"])


def test_columns_can_be_chosen_and_a_table_without_ids_is_numbered(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("p,q,r\n1,2,3\n,5,6\n7,8,9\n")
    table = read_numbers(str(path), "r", columns=["q"])
    assert (table.columns, table.ids.tolist()) == (("q",), ["0", "1", "2"])
    table = read_numbers(str(path), "r")
    assert (table.columns, table.ids.tolist()) == (("p", "q"), ["0", "2"])
    assert read_numbers(str(path), "r", group_column="q").columns == ("p",)
    assert table.fingerprint() != read_numbers(str(path), "p").fingerprint()


@pytest.mark.parametrize("cell", ["abc", "1,2", "1_0", "0x10", "inf", "1e999", "--1"])
def test_a_cell_that_is_no_number_is_named_with_its_row(tmp_path, cell):
    path = tmp_path / "t.csv"
    path.write_text(f'p,q\n1,2\n3,4\n5,6\n"{cell}",8\n')
    with pytest.raises(DataError, match=r"t\.csv, row 3: .* in column 'p' is no number"):
        read_numbers(str(path), "q")
    with pytest.raises(DataError, match=r"row 3: .* in column 'p'"):
        read_numbers(str(path), "p")


def test_what_cannot_be_read_is_said(tmp_path):
    path = write(tmp_path, "csv")
    with pytest.raises(DataError, match="no column 'price'; there are id, x, y"):
        read_numbers(path, "price")
    with pytest.raises(DataError, match="no column 'z' to learn from"):
        read_numbers(path, "weight", columns=["z"])
    with pytest.raises(DataError, match="no column 'weight' to learn from beside"):
        read_numbers(path, "weight", columns=["weight"])
    with pytest.raises(DataError, match="no column 'who' for the group"):
        read_numbers(path, "weight", group_column="who")
    with pytest.raises(DataError, match="no such file"):
        read_numbers(str(tmp_path / "none.csv"), "weight")
    (tmp_path / "t.txt").write_text("1")
    with pytest.raises(DataError, match="a table of numbers is"):
        read_numbers(str(tmp_path / "t.txt"), "weight")
    (tmp_path / "empty.csv").write_text("a,b\n")
    with pytest.raises(DataError, match="no rows"):
        read_numbers(str(tmp_path / "empty.csv"), "b")
    (tmp_path / "words.csv").write_text("a,b\nred,1\nblue,2\n")
    with pytest.raises(DataError, match="no column holds numbers beside 'b'"):
        read_numbers(str(tmp_path / "words.csv"), "b")
    (tmp_path / "blank.csv").write_text("a,b\n,1\n,2\n1,\n")
    with pytest.raises(DataError, match="not one row can be used: no value of 'a' in row 0"):
        read_numbers(str(tmp_path / "blank.csv"), "b")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(DataError, match="not a Parquet file"):
        read_numbers(str(tmp_path / "broken.parquet"), "b")


def test_hostile_words_are_bounded_and_cleaned(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("id,x,y\n\u202eevil\x07,1,2\n" + "long" * 1000 + ",3,4\n")
    ids = read_numbers(str(path), "y").ids
    assert ids[0] == "evil"
    assert len(ids[1]) <= 200


def test_tables_and_pictures_are_told_apart(tmp_path):
    assert is_table(write(tmp_path, "csv"))
    assert is_table(write(tmp_path, "parquet"))
    assert not is_table(str(tmp_path))
    pq.write_table(pa.table({"image": [b"x"], "angle": [1.0]}), tmp_path / "p.parquet")
    assert not is_table(str(tmp_path / "p.parquet"))
    pq.write_table(pa.table({"image": [{"bytes": b"x", "path": "a"}], "angle": [1.0]}), tmp_path / "q.parquet")
    assert not is_table(str(tmp_path / "q.parquet"))
    (tmp_path / "p.csv").write_text("file_name,angle\na.JPG,1\n")
    assert not is_table(str(tmp_path / "p.csv"))


def test_a_damaged_table_of_a_run_is_named(tmp_path):
    read_numbers(write(tmp_path, "csv"), "weight").save(tmp_path / "kept")
    (tmp_path / "kept" / "table.parquet").write_bytes(b"no")
    with pytest.raises(DataError, match=r"table\.parquet: is damaged"):
        NumberTable.load(tmp_path / "kept")
