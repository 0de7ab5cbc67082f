"""What goes wrong around a job: processes killed, disks full, crawls full of faults. Nothing done is lost, nothing is silent."""

import errno
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tarfile
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
from contralto.errors import ContraltoError
from contralto.pipelines.capro import CAProJob, fit_capro
from contralto.systems.registry import get_job

from tests.conftest import COLOURS, bomb, encode, picture, tagged_rows, tiny_rows
from tests.data.test_sources import add
from tests.killing import whole
from tests.runs import assert_same, weights
from tests.tiny import FROZEN, TAGGED, TINY

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
    ("system", "arguments"),
    [("capro", TINY | {"workers": 2}), ("capro", TINY), ("capro", FROZEN), ("capro-multilabel", TAGGED)],
    ids=["trained, 2 workers", "trained", "frozen", "several labels"],
)
def test_killed_at_random_moments_and_started_again_it_ends_the_same(
    tiny_parquet, tagged_parquet, tmp_path, system, arguments
):
    data, fit = tagged_parquet if system == "capro-multilabel" else tiny_parquet, get_job(system).fit
    call = {"definitions": str(data.with_name("classes.yaml")), **arguments, **SLOW_BATCHES}
    undisturbed = fit(str(data), tmp_path / "undisturbed", **(call | {"checkpoint_every": 1000}))
    again, log = tmp_path / "killed", tmp_path / "steps"
    kills = drawn_kills(random.Random(len(call)))
    call = {"data": str(data), "out": str(again), **call}
    plan = {"system": system, "call": call, "kills": kills, "log": str(log)}
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


def words_of(data, run, workers=0):
    """The command for a job of seconds."""
    job = {
        "preset": "small", "text_encoder": "tfidf", "image_encoder": "resnet8", "image_size": 32, "batch_size": 6,
        "queue_size": 24, "epochs": 4, "vanilla_epochs": 1, "finetune_epochs": 1, "hidden": 32,
        "workers": workers,
    }  # fmt: skip
    words = ["fit", "capro", str(data), "--out", str(run), "--no_pretrained", "--no_frozen_features"]
    return [*words, *(f"--{k}={v}" for k, v in job.items())]


@pytest.fixture(scope="module")
def undisturbed(tiny_parquet, tmp_path_factory):
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    assert main(words_of(tiny_parquet, run)) == 0
    return run


def program(code):
    """Python in a process group of its own."""
    return subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, start_new_session=True)


def same_runs(a, b):
    assert_same(a, b)
    for stage in weights(a):
        assert len({(r / "stages" / stage / "metrics.jsonl").read_text() for r in (a, b)}) == 1
    assert not list(b.rglob(".*.part"))


SLOWED = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have started the tests with it switched off
from contralto.cli import main
from contralto.systems.webly.capro import CAPro
step = CAPro.training_step
CAPro.training_step = lambda *words: time.sleep(0.05) or step(*words)
"""


@pytest.mark.xdist_group("undisturbed")
@pytest.mark.slow
@pytest.mark.parametrize("stage", ["plain", "capro"])
def test_ctrl_c_saves_says_how_to_go_on_and_the_same_command_ends_the_same(tiny_parquet, tmp_path, undisturbed, stage):
    words = words_of(tiny_parquet, tmp_path / "cut", workers=2 if stage == "plain" else 0)
    process = program(f"{SLOWED}\nsys.exit(main({words!r}))")
    begun = tmp_path / "cut" / "stages" / stage / "last.ckpt"
    while not begun.exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    time.sleep(0.12)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the loader's workers get it too
    _, told = process.communicate(timeout=60)
    assert process.returncode == 130, told
    assert "the same command goes on" in told
    assert "Traceback" not in told
    whole(tmp_path / "cut")
    place = torch.load(begun, weights_only=True)["place"]
    assert place["batches"] > 0  # within an epoch: the step itself was kept
    assert main(words) == 0
    same_runs(undisturbed, tmp_path / "cut")


LIMITED = """
import os, resource, sys
import contralto.pipelines.capro, contralto.review.report
from contralto.cli import main
for size in {sizes}:
    pid = os.fork()
    if pid == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        os._exit(main({words}))
    print("ended", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), file=sys.stderr, flush=True)
