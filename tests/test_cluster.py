"""Passes over a collection on a local Ray cluster of two workers: the same as here, also when workers die and stores fail."""

import os
import shutil
import signal
import tarfile
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from contralto import cluster
from contralto.cli import main
from contralto.cluster import map_blocks
from contralto.data.ingest import ingest
from contralto.data.sources import find_blocks, read_records
from contralto.encoders.text import encode_texts, text_encoder
from contralto.errors import ContraltoError, DataError, MissingExtraError, UsageError
from contralto.pipelines.applying import apply_model
from contralto.pipelines.capro import fit_capro
from contralto.pipelines.regression import Regressor
from contralto.systems.classifier import Classifier

from tests.data.test_sources import FORMS, ROWS, add, as_parquet, banner, blank
from tests.tiny import TINY
from tests.working import Dying, dying, fail, open_shop

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.xdist_group("ray")


@pytest.fixture(scope="module")
def two_workers():
    open_shop(is_worker=False)
    before = signal.getsignal(signal.SIGTERM)
    root = Path(__file__).parents[1]
    path = os.pathsep.join([str(root), str(root / "src"), os.environ.get("PYTHONPATH", "")])
    with pytest.MonkeyPatch.context() as patch:  # what workers import, and whom they tell
        patch.setenv("PYTHONPATH", path)
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(
            num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR", object_store_memory=200 * 2**20,
            runtime_env={"worker_process_setup_hook": open_shop}, _system_config={"worker_niceness": 0},
        )  # fmt: skip
        signal.signal(signal.SIGTERM, before)
        yield
        ray.shutdown()


def assert_same_manifest(one, other, folder):
    """Equal to the byte in their files."""
    for name, manifest in (("one", one), ("other", other)):
        manifest.save(folder / name)
    files = sorted(p.name for p in (folder / "one").iterdir())
    assert files == sorted(p.name for p in (folder / "other").iterdir())
    assert len(files) >= 3
    for name in files:
        assert (folder / "one" / name).read_bytes() == (folder / "other" / name).read_bytes(), name


