"""A stream of tasks from files to a run: what each task leaves, going on anywhere, other protocols, hostile names."""

import json
import os
import random
import shutil
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
from contralto.encoders.image import image_encoder, save_encoder
from contralto.errors import DataError, UsageError
from contralto.pipelines.continual import Continual, held_out
from contralto.pipelines.frozen import layers_behind
from contralto.pipelines.job import load_preset, presets_of
from contralto.review.continual import write_continual_report
from contralto.systems.continual.prd import PRD
from contralto.systems.registry import get_job

from tests.conftest import picture
from tests.killing import whole

SMALL = {
    "image_encoder": "resnet8", "image_size": 16, "batch_size": 8, "epochs": 2, "extra_epochs": 1, "tasks": 2, "lr": 0.05,
    "workers": 0, "accelerator": "cpu", "progress": False,
}  # fmt: skip
PRD_SMALL = SMALL | {"hidden": 16, "dim": 8, "prototype_lr": 0.05}
COLOURS = {"red": (200, 30, 40), "green": (30, 180, 60), "blue": (40, 60, 210), "grey": (128, 128, 128)}
CHECKED = ("epochs", "extra_epochs", "lr", "alpha", "beta", "axis", "milestones", "prototype_lr", "replayed")
EVIL = "<script>alert(1)</script>"
TRAIN, TEST = 12, 6  # of every class
KILLED = ["prd", "replay"]  # a teacher; a memory
if int(os.environ.get("CONTRALTO_KILLS", "1")) > 1:
    KILLED += ["lwf", "joint"]


def rows(split=True, names=tuple(COLOURS)):
    """Pictures of four colours; of each, the later ones are for testing."""
    found = []
    for i in range(TRAIN + TEST):
        for k, (name, colour) in enumerate(zip(names, COLOURS.values(), strict=True)):
            row = {"image": picture(colour, seed=10 * i + k), "label": name}
            found.append(row | ({"split": "train" if i < TRAIN else "test"} if split else {}))
    return found


@pytest.fixture(scope="session")
def coloured(tmp_path_factory):
    path = tmp_path_factory.mktemp("stream") / "data.parquet"
    pq.write_table(pa.Table.from_pylist(rows()), path)
    return path


@pytest.fixture(scope="session")
def finished(coloured, tmp_path_factory):
    return get_job("prd").fit(str(coloured), tmp_path_factory.mktemp("streamed") / "run", **PRD_SMALL)


def state(run, task=2):
    return load_file(run / "tasks" / f"task{task}" / "state.safetensors")


def same_streams(a, b, tasks=2):
    one, other = state(a, tasks), state(b, tasks)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[k], other[k]) for k in one)
    for task in range(1, tasks + 1):
        folders = [r / "tasks" / f"task{task}" for r in (a, b)]
        assert folders[0].joinpath("metrics.jsonl").read_text() == folders[1].joinpath("metrics.jsonl").read_text()
        tables = [pq.read_table(f / "answers.parquet") for f in folders]
        assert tables[0].equals(tables[1])


def test_every_task_leaves_what_was_said_of_all_so_far(finished, coloured):
    whole(finished)
    metrics = json.loads((finished / "metrics.json").read_text())
    assert metrics["pictures"] == 4 * TRAIN
    assert metrics["tested"] == 4 * TEST
    assert sorted(c for t in metrics["tasks"] for c in t["classes"]) == sorted(COLOURS)
    said = [pq.read_table(finished / "tasks" / f"task{t}" / "answers.parquet").to_pylist() for t in (1, 2)]
    assert [len(s) for s in said] == [2 * TEST, 4 * TEST]
    first = set(metrics["tasks"][0]["classes"])
    assert {r["label"] for r in said[0]} == first
    assert {r["predicted"] for r in said[0]} <= first  # what has not come cannot be said
    for protocol, column in (("class-incremental", "right"), ("task-incremental", "right_in_task")):
        matrix = metrics["matrix"][protocol]
        assert matrix[0][1] is None
        by_hand = [np.mean([r[column] for r in said[1] if r["task"] == t]) for t in range(2)]
        assert matrix[1] == pytest.approx(by_hand, abs=1e-4)
        score = metrics["scores"][f"{protocol}: accuracy, mean over tasks"]
        assert score["value"] == pytest.approx(np.mean(by_hand))
        assert score["low"] <= score["value"] <= score["high"]
    assert all(r["right"] == (r["label"] == r["predicted"]) for r in said[1])
    assert all(r["right_in_task"] or not r["right"] for r in said[1])
    assert metrics["kept"] == 0


