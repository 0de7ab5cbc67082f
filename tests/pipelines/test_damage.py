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
from contralto.systems.classifier import load
from contralto.systems.registry import get_job

from tests.conftest import picture
from tests.tiny import FROZEN, TAGGED

ARGUMENTS = {"capro": FROZEN, "capro-multilabel": TAGGED | {"frozen_features": True, "frozen_encoder_epoch": 0}}


class Run:
    """A finished run of a system and its data."""

    def __init__(self, system, data, out):
        self.system, self.data = system, data
        self.folder = self.go_on(out)

    def go_on(self, folder):
        """The command again."""
        definitions = self.data.with_name("classes.yaml")
        return get_job(self.system).fit(str(self.data), folder, definitions=definitions, **ARGUMENTS[self.system])

    def use(self, name, out):
        """All that reads a file of a run."""
        if name.startswith("model/"):
            load(self.folder).predict([picture((200, 30, 40), 1)])
            columns = {"label_column": "colours,shape"} if self.system == "capro-multilabel" else {}
            cli.evaluate(self.folder, str(self.data), show=False, **columns)
        elif name == "cleaned.parquet":
            cli.clean(self.folder, out=out, show=False)
            cli.report(self.folder, out=out / "r.html", show=False)
        else:
            cli.report(self.folder, out=out / "r.html", show=False)


@pytest.fixture(scope="module")
def runs(tiny_parquet, tagged_parquet, tmp_path_factory):
    out, data = tmp_path_factory.mktemp("damage"), {"capro": tiny_parquet, "capro-multilabel": tagged_parquet}
    return {system: Run(system, data[system], out / system) for system in ARGUMENTS}


@contextlib.contextmanager
def changed(path, data):
    """The file with other bytes, and afterwards as it was."""
    whole = path.read_bytes()
    path.write_bytes(data)
    try:
        yield
    finally:
        path.write_bytes(whole)


BOTH = [
    "model/config.json", "model/model.safetensors", "cleaned.parquet", "config.json", "metrics.json", "environment.json",
    "manifest/manifest.parquet", "manifest/classes.json", "manifest/skipped.parquet", "stages/capro/metrics.jsonl",
]  # fmt: skip
READ = [
    *[(system, name) for system in ARGUMENTS for name in BOTH],
    *[("capro", name) for name in ("test_predictions.parquet", "map.parquet")],
    ("capro-multilabel", "manifest/clean_sets.parquet"),
]


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    place=st.sampled_from(READ),
    changes=st.lists(st.tuples(st.floats(0, 1), st.binary(min_size=1, max_size=8)), min_size=1, max_size=6),
    cut=st.floats(0, 1) | st.just(1.0),
)
def test_a_damaged_file_of_a_run_raises_only_our_errors(runs, tmp_path, place, changes, cut):
    run, name = runs[place[0]], place[1]
    data = bytearray((run.folder / name).read_bytes())
    for share, piece in changes:
        start = int(share * (len(data) - 1))
        data[start : start + len(piece)] = piece
    with changed(run.folder / name, bytes(data[: int(cut * len(data))])), contextlib.suppress(ContraltoError):
        run.use(name, tmp_path)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.sampled_from([p for p in READ if p[1].endswith("json")]), data=st.data())
def test_json_of_a_run_with_other_values_raises_only_our_errors(runs, tmp_path, place, data):
    """Valid JSON in which one value is another one."""
    run, name = runs[place[0]], place[1]
    content = json.loads((run.folder / name).read_text())
    at = content
    while isinstance(at, (dict, list)) and at:
        keys = list(at) if isinstance(at, dict) else list(range(len(at)))
        key, parent = data.draw(st.sampled_from(keys)), at
        at = parent[key]
        if data.draw(st.booleans()):
            break
    value = st.none() | st.integers() | st.floats() | st.text(max_size=5) | st.just([]) | st.just({}) | st.just([[0]])
    parent[key] = data.draw(value)
    with changed(run.folder / name, json.dumps(content).encode()), contextlib.suppress(ContraltoError):
        run.use(name, tmp_path)


class Canary:
    def __reduce__(self):
        return (os.mkdir, (os.environ["CANARY"],))


def objects():
    """An array of pickled objects, as NumPy writes it."""
    buffer = io.BytesIO()
    np.save(buffer, np.array([Canary()], dtype=object), allow_pickle=True)
    return buffer.getvalue()


@pytest.mark.parametrize(("system", "name"), READ)
@pytest.mark.parametrize("kind", ["pickle", "array of objects", "nothing"])
def test_a_foreign_file_is_named_and_never_unpickled(runs, tmp_path, monkeypatch, system, name, kind):
    monkeypatch.setenv("CANARY", str(tmp_path / "canary"))
    data = {"pickle": pickle.dumps(Canary()), "array of objects": objects(), "nothing": b""}[kind]
    run = runs[system]
    with changed(run.folder / name, data), pytest.raises(ContraltoError) as caught:
        run.use(name, tmp_path)
    assert name.rsplit("/", 1)[-1] in str(caught.value)
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("system", ARGUMENTS)
def test_a_job_that_goes_on_names_damaged_state_or_computes_it_again(runs, tmp_path, monkeypatch, system):
    monkeypatch.setenv("CANARY", str(tmp_path / "canary"))
    run, copy = runs[system], tmp_path / "run"
    shutil.copytree(run.folder, copy)
    names = ["config.json", "seconds.json", "manifest/classes.json", "stages/vanilla/weights.safetensors"]
    for name in [*names, *(n for s, n in READ if s == system and n == "manifest/clean_sets.parquet")]:
        with changed(copy / name, pickle.dumps(Canary())), pytest.raises(ContraltoError) as caught:
            run.go_on(copy)
        assert name.rsplit("/", 1)[-1] in str(caught.value)
    for path in (copy / "features").glob("*.npy"):
        path.write_bytes(objects())
    with pytest.warns(UserWarning, match="cannot be read .* computed again"):
        run.go_on(copy)
    assert (copy / "cleaned.parquet").read_bytes() == (run.folder / "cleaned.parquet").read_bytes()
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
@pytest.mark.parametrize("system", ARGUMENTS)
def test_a_model_folder_from_elsewhere_is_checked_before_anything_is_made(runs, system, change):
    run = runs[system].folder
    path = run / "model" / "config.json"
    content = json.loads(path.read_text()) | change
    with changed(path, json.dumps(content).encode()), pytest.raises(ContraltoError):
        load(run)
