"""Regression over a run folder: tables and pictures, a probe and its baseline, resumption, and what is refused."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

import contralto
from contralto.cli import main
from contralto.data.tables import read_numbers
from contralto.errors import DataError, UsageError
from contralto.pipelines.applying import apply_model
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


def without_numbers(table, path, **cells):
    """The rows without what is to be told, some cells changed: column=(row, value)."""
    rows = pq.read_table(table).drop_columns(["weight"]).to_pylist()
    for name, (row, value) in cells.items():
        rows = [r | {name: str(r[name])} if r[name] is not None else r for r in rows]
        rows[row][name] = value
    path.write_text("\n".join(json.dumps(r) for r in rows))
    return path


def test_predict_tells_the_number_of_every_row_as_the_run_did(finished, table, tmp_path, capsys):
    new = without_numbers(table, tmp_path / "new.jsonl")
    assert main(["predict", str(finished), str(new), "--out", str(tmp_path / "p.parquet"), "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == {"n": 299, "unknown": 0, "skipped": 1, "file": str(tmp_path / "p.parquet")}
    assert err == "skipped row 3: no value of 'a'\n"
    said = pq.read_table(tmp_path / "p.parquet")
    assert said.schema.names == ["id", "number"]
    assert said.column("id")[6].as_py() == "<script>alert(1)</script>"
    numbers = dict(zip(*said.to_pydict().values(), strict=True))
    found = pq.read_table(finished / "predictions.parquet").to_pydict()
    np.testing.assert_allclose([numbers[i] for i in found["id"]], found["told"], rtol=1e-6)
    model = contralto.load(finished)
    rows = [[r[c] for c in "abc"] for r in pq.read_table(table).to_pylist()[:3]]
    np.testing.assert_allclose(model.predict(rows), said.column("number").to_numpy()[:3], rtol=1e-6)
    assert main(["embed", str(finished / "model"), str(new), "--out", str(tmp_path / "e.parquet")]) == 0
    embedded = np.array(pq.read_table(tmp_path / "e.parquet").column("embedding").to_pylist())
    assert embedded.shape == (299, 16)
    np.testing.assert_allclose(model.tell(embedded), said.column("number").to_numpy(), rtol=1e-6)


def test_a_long_table_is_told_in_parts_and_in_its_order(finished, tmp_path, monkeypatch):
    rng = np.random.default_rng(1)
    rows = rng.normal(size=(50, 3)) * [1, 50, 1] + [0, 500, 0]
    text = "\n".join(",".join(map(repr, r.tolist())) for r in rows)
    (tmp_path / "new.csv").write_text(f"c,b,a\n{text}\n")  # in another order than in the run
    monkeypatch.setattr("contralto.pipelines.applying.ROWS", 16)
    assert apply_model(contralto.load(finished), str(tmp_path / "new.csv"), tmp_path / "p.parquet").n == 50
    said = pq.read_table(tmp_path / "p.parquet")
    assert said.column("id").to_pylist() == [str(i) for i in range(50)]
    expected = load_regressor(finished).predict(rows[:, ::-1])
    np.testing.assert_allclose(said.column("number").to_numpy(), expected, rtol=1e-6)


def test_what_cannot_be_told_is_said_and_what_was_written_stays(finished, table, bright, tmp_path, capsys):
    kept = tmp_path / "p.parquet"
    assert main(["predict", str(finished), str(table), "--out", str(kept)]) == 0
    before = kept.read_bytes()
    good = str(without_numbers(table, tmp_path / "good.jsonl"))
    (tmp_path / "few.csv").write_text("a,b\n1,2\n")
    (tmp_path / "blank.csv").write_text("a,b,c\n1,,3\n")
    for words, told in [
        (
            [without_numbers(table, tmp_path / "bad.jsonl", b=(9, "1,5"))],
            "bad.jsonl, row 9: '1,5' in column 'b' is no number",
        ),
        ([tmp_path / "few.csv"], "few.csv: there is no column 'c'; there are a, b"),
        ([tmp_path / "blank.csv"], "not one row can be used: no value of 'b' in row 0"),
        ([tmp_path / "none.csv"], "none.csv: there is no such file"),
        ([tmp_path], "a table of numbers is .csv, .jsonl"),
        ([bright], "there is no column 'a'; there are image, brightness, split"),
        ([good, "--on", "ray"], "a table of numbers is read on this machine"),
        ([good, "--threshold", "0.5"], "a number comes without a probability"),
        ([good, "--image_column", "a"], "--image_column names images, and this run takes rows"),
    ]:
        code = main(["predict", str(finished), *map(str, words), "--out", str(kept)])
        err = capsys.readouterr().err
        assert (code, told in err, "Traceback" in err) == (2, True, False), (words, err)
    assert kept.read_bytes() == before
    assert not list(tmp_path.glob(".*part"))
    assert main(["evaluate", str(finished / "model"), str(table)]) == 2
    assert "name the run folder" in capsys.readouterr().err
    for rows in ([[1.0, 2.0]], [[1.0, 2.0, np.nan]], [1.0, 2.0, 3.0]):
        with pytest.raises(UsageError, match=r"\(N, 3\), the columns a, b, c"):
            contralto.load(finished).predict(rows)


def test_a_damaged_model_is_named_before_anything_is_made_of_it(finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    path = run / "model" / "config.json"
    config = json.loads(path.read_text())
    for change in ({"num_features": 10**12}, {"depth": 0}, {"depth": "2"}, {"columns": 3}):
        path.write_text(json.dumps(config | change))
        with pytest.raises(DataError, match=r"config\.json: is damaged"):
            contralto.load(run)
    path.write_text("7")
    with pytest.raises(DataError, match=r"config\.json: is damaged"):
        contralto.load(run)
    path.write_text(json.dumps(config))
    (run / "model" / "model.safetensors").write_bytes(b"x" * 10)
    with pytest.raises(DataError, match=r"model\.safetensors: is damaged"):
        contralto.load(run)


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


def test_pictures_with_a_number_column(bright, table, tmp_path, capsys):
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
    model = contralto.load(run)
    assert model.encoder.size == 16
    rows = pq.read_table(bright).to_pylist()
    for row in (0, 50):
        rows[row]["image"] = b"no picture"
    pq.write_table(pa.Table.from_pylist([{"image": r["image"]} for r in rows]), tmp_path / "data.parquet")
    assert main(["predict", str(run), str(tmp_path / "data.parquet"), "--out", str(tmp_path / "p.parquet")]) == 0
    out, err = capsys.readouterr()
    assert "58 predictions in" in out
    assert err.startswith("skipped data.parquet#0: ")
    said = dict(zip(*pq.read_table(tmp_path / "p.parquet").to_pydict().values(), strict=True))
    assert len(said) == 58
    told = {i: t for i, t in zip(found["id"], found["told"], strict=True) if i in said}
    assert len(told) == 15
    np.testing.assert_allclose([said[i] for i in told], list(told.values()), rtol=1e-4)
    np.testing.assert_allclose(model.predict([rows[7]["image"]]), [said["data.parquet#7"]], rtol=1e-6)
    (tmp_path / "one.png").write_bytes(rows[7]["image"])
    assert main(["embed", str(run), str(tmp_path / "one.png"), "--out", str(tmp_path / "e.parquet"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["width"] == model.config["num_features"]
    assert main(["predict", str(run), str(tmp_path / "one.png"), "--out", str(tmp_path / "p.parquet")]) == 0
    capsys.readouterr()
    (tmp_path / "a.wav").write_bytes(b"RIFF")
    for data, told in ((table, "no column with images was found among"), (tmp_path / "a.wav", "this run takes images")):
        assert main(["predict", str(run), str(data), "--out", str(tmp_path / "p.parquet")]) == 2
        assert told in capsys.readouterr().err


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
