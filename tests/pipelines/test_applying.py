"""Finished runs over real data from the command line: rows, turned pictures, recordings."""

import json
import os
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from sklearn.datasets import load_digits

import contralto
from contralto.cli import main

HOSTILE = "<img src=x>\u202e, [bold]"


def real(*place):
    """A file of CONTRALTO_DATA."""
    path = Path(os.environ.get("CONTRALTO_DATA", "")).joinpath(*place)
    if not path.is_file():
        pytest.skip(f"CONTRALTO_DATA holds no {path.name}")
    return path


def done(*words):
    assert main([str(word) for word in words]) == 0


@pytest.mark.data
def test_the_noise_of_airfoils(tmp_path):
    lines = real("regression", "airfoil.csv").read_text().splitlines()
    target = "sound_pressure_db"
    inputs = [line.rpartition(",")[0] for line in lines]
    assert lines[0].rpartition(",")[2] == target
    (tmp_path / "learn.csv").write_text("\n".join(lines[:1001]))
    (tmp_path / "new.csv").write_text("\n".join([inputs[0], *inputs[1001:]]))
    done(
        "fit",
        "supremix",
        tmp_path / "learn.csv",
        "--target",
        target,
        "--preset",
        "small",
        "--epochs",
        3,
        "--out",
        tmp_path / "run",
    )
    done("predict", tmp_path / "run", tmp_path / "new.csv", "--out", tmp_path / "p.parquet")
    said = pq.read_table(tmp_path / "p.parquet")
    assert said.column("id").to_pylist() == [str(i) for i in range(503)]
    right = np.array([float(line.rpartition(",")[2]) for line in lines[1001:]])
    middle = np.abs(right - np.median(right)).mean()
    assert np.abs(said.column("number").to_numpy() - right).mean() < 0.9 * middle


def test_pictures_of_turned_digits(tmp_path, capsys):
    """The angle of a digit, in a folder per angle; a name that is hostile, and a file that is no picture."""
    found, rng = load_digits(), np.random.default_rng(0)
    sevens = found.images[found.target == 7]
    for number, pixels in enumerate(sevens):
        angle = int(rng.choice([-60, -30, 0, 30, 60]))
        turned = Image.fromarray((pixels * 15).astype(np.uint8)).resize((24, 24)).rotate(angle)
        folder = tmp_path / ("new" if number >= 150 else "learn") / str(angle)
        folder.mkdir(parents=True, exist_ok=True)
        turned.save(folder / (f"{HOSTILE} {number}.png"))
    (tmp_path / "new" / "0" / "broken.png").write_bytes(b"\x89PNG nothing")
    run = tmp_path / "run"
    words = [
        "--image_encoder",
        "resnet8",
        "--image_size",
        24,
        "--batch_size",
        50,
        "--epochs",
        8,
        "--bin",
        30,
        "--no_baseline",
    ]
    words += ["--optimizer", "adam", "--lr", 0.003, "--held", 0.1, "--accelerator", "cpu"]
    done("fit", "supremix", tmp_path / "learn", "--out", run, *words)
    capsys.readouterr()
    done("predict", run, tmp_path / "new", "--out", tmp_path / "p.parquet")
    out, err = capsys.readouterr()
    assert err.startswith("skipped 0/broken: ")
    assert "\u202e" not in out
    said = pq.read_table(tmp_path / "p.parquet").to_pydict()
    assert len(said["id"]) == len(sevens) - 150
    assert all("<img src=x>, [bold]" in name for name in said["id"])
    right = np.array([float(name.partition("/")[0]) for name in said["id"]])
    error = np.abs(np.array(said["number"]) - right).mean()
    assert error < 0.7 * np.abs(right - np.median(right)).mean()
    paths = sorted((tmp_path / "new" / "30").glob("*.png"))
    told = [n for name, n in zip(said["id"], said["number"], strict=True) if name.startswith("30/")]
    np.testing.assert_allclose(contralto.load(run).predict(paths), told, rtol=1e-5)


@pytest.mark.data
def test_spoken_digits(tmp_path, capsys):
    """Two words in a folder each; names that are hostile, and a file that is broken."""
    pytest.importorskip("soundfile")
    table = pq.read_table(real("spoken_digits", "spoken_digits.parquet"))
    rows = [r for r in table.to_pylist() if r["text"] in ("two", "seven")]
    learn, new = tmp_path / "learn", tmp_path / "new"
    for number, row in enumerate(rows):
        folder = (new if number % 4 == 0 else learn) / row["text"]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{HOSTILE} {number}.wav").write_bytes(row["audio"])
    (new / "two" / "broken.wav").write_bytes(b"RIFF nothing")
    run = tmp_path / "run"
    words = [
        "--tasks",
        1,
        "--rate",
        8000,
        "--seconds",
        1,
        "--encoder_dim",
        32,
        "--batch_size",
        32,
        "--epochs",
        8,
        "--lr",
        0.003,
    ]
    words += [
        "--extra_epochs",
        0,
        "--dim",
        8,
        "--decoder_dim",
        16,
        "--decoder_heads",
        2,
        "--decoder_hidden",
        32,
        "--beam",
        1,
    ]
    done("fit", "coconut", learn, "--out", run, "--target", "label", "--accelerator", "cpu", *words)
    capsys.readouterr()
    done("predict", run, new, "--out", tmp_path / "p.parquet", "--json")
    out, err = capsys.readouterr()
    assert json.loads(out)["skipped"] == 1
    assert err.startswith("skipped two/broken: broken sound")
    said = pq.read_table(tmp_path / "p.parquet").to_pylist()
    assert list(said[0]) == ["id", "text", "intent", "confidence"]
    assert np.mean([r["intent"] == r["id"].partition("/")[0] for r in said]) > 0.8
    path = next((new / "seven").glob("*.wav"))
    assert contralto.load(run).predict([path])[0] in ("two", "seven")
    done("embed", run, path, "--out", tmp_path / "e.parquet")
    assert len(pq.read_table(tmp_path / "e.parquet").to_pylist()[0]["embedding"]) == 32
