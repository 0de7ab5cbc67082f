"""What goes wrong around a job: processes killed, disks full, crawls full of faults. Nothing done is lost, nothing is silent."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
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
from tests.tiny import FROZEN, TINY

KILLS = int(os.environ.get("CONTRALTO_KILLS", "5"))  # of each kind; 20 and more on purpose


def whole(folder):
    """Every file of a run can be read to its end."""
    for path in Path(folder).rglob("*"):
        if path.name.startswith("."):
            continue
        if path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".parquet":
            pq.read_table(path)
        elif path.suffix == ".safetensors":
            load_file(path)
        elif path.suffix == ".npy":
            np.load(path, allow_pickle=False)
        elif path.suffix == ".ckpt":
            torch.load(path, weights_only=True)
        elif path.suffix == ".jsonl":
            assert all(json.loads(line) for line in path.read_text().splitlines())


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [TINY | {"workers": 2}, FROZEN], ids=["trained", "frozen"])
def test_killed_at_random_moments_and_started_again_it_ends_the_same(tiny_parquet, tmp_path, arguments):
    call = {"definitions": str(tiny_parquet.with_name("classes.yaml")), **arguments}
    undisturbed = fit_capro(str(tiny_parquet), tmp_path / "undisturbed", **call)
    code = (
        "import torch; torch.set_num_threads(1)\n"
        "from contralto.pipelines.webly import fit_capro\n"
        f"print('ready', flush=True)\nfit_capro({str(tiny_parquet)!r}, {str(tmp_path / 'killed')!r}, **{call!r})"
    )
    rng = random.Random(len(arguments))
    kills = 0
    for _ in range(KILLS):
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True)
        process.stdout.readline()
        try:
            assert process.wait(rng.uniform(0.2, 4.0)) == 0
        except subprocess.TimeoutExpired:
            kills += 1
        os.killpg(process.pid, signal.SIGKILL) if process.poll() is None else None
        process.wait()
        if (tmp_path / "killed").exists():
            whole(tmp_path / "killed")
    assert kills > 0
    time.sleep(0.2)
    again = fit_capro(str(tiny_parquet), tmp_path / "killed", **call)
    for stage in ("plain", "vanilla", "capro", "finetune"):
        a, b = (load_file(r / "stages" / stage / "weights.safetensors") for r in (undisturbed, again))
        assert all(torch.equal(a[k], b[k]) for k in a)
        logs = [(r / "stages" / stage / "metrics.jsonl").read_text() for r in (undisturbed, again)]
        assert logs[0] == logs[1]
    assert pq.read_table(undisturbed / "cleaned.parquet").equals(pq.read_table(again / "cleaned.parquet"))
    assert not list(again.rglob(".*.part"))


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
