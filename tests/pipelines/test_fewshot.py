"""Few-shot learning from labelled pictures in files to a classifier of classes that were never learnt from."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import contralto
from contralto.cli import main
from contralto.data.manifest import Manifest
from contralto.errors import DataError, UsageError
from contralto.pipelines.fewshot import FewShotJob, classifier_from, novel_classes
from contralto.systems.fewshot.susana import SuSana
from contralto.systems.registry import get_job

from tests.conftest import picture
from tests.systems.fewshot import steps

COLOURS = [(r, g, b) for r in (30, 130, 230) for g in (30, 130, 230) for b in (60, 190)]  # 18 classes
EACH = 9
SMALL = {
    "image_encoder": "resnet8", "image_size": 16, "epochs": 2, "lr": 1e-3, "test_way": 3, "test_shots": [1, 2],
    "test_queries": 5, "test_episodes": 40, "jitter": 0.0, "progress": False,
}  # fmt: skip
EPISODES = {"way": 3, "shot": 1, "queries": 3, "episodes": 6}


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    """Pictures of eighteen colours in three families, nine of each, of which the last two are for testing."""
    rows = [
        {
            "image": picture(colour, seed=100 * c + i, side=24), "label": f"colour {c:02}", "group": f"family {c // 6}",
            "split": "test" if i >= EACH - 2 else "train",
        }
        for c, colour in enumerate(COLOURS)
        for i in range(EACH)
    ]  # fmt: skip
    path = tmp_path_factory.mktemp("colours") / "colours.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def fit(name, data, out, **more):
    episodic = {} if name == "base_classifier" else EPISODES
    return FewShotJob(name).fit(str(data), out, **(SMALL | episodic | more))


@pytest.fixture(scope="module")
def finished(colours, tmp_path_factory):
    return fit("susana", colours, tmp_path_factory.mktemp("few") / "run", epochs=4)


def test_a_run_tells_how_well_new_classes_are_told_apart(finished):
    metrics = json.loads((finished / "metrics.json").read_text())
    classes = json.loads((finished / "classes.json").read_text())
    assert (len(classes["base"]), len(classes["novel"])) == (13, 5)
    assert not set(classes["base"]) & set(classes["novel"])
    assert metrics["pictures"] == 13 * (EACH - 2)  # of base classes, without their test pictures
    scores = metrics["scores"]
    trained, before = (
        scores["3 classes, 1 shot, nearest prototype"],
        scores["3 classes, 1 shot, nearest prototype, before training"],
    )
    assert trained["low"] <= trained["value"] <= trained["high"]
    assert trained["value"] > 0.7
    assert before["percent"]
    assert {"3 classes, 2 shots, linear probe", "ICNN score of the new classes, after"} <= set(scores)
    table = pq.read_table(finished / "novel.parquet").to_pylist()
    assert sorted(row["class"] for row in table) == sorted(classes["novel"])
    assert all(row["pictures"] == EACH for row in table)  # all their pictures: none was learnt from
    assert [row["accuracy_1"] for row in table] == sorted(row["accuracy_1"] for row in table)
    for file in metrics["files"].values():
        assert (finished / file).exists()
    page = (finished / "report.html").read_text()
    assert "An episode of new classes" in page
    assert f"{trained['value']:.1%}".replace("%", " %") in page
    sheet = np.asarray(Image.open(finished / "episodes.png"))
    assert (sheet == (34, 139, 34)).all(-1).any()  # something was right


def test_only_pictures_of_base_classes_are_learnt_from(colours, tmp_path, monkeypatch):
    seen = set()
    step = SuSana.training_step

    def looks(self, batch, batch_idx):
        seen.update(batch["index"].tolist())
        assert batch["label"].max() < 13
        return step(self, batch, batch_idx)

    monkeypatch.setattr(SuSana, "training_step", looks)
    job = FewShotJob("susana")
    run = job.fit(str(colours), tmp_path / "run", **(SMALL | EPISODES))
    names = job.manifest.class_names
    learnt = {names[job.manifest.labels[job.rows[i]]] for i in seen}
    assert learnt <= set(json.loads((run / "classes.json").read_text())["base"])
    assert len(learnt) > 8
    assert (job.manifest.column("split")[job.rows] == "train").all()


def test_a_picture_of_a_new_class_under_a_wrong_label_is_not_learnt_from(colours, tmp_path):
    table = pq.read_table(colours)
    right = table["label"].to_pylist()
    wrong = [i for i, name in enumerate(right) if name == "colour 17"][:3]
    given = ["colour 00" if i in wrong else name for i, name in enumerate(right)]
    table = table.set_column(1, "web_label", pa.array(given)).append_column("clean_label", pa.array(right))
    pq.write_table(table, tmp_path / "web.parquet")
    job = FewShotJob("susana")
    job.fit(
        str(tmp_path / "web.parquet"), tmp_path / "run", **(SMALL | EPISODES), novel="colour 15,colour 16,colour 17"
    )
    assert set(wrong) <= set(job.novel_rows.tolist())
    assert not set(job.rows.tolist()) & set(job.novel_rows.tolist())
    assert len(job.rows) == 15 * (EACH - 2)


def test_the_classifier_names_all_classes_by_their_prototypes(finished, colours):
    model = contralto.load(finished / "model")
    assert len(model.classes) == 18
    pictures = [picture(colour, seed=9000 + c, side=24) for c, colour in enumerate(COLOURS)]
    found = model.predict(pictures)
    assert np.mean([name == f"colour {c:02}" for c, name in enumerate(found)]) > 0.5
    assert np.allclose(found.probabilities.sum(1), 1, atol=1e-5)


def test_a_few_pictures_of_other_classes_make_a_classifier(finished, tmp_path):
    for name, colour in (("orange", (250, 140, 20)), ("violet", (120, 20, 200))):
        (tmp_path / "few" / name).mkdir(parents=True)
        for i in range(2):
            (tmp_path / "few" / name / f"{i}.png").write_bytes(picture(colour, seed=i, side=24))
    model = classifier_from(finished, str(tmp_path / "few"))
    assert model.classes == ["orange", "violet"]
    assert model.predict([picture((250, 140, 20), seed=77, side=24), picture((120, 20, 200), seed=78, side=24)]) == [
        "orange", "violet",
    ]  # fmt: skip
    model.save(tmp_path / "kept")
    assert contralto.load(tmp_path / "kept").classes == ["orange", "violet"]
    shutil.rmtree(tmp_path / "few" / "violet")
    with pytest.raises(DataError, match="two classes, found 1"):
        classifier_from(finished, str(tmp_path / "few"))


def test_support_pictures_are_the_classes_of_the_run(colours, tmp_path):
    for name, colour in (("orange", (250, 140, 20)), ("violet", (120, 20, 200))):
        (tmp_path / "few" / name).mkdir(parents=True)
        (tmp_path / "few" / name / "0.png").write_bytes(picture(colour, seed=1, side=24))
    run = fit("protonet", colours, tmp_path / "run", support=str(tmp_path / "few"))
    assert contralto.load(run / "model").classes == ["orange", "violet"]
    assert "2 in all" in (run / "model" / "README.md").read_text()


def test_the_plain_classifier_runs_under_the_same_protocol(colours, tmp_path):
    run = fit("base_classifier", colours, tmp_path / "run", batch_size=16, epochs=1)
    metrics = json.loads((run / "metrics.json").read_text())
    probe = metrics["scores"]["3 classes, 1 shot, linear probe"]["value"]
    assert 1 / 3 < probe <= 1
    assert json.loads((run / "built.json").read_text())["num_classes"] == 13
    # Its encoder is where episodes begin, and the classifier of that run needs it no more.
    on = fit("susana", colours, tmp_path / "on", image_encoder=str(run / "encoder"))
    scores = json.loads((on / "metrics.json").read_text())["scores"]
    before = scores["3 classes, 1 shot, nearest prototype, before training"]
    assert before == metrics["scores"]["3 classes, 1 shot, nearest prototype"]
    shutil.rmtree(run)
    assert len(contralto.load(on / "model").predict([picture(COLOURS[0], seed=1, side=24)])) == 1


def test_evaluation_leaves_out_what_was_learnt_from(finished, colours, tmp_path):
    job = get_job("susana")
    found = job.evaluate(finished, str(colours))
    assert (found["classes"], found["n"]) == (5, 5 * EACH)
    same = json.loads((finished / "metrics.json").read_text())["scores"]["3 classes, 1 shot, nearest prototype"]
    assert found["scores"]["3 classes, 1 shot, nearest prototype"] == pytest.approx(same)
    table = pq.read_table(colours)
    base = json.loads((finished / "classes.json").read_text())["base"]
    pq.write_table(table.filter(pa.compute.is_in(table["label"], pa.array(base))), tmp_path / "base.parquet")
    with pytest.raises(DataError, match=r"base\.parquet.*0 of 0 classes"):
        job.evaluate(finished, str(tmp_path / "base.parquet"))


def test_the_commands_fit_and_evaluate_and_predict(colours, tmp_path, capsys):
    words = [
        "fit",
        "susana",
        str(colours),
        "--out",
        str(tmp_path / "run"),
        "--terms",
        "[cross, prototriplet, fullicnn]",
    ]
    for key, value in (SMALL | EPISODES).items():
        if key != "progress":
            words += [f"--{key}", json.dumps(value) if isinstance(value, list) else str(value)]
    assert main(words) == 0
    assert "3 classes, 1 shot, nearest prototype" in capsys.readouterr().out
    assert main(["evaluate", str(tmp_path / "run"), str(colours), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["classes"] == 5
    assert main(["predict", str(tmp_path / "run" / "model"), str(colours), "--out", str(tmp_path / "p.parquet")]) == 0
    assert pq.read_table(tmp_path / "p.parquet").num_rows == 18 * EACH
    assert main(["report", str(tmp_path / "run")]) == 0


def test_interrupted_and_called_again_it_is_the_same_run(colours, tmp_path, monkeypatch):
    whole = fit("susana", colours, tmp_path / "whole", checkpoint_every=2)
    step = SuSana.training_step

    def stops(self, batch, batch_idx):
        if (self.current_epoch, batch_idx) == (1, 3):
            raise KeyboardInterrupt
        return step(self, batch, batch_idx)

    with monkeypatch.context() as patched:
        patched.setattr(SuSana, "training_step", stops)
        with pytest.raises(KeyboardInterrupt):
            fit("susana", colours, tmp_path / "run", checkpoint_every=2)
    run = fit("susana", colours, tmp_path / "run", checkpoint_every=2)
    same = ("training/weights.safetensors", "classes.json", "model/model.safetensors", "episodes.png")
    assert all((run / f).read_bytes() == (whole / f).read_bytes() for f in same)
    scores = [json.loads((r / "metrics.json").read_text())["scores"] for r in (run, whole)]
    assert scores[0] == scores[1]
    with pytest.raises(UsageError, match="margin"):
        fit("susana", colours, run, checkpoint_every=2, margin=0.1)


def manifest_of(path, folder):
    from contralto.data.ingest import ingest

    ingest(str(path), image_filter=False).save(folder)
    return Manifest.load(folder)


def test_which_classes_are_new(colours, tmp_path):
    manifest = manifest_of(colours, tmp_path / "m")
    train = np.flatnonzero(manifest.column("split") == "train")
    how = {"named": None, "share": 0.3, "groups": False, "seed": 0}
    assert novel_classes(manifest, train, **(how | {"named": "colour 03, colour 01"})).tolist() == [1, 3]
    (tmp_path / "names.txt").write_text("colour 05\n\ncolour 02\n")
    assert novel_classes(manifest, train, **(how | {"named": str(tmp_path / "names.txt")})).tolist() == [2, 5]
    drawn = novel_classes(manifest, train, **how)
    assert len(drawn) == 5
    assert (drawn == novel_classes(manifest, train, **how)).all()
    assert (drawn != novel_classes(manifest, train, **(how | {"seed": 1}))).any()
    family = novel_classes(manifest, train, **(how | {"groups": True}))
    assert len(set((family // 6).tolist())) == 1
    assert len(family) == 6
    # Classes without a picture for training are the new ones, as few-shot collections come.
    kept = train[manifest.labels[train] >= 4]
    assert novel_classes(manifest, kept, **how).tolist() == [0, 1, 2, 3]


def test_what_cannot_be_is_said_before_anything_is_trained(colours, tmp_path):
    def refused(told, kind=DataError, **more):
        with pytest.raises(kind, match=told):
            fit("susana", colours, tmp_path / "run", **more)
        shutil.rmtree(tmp_path / "run")

    refused("no class is called 'colour 99'", UsageError, novel="colour 01,colour 99")
    refused("names no class", UsageError, novel=" , ")
    refused("test_shots", UsageError, test_shots=[])
    refused("at least one episode", UsageError, test_episodes=0)
    refused("novel_share must be between", UsageError, novel_share=1.5)
    refused(r"base classes.*14 classes of 4 pictures", way=14)
    refused(r"new classes.*6 classes of 6 pictures", test_way=6)
    refused("fewer than two are left", novel=",".join(f"colour {c:02}" for c in range(17)))
    table = pq.read_table(colours).drop_columns(["group"])
    pq.write_table(table, tmp_path / "alone.parquet")
    with pytest.raises(DataError, match="--group_column"):
        fit("susana", tmp_path / "alone.parquet", tmp_path / "run", novel_groups=True)
    pq.write_table(table.drop_columns(["label"]), tmp_path / "bare.parquet")
    with pytest.raises(DataError, match="label"):
        fit("susana", tmp_path / "bare.parquet", tmp_path / "other")


def test_hostile_names_and_broken_files_do_no_harm(colours, tmp_path):
    rows = pq.read_table(colours).to_pylist()
    for row in rows:
        row["label"] = {"colour 00": "<script>alert(1)</script>", "colour 01": "../../etc"}.get(
            row["label"], row["label"]
        )
    rows.append({"image": b"\xff\xd8\xff no picture", "label": "colour 02", "group": "", "split": "train"})
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "hostile.parquet")
    before = {path.name for path in tmp_path.iterdir()}
    run = fit("susana", tmp_path / "hostile.parquet", tmp_path / "run", epochs=1)
    assert {path.name for path in tmp_path.iterdir()} - before == {"run"}
    assert "<script>alert(1)</script>" not in (run / "report.html").read_text()
    assert Manifest.load(run / "manifest").skipped.num_rows == 1
    assert "<script>alert(1)</script>" in contralto.load(run / "model").classes


def test_damaged_runs_are_named(finished, colours, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "classes.json").write_text("{")
    with pytest.raises(DataError, match=r"classes\.json"):
        get_job("susana").evaluate(tmp_path / "run", str(colours))
    (tmp_path / "run" / "classes.json").unlink()
    with pytest.raises(DataError, match=r"classes\.json.*finished"):
        get_job("susana").evaluate(tmp_path / "run", str(colours))


def test_all_systems_here_have_a_small_preset():
    from contralto.pipelines.job import load_preset, presets_of

    for name in steps.SYSTEMS:
        small = load_preset("small", name)
        assert set(small) <= set(FewShotJob(name).parameters())
    for preset in presets_of("susana"):
        arguments = load_preset(preset, "susana")
        assert set(arguments) <= set(FewShotJob("susana").parameters())


@pytest.mark.data
@pytest.mark.slow
def test_photographs_of_a_collection(data_folder, tmp_path):
    data = Path(data_folder) / "tiny_imagenet100" / "tiny_imagenet100.parquet"
    table = pq.read_table(data)
    few = table.filter(pa.compute.less(table["label"], 12))
    pq.write_table(few.filter(pa.compute.equal(few["split"], "test")).drop_columns(["split"]), tmp_path / "few.parquet")
    more = {"image_size": 32, "novel_share": 0.4, "test_queries": 8, "episodes": 4, "epochs": 1}
    run = fit("susana", tmp_path / "few.parquet", tmp_path / "run", **more)
    scores = json.loads((run / "metrics.json").read_text())["scores"]
    assert 0.3 < scores["3 classes, 2 shots, nearest prototype"]["value"] < 0.9
