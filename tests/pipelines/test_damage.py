"""A run folder that was damaged, or that came from somebody else: an error that names the file, and nothing is executed."""

import contextlib
import io
import json
import os
import pickle
import shutil

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from contralto import cli
from contralto.errors import ContraltoError
from contralto.pipelines.capro import fit_capro
from contralto.systems.webly.model import load

from tests.conftest import picture
from tests.tiny import FROZEN


@pytest.fixture(scope="module")
def run(tiny_parquet, tmp_path_factory):
    out = tmp_path_factory.mktemp("damage") / "run"
    return fit_capro(str(tiny_parquet), out, definitions=tiny_parquet.with_name("classes.yaml"), **FROZEN)


@contextlib.contextmanager
def changed(path, data):
    """The file with other bytes, and afterwards as it was."""
    whole = path.read_bytes()
    path.write_bytes(data)
    try:
        yield
    finally:
        path.write_bytes(whole)


def go_on(run, data):
    fit_capro(str(data), run, definitions=data.with_name("classes.yaml"), **FROZEN)


def use(name, run, data, out):
    """All that reads a file of a run."""
    if name.startswith("model/"):
        load(run).predict([picture((200, 30, 40), 1)])
        cli.evaluate(run, str(data), show=False)
    elif name == "cleaned.parquet":
        cli.clean(run, out=out, show=False)
        cli.report(run, out=out / "r.html", show=False)
    else:
        cli.report(run, out=out / "r.html", show=False)


READ = [
    "model/config.json", "model/model.safetensors", "cleaned.parquet", "config.json", "metrics.json", "environment.json",
    "manifest/manifest.parquet", "manifest/classes.json", "manifest/skipped.parquet", "test_predictions.parquet",
    "map.parquet", "stages/capro/metrics.jsonl",
]  # fmt: skip


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(READ),
    changes=st.lists(st.tuples(st.floats(0, 1), st.binary(min_size=1, max_size=8)), min_size=1, max_size=6),
    cut=st.floats(0, 1) | st.just(1.0),
)
def test_a_damaged_file_of_a_run_raises_only_our_errors(run, tiny_parquet, tmp_path, name, changes, cut):
    data = bytearray((run / name).read_bytes())
    for place, piece in changes:
        start = int(place * (len(data) - 1))
        data[start : start + len(piece)] = piece
    with changed(run / name, bytes(data[: int(cut * len(data))])), contextlib.suppress(ContraltoError):
        use(name, run, tiny_parquet, tmp_path)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from([n for n in READ if n.endswith("json")]), data=st.data())
def test_json_of_a_run_with_other_values_raises_only_our_errors(run, tiny_parquet, tmp_path, name, data):
    """Valid JSON in which one value is another one."""
    content = json.loads((run / name).read_text())
    at = content
    while isinstance(at, (dict, list)) and at:
        keys = list(at) if isinstance(at, dict) else list(range(len(at)))
        key, parent = data.draw(st.sampled_from(keys)), at
        at = parent[key]
        if data.draw(st.booleans()):
            break
    value = st.none() | st.integers() | st.floats() | st.text(max_size=5) | st.just([]) | st.just({}) | st.just([[0]])
    parent[key] = data.draw(value)
    with changed(run / name, json.dumps(content).encode()), contextlib.suppress(ContraltoError):
        use(name, run, tiny_parquet, tmp_path)


class Canary:
    def __reduce__(self):
        return (os.mkdir, (os.environ["CANARY"],))


def objects():
    """An array of pickled objects, as NumPy writes it."""
    buffer = io.BytesIO()
    np.save(buffer, np.array([Canary()], dtype=object), allow_pickle=True)
    return buffer.getvalue()


@pytest.mark.parametrize("name", READ)
@pytest.mark.parametrize("kind", ["pickle", "array of objects", "nothing"])
def test_a_foreign_file_is_named_and_never_unpickled(run, tiny_parquet, tmp_path, monkeypatch, name, kind):
    monkeypatch.setenv("CANARY", str(tmp_path / "canary"))
    data = {"pickle": pickle.dumps(Canary()), "array of objects": objects(), "nothing": b""}[kind]
    with changed(run / name, data), pytest.raises(ContraltoError) as caught:
        use(name, run, tiny_parquet, tmp_path)
    assert name.rsplit("/", 1)[-1] in str(caught.value)
    assert not (tmp_path / "canary").exists()


def test_a_job_that_goes_on_names_damaged_state_or_computes_it_again(run, tiny_parquet, tmp_path, monkeypatch):
    monkeypatch.setenv("CANARY", str(tmp_path / "canary"))
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    for name in ("config.json", "seconds.json", "manifest/classes.json", "stages/vanilla/weights.safetensors"):
        with changed(copy / name, pickle.dumps(Canary())), pytest.raises(ContraltoError) as caught:
            go_on(copy, tiny_parquet)
        assert name.rsplit("/", 1)[-1] in str(caught.value)
    for path in (copy / "features").glob("*.npy"):
        path.write_bytes(objects())
    with pytest.warns(UserWarning, match="cannot be read .* computed again"):
        go_on(copy, tiny_parquet)
    assert (copy / "cleaned.parquet").read_bytes() == (run / "cleaned.parquet").read_bytes()
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"hidden": 10**12},
        {"size": 10**9},
        {"num_features": -1},
        {"dim": "8"},
        {"encoder": "hf-hub:a/b"},
        {"std": 3},
        {"crop": float("nan")},
        {"crop": -1},
        {"std": [0, 1, 1]},
        {"classes": [1, 2, 3]},
    ],
)
def test_a_model_folder_from_elsewhere_is_checked_before_anything_is_made(run, change):
    path = run / "model" / "config.json"
    content = json.loads(path.read_text()) | change
    with changed(path, json.dumps(content).encode()), pytest.raises(ContraltoError):
        load(run)
