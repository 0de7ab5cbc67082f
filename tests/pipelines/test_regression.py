"""Regression over a run folder: tables and pictures, a probe and its baseline, resumption, and what is refused."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from contralto.cli import main
from contralto.data.tables import read_numbers
from contralto.errors import DataError, UsageError
from contralto.pipelines.job import load_preset, presets_of
from contralto.pipelines.regression import load_regressor
from contralto.systems.registry import get_job

from tests.conftest import picture
from tests.killing import whole

TABLE = {"target": "weight", "batch_size": 32, "epochs": 12, "width": 16, "dim": 8, "progress": False}
PICTURES = {
    "target": "brightness", "image_encoder": "resnet8", "image_size": 16, "batch_size": 16, "epochs": 2, "dim": 8,
    "optimizer": "adam", "progress": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """A curved function of two of three columns, some rows without a cell, a name that is hostile."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, 3)) * [1, 50, 1] + [0, 500, 0]
    y = np.round(3 * x[:, 0] + ((x[:, 1] - 500) / 50) ** 2 * 2 + 20, 1)
    rows = [
        {"id": f"row {i}", "a": a, "b": b, "c": c, "weight": w}
        for i, (a, b, c, w) in enumerate([*map(list, np.c_[x, y])])
    ]
    rows[3]["a"] = None
    rows[5]["weight"] = None
    rows[7]["id"] = "<script>alert(1)</script>"
    path = tmp_path_factory.mktemp("table") / "data.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.fixture(scope="module")
def finished(table, tmp_path_factory):
    return get_job("supremix").fit(str(table), tmp_path_factory.mktemp("run") / "run", **TABLE)


def test_the_page_is_written_again_by_the_command(finished, tmp_path):
    assert main(["report", str(finished), "--out", str(tmp_path / "r.html")]) == 0
    assert (tmp_path / "r.html").read_text() == (finished / "report.html").read_text()


def test_predict_says_what_to_use_instead(finished, table, capsys):
    assert main(["predict", str(finished), str(table)]) == 2
    assert "load_regressor" in capsys.readouterr().err


def test_a_run_tells_better_than_the_median_and_says_so(finished):
    whole(finished)
    metrics = json.loads((finished / "metrics.json").read_text())
    assert (metrics["learnt"], metrics["tested"], metrics["target"]) == (238, 60, "weight")
    found = pq.read_table(finished / "predictions.parquet").to_pydict()
    error = np.abs(np.array(found["number"]) - np.array(found["told"]))
    scores = metrics["scores"]
    assert scores["mean absolute error"]["value"] == pytest.approx(error.mean())
    assert scores["mean absolute error"]["value"] < 0.7 * scores["mean absolute error of the median"]["value"]
    of_plain = np.abs(np.array(found["number"]) - np.array(found["baseline"]))
    assert scores["mean absolute error, least absolute error"]["value"] == pytest.approx(of_plain.mean())
    assert scores["smaller error than that, by"]["value"] == pytest.approx((of_plain - error).mean())
    assert pq.read_table(finished / "manifest" / "skipped.parquet").num_rows == 2


def test_the_page_shows_the_test_samples_and_nothing_runs_on_it(finished):
    page = (finished / "report.html").read_text()
    assert page.count("<circle") == 2 * 60
    assert "<script>alert" not in page
    assert "Telling <bdi>weight</bdi>" in page


def test_the_model_tells_what_the_run_told(finished, table):
    model = load_regressor(finished)
    rows = read_numbers(str(table), "weight", columns=model.config["columns"])
    told = dict(zip(rows.ids.tolist(), model.tell(model.embed_rows(rows.inputs)), strict=True))
    found = pq.read_table(finished / "predictions.parquet").to_pydict()
    np.testing.assert_allclose([told[i] for i in found["id"]], found["told"], rtol=1e-6)


