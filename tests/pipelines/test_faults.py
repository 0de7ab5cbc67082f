"""What goes wrong around a job: processes killed, disks full, crawls full of faults. Nothing done is lost, nothing is silent."""

import errno
import itertools
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
from PIL import Image
from safetensors.torch import load_file

from contralto.cli import main
from contralto.data.manifest import Manifest
from contralto.pipelines.webly import fit_capro

from tests.conftest import COLOURS, bomb, encode, picture, tiny_rows
from tests.killing import whole
from tests.tiny import FROZEN, TINY

KILLS = int(os.environ.get("CONTRALTO_KILLS", "1"))  # at any time, for every stage; 20 and more on purpose


EVERY = 3
SLOW_BATCHES = {"batch_size": 6, "checkpoint_every": EVERY}


def drawn_kills(rng):
    """Kills inside every stage, while files are written, and at any time."""
    kills = []
    for stage, count, most in (("plain", 3, 14), ("vanilla", 2, 5), ("capro", 4, 9), ("finetune", 2, 4)):
        kills += [["step", stage, rng.randint(1, most)] for _ in range(count)]
        kills += [["write", rng.randint(1, 14), moment] for moment in ("before", "half", "after")]
        kills += [["time", rng.uniform(0.05, 2.0)] for _ in range(KILLS)]
    return kills


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments", [TINY | {"workers": 2}, TINY, FROZEN], ids=["trained, 2 workers", "trained", "frozen"]
)
def test_killed_at_random_moments_and_started_again_it_ends_the_same(tiny_parquet, tmp_path, arguments):
    call = {"definitions": str(tiny_parquet.with_name("classes.yaml")), **arguments, **SLOW_BATCHES}
    undisturbed = fit_capro(str(tiny_parquet), tmp_path / "undisturbed", **(call | {"checkpoint_every": 1000}))
    again, log = tmp_path / "killed", tmp_path / "steps"
    kills = drawn_kills(random.Random(len(call)))
    plan = {"call": {"data": str(tiny_parquet), "out": str(again), **call}, "kills": kills, "log": str(log)}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    program = [sys.executable, Path(__file__).parents[1] / "killing.py", tmp_path / "plan.json"]
    result = subprocess.run(program, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stderr[-3000:]
    ends = json.loads(result.stdout.splitlines()[-1])
    assert [end for _, end in ends].count("killed") >= 20
    assert ends[-1][1] == 0, result.stderr[-3000:]

    whole(again)
    assert not list(again.rglob(".*.part"))
    for stage in ("plain", "vanilla", "capro", "finetune"):
        a, b = (load_file(r / "stages" / stage / "weights.safetensors") for r in (undisturbed, again))
        assert all(torch.equal(a[k], b[k]) for k in a)
        logs = [(r / "stages" / stage / "metrics.jsonl").read_text() for r in (undisturbed, again)]
        assert logs[0] == logs[1]
    assert pq.read_table(undisturbed / "cleaned.parquet").equals(pq.read_table(again / "cleaned.parquet"))

    steps = [line.split() for line in log.read_text().splitlines()]
    done = [{tuple(place) for pid, *place in steps if pid == str(process)} for process, _ in ends]
    for i, (before, after) in enumerate(itertools.pairwise(done)):
        assert len(before & after) <= EVERY, kills[i]  # what one kill costs


def test_a_full_disk_is_an_error_that_loses_nothing(tiny_parquet, tmp_path, capsys, monkeypatch):
    run = tmp_path / "run"
    words = [
        "fit",
        "capro",
        str(tiny_parquet),
        "--out",
        str(run),
        "--preset",
        "small",
        "--text_encoder=tfidf",
        "--no_pretrained",
    ]
    words += [
        "--image_encoder=resnet8",
        "--image_size=32",
        "--batch_size=12",
        "--queue_size=24",
        "--epochs=4",
        "--vanilla_epochs=1",
    ]
    replace, calls = Path.replace, []

    def full(self, target):
        calls.append(target)
        if Path(target).name == "cleaned.parquet":
            raise OSError(errno.ENOSPC, "No space left on device", str(target))
        return replace(self, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", full)
        assert main(words) == 1
    assert "No space left on device" in capsys.readouterr().err
    whole(run)
    trained = (run / "stages" / "capro" / "weights.safetensors").stat().st_mtime_ns
    assert main([*words, "--json"]) == 0
    assert (run / "stages" / "capro" / "weights.safetensors").stat().st_mtime_ns == trained
    assert (run / "cleaned.parquet").exists()


def test_a_crawl_with_planted_faults_trains_through_and_lists_exactly_those(tmp_path):
    good = tiny_rows(per_class=20, test_per_class=0)
    noisy = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8))
    exif = noisy.getexif()
    exif[0x0112] = 8
    bad = {
        "cut": good[0]["image"][:900], "zero": b"", "html": b"<html>404</html>", "bomb": bomb(60_000),
        "dot": encode(Image.new("RGB", (1, 1)), "PNG"), "null": None, "junk": os.urandom(3000),
    }  # fmt: skip
    odd = {
        "animated": encode(noisy, "GIF", save_all=True, append_images=[noisy.rotate(90)]),
        "cmyk": encode(noisy.convert("CMYK"), "JPEG"),
        "deep": encode(Image.fromarray(np.random.default_rng(1).integers(0, 65535, (40, 40)).astype(np.uint16)), "PNG"),
        "alpha": encode(noisy.convert("RGBA"), "PNG"),
        "turned": encode(noisy, "JPEG", exif=exif),
    }
    rows = [{"id": r["id"], "image": r["image"], "text": r["text"], "query": r["query"]} for r in good]
    rows += [{"id": name, "image": data, "text": "x", "query": "red"} for name, data in (bad | odd).items()]
    texts = ["", None, "y" * 1_000_000, "\u202e\x00\ud7ff", "<script>"]
    for i, text in enumerate(texts):
        rows[i]["text"] = text
    rows[7]["id"] = rows[8]["id"]  # twice the same id
    rows.append({"id": "alone", "image": picture(COLOURS["blue"], 9), "text": "a lonely class", "query": "lonely"})
    np.random.default_rng(0).shuffle(rows)
    path = tmp_path / "crawl.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    (tmp_path / "c.yaml").write_text("red: {}\ngreen: {}\nblue: {}\nlonely: {}\nnever found: {}\n")
    run = fit_capro(str(path), tmp_path / "run", definitions=tmp_path / "c.yaml", **(FROZEN | {"epochs": 2}))
    manifest = Manifest.load(run / "manifest")
    planted = {i for i, r in enumerate(rows) if r["id"] in bad}
    assert {r["row"] for r in manifest.skipped.to_pylist()} == planted
    assert all(r["reason"] for r in manifest.skipped.to_pylist())
    assert len(manifest) == len(rows) - len(planted)
    assert len(set(manifest.column("id"))) == len(manifest)
    assert pq.read_table(run / "cleaned.parquet").num_rows == len(manifest)
    assert (run / "report.html").stat().st_size < 3_000_000
