"""The main job end to end on a tiny collection: outputs, resume, determinism, and what it must not look at."""

import csv
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from contralto.errors import DataError, UsageError
from contralto.pipelines import job
from contralto.pipelines.capro import CAProJob, fit_capro
from contralto.pipelines.job import load_preset, presets_of
from contralto.pipelines.outputs import write_cleaned_csv
from contralto.systems.classifier import load
from contralto.systems.webly.capro import EXTENSIONS, CAPro

from tests.conftest import picture, tiny_rows
from tests.runs import assert_same, same_weights, stopped, weights
from tests.tiny import FROZEN, TINY

COLUMNS = [
    "index", "id", "given", "verdict", "new", "given_classifier", "given_auxiliary", "given_prototype", "given_fused",
    "new_classifier", "new_auxiliary", "new_prototype", "new_fused", "text_match", "text_rank", "nearest_prototypes",
    "nearest_similarities", "p_wrong", "p_off_topic",
]  # fmt: skip


@pytest.fixture(scope="module", params=[TINY, FROZEN | {"reconcile": True}], ids=["trained", "frozen and reconciled"])
def finished(request, tiny_parquet, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "r"
    definitions = tiny_parquet.with_name("classes.yaml")
    return fit_capro(str(tiny_parquet), out, definitions=definitions, **request.param), request.param


def test_everything_promised_is_there(finished):
    run, arguments = finished
    reconciled = arguments.get("reconcile", False)
    table = pq.read_table(run / "cleaned.parquet")
    assert table.column_names == COLUMNS
    assert table.num_rows == 48
    assert set(table["verdict"].to_pylist()) <= {"kept", "corrected", "off-topic", "anchor"}
    anchors = table["verdict"].to_pylist().count("anchor")
    assert 3 <= anchors <= 9 if reconciled else anchors == 9
    assert table["p_off_topic"].null_count == (0 if reconciled else 48)
    for row in table.to_pylist():
        assert 0 <= row["p_wrong"] <= 1
        if row["verdict"] in ("kept", "anchor"):
            assert row["new"] == row["given"]
        if row["verdict"] == "off-topic":
            assert row["new"] == ""
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["test"]["n"] == 18
    assert {"plain", "model", "difference"} < set(metrics["test"])
    assert metrics["noise"]["rate_given"] == pytest.approx(0.25)
    assert (run / "report.html").read_text().startswith("<!doctype html>")
    assert json.loads((run / "config.json").read_text())["extensions"] == [
        "text_weight", "class_balanced", *(["reconcile"] if reconciled else [])
    ]  # fmt: skip
    assert "contralto.load" in (run / "model" / "README.md").read_text()


def test_the_saved_model_is_the_trained_one(finished):
    run, arguments = finished
    model = load(run)
    rows = [r for r in tiny_rows() if r["split"] == "test"]
    prediction = model.predict([r["image"] for r in rows])
    stored = pq.read_table(run / "test_predictions.parquet")
    names = ["red", "green", "blue"]
    assert [names.index(p) for p in prediction] == stored["predicted"].to_pylist()
    tolerance = 5e-3 if arguments.get("frozen_features") else 1e-5  # the cache of features is in half precision
    np.testing.assert_allclose(prediction.probabilities.max(1), stored["confidence"].to_numpy(), atol=tolerance)


def test_the_same_arguments_give_the_same_run(finished, tiny_parquet, tmp_path):
    run, arguments = finished
    again = fit_capro(
        str(tiny_parquet), tmp_path / "r", definitions=tiny_parquet.with_name("classes.yaml"), **arguments
    )
    assert_same(run, again)


@pytest.mark.parametrize(("stage", "epoch"), [("plain", 3), ("vanilla", 0), ("capro", 0), ("capro", 1), ("capro", 3)])
def test_an_interrupted_job_goes_on_and_ends_the_same(finished, tiny_parquet, tmp_path, monkeypatch, stage, epoch):
    run, arguments = finished
    call = {"definitions": tiny_parquet.with_name("classes.yaml"), **arguments}
    with stopped(monkeypatch, CAPro, stage, epoch, 2):
        fit_capro(str(tiny_parquet), tmp_path / "r", **call)
    assert_same(run, fit_capro(str(tiny_parquet), tmp_path / "r", **call))


def test_a_finished_job_computes_nothing_again(finished, tiny_parquet, monkeypatch):
    run, arguments = finished

    def never(*_, **__):
        raise AssertionError("computed again")

    monkeypatch.setattr(job, "ingest", never)
    monkeypatch.setattr(job, "EncodePictures", never)
    monkeypatch.setattr(CAPro, "training_step", never)
    fit_capro(str(tiny_parquet), run, definitions=tiny_parquet.with_name("classes.yaml"), **arguments)


def test_clean_labels_change_nothing_that_is_learnt(finished, tiny_parquet, tmp_path):
    """The clean labels of all pictures are replaced by noise: the run is the same, but for its evaluation."""
    run, arguments = finished
    table = pq.read_table(tiny_parquet)
    rng = np.random.default_rng(5)
    shuffled = pa.array(rng.permutation(table["label"].to_pylist()))
    other = tmp_path / "tiny.parquet"
    pq.write_table(table.set_column(table.schema.get_field_index("label"), "label", shuffled), other)
    again = fit_capro(str(other), tmp_path / "r", definitions=tiny_parquet.with_name("classes.yaml"), **arguments)
    assert_same(run, again)
    before, after = (json.loads((r / "metrics.json").read_text()) for r in (run, again))
    assert before["test"]["model"] != after["test"]["model"]
    assert before["noise"] != after["noise"]


def test_workers_and_other_label_modes_and_sample_weights_run(tiny_parquet, tmp_path):
    small = TINY | {"epochs": 2, "baseline": False}
    definitions = tiny_parquet.with_name("classes.yaml")
    runs = [
        fit_capro(str(tiny_parquet), tmp_path / str(w), definitions=definitions, **(small | {"workers": w}))
        for w in (0, 2)
    ]
    a, b = (load_file(r / "stages" / "finetune" / "weights.safetensors") for r in runs)
    assert all(torch.equal(a[k], b[k]) for k in a)
    for i, extra in enumerate(({"sample_weights": "frequency"}, {"sample_weights": "text"}, {"anchors": -3})):
        fit_capro(str(tiny_parquet), tmp_path / f"x{i}", definitions=definitions, **(small | extra))


def test_without_clean_labels_and_without_texts_it_still_works(tmp_path):
    rows = [{k: r[k] for k in ("image", "query")} for r in tiny_rows(per_class=12, test_per_class=0)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    run = fit_capro(str(tmp_path / "a.parquet"), tmp_path / "r", **(FROZEN | {"epochs": 2}))
    metrics = json.loads((run / "metrics.json").read_text())
    assert set(metrics) == {"counts", "time", "memory_gib"}
    assert not (run / "stages" / "plain").exists()


def test_reconciled_the_planted_wrong_labels_are_found_and_corrected(tiny_parquet, tmp_path):
    definitions = tiny_parquet.with_name("classes.yaml")
    run = fit_capro(str(tiny_parquet), tmp_path / "r", definitions=definitions, **(FROZEN | {"reconcile": True}))
    noise = json.loads((run / "metrics.json").read_text())["noise"]
    assert noise["precision"] == noise["recall"] == noise["corrected_accuracy"] == 1.0


def test_texts_that_say_nothing_are_not_reconciled(tmp_path):
    rows = [r | {"text": f"nothing {i % 7}"} for i, r in enumerate(tiny_rows())]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    runs = [
        fit_capro(str(tmp_path / "a.parquet"), tmp_path / str(r), **(FROZEN | {"reconcile": r})) for r in (True, False)
    ]
    assert same_weights(*map(weights, runs))
    assert pq.read_table(runs[0] / "cleaned.parquet")["p_off_topic"].null_count == 48


def test_wrong_use_is_named(tiny_parquet, tmp_path):
    with pytest.raises(UsageError, match="no argument 'nonsense'"):
        CAProJob(str(tiny_parquet), tmp_path / "r", {"nonsense": 1})
    with pytest.raises(UsageError, match="one device"):
        CAProJob(str(tiny_parquet), tmp_path / "r", {"devices": 2})
    with pytest.raises(UsageError, match="no preset of capro is called 'huge'"):
        load_preset("huge")
    with pytest.raises(UsageError, match="queue_size 24 is smaller than a batch of 100"):
        fit_capro(str(tiny_parquet), tmp_path / "q", **(TINY | {"batch_size": 100}))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("x")
    with pytest.raises(UsageError, match="is not empty and holds no run"):
        fit_capro(str(tiny_parquet), tmp_path / "full", **TINY)
    with pytest.raises(DataError, match="no such file"):
        fit_capro("/nowhere", tmp_path / "again", **TINY)
    with pytest.raises(DataError, match="nothing else"):  # a folder in which nothing was done yet may be taken again
        fit_capro("/nothing else", tmp_path / "again", **TINY)
    one = tmp_path / "one.parquet"
    pq.write_table(pa.table({"image": [picture((99, 9, 9), i) for i in range(3)], "query": ["a"] * 3}), one)
    with pytest.raises(DataError, match="at least two classes"):
        fit_capro(str(one), tmp_path / "one", **TINY)


def test_another_job_in_the_same_folder_is_refused(finished, tiny_parquet):
    run, arguments = finished
    with pytest.raises(UsageError, match="other arguments \\(alpha\\)"):
        fit_capro(
            str(tiny_parquet), run, definitions=tiny_parquet.with_name("classes.yaml"), **(arguments | {"alpha": 0.4})
        )


@pytest.mark.parametrize("name", presets_of("capro"))
def test_presets_hold_arguments_that_exist(name, tmp_path):
    CAProJob("x", tmp_path, load_preset(name))
    extensions = set(load_preset(name)) & set(EXTENSIONS)
    assert bool(extensions) == (name == "small")  # extensions stay out of the paper's presets


@pytest.mark.parametrize("cell", ["=1+1", "+1", "-1", "@x", "\t=1", " =1", "\r=2", "\n=2", "\uff1d1"])
def test_no_cell_of_the_csv_is_a_formula(cell, tmp_path):
    write_cleaned_csv(pa.table({"id": [cell, "plain"], "near": [[cell, "b"], ["c"]]}), tmp_path / "a.csv")
    with (tmp_path / "a.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[0]["id"][0] == "'"
    assert rows[0]["near"][0] == "'"
    assert rows[1] == {"id": "plain", "near": "c"}