"""


@pytest.mark.xdist_group("undisturbed")
@pytest.mark.slow
def test_files_that_may_not_grow_any_more_are_an_error_that_loses_nothing(tiny_parquet, tmp_path, undisturbed):
    """The kernel refuses to write beyond a size, as on a full disk, at another file each time."""
    words, sizes = words_of(tiny_parquet, tmp_path / "run"), (100, 5_000, 50_000, 600_000)
    _, told = program(LIMITED.format(sizes=sizes, words=words)).communicate(timeout=300)
    assert told.count("ended 1\n") == told.count("File too large") == len(sizes), told
    assert "Traceback" not in told
    whole(tmp_path / "run")
    assert main(words) == 0
    same_runs(undisturbed, tmp_path / "run")


@pytest.mark.xdist_group("undisturbed")
@pytest.mark.parametrize("name", ["weights.safetensors", "cleaned.parquet"])
def test_a_full_disk_is_an_error_that_loses_nothing(tiny_parquet, tmp_path, capsys, monkeypatch, undisturbed, name):
    run, replace = tmp_path / "run", Path.replace

    def full(self, target):
        if Path(target).name == name:
            raise OSError(errno.ENOSPC, "No space left on device", str(target))
        return replace(self, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", full)
        assert main(words_of(tiny_parquet, run)) == 1
    assert "No space left on device" in capsys.readouterr().err
    whole(run)
    kept = {p: p.stat().st_mtime_ns for p in run.glob("stages/*/weights.safetensors")}
    assert len(kept) == (0 if name == "weights.safetensors" else 3)
    assert main([*words_of(tiny_parquet, run), "--json"]) == 0
    assert kept == {p: p.stat().st_mtime_ns for p in kept}
    same_runs(undisturbed, run)


@pytest.mark.parametrize("workers", [0, 2])
def test_pictures_that_vanish_while_a_job_runs_are_named_without_a_traceback(tmp_path, capsys, workers):
    for i, row in enumerate(tiny_rows(per_class=8, test_per_class=0)):
        (tmp_path / "data" / row["query"]).mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / row["query"] / f"{i}.png").write_bytes(row["image"])
    job = CAProJob(str(tmp_path / "data"), tmp_path / "run", TINY | {"workers": workers}, progress=False)
    job.claim()
    job.ingest()
    (tmp_path / "data" / "red" / "3.png").unlink()
    with pytest.raises(ContraltoError, match=r"red/3\.png: cannot be read any more") as caught:
        job.train("vanilla")
    assert "Traceback" not in str(caught.value)


def as_parquet(rows, folder):
    pq.write_table(pa.Table.from_pylist(rows), folder / "crawl.parquet")
    return folder / "crawl.parquet"


def as_tar(rows, folder):
    with tarfile.open(folder / "crawl.tar", "w") as archive:
        for i, row in enumerate(rows):
            parts = {"jpg": row["image"] or b"", "cls": row["query"].encode(),
                     "txt": (row["text"] or "").encode(), "json": json.dumps({"id": row["id"]}).encode()}  # fmt: skip
            for suffix, data in parts.items():
                add(archive, f"{i:05d}.{suffix}", data)
    return folder / "crawl.tar"


@pytest.mark.parametrize("write", [as_parquet, as_tar])
def test_a_crawl_with_planted_faults_trains_through_and_lists_exactly_those(tmp_path, write):
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
    path = write(rows, tmp_path)
    (tmp_path / "c.yaml").write_text("red: {}\ngreen: {}\nblue: {}\nlonely: {}\nnever found: {}\n")
    run = fit_capro(str(path), tmp_path / "run", definitions=tmp_path / "c.yaml", **(FROZEN | {"epochs": 2}))
    manifest = Manifest.load(run / "manifest")
    planted = {i for i, r in enumerate(rows) if r["id"] in bad}
    assert {r["row"] for r in manifest.skipped.to_pylist()} == planted
    assert all(r["reason"] and r["source"] == path.name for r in manifest.skipped.to_pylist())
    listed = {rows[r["row"]]["id"]: r["reason"] for r in manifest.skipped.to_pylist()}
    assert (listed["bomb"], listed["html"], listed["dot"]) == ("too many pixels", "not an image", "too small")
    assert len(manifest) == len(rows) - len(planted)
    assert len(set(manifest.column("id"))) == len(manifest)
    assert pq.read_table(run / "cleaned.parquet").num_rows == len(manifest)
    assert (run / "report.html").stat().st_size < 3_000_000


def test_tags_and_right_labels_of_any_kind_train_through(tmp_path):
    values = [
        None, 17, ["red", None, ["green"], {"a": "blue"}], {"red": 1}, "y" * 1_000_000, "\u202e\x00red", "<script>red</script>",
        [], "", True, float("nan"), ["red"] * 100_000, "red" * 60,
    ]  # fmt: skip
    rows = tagged_rows(test=18)
    for i, value in enumerate(values):
        rows[i + 8]["tags"] = rows[-1 - i]["colours"] = value
    with (tmp_path / "crawl.jsonl").open("w") as file:
        for i, row in enumerate(rows):
            picture = row.pop("image")
            (tmp_path / f"{i}.png").write_bytes(picture if i != 3 else b"<html>404</html>")
            file.write(json.dumps({"path": f"{i}.png", **row}) + "\n")
    (tmp_path / "c.yaml").write_text("red: {}\ngreen: {}\nblue: {}\nnever found: {}\n")
    arguments = TAGGED | {"epochs": 2, "definitions": tmp_path / "c.yaml"}
    run = get_job("capro-multilabel").fit(str(tmp_path / "crawl.jsonl"), tmp_path / "run", **arguments)
    manifest = Manifest.load(run / "manifest")
    assert [r["reason"] for r in manifest.skipped.to_pylist()] == ["not an image"]
    table = {r["id"]: r for r in pq.read_table(run / "cleaned.parquet").to_pylist()}
    names_red = {i for i, v in enumerate(values) if "red" in str(v)}
    assert {i for i in range(len(values)) if "red" in table.get(f"p{i + 8}", {"given": []})["given"]} == names_red
    assert not {f"p{i + 8}" for i in range(len(values)) if i not in names_red} & set(table)
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["test"]["model"]["by_class"][3] is None
    assert (run / "report.html").stat().st_size < 3_000_000
