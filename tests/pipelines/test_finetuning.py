"""Fine-tuning from pictures in files to a classifier that the other commands use."""

import json
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from scipy.ndimage import label

import contralto
from contralto.cli import main
from contralto.errors import DataError, UsageError
from contralto.pipelines.finetuning import FineTuningJob
from contralto.pipelines.job import load_preset, presets_of
from contralto.review.episodes import RIGHT, WRONG
from contralto.systems.registry import get_job

from tests.conftest import COLOURS, picture
from tests.killing import whole

SMALL = {
    "image_encoder": "resnet8", "pretrained": False, "image_size": 16, "batch_size": 16, "micro_batch": 8, "epochs": 3,
    "lr": 0.05, "dim": 8, "progress": False,
}  # fmt: skip
ARGUMENTS = {k: v for k, v in SMALL.items() if k != "progress"}
N, TESTED = 48, 18


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Pictures of three colours; some are for testing, some have no label."""
    folder = tmp_path_factory.mktemp("tuned")
    names = sorted(COLOURS)
    rows = [
        {
            "image": picture(COLOURS[names[i % 3]], seed=i),
            "label": None if i < 6 else names[i % 3],
            "split": "test" if i >= N else "train",
            "group": f"g{i // 2}",
        }
        for i in range(N + TESTED)
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "data.parquet")
    return folder / "data.parquet"


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "run"
    return get_job("core_tuning").fit(str(data), out, baseline=True, **SMALL)


def test_the_page_is_written_again_by_the_command(finished, tmp_path):
    assert main(["report", str(finished), "--out", str(tmp_path / "r.html")]) == 0
    assert (tmp_path / "r.html").read_text() == (finished / "report.html").read_text()


def test_a_run_holds_a_classifier_and_how_right_it_is(finished, data):
    whole(finished)
    metrics = json.loads((finished / "metrics.json").read_text())
    assert (metrics["pictures"], metrics["tested"], metrics["unlabelled"]) == (N - 6, TESTED, 6)
    scores = metrics["scores"]
    table = pq.read_table(finished / "predictions.parquet").to_pydict()
    right = np.array(table["label"]) == np.array(table["predicted"])
    assert scores["accuracy"]["value"] == pytest.approx(right.mean())
    assert scores["accuracy"]["low"] <= scores["accuracy"]["value"] <= scores["accuracy"]["high"]
    plain = np.array(table["label"]) == np.array(table["baseline"])
    assert scores["difference"]["value"] == pytest.approx(right.mean() - plain.mean())
    assert {"accuracy, mean over classes", "accuracy of cross-entropy"} <= set(scores)
    model = contralto.load(finished)
    assert model.classes == sorted(COLOURS)
    pictures = [picture(COLOURS[name], seed=900 + i) for i, name in enumerate(model.classes)]
    assert model.predict(pictures).probabilities.shape == (3, 3)
    assert "fine-tuned with core_tuning" in (finished / "model" / "README.md").read_text()
    page = (finished / "report.html").read_text()
    assert page.count("<circle") >= TESTED
    changed = right.sum() - plain.sum()
    [mended, spoilt] = map(int, re.search(r"(\d+) images are right that were wrong, and (\d+) wrong", page).groups())
    assert (mended - spoilt, spoilt) == (changed, (plain & ~right).sum())


def test_the_sheet_shows_test_pictures_with_the_classes_they_are_taken_for(finished):
    """One of each class to learn from, then test pictures: green frames are right answers, red ones wrong."""
    table = pq.read_table(finished / "predictions.parquet").to_pydict()
    sheet = np.asarray(Image.open(finished / "answers.png").convert("RGB")).astype(int)
    asked = 3 * 6  # all that there are to test: less than the sheet has room for
    heights = len(sheet) // 2
    for half, said in ((sheet[:heights], "baseline"), (sheet[heights:], "predicted")):
        right = sum(a == b for a, b in zip(table["label"], table[said], strict=True))
        corners = [(half == np.array(colour)).all(2) for colour in (RIGHT, WRONG)]
        frames = [label(c)[1] for c in corners]
        assert frames == [right, asked - right]


def test_what_the_model_says_is_what_the_system_learnt(finished):
    weights = load_file(finished / "training" / "weights.safetensors")
    model = load_file(finished / "model" / "model.safetensors")
    assert torch.equal(weights["classifier.weight"], model["classifier.weight"])
    encoder = load_file(finished / "encoder" / "encoder.safetensors")
    assert all(torch.equal(weights[f"encoder.{k}"], v) for k, v in encoder.items())
    plain = load_file(finished / "baseline" / "weights.safetensors")
    assert not any(k.startswith("projector") for k in plain)
    assert not torch.equal(plain["classifier.weight"], weights["classifier.weight"])


def test_the_commands_evaluate_and_predict_take_the_run(finished, data, tmp_path, capsys):
    assert main(["evaluate", str(finished), str(data), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    metrics = json.loads((finished / "metrics.json").read_text())
    assert found["accuracy"] == pytest.approx(metrics["scores"]["accuracy"]["value"])
    assert main(["predict", str(finished), str(data), "--out", str(tmp_path / "p.parquet"), "--json"]) == 0
    assert pq.read_table(tmp_path / "p.parquet").num_rows == N + TESTED


def test_a_run_goes_on_and_is_the_same_again(finished, data, tmp_path, monkeypatch):
    before = (finished / "training" / "weights.safetensors").stat().st_mtime_ns
    get_job("core_tuning").fit(str(data), finished, baseline=True, **SMALL)
    assert (finished / "training" / "weights.safetensors").stat().st_mtime_ns == before
    system, seen = get_job("core_tuning").system, []
    step = system.training_step

    def stops(self, batch, batch_idx):
        seen.append(batch_idx)
        if len(seen) == 4:
            raise KeyboardInterrupt
        return step(self, batch, batch_idx)

    with monkeypatch.context() as patched:
        patched.setattr(system, "training_step", stops)
        with pytest.raises(KeyboardInterrupt):
            get_job("core_tuning").fit(str(data), tmp_path / "again", checkpoint_every=1, **SMALL)
    again = get_job("core_tuning").fit(str(data), tmp_path / "again", checkpoint_every=1, **SMALL)
    told = load_file(again / "training" / "weights.safetensors")
    straight = get_job("core_tuning").fit(str(data), tmp_path / "straight", **SMALL)
    assert all(torch.equal(v, told[k]) for k, v in load_file(straight / "training" / "weights.safetensors").items())


def test_it_starts_from_a_pretraining_by_its_folder(data, tmp_path):
    small = {k: SMALL[k] for k in ("image_encoder", "image_size", "batch_size", "progress")}
    pretrained = get_job("simclr").fit(str(data), tmp_path / "pre", epochs=1, hidden=8, dim=8, **small)
    runs = [
        get_job("finetuning").fit(
            str(data), tmp_path / f"run{i}", **(SMALL | {"image_encoder": str(name), "pretrained": True, "epochs": 0})
        )
        for i, name in enumerate((pretrained, pretrained / "encoder"))
    ]
    before = load_file(pretrained / "encoder" / "encoder.safetensors")
    for run in runs:
        after = load_file(run / "encoder" / "encoder.safetensors")
        assert all(torch.equal(before[k], after[k]) for k in before)


def test_few_shots_are_drawn_by_the_seed_and_without_a_split_some_are_kept_aside(data, tmp_path):
    job = FineTuningJob("finetuning")
    rows = []
    for seed in (0, 1, 0):
        job.begin(str(data), tmp_path / f"s{len(rows)}", ARGUMENTS | {"shots": 2, "seed": seed}, False)
        job.ingest()
        assert np.bincount(job.labels).tolist() == [2, 2, 2]
        rows.append(job.rows.tolist())
    assert rows[0] == rows[2] != rows[1]
    table = pq.read_table(data).drop_columns(["split"])
    pq.write_table(table, tmp_path / "whole.parquet")
    job.begin(str(tmp_path / "whole.parquet"), tmp_path / "held", ARGUMENTS | {"held": 0.3}, False)
    job.ingest()
    groups = job.manifest.column("group")
    assert not set(groups[job.rows]) & set(groups[job.test_rows])
    assert 0.1 < len(job.test_rows) / 60 < 0.5
    job.begin(str(tmp_path / "whole.parquet"), tmp_path / "none", ARGUMENTS | {"held": 0.0}, False)
    job.ingest()
    assert len(job.test_rows) == 0


def test_without_test_pictures_there_are_no_scores(data, tmp_path):
    pq.write_table(pq.read_table(data).drop_columns(["split"]), tmp_path / "whole.parquet")
    run = get_job("finetuning").fit(str(tmp_path / "whole.parquet"), tmp_path / "run", **SMALL, held=0.0)
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["scores"] == {}
    assert not (run / "predictions.parquet").exists()
    assert "Not measured" in (run / "model" / "README.md").read_text()


def test_what_cannot_be_is_said(data, tmp_path):
    table = pq.read_table(data)
    pq.write_table(table.drop_columns(["label"]), tmp_path / "none.parquet")
    with pytest.raises(DataError, match="no picture has a label"):
        get_job("core_tuning").fit(str(tmp_path / "none.parquet"), tmp_path / "a", **SMALL)
    one = table.filter(pa.compute.equal(table["label"], "red"))
    pq.write_table(one, tmp_path / "one.parquet")
    with pytest.raises(DataError, match="two classes at least, found red"):
        get_job("core_tuning").fit(str(tmp_path / "one.parquet"), tmp_path / "b", **SMALL)
    with pytest.raises(UsageError, match="shots at least 1"):
        get_job("core_tuning").fit(str(data), tmp_path / "c", **SMALL, shots=0)
    with pytest.raises(UsageError, match="no argument 'depth'"):
        get_job("core_tuning").fit(str(data), tmp_path / "d", **SMALL, depth=3)


@pytest.mark.parametrize("name", ["core_tuning", "finetuning"])
def test_presets_are_arguments(name):
    assert presets_of(name) == ["small"]
    assert set(load_preset("small", name)) <= set(get_job(name).parameters())