def test_only_the_last_state_is_kept(finished):
    assert not (finished / "tasks" / "task1" / "state.safetensors").exists()
    assert not list(finished.rglob("weights.safetensors"))
    last = state(finished)
    assert int(last["finished"]) == 2
    assert last["known"].all()


def test_the_model_says_what_the_system_says(finished, coloured):
    model = contralto.load(finished)
    assert sorted(model.classes) == sorted(COLOURS)
    table = pq.read_table(coloured).to_pylist()
    said = {r["index"]: r["predicted"] for r in pq.read_table(finished / "tasks/task2/answers.parquet").to_pylist()}
    assert list(model.predict([table[i]["image"] for i in said])) == list(said.values())
    encoder = image_encoder(str(finished / "encoder"))
    assert all(torch.equal(v, state(finished)[f"encoder.{k}"]) for k, v in encoder.state_dict().items())
    card = (finished / "model" / "README.md").read_text()
    assert "learnt in 2 tasks" in card
    assert "forgetting" in card


def test_commands_evaluate_predict_and_embed(finished, coloured, tmp_path, capsys):
    assert main(["evaluate", str(finished), str(coloured), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["n"] == 4 * TEST
    metrics = json.loads((finished / "metrics.json").read_text())
    for protocol, matrix in metrics["matrix"].items():
        for task in range(2):
            found = told["scores"][f"{protocol}: accuracy, task {task + 1}"]["value"]
            assert found == pytest.approx(matrix[1][task], abs=1e-4)
    assert main(["predict", str(finished), str(coloured), "--out", str(tmp_path / "p.parquet")]) == 0
    assert main(["embed", str(finished), str(coloured), "--out", str(tmp_path / "e.parquet")]) == 0
    capsys.readouterr()
    other = tmp_path / "other.parquet"
    pq.write_table(pa.Table.from_pylist([{"image": picture((0, 0, 0), 1), "label": "black"}] * 2), other)
    assert main(["evaluate", str(finished), str(other)]) == 2
    assert "no picture has a label of a class that the run knows" in capsys.readouterr().err


def test_the_command_line_names_the_arguments_of_job_and_system(capsys):
    assert main(["fit", "prd", "--help"]) == 0
    told = capsys.readouterr().out
    for word in ("--tasks", "--split_by", "--beta", "--axis", "--extra_epochs", "--image_encoder"):
        assert word in told


def test_called_again_it_is_done_and_with_other_arguments_refused(finished, coloured):
    before = (finished / "tasks" / "task2" / "state.safetensors").stat().st_mtime_ns
    get_job("prd").fit(str(coloured), finished, **PRD_SMALL)
    assert (finished / "tasks" / "task2" / "state.safetensors").stat().st_mtime_ns == before
    with pytest.raises(UsageError, match="beta"):
        get_job("prd").fit(str(coloured), finished, **PRD_SMALL, beta=1.0)


@pytest.mark.parametrize("place", [(0, 1, 2), (1, 0, 2), (1, 1, 1)], ids=["first task", "second", "second epoch"])
def test_stopped_within_a_task_it_goes_on_bit_by_bit(finished, coloured, tmp_path, monkeypatch, place):
    task, epoch, step = place
    training_step = PRD.training_step

    def stops(self, batch, batch_idx):
        if (int(self.task), self.current_epoch, batch_idx) == (task, epoch, step):
            raise KeyboardInterrupt
        return training_step(self, batch, batch_idx)

    arguments = PRD_SMALL | {"checkpoint_every": 1}
    with monkeypatch.context() as patched:
        patched.setattr(PRD, "training_step", stops)
        with pytest.raises(KeyboardInterrupt):
            get_job("prd").fit(str(coloured), tmp_path / "run", **arguments)
    assert (tmp_path / "run" / "tasks" / f"task{task + 1}" / "last.ckpt").exists()
    get_job("prd").fit(str(coloured), tmp_path / "run", **arguments)
    same_streams(finished, tmp_path / "run")


def test_stopped_between_tasks_it_goes_on_with_state_or_weights(finished, coloured, tmp_path, monkeypatch):
    """The moments between the end of a training and the beginning of the next."""
    for moment in ("save_weights", "ask"):
        run = tmp_path / moment

        def broken(*words, **more):
            raise KeyboardInterrupt

        with monkeypatch.context() as patched:
            if moment == "ask":
                patched.setattr(Continual, "ask", broken)
            else:
                patched.setattr("contralto.pipelines.continual.save_weights", broken)
            with pytest.raises(KeyboardInterrupt):
                get_job("prd").fit(str(coloured), run, **PRD_SMALL)
        assert (run / "tasks" / "task1" / "done.json").exists()
        assert not (run / "tasks" / "task1" / "answers.parquet").exists()
        get_job("prd").fit(str(coloured), run, **PRD_SMALL)
        same_streams(finished, run)


@pytest.fixture(scope="session")
def known(tmp_path_factory):
    """An encoder with weights."""
    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp("known") / "encoder"
    save_encoder(image_encoder("resnet8", size=16), folder)
    return folder


def test_a_frozen_encoder_stays_and_layers_behind_it_learn(coloured, known, tmp_path, monkeypatch):
    arguments = PRD_SMALL | {"image_encoder": str(known), "frozen": True, "cache": str(tmp_path / "cache")}
    run = get_job("prd").fit(str(coloured), tmp_path / "run", **arguments)
    whole(run)
    begun, kept = image_encoder(str(known)), image_encoder(str(run / "encoder"))
    assert kept.name == "adapted/resnet8"
    assert all(torch.equal(v, kept.backbone[0].state_dict()[k]) for k, v in begun.backbone.state_dict().items())
    layers, fresh = kept.backbone[1], layers_behind(begun, np.zeros((1, 128)))
    assert not torch.equal(layers[2].weight, fresh.backbone[2].weight)
    said = pq.read_table(run / "tasks/task2/answers.parquet").to_pylist()
    model, table = contralto.load(run), pq.read_table(coloured).to_pylist()
    predicted = list(model.predict([table[row["index"]]["image"] for row in said]))
    assert np.mean([p == row["predicted"] for p, row in zip(predicted, said, strict=True)]) > 0.9  # features are halves
    assert len(list((tmp_path / "cache").glob("plain*.npy"))) == 1
    assert len(list((tmp_path / "cache").glob("view*.npy"))) == 4  # two views, two drawings of each

    def never(*words, **more):
        raise AssertionError("features are computed again")

    monkeypatch.setattr("contralto.pipelines.continual.features_of_view", never)
    monkeypatch.setattr("contralto.pipelines.continual.map_blocks", never)
    step, seen = PRD.training_step, []

    def stops(self, batch, batch_idx):
        seen.append(batch["views"][0].shape)
        if (int(self.task), self.current_epoch, batch_idx) == (1, 1, 1):
            raise KeyboardInterrupt
        return step(self, batch, batch_idx)

    with monkeypatch.context() as patched:
        patched.setattr(PRD, "training_step", stops)
        with pytest.raises(KeyboardInterrupt):
            get_job("prd").fit(str(coloured), tmp_path / "again", **arguments, checkpoint_every=1)
    get_job("prd").fit(str(coloured), tmp_path / "again", **arguments, checkpoint_every=1)
    assert set(seen) == {(8, 128)}
    same_streams(run, tmp_path / "again")


def test_layers_behind_a_frozen_encoder_begin_with_the_centre_of_the_first_task_alone(coloured, known, tmp_path):
    job = get_job("lwf")
    arguments = SMALL | {"image_encoder": str(known), "frozen": True, "epochs": 1, "extra_epochs": 0}
    job.fit(str(coloured), tmp_path / "run", **arguments)
    first = torch.from_numpy(job.plain[job.rows[job.tasks[0].rows]].astype(np.float32))
    layers = job.encoder().backbone[0]
    assert torch.allclose(layers(first).mean(0), torch.zeros(128), atol=1e-4)
    later = torch.from_numpy(job.plain[job.rows[job.tasks[1].rows]].astype(np.float32))
    assert layers(later).mean(0).abs().max() > 0.1


def test_a_frozen_encoder_must_have_weights(coloured, tmp_path, capsys):
    words = ["fit", "prd", str(coloured), "--out", str(tmp_path / "run"), "--image_encoder", "resnet8", "--frozen"]
    assert main(words) == 2
    assert "--frozen needs an encoder that has learnt something" in capsys.readouterr().err
    with pytest.raises(UsageError, match="variants"):
        get_job("prd").fit(str(coloured), tmp_path / "none", **PRD_SMALL, variants=0)


@pytest.mark.slow
@pytest.mark.parametrize("system", KILLED)
def test_killed_at_random_moments_and_started_again_it_ends_the_same(coloured, tmp_path, system):
    arguments = {"prd": PRD_SMALL}.get(system, SMALL) | {"seed": 5}
    if system == "replay":
        arguments |= {"memory_size": 6, "memory_rule": "barycenter", "replayed": 3}
    undisturbed = get_job(system).fit(str(coloured), tmp_path / "undisturbed", **arguments)
    again, rng = tmp_path / "killed", random.Random(1)
    kills = [["step", "training", rng.randint(1, 4)] for _ in range(5)]
    kills += [["write", rng.randint(1, 14), moment] for moment in ("before", "half", "after") for _ in range(3)]
    kills += [["time", rng.uniform(0.1, 1.5)] for _ in range(2)]
    rng.shuffle(kills)
    call = {"data": str(coloured), "out": str(again), "checkpoint_every": 2, **arguments}
    plan = {"system": system, "call": call, "kills": kills, "log": str(tmp_path / "steps")}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    program = [sys.executable, Path(__file__).parents[1] / "killing.py", tmp_path / "plan.json"]
    result = subprocess.run(program, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-3000:]
    ends = json.loads(result.stdout.splitlines()[-1])
    assert [end for _, end in ends].count("killed") >= 10
    assert ends[-1][1] == 0, result.stderr[-3000:]
    same_streams(undisturbed, again)
    told = [json.loads((r / "metrics.json").read_text()) for r in (undisturbed, again)]
    assert told[0]["scores"] == told[1]["scores"]
    assert told[0]["matrix"] == told[1]["matrix"]


def test_replay_trains_on_what_it_kept_and_on_nothing_else_of_before(coloured, tmp_path, monkeypatch):
    job, seen = get_job("replay"), []
    step = job.system.training_step

    def noted(self, batch, batch_idx):
        seen.append((int(self.task), batch["index"].tolist(), batch["replayed"].tolist(), batch["label"].tolist()))
        return step(self, batch, batch_idx)

    monkeypatch.setattr(job.system, "training_step", noted)
    run = job.fit(str(coloured), tmp_path / "run", **SMALL, memory_size=6, memory_rule="closest", replayed=3)
    last = state(run)
    kept = set(last["memory.kept"][last["memory.kept"] >= 0].tolist())
    assert len(kept) == 4  # 6 // 4 of each of four classes
    of_first = {i for t, rows, _, _ in seen for i in rows if t == 0}
    old = {i for t, rows, replayed, _ in seen if t == 1 for i, r in zip(rows, replayed, strict=True) if r}
    assert all(sum(replayed) == (3 if t else 0) for t, _, replayed, _ in seen)
    assert old <= of_first
    assert len(old) == 6  # 6 // 2 of each of two
    assert (
        not {i for t, rows, replayed, _ in seen if t == 1 for i, r in zip(rows, replayed, strict=True) if not r}
        & of_first
    )
    assert json.loads((run / "metrics.json").read_text())["kept"] == 4


def test_every_epoch_of_the_stream_has_an_order_of_its_own(coloured, tmp_path, monkeypatch):
    job, seen = get_job("prd"), []
    step = job.system.training_step

    def noted(self, batch, batch_idx):
        seen.append((int(self.task), self.current_epoch, batch["index"].tolist(), batch["views"][0]))
        return step(self, batch, batch_idx)

    monkeypatch.setattr(job.system, "training_step", noted)
    job.fit(str(coloured), tmp_path / "run", **PRD_SMALL)
    epochs = {(t, e): [i for a, b, rows, _ in seen if (a, b) == (t, e) for i in rows] for t, e, _, _ in seen}
    assert list(epochs) == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]
    assert all(len(rows) == len(set(rows)) == 2 * TRAIN for rows in epochs.values())
    assert len({tuple(np.argsort(np.argsort(rows))) for rows in epochs.values()}) == 5
    pixels = [x for _, _, rows, views in seen for i, x in zip(rows, views, strict=True) if i == epochs[0, 0][0]]
    assert len(pixels) == 3
    assert not torch.equal(pixels[0], pixels[1])


def test_joint_training_sees_all_so_far(coloured, tmp_path, monkeypatch):
    job, seen = get_job("joint"), []
    step = job.system.training_step

    def noted(self, batch, batch_idx):
        seen.append((int(self.task), batch["index"].tolist()))
        return step(self, batch, batch_idx)

    monkeypatch.setattr(job.system, "training_step", noted)
    run = job.fit(str(coloured), tmp_path / "run", **SMALL)
    count = [len({i for t, rows in seen if t == task for i in rows}) for task in range(2)]
    assert count == [2 * TRAIN, 4 * TRAIN]
    assert sum(t == 1 for t, _ in seen) == 2 * (4 * TRAIN // 8)
    assert contralto.load(run).classes == sorted(COLOURS)


def test_domains_and_drift(coloured, tmp_path):
    table = [r | {"place": "in<b>side" if i % 2 else "outside"} for i, r in enumerate(rows())]
    names = list(COLOURS)
    for i, row in enumerate(table):
        row["place"] = "in<b>side" if (i // len(names)) % 2 else "outside"
    data = tmp_path / "domains.parquet"
    pq.write_table(pa.Table.from_pylist(table), data)
    run = get_job("finetune").fit(
        str(data), tmp_path / "domains", **SMALL, split_by="domain", group_column="place", compare="seen"
    )
    metrics = json.loads((run / "metrics.json").read_text())
    assert {t["name"] for t in metrics["tasks"]} == {"in<b>side", "outside"}
    assert all(len(t["classes"]) == 4 for t in metrics["tasks"])
    assert "in<b>side" not in (run / "report.html").read_text()
    scores = get_job("finetune").evaluate(run, str(data), group_column="place")["scores"]
    assert "class-incremental: accuracy, outside" in scores
    with pytest.raises(DataError, match="without a domain"):
        get_job("finetune").fit(str(coloured), tmp_path / "none", **SMALL, split_by="domain")
    run = get_job("replay").fit(
        str(coloured),
        tmp_path / "drift",
        **SMALL,
        split_by="drift",
        memory_rule="reservoir",
        memory_size=10,
        replayed=2,
    )
    metrics = json.loads((run / "metrics.json").read_text())
    assert [t["name"] for t in metrics["tasks"]] == ["stretch 1", "stretch 2"]
    assert sum(t["pictures"] for t in metrics["tasks"]) == 4 * TRAIN
    assert metrics["kept"] == 10


def test_without_a_test_split_a_share_of_every_class_is_kept_for_it(tmp_path):
    data = tmp_path / "data.parquet"
    pq.write_table(pa.Table.from_pylist(rows(split=False)), data)
    run = get_job("finetune").fit(str(data), tmp_path / "run", **SMALL)
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["tested"] == 4 * round(0.2 * (TRAIN + TEST))
    assert metrics["pictures"] + metrics["tested"] == 4 * (TRAIN + TEST)
    said = pq.read_table(run / "tasks" / "task2" / "answers.parquet")
    assert {said.column("label").to_pylist().count(name) for name in COLOURS} == {round(0.2 * (TRAIN + TEST))}
    groups = np.repeat(np.arange(30), 4).astype(str)
    held = held_out(np.zeros(120, int), 0.3, groups=groups, seed=1)
    assert 0 < held.sum() < 120
    assert all(len(set(held[groups == g])) == 1 for g in np.unique(groups))


def test_what_cannot_be_cut_is_refused_with_a_sentence(coloured, tmp_path):
    with pytest.raises(UsageError, match="tasks must be between 1 and 4"):
        get_job("prd").fit(str(coloured), tmp_path / "many", **(PRD_SMALL | {"tasks": 5}))
    with pytest.raises(UsageError, match="split_by"):
        get_job("prd").fit(str(coloured), tmp_path / "by", **PRD_SMALL, split_by="colour")
    with pytest.raises(UsageError, match="test_share"):
        get_job("prd").fit(str(coloured), tmp_path / "share", **PRD_SMALL, test_share=1.0)
    few = [r for r in rows() if r["split"] == "train" or r["label"] in ("red", "green")]
    data = tmp_path / "few.parquet"
    pq.write_table(pa.Table.from_pylist(few), data)
    with pytest.raises(DataError, match="0 to test"):
        get_job("prd").fit(str(data), tmp_path / "few", **(PRD_SMALL | {"tasks": 4}))
    missing = [r | {"label": None if i == 3 else r["label"]} for i, r in enumerate(rows())]
    data = tmp_path / "missing.parquet"
    pq.write_table(pa.Table.from_pylist(missing), data)
    with pytest.raises(DataError, match="1 pictures have none"):
        get_job("prd").fit(str(data), tmp_path / "missing", **PRD_SMALL)


def test_hostile_names_stay_text_in_the_page(tmp_path):
    names = (EVIL, "a" * 500, '"onload="x', "{{ 7 * 7 }}")
    data = tmp_path / "data.parquet"
    pq.write_table(pa.Table.from_pylist(rows(names=names)), data)
    run = get_job("finetune").fit(str(data), tmp_path / "run", **SMALL)
    page = (run / "report.html").read_text()
    assert EVIL not in page
    assert "&lt;script&gt;alert(1)" in page
    assert "{{ 7 * 7 }}" in page
    assert "a" * 200 not in page
    assert "Content-Security-Policy" in page


@pytest.mark.parametrize("system", ["prd", "lwf", "replay", "finetune", "joint"])
def test_presets_hold_arguments_that_exist(system, coloured, tmp_path):
    names = presets_of(system)
    assert "small" in names
    for name in names:
        given = load_preset(name, system)
        job = get_job(system)
        job.begin(str(coloured), tmp_path / name, given | {"accelerator": "cpu", "tasks": 2}, progress=False)
        job.ingest()
        small = {k: SMALL[k] for k in ("image_encoder", "image_size")}
        job.arguments |= small | {k: v for k, v in {"hidden": 8, "dim": 4}.items() if k in given}
        module = job.build()
        assert all(
            getattr(module, k) == (tuple(v) if isinstance(v, list) else v) for k, v in given.items() if k in CHECKED
        )


def test_the_page_shows_matrices_and_what_was_forgotten(finished, tmp_path):
    page = (finished / "report.html").read_text()
    assert page.count('class="share"') == 2 * 3  # two matrices of three entries
    said = [pq.read_table(finished / "tasks" / f"task{t}" / "answers.parquet").to_pylist() for t in (1, 2)]
    right = {r["index"] for r in said[0] if r["right"]}
    lost = [r for r in said[1] if r["index"] in right and not r["right"]]
    items = json.loads(page.split('id="items">')[1].split("</script>")[0])
    assert len(items) == len(lost)
    assert write_continual_report(finished, out=tmp_path / "r.html").read_text() == page
    assert main(["report", str(finished), "--out", str(tmp_path / "command.html")]) == 0
    assert (tmp_path / "command.html").read_text() == page
    broken = tmp_path / "broken"
    shutil.copytree(finished, broken)
    (broken / "metrics.json").unlink()
    with pytest.raises(DataError, match=r"no metrics\.json"):
        write_continual_report(broken)
