"""Readers over damaged files: whatever the bytes are, only our own errors come out."""

import contextlib
import functools
import json
import tempfile
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from contralto.data.ingest import ingest
from contralto.errors import ContraltoError

from tests.data.test_sources import as_folder_with_metadata, as_parquet, as_shards, as_table, as_tar


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


@functools.cache
def tree(kind):
    return {"folder": as_folder_with_metadata, "shards": as_shards}[kind](Path(tempfile.mkdtemp()))


@pytest.mark.parametrize("kind", ["folder", "shards"])
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    which=st.floats(0, 1, exclude_max=True),
    changes=st.lists(st.tuples(st.floats(0, 1), st.binary(min_size=1, max_size=8)), max_size=12),
    cut=st.floats(0, 1) | st.just(1.0),
)
def test_a_damaged_file_in_a_folder_raises_only_our_errors_and_the_others_stay(tmp_path, kind, which, changes, cut):
    files = sorted((p for p in tree(kind).rglob("*.*") if p.is_file()), key=lambda p: (p.suffix == ".png", p))
    path = files[int(which**2 * len(files))]  # the first ones are what is parsed
    whole = path.read_bytes()
    data = bytearray(whole)
    for place, piece in changes:
        start = int(place * (len(data) - 1))
        data[start : start + len(piece)] = piece
    path.write_bytes(bytes(data[: int(cut * len(data))]))
    manifest, told = outcome(lambda: ingest(str(tree(kind))))
    path.write_bytes(whole)
    if manifest is None:
        assert str(tree(kind)) in told
    else:
        assert len(manifest) >= 11
        assert len(manifest) + manifest.skipped.num_rows == 12


def outcome(function):
    """What a function gives, or the message of our error."""
    try:
        return function(), ""
    except ContraltoError as error:
        return None, str(error)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    content=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["name", "query", "queries", "definition", "red"]) | st.text(max_size=4),
                inner,
                max_size=4,
            )
        ),
        max_leaves=8,
    ),
    suffix=st.sampled_from(["json", "yaml"]),
)
def test_any_content_as_definitions(tmp_path, content, suffix):
    from contralto.data.definitions import load_definitions

    path = tmp_path / f"classes.{suffix}"
    path.write_text(json.dumps(content) if suffix == "json" else yaml.safe_dump(content), encoding="utf-8")
    classes, told = outcome(lambda: load_definitions(path))
    if classes is None:
        assert str(path) in told
    else:
        assert all(isinstance(c.name, str) and isinstance(c.definition, str) for c in classes)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(max_size=400), kind=st.sampled_from(["csv", "jsonl", "yaml"]))
def test_any_text_as_a_table_or_definitions(tmp_path, text, kind):
    from contralto.data.definitions import load_definitions

    path = tmp_path / f"data.{kind}"
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    with contextlib.suppress(ContraltoError):
        load_definitions(path) if kind == "yaml" else ingest(str(path))
