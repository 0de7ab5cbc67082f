"""The claim of FoPro: its machinery, its data, and the figures in the docs."""

import csv
import io
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from contralto.claims import fopro
from contralto.claims.runner import compare
from contralto.errors import DataError, UsageError


@pytest.mark.data
def test_a_quick_claim_runs_and_goes_on_where_it_stopped(data_folder, tmp_path):
    arguments = {"data": "1 shot", "quick": True, "work": tmp_path / "w", "progress": False}
    result = fopro.reproduce_fopro(tmp_path / "out", **arguments)
    found = result["data"]["1 shot"]
    assert list(found["arms"]) == list(fopro.ARMS)
    assert found["verdict"] == "not judged"
    assert not (tmp_path / "out").exists()
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "w").rglob("found.json")}
    assert len(before) == len(fopro.ARMS)
    again = fopro.reproduce_fopro(tmp_path / "out", **arguments)
    assert json.dumps(again["data"]) == json.dumps(result["data"])  # as text: there are NaNs among the figures
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "w").rglob("found.json")} == before


@pytest.mark.data
def test_the_data_are_what_the_claim_says(data_folder, tmp_path):
    shots = fopro.make_data(tmp_path, 2, seed=1)
    rows = pq.read_table(tmp_path / "data.parquet").to_pylist()
    kinds = {k: [r for r in rows if r["id"].startswith(k)] for k in ("web", "foreign", "shot", "test")}
    assert {k: len(v) for k, v in kinds.items()} == {"web": 2500, "foreign": 250, "shot": 20, "test": 2000}
    wrong = np.mean([r["query"] != r["label"] for r in kinds["web"]])
    assert wrong == pytest.approx(0.4, abs=0.03)
    with shots.open() as file:
        assert {(r["id"], r["label"]) for r in csv.DictReader(file)} == {(r["id"], r["label"]) for r in kinds["shot"]}
    pictures = {k: [np.asarray(Image.open(io.BytesIO(r["image"]))) for r in v[:20]] for k, v in kinds.items()}
    assert all(p.shape == (32, 32, 3) for p in pictures["web"] + pictures["foreign"])
    blue = {k: np.mean([p[..., 2].mean() - p[..., 0].mean() for p in v]) for k, v in pictures.items()}
    assert blue["web"] < blue["test"] - 30  # a warm cast
    again = pq.read_table(tmp_path / "data.parquet")
    fopro.make_data(tmp_path, 2, seed=1)
    assert pq.read_table(tmp_path / "data.parquet").equals(again)


def test_wrong_use_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("CONTRALTO_DATA", str(tmp_path))
    with pytest.raises(UsageError, match="1 shot or 16 shots"):
        fopro.reproduce_fopro(tmp_path, data="many", work=tmp_path, progress=False)
    with pytest.raises(DataError, match="cifar10n and tiny_imagenet100 were not found"):
        fopro.reproduce_fopro(tmp_path, work=tmp_path, progress=False)


def test_verdicts_follow_the_interval():
    labels, groups = np.arange(200) % 2, np.array([""] * 200)
    base = np.zeros((3, 200))
    better = np.ones((3, 200))
    found = compare({"a": base, "b": better}, [("b", "a"), ("a", "b"), ("a", "a")], labels, groups)
    assert [c["verdict"] for c in found] == ["reproduced", "not reproduced", "inconclusive"]
