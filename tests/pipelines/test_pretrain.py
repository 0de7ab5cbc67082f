"""Pretraining from pictures in files to an encoder, its embeddings and what they are worth."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

import contralto
from contralto.cli import main
from contralto.encoders.image import image_encoder
from contralto.errors import DataError, UsageError
from contralto.pipelines.embedding import evaluate_encoder
from contralto.pipelines.loading import load
from contralto.systems.registry import get_job

from tests.conftest import COLOURS, picture
from tests.killing import whole

SMALL = {
    "image_encoder": "resnet8", "image_size": 16, "batch_size": 8, "epochs": 2, "hidden": 16, "dim": 8, "optimizer": "adam",
    "lr": 1e-3, "warmup_epochs": 0, "progress": False,
}  # fmt: skip
N = 40
KILLED = ["moco", "mcl_multistage"]  # a queue and a momentum network; several trainings, batches of one group
if int(os.environ.get("CONTRALTO_KILLS", "1")) > 1:
    KILLED += ["simclr", "adainf"]


@pytest.fixture(scope="session")
def coloured(tmp_path_factory):
    """Pictures of two colours with labels, and of which some are for testing."""
    folder = tmp_path_factory.mktemp("coloured")
    names = sorted(COLOURS)[:2]
    rows = [
        {
            "image": picture(COLOURS[names[i % 2]], seed=i),
            "label": names[i % 2],
            "split": "test" if i >= N else "train",
        }
        for i in range(N + 16)
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "data.parquet")
    return folder / "data.parquet"


@pytest.fixture(scope="session")
def finished(coloured, tmp_path_factory):
    out = tmp_path_factory.mktemp("pretrained") / "run"
    return get_job("simclr").fit(str(coloured), out, **SMALL)


def test_a_run_holds_what_is_needed_to_go_on(finished, coloured):
    metrics = json.loads((finished / "metrics.json").read_text())
    assert metrics["pictures"] == N
    assert 0 < metrics["loss"] < 10
    assert 0 <= metrics["probe"] <= 1
    assert 0 <= metrics["knn"] <= 1
    whole(finished)
    page = (finished / "report.html").read_text()
    assert "SimCLR" in page
    assert page.count("<circle") >= N


def test_the_encoder_serves_under_its_folder_as_a_name(finished, coloured):
    encoder = image_encoder(str(finished / "encoder")).eval()
    pixels = torch.randn(3, 3, 16, 16)
    system = load(finished).system
    with torch.no_grad():
        torch.testing.assert_close(encoder(pixels), system.embed(pixels))
    weights = load_file(finished / "training" / "weights.safetensors")
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, weights[f"encoder.{name}"])


def test_evaluation_finds_the_colours_and_says_on_what_it_stands(finished, coloured):
    result = evaluate_encoder(load(finished), str(coloured))
    assert (result["learnt_from"], result["tested"], result["split"]) == (N, 16, "test")
    assert result["probe"] == 1.0
    assert result["knn"] >= 0.8
    assert result["probe_low"] <= result["probe"] <= result["probe_high"]
    assert result["alignment"] >= 0
    assert result["uniformity"] <= 0


def test_commands_embed_and_evaluate_and_report_it(finished, coloured, tmp_path, capsys):
    assert main(["embed", str(finished), str(coloured), "--out", str(tmp_path / "e.parquet"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["n"], told["width"]) == (N + 16, 128)
    assert main(["evaluate", str(finished), str(coloured)]) == 0
    assert "linear probe" in capsys.readouterr().out
    assert main(["report", str(finished), "--out", str(tmp_path / "r.html")]) == 0
    assert (tmp_path / "r.html").read_text() == (finished / "report.html").read_text()
    assert main(["predict", str(finished), str(coloured)]) == 2
    assert "no classes" in capsys.readouterr().err
    assert contralto.load(finished).embed([np.zeros((20, 20, 3), np.uint8)]).shape == (1, 128)


def test_called_again_it_is_done_and_with_other_arguments_refused(finished, coloured):
    before = (finished / "training" / "weights.safetensors").stat().st_mtime_ns
    get_job("simclr").fit(str(coloured), finished, **SMALL)
    assert (finished / "training" / "weights.safetensors").stat().st_mtime_ns == before
    with pytest.raises(UsageError, match="temperature"):
        get_job("simclr").fit(str(coloured), finished, **SMALL, temperature=0.3)
    with pytest.raises(UsageError, match="no argument 'warp'"):
        get_job("simclr").fit(str(coloured), finished.with_name("other"), **SMALL, warp=1)


def test_a_folder_without_labels_and_with_broken_files_is_enough(tmp_path, capsys):
    data = tmp_path / "pictures"
    data.mkdir()
    for i in range(12):
        (data / f"{i}.png").write_bytes(picture((200, 30, 30), seed=i))
    (data / "broken.jpg").write_bytes(b"\xff\xd8\xff nothing")
    (data / "empty.png").write_bytes(b"")
    run = get_job("byol").fit(str(data), tmp_path / "run", **SMALL)
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["pictures"] == 12
    assert "probe" not in metrics
    with pytest.raises(DataError, match="no given labels"):
        evaluate_encoder(load(run), str(data))


def test_one_picture_is_refused_with_a_sentence(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.png").write_bytes(picture((200, 30, 30), seed=1))
    with pytest.raises(DataError, match="at least two"):
        get_job("simclr").fit(str(tmp_path / "data"), tmp_path / "run", **SMALL)


def test_the_last_incomplete_batch_is_left_out_and_fewer_pictures_than_a_batch_are_one(coloured, tmp_path):
    run = get_job("simclr").fit(str(coloured), tmp_path / "a", **(SMALL | {"batch_size": 16}))
    assert load(run).system.done == 2 * (N // 16)
    run = get_job("simclr").fit(str(coloured), tmp_path / "b", **(SMALL | {"batch_size": 512, "epochs": 1}))
    assert load(run).system.done == 1


def test_pictures_decoded_once_or_in_every_epoch_give_the_same(coloured, tmp_path, finished):
    run = get_job("simclr").fit(str(coloured), tmp_path / "run", **SMALL, cache_gib=0.0, workers=2)
    a, b = (load_file(r / "training" / "weights.safetensors") for r in (run, finished))
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.slow
@pytest.mark.parametrize("system", KILLED)
def test_killed_at_random_moments_and_started_again_it_ends_the_same(coloured, tmp_path, system):
    arguments = SMALL | {"epochs": 3, "seed": 5}
    if system == "moco":
        arguments = {k: v for k, v in arguments.items() if k != "warmup_epochs"} | {"queue_size": 16}
    if system == "mcl_multistage":  # batches of its own, in a second training
        arguments |= {"stages": 2, "clusters": 2, "smallest": 2}
    if system == "adainf":
        (tmp_path / "generated").mkdir()
        for i in range(12):
            (tmp_path / "generated" / f"{i}.png").write_bytes(picture((90, 90, 90), seed=1000 + i))
        arguments |= {"generated": str(tmp_path / "generated"), "dup": 3}
    undisturbed = get_job(system).fit(str(coloured), tmp_path / "undisturbed", **arguments)
    again, rng = tmp_path / "killed", random.Random(1)
    kills = [["step", "training", rng.randint(1, 4)] for _ in range(4)]
    kills += [["write", rng.randint(1, 12), moment] for moment in ("before", "half", "after") for _ in range(2)]
    kills += [["time", rng.uniform(0.1, 1.5)] for _ in range(3)]
    rng.shuffle(kills)
    call = {"data": str(coloured), "out": str(again), "checkpoint_every": 2, **arguments}
    plan = {"system": system, "call": call, "kills": kills, "log": str(tmp_path / "steps")}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    program = [sys.executable, Path(__file__).parents[1] / "killing.py", tmp_path / "plan.json"]
    result = subprocess.run(program, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-3000:]
    ends = json.loads(result.stdout.splitlines()[-1])
    assert [end for _, end in ends].count("killed") >= 8
    assert ends[-1][1] == 0, result.stderr[-3000:]
    a, b = (load_file(r / "training" / "weights.safetensors") for r in (undisturbed, again))
    assert all(torch.equal(a[k], b[k]) for k in a)
    lines = [(r / "training" / "metrics.jsonl").read_text() for r in (undisturbed, again)]
    assert lines[0] == lines[1]