def with_faults(form, root):
    """A collection with what a crawl has: broken, blank and hostile pictures, and texts of all kinds."""
    FORMS[form](root)
    good = ROWS[0]["data"]
    faults = {
        "cut": good[: len(good) // 2],
        "html": b"<html>",
        "blank": blank(),
        "long": banner(),
        "empty": b"",
        "again": good,
    }
    if form in ("folder", "metadata", "shards"):
        folder = sorted(p for p in root.iterdir() if p.is_dir())[1]
        for name, data in faults.items():
            (folder / f"{name}.png").write_bytes(data)
        (folder / "cut.json").write_text("{")
        return root
    if form == "tar":
        with tarfile.open(root / "00001b.tar", "w") as archive:
            for name, data in faults.items():
                add(archive, f"{name}.json", b'{"class": "red", "size": [1, 2.5, null], "text": {"a": "b"}}')
                add(archive, f"{name}.png", data)
            add(archive, "../x.png", good)
        with (root / "00002.tar").open("wb") as file:
            file.write((root / "00000.tar").read_bytes()[:-3000])
        return root
    rows = [{"image": d, "class": "red", "text": None, "more": i / 3} for i, d in enumerate(faults.values())]
    pq.write_table(
        pa.Table.from_pylist([*rows, {"image": None, "class": "green"}]), root / "more.parquet", row_group_size=2
    )
    return root


@pytest.mark.parametrize("form", ["folder", "metadata", "shards", "tar", "parquet"])
def test_ingest_gives_the_same_manifest_to_the_byte(two_workers, tmp_path, monkeypatch, form):
    monkeypatch.setattr("contralto.data.sources.BLOCK_ROWS", 3)
    root = with_faults(form, tmp_path / "data")
    left_out = [[], []]
    here = ingest(str(root), left_out=left_out[0].append)
    there = ingest(f"shop://{root}", left_out=left_out[1].append, on="ray")
    assert len(list(find_blocks(str(root)))) >= 3
    assert len(here) >= 13
    assert here.skipped.num_rows >= 5
    assert left_out[0] == left_out[1]
    assert_same_manifest(here, ingest(str(root), on="ray"), tmp_path)
    assert there.table.equals(here.table)
    assert there.skipped.equals(here.skipped)
    assert there.read_bytes(0) == here.read_bytes(0)


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_tables_are_cut_into_rows(two_workers, tmp_path, kind):
    target = FORMS[kind](tmp_path / "data")
    with target.open("a") as file:
        file.write(
            "\nmissing.png,red,x\n../a.png,red,y\n" if kind == "csv" else '\n{"path": "missing.png", "class": "red"}\n'
        )
    here, there = ingest(str(target)), ingest(str(target), on="ray")
    assert here.skipped.num_rows == (2 if kind == "csv" else 1)
    assert_same_manifest(here, there, tmp_path)


@pytest.mark.parametrize(
    ("form", "file"),
    [("tar", "00001.tar"), ("parquet", "data.parquet"), ("folder", "green/green1.txt"), ("folder", "green/green1.png")],
)
def test_a_worker_that_is_killed_and_a_store_that_fails_lose_and_double_nothing(two_workers, tmp_path, form, file):
    root = FORMS[form](tmp_path / "data")
    root = root.parent if root.is_file() else root
    here = ingest(str(root))
    for ending in (".dies", ".fails"):
        marker = root / (file + ending)
        marker.touch()
        there = ingest(f"shop://{root}", on="ray")
        assert not marker.exists()
        assert there.table.equals(here.table)
        assert there.skipped.num_rows == 0


def test_results_come_whole_and_in_order_though_workers_die(two_workers, tmp_path):
    expected = [[x, {"a": x}] for x in range(7)]
    assert list(map_blocks(Dying, range(7), on="ray", setup=(str(tmp_path / "a"),))) == expected
    assert list(map_blocks(partial(dying, str(tmp_path / "b")), [0], on="ray")) == expected[:1]
    assert list(map_blocks(dying, [], on="ray")) == []


def test_errors_of_ours_come_back_as_they_were_and_others_are_told(two_workers):
    done = map_blocks(fail, range(5), on="ray")
    assert [next(done), next(done)] == [0, 1]
    with pytest.raises(DataError, match=r"a\.csv, row 7: is no good") as caught:
        next(done)
    assert (caught.value.file, caught.value.row) == ("a.csv", 7)
    with pytest.raises(MissingExtraError, match=r"contralto\[graph\]"):
        list(map_blocks(fail, [3], on="ray"))
    with pytest.raises(ContraltoError, match="ZeroDivisionError: nothing to divide by"):
        list(map_blocks(fail, [4], on="ray"))


def test_from_the_far_end_of_a_connection_ray_data_runs_on_the_cluster(two_workers, monkeypatch):
    monkeypatch.setattr(ray.util.client.ray, "is_connected", lambda: True)
    assert list(map_blocks(abs, range(-3, 3), on="ray")) == [3, 2, 1, 0, 1, 2]
    with pytest.raises(DataError, match=r"a\.csv, row 7: is no good"):
        list(map_blocks(fail, range(5), on="ray"))


@pytest.mark.parametrize(
    ("name", "content"),
    [("data.jsonl", '{"path": "a.png"}\nnot json'), ("data.parquet", "PAR1 not really"), ("data.tar", "x")],
)
def test_what_cannot_be_read_is_told_as_here(two_workers, tmp_path, name, content):
    (tmp_path / name).write_text(content)
    told = []
    for on in (None, "ray"):
        with pytest.raises(DataError, match=name) as caught:
            ingest(str(tmp_path / name), on=on)
        told.append(str(caught.value))
    assert told[0] == told[1]
    assert list(read_records(str(as_parquet(tmp_path / "p"))))[7].row == 7


def test_texts_in_blocks(two_workers, monkeypatch):
    monkeypatch.setattr("contralto.encoders.text.TEXTS", 4)
    texts = [r["text"] for r in ROWS]
    encoder = text_encoder("tfidf").fit(texts)
    assert np.array_equal(encode_texts(encoder, texts, on="ray"), encoder.encode(texts))


@pytest.mark.slow
def test_the_passes_of_a_job_on_a_cluster_are_those_here(two_workers, tiny_parquet, tmp_path, monkeypatch):
    """A run whose trainings are done, but nothing that is computed over all pictures: on a cluster it becomes the same again."""
    monkeypatch.setattr("contralto.encoders.pictures.BLOCK", 32)
    call = {"definitions": tiny_parquet.with_name("classes.yaml"), **TINY, "epochs": 2, "baseline": False}
    here = fit_capro(str(tiny_parquet), tmp_path / "here", **call)
    there = tmp_path / "there"
    shutil.copytree(here, there)
    made = ["test_predictions.parquet", "embedding.npy", "cleaned.parquet"]
    made += [str(f.relative_to(here)) for f in (here / "features").glob("*.npy")]
    for name in made:
        (there / name).unlink()
    shutil.rmtree(there / "manifest")
    assert fit_capro(str(tiny_parquet), there, on="ray", **call) == there
    assert len(made) >= 6
    for name in [*made, "manifest/manifest.parquet"]:
        assert (here / name).read_bytes() == (there / name).read_bytes(), name
    assert fit_capro(str(tiny_parquet), there, **call) == there  # where it runs may change when a run goes on


@pytest.mark.parametrize("task", ["predict", "embed", "tell"])
def test_a_model_over_a_collection_on_a_cluster_and_here(two_workers, tmp_path, monkeypatch, task):
    monkeypatch.setattr("contralto.data.sources.BLOCK_ROWS", 5)
    config = {
        "encoder": "resnet8", "num_features": 128, "size": 32, "crop": 1.0, "mean": [0.5] * 3, "std": [0.5] * 3,
        "classes": ["red", "green", "blue"], "hidden": 16, "dim": 8, "temperature": 0.1,
    }  # fmt: skip
    root, model, outs = with_faults("folder", tmp_path / "data"), Classifier(config).eval(), []
    if task == "tell":
        task, about = "predict", {"target": "weight", "columns": None, "num_features": 128}
        model = Regressor(model.encoder, about).eval()
    for on in (None, "ray"):
        outs.append(tmp_path / f"{on}.parquet")
        applied = apply_model(model, str(root), outs[-1], task=task, on=on)
        assert (applied.n, [name for name, _ in applied.skipped]) == (15, ["green/cut", "green/empty", "green/html"])
    assert outs[0].read_bytes() == outs[1].read_bytes()
    assert pq.read_metadata(outs[0]).num_rows == 15


def test_a_list_on_a_cluster_is_the_list_here(two_workers, tiny_parquet, tmp_path):
    np.save(tmp_path / "e.npy", np.random.default_rng(0).standard_normal((66, 8), np.float32))
    words = ["clean", str(tiny_parquet), "--embeddings", str(tmp_path / "e.npy"), "--text_encoder", "tfidf"]
    for out, more in (("here", []), ("there", ["--on", "ray"])):
        assert main([*words, "--out", str(tmp_path / out), *more]) == 0
    here, there = ((tmp_path / out / "cleaned.parquet").read_bytes() for out in ("here", "there"))
    assert here == there


def test_where_to_run_is_checked(monkeypatch):
    with pytest.raises(UsageError, match='on must be "ray" or "ray://host:port", got \'spark\''):
        map_blocks(len, [], on="spark")
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r"contralto\[ray\]"):
        map_blocks(len, [], on="ray")
    assert list(map_blocks(Dying, [1, 2], setup=("x",))) == [[1, {"a": 1}], [2, {"a": 2}]]


def test_a_cluster_leaves_signals_as_they_were(monkeypatch):
    """Ray takes SIGTERM for itself, with which a training saves its step."""

    class Greedy:
        is_initialized = staticmethod(lambda: False)

        @staticmethod
        def init(**_):
            signal.signal(signal.SIGTERM, lambda *_: None)

    monkeypatch.setattr(cluster, "_ray", Greedy)
    before = signal.getsignal(signal.SIGTERM)
    assert isinstance(cluster._connected("ray"), Greedy)
    assert signal.getsignal(signal.SIGTERM) == before
