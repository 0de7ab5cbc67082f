"""FoPro's job end to end on a tiny collection: shots, outputs, resume, determinism, bad input."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from contralto.errors import DataError, UsageError
from contralto.pipelines.fopro import FoProJob, fit_fopro
from contralto.pipelines.job import load_preset, presets_of
from contralto.systems.classifier import load
from contralto.systems.webly.fopro import FoPro

from tests.conftest import tiny_rows
from tests.runs import assert_same, stopped

TINY = {
    "image_encoder": "resnet8", "image_size": 32, "crop": 1.0, "batch_size": 12, "hidden": 16, "dim": 8, "queue_size": 24,
    "momentum_prototype": 0.9, "epochs": 5, "lr": 0.003, "warmup_epochs": 0, "frozen_encoder_epoch": 1, "init_proto_epoch": 0,
    "start_clean_epoch": 1, "relation_clean_epoch": 2, "relation_epochs": 1, "finetune_epochs": 1, "workers": 0,
    "accelerator": "cpu", "seed": 0, "progress": False,
}  # fmt: skip
FROZEN = TINY | {
    "frozen_features": True,
    "frozen_encoder_epoch": 0,
    "optimizer": "sgd",
    "lr": 0.03,
    "finetune_lr": 0.003,
}
STAGES = ("plain", "prototypes", "relation", "fopro", "finetune")


@pytest.fixture(scope="module")
def shots(tmp_path_factory):
    """Two shots per class; one of them has a wrong web label, one is no colour at all."""
    rows = [r for r in tiny_rows() if r["split"] == "train"]
    lines = ["id,label"]
    for name in ("red", "green", "blue"):
        own = [r for r in rows if r["query"] == name]
        lines += [f"{own[0]['id']},{name}", f"{own[3]['id']},{own[3]['label']}"]
        assert own[3]["label"] != name
    lines.append(f"{rows[5]['id']},")
    path = tmp_path_factory.mktemp("shots") / "shots.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module", params=[TINY, FROZEN], ids=["trained", "frozen"])
def finished(request, tiny_parquet, shots, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "r"
    return fit_fopro(str(tiny_parquet), out, shots=shots, **request.param), request.param


def test_everything_promised_is_there_and_shots_hold(finished, shots):
    run, _ = finished
    table = pq.read_table(run / "cleaned.parquet")
    assert table.num_rows == 47  # one was said to be no colour
    rows = {r["id"]: r for r in table.to_pylist()}
    wanted = [line.split(",") for line in shots.read_text().splitlines()[1:]]
    for identity, label in wanted:
        if label:
            found = rows[identity]
            assert (found["given"], found["new"], found["verdict"], found["given_fused"]) == (label, label, "anchor", 1)
            assert found["p_wrong"] == 0
        else:
            assert identity not in rows
    assert table["verdict"].to_pylist().count("anchor") == 6
    assert table["text_match"].null_count == 47
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["anchors"] == {"count": 6, "precision": 1.0}
    assert {"plain", "model", "difference"} < set(metrics["test"])
    page = (run / "report.html").read_text()
    assert "FoPro" in page
    assert "CAPro" not in page
    assert "labelled by a person" in page
    config = json.loads((run / "config.json").read_text())
    assert config["system"] == "fopro"
    assert config["extensions"] == []


def test_the_saved_model_is_the_trained_one(finished):
    run, _ = finished
    rows = [r for r in tiny_rows() if r["split"] == "test"]
    prediction = load(run).predict([r["image"] for r in rows])
    stored = pq.read_table(run / "test_predictions.parquet")
    assert [["blue", "green", "red"].index(p) for p in prediction] == stored["predicted"].to_pylist()


@pytest.mark.parametrize("stage", STAGES)
def test_an_interrupted_job_goes_on_and_ends_the_same(finished, tiny_parquet, shots, tmp_path, monkeypatch, stage):
    run, arguments = finished
    with stopped(monkeypatch, FoPro, stage, 0, 1):
        fit_fopro(str(tiny_parquet), tmp_path / "r", shots=shots, **arguments)
    assert_same(run, fit_fopro(str(tiny_parquet), tmp_path / "r", shots=shots, **arguments))


def test_planted_wrong_labels_are_found_and_clean_labels_change_nothing(tiny_parquet, shots, tmp_path):
    arguments = FROZEN | {
        "epochs": 40, "lr": 0.3, "batch_size": 8, "init_proto_epoch": 8, "start_clean_epoch": 10, "relation_clean_epoch": 11,
        "baseline": False,
    }  # fmt: skip
    run = fit_fopro(str(tiny_parquet), tmp_path / "a", shots=shots, **arguments)
    noise = json.loads((run / "metrics.json").read_text())["noise"]
    assert noise["precision"] == noise["recall"] == noise["average_precision"] == 1.0
    table = pq.read_table(tiny_parquet)
    shuffled = pa.array(np.random.default_rng(5).permutation(table["label"].to_pylist()))
    pq.write_table(table.set_column(table.schema.get_field_index("label"), "label", shuffled), tmp_path / "b.parquet")
    other = fit_fopro(str(tmp_path / "b.parquet"), tmp_path / "b", shots=shots, **arguments)
    assert pq.read_table(run / "cleaned.parquet").equals(pq.read_table(other / "cleaned.parquet"))


def test_without_shots_the_web_pictures_take_their_place(tiny_parquet, tmp_path):
    arguments = FROZEN | {"resample": True, "class_weighted": True, "hidden": 0}
    run = fit_fopro(str(tiny_parquet), tmp_path / "r", **arguments)
    table = pq.read_table(run / "cleaned.parquet")
    assert table.num_rows == 48
    assert "anchor" not in table["verdict"].to_pylist()
    assert load(run).embed([tiny_rows()[0]["image"]]).shape == (1, 8)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("id,label\nnobody,red\n", "shots.csv, row 0: no usable picture has the id 'nobody'"),
        (
            "id,label\ntrain-red-0,red\ntrain-red-1,pink\n",
            "row 1: no class is called 'pink': there are blue, green, red",
        ),
        ("id,label\ntrain-red-0,red\ntrain-red-0,blue\n", "row 1: 'train-red-0' has a second, different label"),
        ("id,label\ntest-red-0,red\n", "'test-red-0' is no training picture"),
        ("name,label\nx,red\n", "there is no column 'id'; found name, label"),
        ("", "there is no column 'id'; found none"),
        ("id,label\n\xff\xfe", "row 0"),
    ],
)
def test_bad_shots_are_named(tiny_parquet, tmp_path, text, said):
    (tmp_path / "shots.csv").write_text(text)
    with pytest.raises(DataError, match=said.replace("(", "\\(")):
        fit_fopro(str(tiny_parquet), tmp_path / "r", shots=tmp_path / "shots.csv", **TINY)


def test_shots_may_be_parquet_and_a_missing_or_damaged_file_is_named(tiny_parquet, tmp_path):
    with pytest.raises(DataError, match="no such file"):
        fit_fopro(str(tiny_parquet), tmp_path / "r", shots=tmp_path / "none.csv", **TINY)
    pq.write_table(pa.table({"id": [1], "label": ["red"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="'id' must hold strings"):
        fit_fopro(str(tiny_parquet), tmp_path / "a", shots=tmp_path / "a.parquet", **TINY)
    (tmp_path / "b.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(DataError, match=r"b\.parquet"):
        fit_fopro(str(tiny_parquet), tmp_path / "b", shots=tmp_path / "b.parquet", **TINY)
    pq.write_table(pa.table({"id": ["train-red-0"], "label": ["blue"]}), tmp_path / "c.parquet")
    arguments = {k: v for k, v in TINY.items() if k != "progress"} | {"shots": tmp_path / "c.parquet"}
    job = FoProJob(str(tiny_parquet), tmp_path / "c", arguments, progress=False)
    job.ingest()
    assert job.labels[job.anchors].tolist() == [0]


@pytest.mark.parametrize("name", presets_of("fopro"))
def test_presets_hold_arguments_that_exist(name, tmp_path):
    job = FoProJob("x", tmp_path, load_preset(name, "fopro"))
    assert bool(job._extensions()) == (name == "small")


def test_other_shots_are_another_job(finished, tiny_parquet, tmp_path):
    run, arguments = finished
    (tmp_path / "other.csv").write_text("id,label\ntrain-red-0,red\n")
    with pytest.raises(UsageError, match="other arguments \\(shots\\)"):
        fit_fopro(str(tiny_parquet), run, shots=tmp_path / "other.csv", **arguments)
