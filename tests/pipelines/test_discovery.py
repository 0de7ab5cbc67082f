"""Discovery from pictures in files to classes, names for them and predictions by these names."""

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
from contralto.data.names import read_names, save_names
from contralto.encoders.image import image_encoder, save_encoder
from contralto.errors import DataError, UsageError
from contralto.pipelines.job import load_preset
from contralto.review.discovered import Discoveries
from contralto.systems.classifier import as_tensor
from contralto.systems.registry import get_job
from contralto.views.image import EvalView

from tests.conftest import picture
from tests.killing import whole

COLOURS = {
    "blue": (40, 60, 210), "green": (30, 180, 60), "red": (200, 30, 40), "yellow": (230, 220, 40), "white": (245, 245, 245),
    "black": (10, 10, 10),
}  # fmt: skip
OLD, NEW = ["blue", "green", "red", "yellow"], ["white", "black"]
PER_CLASS = 16
SMALL = {
    "image_size": 16, "batch_size": 16, "epochs": 3, "hidden": 16, "dim": 8, "lr": 0.02, "progress": False,
    "new_classes": 2, "frozen": True,
}  # fmt: skip
LONGER = SMALL | {"epochs": 30, "lr": 0.01, "ramp_epochs": 15}
HOSTILE = "<script>window.hacked = 1</script>"


def rows(names, per_class, first=0, given=lambda name, i: name, **more):
    """Pictures of some colours; `given` says which label a picture has."""
    return [
        {"id": f"{n}-{first + i}", "image": picture(COLOURS[n], seed=1000 * c + first + i), "class_name": given(n, i)}
        | more
        for c, n in enumerate(names)
        for i in range(per_class)
    ]


def write(path, found):
    pq.write_table(pa.Table.from_pylist(found), path)
    return str(path)


def known_half(name, i):
    return name if name in OLD and i % 2 else None


@pytest.fixture(scope="session")
def colours(tmp_path_factory):
    """One table of six colours: four have labels for half of their pictures; and the same with all right labels."""
    folder = tmp_path_factory.mktemp("colours")
    everything = OLD + NEW
    held = rows(everything, 4, first=100, split="test")
    partly = rows(everything, PER_CLASS, given=known_half, split="train")
    truth = rows(everything, PER_CLASS, split="train")
    return write(folder / "partly.parquet", partly + held), write(folder / "truth.parquet", truth + held)


@pytest.fixture(scope="session")
def encoder(tmp_path_factory):
    """An encoder with weights, as a folder: random ones tell colours apart once their norms have seen some."""
    folder = tmp_path_factory.mktemp("encoder") / "resnet8"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        random_one = image_encoder("resnet8", size=16).train()
        view = EvalView(16, 0.875, random_one.mean, random_one.std)
        seen = [picture(c, seed=i) for i in range(8) for c in COLOURS.values()]
        with torch.no_grad():
            for _ in range(20):
                random_one(torch.stack([view(as_tensor(p)) for p in seen]))
        save_encoder(random_one, folder)
    return str(folder)


@pytest.fixture(scope="session")
def finished(colours, encoder, tmp_path_factory):
    out = tmp_path_factory.mktemp("discovered") / "run"
    return get_job("protogcd").fit(colours[0], out, image_encoder=encoder, **LONGER)


@pytest.fixture
def run(finished):
    """The finished run, with no class named."""
    save_names(finished, dict.fromkeys(Discoveries(finished).new_classes, ""))
    return finished


def test_a_run_holds_a_class_for_every_picture_and_what_is_needed_to_go_on(run):
    whole(run)
    table = pq.read_table(run / "discovered.parquet")
    assert table.num_rows == 6 * PER_CLASS
    given = table.column("given").to_pylist()
    assert sum(g is not None for g in given) == len(OLD) * PER_CLASS // 2
    metrics = json.loads((run / "metrics.json").read_text())
    assert (metrics["labelled"], metrics["unlabelled"], metrics["old_classes"]) == (32, 64, 4)
    assert metrics["estimate"] is None
    assert 0 <= metrics["new_classes"] <= metrics["asked"] == 2
    found = table.column("found").to_pylist()
    assert set(found) <= {*OLD, "new 1", "new 2"}
    unlabelled = [f for f, g in zip(found, given, strict=True) if g is None]
    assert metrics["in_new"] == sum(f.startswith("new") for f in unlabelled)
    sizes = [unlabelled.count(f"new {i + 1}") for i in range(metrics["new_classes"])]
    assert sizes == sorted(sizes, reverse=True)
    assert all(sizes)
    held = {name: score["value"] for name, score in metrics["scores"].items() if "held-out" in name}
    assert len(held) == 5
    assert metrics["new_classes"] == 2
    assert held["accuracy of new classes, held-out images"] > 0.8
    assert held["accuracy of old classes, held-out images"] > 0.8
    assert pq.read_table(run / "map.parquet").num_rows == 6 * PER_CLASS + 4 + metrics["new_classes"]


