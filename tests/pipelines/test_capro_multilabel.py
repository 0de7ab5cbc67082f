"""The multi-label job end to end on tiny pictures of two colours: web labels from tags, outputs, resume, bad input."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from contralto.cli import main
from contralto.data.ingest import ingest
from contralto.data.manifest import ClassInfo, Manifest
from contralto.errors import DataError
from contralto.pipelines.capro_multilabel import CAProMultiLabelJob, fit_capro_multilabel
from contralto.pipelines.job import load_preset, presets_of
from contralto.systems.classifier import load
from contralto.systems.webly.capro_multilabel import CAProMultiLabel

from tests.conftest import COLOURS, tagged_rows
from tests.runs import assert_same, stopped
from tests.tiny import TAGGED

NAMES = list(COLOURS)


@pytest.fixture(
    scope="module", params=[{}, {"frozen_features": True, "frozen_encoder_epoch": 0}], ids=["trained", "frozen"]
)
def finished(request, tagged_parquet, tmp_path_factory):
    arguments = TAGGED | {"definitions": tagged_parquet.with_name("classes.yaml")} | request.param
    return fit_capro_multilabel(str(tagged_parquet), tmp_path_factory.mktemp("run") / "r", **arguments), arguments


def test_everything_promised_is_there(finished):
    run, _ = finished
    table = pq.read_table(run / "cleaned.parquet").to_pylist()
    assert len(table) == 53  # one picture's tags name nothing
    assert "p7" not in {r["id"] for r in table}
    for r in table:
        given, new = set(r["given"]), set(r["new"])
        assert new == (given - set(r["removed"]) - set(r["ignored"])) | set(r["added"])
        assert set(r["anchor"]) <= given & new  # anchors hold
        assert 0 <= r["p_wrong"] <= 1
    assert sum(len(r["anchor"]) for r in table) == 3 * 2 * 3  # three of each kind and class
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["test"]["n"] == 18
    assert {"plain", "model", "difference"} < set(metrics["test"])
    assert metrics["counts"]["given"] == sum(len(r["given"]) for r in table)
    truth = {r["id"]: set(r["colours"]) for r in tagged_rows()}
    hit = sum(len(set(r["given"]) & truth[r["id"]]) for r in table)
    assert metrics["labels"]["given"]["precision"] == pytest.approx(hit / metrics["counts"]["given"])
    assert "mAP" in (run / "model" / "README.md").read_text()
    assert "multi-label" in (run / "report.html").read_text()
    assert "; " in (run / "cleaned.csv").read_text()


def test_glued_and_search_words_are_found_in_tags(tagged_parquet):
    job = CAProMultiLabelJob(str(tagged_parquet), tagged_parquet.parent / "job", _arguments(tagged_parquet))
    job.ingest()
    by_id = dict(zip(job.manifest.column("id")[job.train_rows].tolist(), job.web.tolist(), strict=True))
    for i, r in enumerate(tagged_rows()[:54]):
        if i != 7 and i % 6 != 5:
            assert by_id[r["id"]] == [int(n in r["colours"]) for n in NAMES]


def _arguments(tagged_parquet):
    words = {k: v for k, v in TAGGED.items() if k != "progress"}
    return words | {"definitions": tagged_parquet.with_name("classes.yaml")}


def test_the_saved_model_names_several_classes(finished, tagged_parquet, tmp_path, capsys):
    run, arguments = finished
    model = load(run)
    test = tagged_rows()[54:]
    found = model.predict([r["image"] for r in test])
    stored = pq.read_table(run / "test_predictions.parquet")
    tolerance = 5e-3 if arguments.get("frozen_features") else 1e-5
    np.testing.assert_allclose(found.probabilities, np.array(stored["model"].to_pylist()), atol=tolerance)
    assert found == [[n for n, p in zip(NAMES, row, strict=True) if p > 0.5] for row in found.probabilities]
    assert model.predict([test[0]["image"]], threshold=1.0) == [[]]
    assert main(["evaluate", str(run), str(tagged_parquet), "--label_column", "colours,shape", "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    told = json.loads((run / "metrics.json").read_text())["test"]["model"]
    assert again["n"] == 18
    assert again["map_macro"] == pytest.approx(told["map_macro"], abs=0.02)
    assert main(["predict", str(run), str(tagged_parquet), "--out", str(tmp_path / "p.parquet")]) == 0
    assert pq.read_table(tmp_path / "p.parquet")["label"].type == pa.list_(pa.string())


@pytest.mark.parametrize("stage", ["vanilla", "capro"])
def test_an_interrupted_job_goes_on_and_ends_the_same(finished, tagged_parquet, tmp_path, monkeypatch, stage):
    run, arguments = finished
    with stopped(monkeypatch, CAProMultiLabel, stage, 2, 1):
        fit_capro_multilabel(str(tagged_parquet), tmp_path / "r", **arguments)
    assert_same(run, fit_capro_multilabel(str(tagged_parquet), tmp_path / "r", **arguments))


def test_right_labels_change_nothing_that_is_learnt(tagged_parquet, tmp_path):
    arguments = TAGGED | {"definitions": tagged_parquet.with_name("classes.yaml"), "baseline": False, "epochs": 3}
    table = pq.read_table(tagged_parquet)
    other = tmp_path / "other.parquet"
    turned = table.column("colours").to_pylist()[::-1]
    pq.write_table(table.set_column(table.schema.get_field_index("colours"), "colours", pa.array(turned)), other)
    runs = [fit_capro_multilabel(str(d), tmp_path / n, **arguments) for n, d in (("a", tagged_parquet), ("b", other))]
    a, b = (load_file(r / "stages" / "finetune" / "weights.safetensors") for r in runs)
    assert all(torch.equal(a[k], b[k]) for k in a)
    first, second = (json.loads((r / "metrics.json").read_text())["labels"] for r in runs)
    assert first != second


def test_without_right_labels_it_still_works(tagged_parquet, tmp_path):
    table = pq.read_table(tagged_parquet).drop_columns(["colours", "shape"])
    pq.write_table(table, tmp_path / "a.parquet")
    arguments = TAGGED | {"definitions": tagged_parquet.with_name("classes.yaml"), "epochs": 2, "clean_column": None}
    run = fit_capro_multilabel(str(tmp_path / "a.parquet"), tmp_path / "r", **arguments)
    assert set(json.loads((run / "metrics.json").read_text())) == {"counts", "time", "memory_gib"}


def test_wrong_use_is_named(tagged_parquet, tmp_path):
    with pytest.raises(DataError, match="need a file of definitions"):
        fit_capro_multilabel(str(tagged_parquet), tmp_path / "a", **TAGGED)
    (tmp_path / "c.yaml").write_text("\n".join(f"{n}: {{query: {n}, definition: x.}}" for n in ("walrus", "yak")))
    with pytest.raises(DataError, match="no text names any of the classes"):
        fit_capro_multilabel(str(tagged_parquet), tmp_path / "b", definitions=tmp_path / "c.yaml", **TAGGED)
    words = TAGGED | {"clean_column": "colours,nothing"}
    with pytest.raises(DataError, match="no column 'nothing'"):
        fit_capro_multilabel(
            str(tagged_parquet), tmp_path / "c", definitions=tagged_parquet.with_name("classes.yaml"), **words
        )


def test_sets_survive_saving_and_damage_is_named(tagged_parquet, tmp_path):
    classes = [ClassInfo(n, (n,)) for n in NAMES]
    manifest = ingest(str(tagged_parquet), classes=classes, clean_column="colours", multilabel=True)
    manifest.save(tmp_path)
    again = Manifest.load(tmp_path)
    truth = again.clean_matrix()
    assert [[NAMES[c] for c in np.flatnonzero(t)] for t in truth] == [
        [n for n in NAMES if n in r["colours"]] for r in tagged_rows()
    ]
    pq.write_table(
        pa.table({"classes": pa.array([[9]] * len(truth), pa.list_(pa.int32()))}), tmp_path / "clean_sets.parquet"
    )
    with pytest.raises(DataError, match=r"clean_sets\.parquet"):
        Manifest.load(tmp_path)


@pytest.mark.parametrize("name", presets_of("capro-multilabel"))
def test_presets_hold_arguments_that_exist(name, tmp_path):
    job = CAProMultiLabelJob("x", tmp_path, load_preset(name, "capro-multilabel"))
    assert job._extensions() == ["lambda_class"]