def test_evaluate_measures_other_data(finished, table, capsys):
    assert main(["evaluate", str(finished), str(table), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["n"] == 298
    assert found["scores"]["mean absolute error"]["value"] > 0
    assert main(["evaluate", str(finished), str(table), "--label_column", "nothing"]) == 2
    assert "no column 'nothing'" in capsys.readouterr().err


def test_a_run_goes_on_and_is_the_same_again(finished, table, tmp_path, monkeypatch):
    job = get_job("supremix")
    before = (finished / "training" / "weights.safetensors").stat().st_mtime_ns
    job.fit(str(table), finished, **TABLE)
    assert (finished / "training" / "weights.safetensors").stat().st_mtime_ns == before
    step, seen = job.system.training_step, []

    def stops(self, batch, batch_idx):
        seen.append(batch_idx)
        if len(seen) == 10:
            raise KeyboardInterrupt
        return step(self, batch, batch_idx)

    with monkeypatch.context() as patched:
        patched.setattr(job.system, "training_step", stops)
        with pytest.raises(KeyboardInterrupt):
            get_job("supremix").fit(str(table), tmp_path / "again", checkpoint_every=1, **TABLE)
    again = get_job("supremix").fit(str(table), tmp_path / "again", checkpoint_every=1, **TABLE)
    one, other = (load_file(run / "training" / "weights.safetensors") for run in (finished, again))
    assert all(torch.equal(one[k], other[k]) for k in one)
    assert pq.read_table(again / "predictions.parquet").equals(pq.read_table(finished / "predictions.parquet"))
    with pytest.raises(UsageError, match="width"):
        get_job("supremix").fit(str(table), finished, **(TABLE | {"width": 8}))


def test_least_absolute_error_tells_by_its_own_output(table, tmp_path):
    run = get_job("supremix").fit(str(table), tmp_path / "run", **TABLE, method="l1")
    assert not (run / "baseline").exists()
    weights = load_file(run / "training" / "weights.safetensors")
    model = load_regressor(run)
    torch.testing.assert_close(
        model.output.weight, (weights["spread"] * weights["output.weight"]).double(), rtol=1e-6, atol=1e-6
    )


def test_other_methods_and_the_other_probe_serve(table, tmp_path):
    for method, linear in (("rnc", "ridge"), ("mix_neg", "l1")):
        run = get_job("supremix").fit(
            str(table), tmp_path / method, **TABLE, method=method, linear=linear, baseline=False, columns="a,b"
        )
        scores = json.loads((run / "metrics.json").read_text())["scores"]
        assert scores["mean absolute error"]["value"] < scores["mean absolute error of the median"]["value"]
        assert load_regressor(run).config["columns"] == ["a", "b"]


@pytest.fixture(scope="module")
def bright(tmp_path_factory):
    """Grey pictures whose number is their brightness; some for testing, one without a number."""
    rng = np.random.default_rng(0)
    values = rng.integers(20, 200, 60)
    rows = [
        {
            "image": picture((int(v),) * 3, seed=i, side=24), "brightness": None if i == 4 else float(v) / 2,
            "split": "test" if i >= 44 else "train",
        }
        for i, v in enumerate(values)
    ]  # fmt: skip
    path = tmp_path_factory.mktemp("bright") / "data.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def test_pictures_with_a_number_column(bright, tmp_path, capsys):
    run = get_job("supremix").fit(str(bright), tmp_path / "run", **PICTURES)
    whole(run)
    metrics = json.loads((run / "metrics.json").read_text())
    assert (metrics["learnt"], metrics["tested"]) == (43, 16)
    found = pq.read_table(run / "predictions.parquet").to_pydict()
    assert set(found["number"]) <= {v / 2 for v in range(20, 200)}
    assert main(["evaluate", str(run), str(bright), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["n"] == 16
    value = told["scores"]["mean absolute error"]["value"]
    assert value == pytest.approx(metrics["scores"]["mean absolute error"]["value"], rel=1e-4)
    assert load_regressor(run).encoder.size == 16


def test_what_cannot_be_is_said(table, bright, tmp_path):
    job, small = get_job("supremix"), {k: v for k, v in TABLE.items() if k != "target"}
    with pytest.raises(UsageError, match="--target"):
        job.fit(str(table), tmp_path / "a", **small)
    with pytest.raises(DataError, match="no column 'price'"):
        job.fit(str(table), tmp_path / "b", **small, target="price")
    with pytest.raises(UsageError, match="those of a table"):
        job.fit(str(bright), tmp_path / "c", **PICTURES, columns="a")
    words = pq.read_table(bright).drop_columns(["brightness"]).append_column("brightness", pa.array(["dark"] * 60))
    pq.write_table(words, tmp_path / "words.parquet")
    with pytest.raises(DataError, match="'dark' is no number"):
        job.fit(str(tmp_path / "words.parquet"), tmp_path / "d", **PICTURES)
    (tmp_path / "same.csv").write_text("a,weight\n" + "\n".join(f"{i},5" for i in range(20)))
    with pytest.raises(DataError, match="all numbers to learn from are 5"):
        job.fit(str(tmp_path / "same.csv"), tmp_path / "e", **TABLE)
    (tmp_path / "few.csv").write_text("a,weight\n1,2\n3,4\n")
    with pytest.raises(DataError, match="too few samples"):
        job.fit(str(tmp_path / "few.csv"), tmp_path / "f", **TABLE)
    with pytest.raises(UsageError, match="held is a share"):
        job.fit(str(table), tmp_path / "g", **TABLE, held=1.0)
    with pytest.raises(DataError, match="no regressor here"):
        load_regressor(tmp_path)


def test_presets_are_arguments():
    assert presets_of("supremix") == ["small"]
    assert set(load_preset("small", "supremix")) <= set(get_job("supremix").parameters())