def test_labels_of_other_splits_are_not_learnt_from(colours, encoder, run, tmp_path):
    """Held-out pictures show all six colours, with labels: new ones stay new, and no weight depends on them."""
    without = pq.read_table(colours[0]).filter(pa.compute.equal(pa.compute.field("split"), "train"))
    pq.write_table(without, tmp_path / "train.parquet")
    again = get_job("protogcd").fit(str(tmp_path / "train.parquet"), tmp_path / "run", image_encoder=encoder, **LONGER)
    a, b = (pq.read_table(r / "discovered.parquet").drop_columns(["index"]) for r in (run, again))
    assert a.equals(b)


def test_predictions_use_the_names_that_people_gave(run, colours, tmp_path, capsys):
    new = Discoveries(run).new_classes
    save_names(run, {c: HOSTILE if i else "snow" for i, c in enumerate(new)})
    target = tmp_path / "p.parquet"
    assert main(["predict", str(run), colours[1], "--out", str(target), "--json"]) == 0
    labels = set(pq.read_table(target).column("label").to_pylist())
    assert labels <= {*OLD, "snow", HOSTILE}
    model = contralto.load(run)
    assert model.classes[: len(OLD)] == sorted(OLD)
    assert contralto.load(run / "model").classes == model.classes
    (run / "names.json").write_text('{"new 1": 3}')
    assert main(["predict", str(run), colours[1], "--out", str(target)]) == 2
    assert "names.json" in capsys.readouterr().err


