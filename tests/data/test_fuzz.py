"""Readers over damaged files: whatever the bytes are, only our own errors come out."""

import contextlib
import functools
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from contralto.data.ingest import ingest
from contralto.errors import ContraltoError

from tests.data.test_sources import as_parquet, as_table, as_tar


@functools.cache
def whole(kind):
    folder = Path(tempfile.mkdtemp())
    if kind == "tar":
        return (as_tar(folder) / "00000.tar").read_bytes()
    if kind == "parquet":
        return as_parquet(folder).read_bytes()
    return as_table(folder, kind).read_bytes()


@pytest.mark.parametrize("kind", ["tar", "parquet", "csv", "jsonl"])
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    changes=st.lists(st.tuples(st.floats(0, 1), st.binary(min_size=1, max_size=8)), max_size=12),
    cut=st.floats(0, 1) | st.just(1.0),
)
def test_damaged_files_raise_only_our_errors(tmp_path, kind, changes, cut):
    data = bytearray(whole(kind))
    for place, piece in changes:
        start = int(place * (len(data) - 1))
        data[start : start + len(piece)] = piece
    path = tmp_path / f"data.{kind}"
    path.write_bytes(bytes(data[: int(cut * len(data))]))
    with contextlib.suppress(ContraltoError):
        ingest(str(path))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(max_size=400), kind=st.sampled_from(["csv", "jsonl", "yaml"]))
def test_any_text_as_a_table_or_definitions(tmp_path, text, kind):
    from contralto.data.definitions import load_definitions

    path = tmp_path / f"data.{kind}"
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    with contextlib.suppress(ContraltoError):
        load_definitions(path) if kind == "yaml" else ingest(str(path))
