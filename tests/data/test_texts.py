"""Texts from all their files, and words as numbers."""

import gzip
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from contralto.data.texts import END, PAD, START, UNKNOWN, Vocabulary, read_texts
from contralto.errors import DataError, UsageError

TEXTS = ["A first text, with a comma.", "Zweiter Text: größer", "third"]


def write(folder, kind):
    path = folder / f"texts.{kind}"
    rows = [{"number": i, "title": t} for i, t in enumerate([TEXTS[0], "  ", *TEXTS[1:]])]
    lines = "\n".join(json.dumps(r) for r in rows)
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif kind == "csv":
        path.write_text("number,title\n" + "\n".join(f'{r["number"]},"{r["title"]}"' for r in rows), encoding="utf-8")
    else:
        text = "\n".join(r["title"] for r in rows) if kind.startswith("txt") else lines
        data = text.encode()
        path.write_bytes(gzip.compress(data) if kind.endswith("gz") else data)
    return str(path)


@pytest.mark.parametrize("kind", ["txt", "txt.gz", "jsonl", "jsonl.gz", "csv", "parquet"])
def test_the_same_texts_come_out_of_all_files(tmp_path, kind):
    assert read_texts(write(tmp_path, kind)) == TEXTS


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_columns_are_named(tmp_path, kind):
    path = write(tmp_path, kind)
    assert read_texts(path, text_column="title") == TEXTS
    with pytest.raises(DataError, match="no column is called 'body'; there are: number, title"):
        read_texts(path, text_column="body")


def test_what_cannot_be_read_is_named(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        read_texts(str(tmp_path / "nothing.txt"))
    for name, data, told in (
        ("a.pdf", b"", "texts are read from"),
        ("a.parquet", b"no", "not a Parquet file"),
        ("a.jsonl", b'{"text": 3}', "row 0: a text was expected, got int"),
        ("b.jsonl", b'{"words": "x"}', "name it: --text_column"),
        ("c.txt.gz", gzip.compress(b"text " * 5000)[:-20], "cannot be read"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(DataError, match=told):
            read_texts(str(tmp_path / name))


def test_words_are_numbered_by_frequency_then_alphabet():
    known = Vocabulary.learn(["b b a a c", "a <unk> <unk> <unk> <unk>"], least=2)
    assert known.words == ["a", "b"]
    assert len(known) == 6
    assert Vocabulary.learn(["b b a a c"], size=1, least=1).words == ["a"]
    with pytest.raises(UsageError, match="no word is there 2 times"):
        Vocabulary.learn(["a b c"])


def test_sentences_end_and_are_cut_and_padded():
    known = Vocabulary(["a", "b"])
    rows = known.encode(["A b c", "a a a a a", "", "b"], length=4)
    assert rows.tolist() == [[4, 5, UNKNOWN, END], [4, 4, 4, END], [END, PAD, PAD, PAD], [5, END, PAD, PAD]]
    assert rows.dtype == np.int64
    assert known.decode(rows) == ["a b <unk>", "a a a", "", "b"]
    assert known.decode(np.array([[START, 4, 5, 4]])) == ["a b a"]


@given(st.text(max_size=60))
def test_any_text_has_numbers(text):
    row = Vocabulary(["a"]).encode([text], length=8)[0]
    assert END in row
    assert row.max() <= 4