def test_evaluation_leaves_labelled_pictures_out_and_tells_those_of_the_run_from_others(run, colours, capsys):
    assert main(["evaluate", str(run), colours[1], "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["n"] == [64, 24]
    assert told["labelled"] == 32
    assert {name.rpartition(", ")[2] for name in told["scores"]} == {"images of the run", "other images"}
    for where in ("images of the run", "other images"):
        together, apart = (told["scores"][f"accuracy of new classes{how}, {where}"] for how in ("", ", matched apart"))
        assert together["value"] <= apart["value"]
        assert together["low"] <= together["value"] <= together["high"]
    held = json.loads((run / "metrics.json").read_text())["scores"]["accuracy, held-out images"]
    assert told["scores"]["accuracy, other images"]["value"] == held["value"]
    assert main(["evaluate", str(run), colours[1], "--split", "test", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["n"] == [0, 24]


def test_right_names_make_right_predictions(run, colours, capsys):
    """A new class with the name of what it shows counts; a wrong name does not."""
    found = Discoveries(run)
    truth = dict(zip(*(pq.read_table(colours[1]).column(c).to_pylist() for c in ("id", "class_name")), strict=True))
    names = {}
    for k, c in enumerate(found.classes):
        shown = [truth[found.ids[n]] for n in found.members(k)]
        if found.is_new[k]:
            names[c] = max(set(shown), key=shown.count)
    save_names(run, names)
    assert main(["evaluate", str(run), colours[1], "--json"]) == 0
    right = json.loads(capsys.readouterr().out)["scores"]["right by the names that people gave, images of the run"][
        "value"
    ]
    save_names(run, dict.fromkeys(names, "something else"))
    assert main(["evaluate", str(run), colours[1], "--json"]) == 0
    wrong = json.loads(capsys.readouterr().out)["scores"]["right by the names that people gave, images of the run"][
        "value"
    ]
    assert right > wrong


def test_called_again_it_is_done_keeps_names_and_refuses_other_arguments(run, colours, encoder):
    new = Discoveries(run).new_classes
    save_names(run, dict.fromkeys(new, "heron"))
    before = (run / "training" / "weights.safetensors").stat().st_mtime_ns
    table = (run / "discovered.parquet").read_bytes()
    get_job("protogcd").fit(colours[0], run, image_encoder=encoder, **LONGER)
    assert (run / "training" / "weights.safetensors").stat().st_mtime_ns == before
    assert (run / "discovered.parquet").read_bytes() == table
    assert read_names(run) == dict.fromkeys(new, "heron")
    with pytest.raises(UsageError, match="entropy"):
        get_job("protogcd").fit(colours[0], run, image_encoder=encoder, **(LONGER | {"entropy": 1.5}))


def test_a_second_source_is_unlabelled_whatever_its_folders_say(tmp_path, encoder):
    """Pictures in folders by class as one source; the other one has folders, too, and one picture of the first."""
    for n in OLD[:2]:
        (tmp_path / "known" / n).mkdir(parents=True)
        for i in range(8):
            (tmp_path / "known" / n / f"{i}.png").write_bytes(picture(COLOURS[n], seed=i))
    for n in (OLD[0], NEW[0]):
        (tmp_path / "more" / n).mkdir(parents=True)
        for i in range(8):
            (tmp_path / "more" / n / f"{i}.png").write_bytes(picture(COLOURS[n], seed=50 + i))
    (tmp_path / "more" / NEW[0] / "again.png").write_bytes(picture(COLOURS[OLD[0]], seed=0))
    run = get_job("protogcd").fit(
        str(tmp_path / "known"), tmp_path / "run", unlabelled=str(tmp_path / "more"), image_encoder=encoder,
        **(SMALL | {"new_classes": 1}),
    )  # fmt: skip
    metrics = json.loads((run / "metrics.json").read_text())
    assert (metrics["labelled"], metrics["unlabelled"], metrics["old_classes"]) == (16, 16, 2)
    table = pq.read_table(run / "discovered.parquet")
    assert table.column("part").to_pylist() == [0] * 16 + [1] * 16
    found = Discoveries(run)
    from_more = found.read_bytes(16)
    assert from_more in [p.read_bytes() for p in (tmp_path / "more").rglob("*.png")]


def test_the_number_of_classes_is_estimated_with_an_interval_where_none_is_given(colours, encoder, tmp_path):
    arguments = {k: v for k, v in SMALL.items() if k != "new_classes"} | {"epochs": 1, "most_classes": 8}
    run = get_job("protogcd").fit(colours[0], tmp_path / "run", image_encoder=encoder, **arguments)
    estimate = json.loads((run / "metrics.json").read_text())["estimate"]
    assert 4 <= estimate["low"] <= estimate["number"] <= estimate["high"] <= 8
    assert estimate["method"] == "search"
    assert all(4 <= int(k) <= 8 for k in estimate["tried"])
    assert "estimated; 95 % interval" in (run / "report.html").read_text()
    before = (run / "number.json").stat().st_mtime_ns
    get_job("protogcd").fit(colours[0], run, image_encoder=encoder, **arguments)
    assert (run / "number.json").stat().st_mtime_ns == before
    with pytest.raises(UsageError, match="most_classes must be above"):
        get_job("protogcd").fit(
            colours[0], tmp_path / "few", image_encoder=encoder, **(arguments | {"most_classes": 4})
        )


def test_the_whole_encoder_learns_without_frozen_and_serves_afterwards(colours, tmp_path):
    arguments = SMALL | {"frozen": False, "epochs": 1, "image_encoder": "resnet8"}
    run = get_job("protogcd").fit(colours[0], tmp_path / "run", **arguments)
    weights = load_file(run / "training" / "weights.safetensors")
    kept = image_encoder(str(run / "encoder")).state_dict()
    assert all(torch.equal(kept[k], weights[f"encoder.{k}"]) for k in kept)
    found = Discoveries(run)
    model = contralto.load(run)
    predicted = model.predict([found.read_bytes(n) for n in range(len(found))]).probabilities.argmax(1)
    assert (predicted == found.found).mean() > 0.95  # features of the tables went through half precision


def test_the_model_of_a_frozen_run_says_what_the_tables_say(run):
    found = Discoveries(run)
    predicted = contralto.load(run).predict([found.read_bytes(n) for n in range(len(found))])
    assert (predicted.probabilities.argmax(1) == found.found).mean() > 0.95
    sure = predicted.probabilities.max(1)
    assert np.abs(sure - found.confidence).mean() < 0.02


@pytest.mark.parametrize("whole_encoder", [False, True])
def test_gpc_hears_of_all_samples_before_its_epochs(colours, encoder, tmp_path, whole_encoder):
    arguments = SMALL | {"epochs": 3, "kmeans_restarts": 1, "frozen": not whole_encoder}
    run = get_job("gpc").fit(
        colours[0], tmp_path / "run", image_encoder="resnet8" if whole_encoder else encoder, **arguments
    )
    numbers = json.loads((run / "metrics.json").read_text())["numbers"]
    assert len(numbers) == 2  # not before the first epoch
    assert all(n >= 4 for n in numbers)
    assert len(list((run / "features").glob("plain-*.npy"))) == 1  # those of the epochs are not kept


def test_gpc_starts_somewhere_where_nothing_can_be_estimated(colours, tmp_path):
    arguments = {k: v for k, v in SMALL.items() if k != "new_classes"} | {"frozen": False, "epochs": 1}
    run = get_job("gpc").fit(colours[0], tmp_path / "run", image_encoder="resnet8", kmeans_restarts=1, **arguments)
    assert json.loads((run / "metrics.json").read_text())["asked"] == 4
    with pytest.raises(UsageError, match="new_classes"):
        get_job("protogcd").fit(colours[0], tmp_path / "other", image_encoder="resnet8", **arguments)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (lambda name, i: None, "none has labels"),
        (lambda name, i: name, "nothing to discover"),
        (lambda name, i: "red" if name == "red" else None, "only 'red' has labels"),
    ],
)
def test_labels_that_allow_no_discovery_are_refused_with_a_sentence(tmp_path, encoder, given, told):
    data = write(tmp_path / "data.parquet", rows(OLD, 3, given=given))
    with pytest.raises(DataError, match=told):
        get_job("protogcd").fit(data, tmp_path / "run", image_encoder=encoder, **SMALL)


def test_wrong_arguments_are_refused_before_a_picture_is_read(colours, tmp_path):
    job = get_job("protogcd")
    for wrong, told in (
        ({"new_classes": 0}, "at least 1"),
        ({"variants": 0}, "at least 1"),
        ({"image_encoder": "resnet8"}, "begins without weights"),
        ({"warp": 1, "pretrained": True}, "no argument 'warp'"),
    ):
        with pytest.raises(UsageError, match=told):
            job.fit("nowhere", tmp_path / "run", **(SMALL | wrong))
    with pytest.raises(DataError):
        job.fit(str(tmp_path / "nowhere"), tmp_path / "run", pretrained=True, **SMALL)


def test_unlabelled_pictures_that_are_all_known_already_are_nothing_new(tmp_path, encoder):
    data = write(tmp_path / "data.parquet", rows(OLD, 3))
    with pytest.raises(DataError, match="nothing to discover"):
        get_job("protogcd").fit(data, tmp_path / "run", unlabelled=data, image_encoder=encoder, **SMALL)


def test_broken_files_are_skipped_and_hostile_names_come_through(tmp_path, encoder):
    """A class is called like markup, another one like a discovered class; an id is markup."""
    names = {"red": HOSTILE, "green": "new 1", "blue": "\u202eeulb"}
    found = rows(["red", "green", "blue", "white"], 6, given=lambda n, i: names.get(n) if i % 2 else None)
    found[0]["id"] = HOSTILE
    found.append({"id": "broken", "image": b"\xff\xd8\xff nothing", "class_name": "red"})
    run = get_job("protogcd").fit(
        write(tmp_path / "data.parquet", found), tmp_path / "run", image_encoder=encoder, **(SMALL | {"new_classes": 1})
    )
    discovered = Discoveries(run)
    assert set(discovered.classes) - {HOSTILE, "new 1", "eulb"} <= {"new 2"}
    assert set(discovered.new_classes) <= {"new 2"}
    assert HOSTILE not in (run / "report.html").read_text()
    assert len(discovered) == 24


def test_the_preset_fits_both_systems():
    for system in ("protogcd", "gpc"):
        preset = load_preset("frozen", system)
        assert preset["frozen"]
        assert set(preset) <= set(get_job(system).parameters())


@pytest.mark.slow
@pytest.mark.parametrize("system", ["protogcd", "gpc"] if int(os.environ.get("CONTRALTO_KILLS", "1")) > 1 else ["gpc"])
def test_killed_at_random_moments_and_started_again_it_ends_the_same(colours, encoder, tmp_path, system):
    arguments = SMALL | {"seed": 5, "image_encoder": encoder}
    if system == "gpc":
        arguments |= {"kmeans_restarts": 1, "psi": "auto"}
    undisturbed = get_job(system).fit(colours[0], tmp_path / "undisturbed", **arguments)
    again, rng = tmp_path / "killed", random.Random(1)
    kills = [["step", "training", rng.randint(1, 6)] for _ in range(4)]
    kills += [["write", rng.randint(1, 20), moment] for moment in ("before", "half", "after") for _ in range(3)]
    kills += [["time", rng.uniform(0.1, 2.0)] for _ in range(3)]
    rng.shuffle(kills)
    call = {"data": colours[0], "out": str(again), "checkpoint_every": 2, **arguments}
    plan = {"system": system, "call": call, "kills": kills, "log": str(tmp_path / "steps")}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    program = [sys.executable, Path(__file__).parents[1] / "killing.py", tmp_path / "plan.json"]
    result = subprocess.run(program, capture_output=True, text=True, timeout=900, env=os.environ)
    assert result.returncode == 0, result.stderr[-3000:]
    ends = json.loads(result.stdout.splitlines()[-1])
    assert [end for _, end in ends].count("killed") >= 4
    assert ends[-1][1] == 0, result.stderr[-3000:]
    a, b = (load_file(r / "training" / "weights.safetensors") for r in (undisturbed, again))
    assert all(torch.equal(a[k], b[k]) for k in a)
    a, b = (pq.read_table(r / "discovered.parquet") for r in (undisturbed, again))
    assert a.equals(b)
    lines = [(r / "training" / "metrics.jsonl").read_text() for r in (undisturbed, again)]
    assert lines[0] == lines[1]
