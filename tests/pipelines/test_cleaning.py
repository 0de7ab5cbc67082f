"""The list of wrong images from the outputs of somebody else's model: found, named, and blind to clean labels."""

import io
import json
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import contralto
from contralto.cli import main
from contralto.errors import DataError, UsageError
from contralto.pipelines import cleaning
from contralto.pipelines.cleaning import clean_with_model

from tests.conftest import COLOURS, tiny_rows

COLUMNS = [
    "index", "id", "given", "verdict", "new", "given_classifier", "given_auxiliary", "given_prototype", "given_fused",
    "new_classifier", "new_auxiliary", "new_prototype", "new_fused", "text_match", "text_rank", "nearest_prototypes",
    "nearest_similarities", "p_wrong", "p_off_topic",
]  # fmt: skip
SMALL = {"text_encoder": "tfidf", "anchors": 3, "neighbours": 8, "progress": False}
ORDER = ["red", "green", "blue"]  # of the definitions


def mean_colours(rows):
    return np.array([np.asarray(Image.open(io.BytesIO(r["image"]))).mean((0, 1)) for r in rows], np.float32)


def soft(rows, order, sure=0.9):
    """What a good model says, (N, C)."""
    right = np.array([[r["label"] == name for name in order] for r in rows])
    return np.where(right, sure, (1 - sure) / (len(order) - 1))


def write(rows, folder):
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / "data.parquet")
    lines = [f"{name}: {{query: {name}, definition: The colour {name} of paint.}}" for name in COLOURS]
    (folder / "classes.yaml").write_text("\n".join(lines))
    return folder / "data.parquet"


def quality(table):
    """Precision and recall of the list by the names of the planted errors, and how many corrections are right."""
    rows = table.to_pylist()
    planted = {r["id"]: r["label"] for r in tiny_rows() if r["query"] is not None and r["query"] != r["label"]}
    flagged = {r["id"] for r in rows if r["verdict"] in ("corrected", "off-topic")}
    right = [r["new"] == planted.get(r["id"]) for r in rows if r["verdict"] == "corrected"]
    assert len(planted) == 12
    return len(flagged & set(planted)) / max(len(flagged), 1), len(flagged & set(planted)) / 12, np.mean(right)


@pytest.fixture(scope="module")
def rows():
    return tiny_rows()


@pytest.fixture(scope="module")
def data(rows, tmp_path_factory):
    return write(rows, tmp_path_factory.mktemp("own"))


@pytest.fixture(scope="module", params=["embeddings", "probs", "both"])
def arrays(request, rows):
    given = {"embeddings": mean_colours(rows), "probs": soft(rows, ORDER)}
    return given if request.param == "both" else {request.param: given[request.param]}


def clean(data, out, **more):
    return clean_with_model(data, out, definitions=data.with_name("classes.yaml"), **(SMALL | more))


def test_planted_errors_are_found_and_corrected(data, arrays, tmp_path):
    table = clean(data, tmp_path / "o", **arrays)
    precision, recall, right = quality(table)
    assert precision >= 0.9
    assert recall >= 0.9
    assert right >= 0.9
    worst = table.sort_by([("p_wrong", "descending")]).slice(0, 12)
    assert sum(r["id"].endswith(("3", "7", "11", "15")) for r in worst.to_pylist()) >= 11  # every fourth is wrong


def test_files_hold_the_columns_of_a_run_and_what_does_not_apply_is_empty(data, arrays, tmp_path):
    out = tmp_path / "o"
    table = clean(data, out, **arrays)
    assert table.column_names == [*COLUMNS, "given_neighbours", "new_neighbours"]
    assert pq.read_table(out / "cleaned.parquet").equals(table)
    assert (out / "cleaned.csv").read_text().splitlines()[0] == ",".join(f'"{c}"' for c in table.column_names)
    assert sorted(p.name for p in out.iterdir()) == ["cleaned.csv", "cleaned.parquet", "metrics.json"]
    seen = "embeddings" in arrays
    for row in table.to_pylist():
        assert 0 <= row["p_wrong"] <= 1
        assert 0 <= row["p_off_topic"] <= 1
        assert row["given_auxiliary"] is None
        assert (row["given_prototype"] is None) == (row["new_neighbours"] is None) == (not seen)
        assert len(row["nearest_prototypes"]) == (3 if seen else 0)
        assert (row["new"] == row["given"]) or row["verdict"] in ("corrected", "off-topic")
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["classes"] == ORDER
    assert metrics["noise"]["rate_given"] == pytest.approx(0.25)
    assert sum(metrics["counts"].values()) == table.num_rows == 48
    expected = {"text", "classifier"} | ({"prototype", "neighbours"} if seen else set())
    assert set(metrics["alone"]) - {"probs as given"} == expected


def test_a_run_has_the_same_columns(tiny_parquet, tmp_path):
    from tests.tiny import FROZEN

    run = contralto.fit_capro(str(tiny_parquet), tmp_path / "run", **(FROZEN | {"epochs": 1, "baseline": False}))
    assert pq.read_table(run / "cleaned.parquet").column_names == COLUMNS
    with pytest.raises(UsageError, match="holds a run"):
        clean(tiny_parquet, run, probs=np.ones((66, 3)) / 3)


def test_clean_labels_change_nothing_but_the_metrics(rows, data, arrays, tmp_path):
    shuffled = np.random.default_rng(5).permutation([r["label"] for r in rows]).tolist()
    other = write([r | {"label": s} for r, s in zip(rows, shuffled, strict=True)], tmp_path / "d")
    before, after = (clean(d, tmp_path / str(i), **arrays) for i, d in enumerate((data, other)))
    assert before.drop(["id"]).equals(after.drop(["id"]))
    quality_of = [json.loads((tmp_path / str(i) / "metrics.json").read_text())["noise"]["precision"] for i in (0, 1)]
    assert quality_of[0] > quality_of[1] + 0.2


def test_without_clean_labels_there_is_no_judgement(rows, tmp_path):
    data = write([{k: v for k, v in r.items() if k != "label"} for r in rows], tmp_path / "d")
    table = clean(data, tmp_path / "o", embeddings=mean_colours(rows))
    assert quality(table)[0] >= 0.9
    assert not {"noise", "anchors", "alone"} & set(json.loads((tmp_path / "o" / "metrics.json").read_text()))


def test_rows_for_skipped_pictures_are_dropped_wherever_they_are(rows, tmp_path):
    """Broken pictures at the start and in the middle; their rows hold NaN, as a model that failed on them leaves them."""
    broken = {"image": b"no picture", "text": "", "query": "red", "label": "red", "split": "train"}
    mixed = [broken | {"id": "x"}, *rows[:20], broken | {"id": "y"}, broken | {"id": "z"}, *rows[20:]]
    data = write(mixed, tmp_path / "d")
    colours = mean_colours(rows)
    gap = np.full((1, 3), np.nan, np.float32)
    with_skipped = np.concatenate([gap, colours[:20], gap, gap, colours[20:]])
    judged = colours[[i for i, r in enumerate(rows) if r["split"] == "train"]]
    tables = [clean(data, tmp_path / str(i), embeddings=e) for i, e in enumerate((with_skipped, colours, judged))]
    assert tables[0].equals(tables[1])
    assert tables[0].equals(tables[2])
    assert quality(tables[0])[1] >= 0.9
    assert json.loads((tmp_path / "0" / "metrics.json").read_text())["skipped"] == 3
    with pytest.raises(DataError) as told:
        clean(data, tmp_path / "n", embeddings=colours[:-1])
    for number in ("has 65 rows", "69 (pictures read, with the skipped ones)", "66 (usable pictures)", "48 (usable"):
        assert number in str(told.value)
    with_skipped[5] = np.nan
    with pytest.raises(DataError, match="row 5: holds NaN"):
        clean(data, tmp_path / "n", embeddings=with_skipped)


def test_only_training_pictures_with_a_web_label_are_judged(rows, tmp_path):
    labelled = [r | {"query": r["query"] or r["label"]} for r in rows]
    labelled[0]["query"] = None
    data = write(labelled, tmp_path / "d")
    table = clean(data, tmp_path / "o", probs=soft(rows, ORDER))
    assert table["index"].to_pylist() == list(range(1, 48))
    assert all(i.startswith("train") for i in table["id"].to_pylist())


@pytest.mark.parametrize("kind", ["embeddings", "probs"])
def test_one_text_for_a_whole_class_does_not_hide_the_class_from_its_judge(rows, tmp_path, kind):
    data = write([r | {"text": f"{r['label']} colour"} for r in rows], tmp_path / "d")
    given = {"embeddings": mean_colours(rows), "probs": soft(rows, ORDER)}
    assert quality(clean(data, tmp_path / "o", **{kind: given[kind]})) == (1, 1, 1)


@pytest.mark.parametrize("kind", ["embeddings", "probs", "both"])
@pytest.mark.parametrize("texts", ["none", "worthless"])
def test_without_texts_it_still_works(rows, tmp_path, kind, texts, monkeypatch):
    words = np.random.default_rng(3).choice(["wall", "old", "nice", "bright", "red wall"], len(rows))
    data = write(
        [r | {"text": "" if texts == "none" else str(w)} for r, w in zip(rows, words, strict=True)], tmp_path / "d"
    )
    given = {"embeddings": mean_colours(rows), "probs": soft(rows, ORDER)}
    table = clean(data, tmp_path / "o", **(given if kind == "both" else {kind: given[kind]}))
    precision, recall, right = quality(table)
    assert precision >= 0.8
    assert recall >= 0.7
    assert right >= 0.9
    assert table["p_off_topic"].null_count == 48
    assert json.loads((tmp_path / "o" / "metrics.json").read_text())["texts"] is False


def test_columns_are_in_the_order_of_the_classes(rows, data, tmp_path):
    """With definitions in their order, else sorted by name; without texts, so that probabilities alone decide."""
    silent = write([r | {"text": ""} for r in rows], tmp_path / "d")
    definitions = silent.with_name("classes.yaml")
    named = clean_with_model(silent, tmp_path / "a", probs=soft(rows, ORDER), definitions=definitions, **SMALL)
    plain = clean_with_model(silent, tmp_path / "b", probs=soft(rows, sorted(ORDER)), **SMALL)
    wrong = clean_with_model(silent, tmp_path / "c", probs=soft(rows, ORDER), **SMALL)
    assert quality(named)[2] == quality(plain)[2] == 1
    assert quality(wrong)[0] < 0.5
    assert json.loads((tmp_path / "b" / "metrics.json").read_text())["classes"] == sorted(ORDER)


def test_anchors_are_left_out_of_their_own_mean():
    features = np.array([[1, 0], [1, 0], [0.8, 0.6], [0, 1]], np.float32)
    near = cleaning._prototype_similarity(features, np.array([0, 1, 0, 1]), np.array([True, False, True, True]), 2)
    np.testing.assert_allclose(near[0], [0.8, 0.0], atol=1e-6)  # class 0: picture 2 alone; class 1: picture 3
    assert near[3, 1] == 0  # nothing is left of its class
    np.testing.assert_allclose(near[1, 0], 1.8 / np.hypot(1.8, 0.6), atol=1e-5)  # no anchor: the whole mean


def test_probabilities_that_know_every_given_label_are_warned_of(rows, data, tmp_path, capsys):
    names = np.array(ORDER)
    learnt = np.array([names == r["query"] if r["query"] else np.full(3, 1 / 3) for r in rows], float)
    clean(data, tmp_path / "o", probs=learnt, progress=True)
    assert "Was the model trained on them?" in capsys.readouterr().err
    clean(data, tmp_path / "p", probs=soft(rows, ORDER), progress=True)
    told = capsys.readouterr().err
    assert "Was the model trained" not in told
    assert "in this order: red, green, blue" in told


def save(path, array):
    np.save(path, array, allow_pickle=True)
    return path


def test_the_command_writes_the_list_and_prints_both_forms(rows, data, tmp_path, capsys):
    p, e = save(tmp_path / "p.npy", soft(rows, ORDER).astype(np.float16)), save(tmp_path / "e.npy", mean_colours(rows))
    words = ["clean", data, "--probs", p, "--embeddings", e, "--definitions", data.with_name("classes.yaml")]
    words += ["--out", tmp_path / "o", "--text_encoder=tfidf", "--anchors=3", "--neighbours=8"]
    assert main([*map(str, words), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["counts"]["anchor"] == 9
    assert result["noise"]["recall"] >= 0.9
    assert "probs as given" in result["alone"]
    assert main(list(map(str, words))) == 0
    shown = capsys.readouterr().out
    for told in ("p(wrong)", "all together", "prototype alone", "9 anchor", "25.0 % as given"):
        assert told in shown
    assert main(["clean", str(tmp_path / "o"), "--out", str(tmp_path / "again"), "--json"]) == 0  # a list is a list
    assert main(["clean", "--help"]) == 0
    assert "sorted names of the given labels" in " ".join(capsys.readouterr().out.split())


class Evil:
    def __reduce__(self):
        return (print, ("executed",))


@pytest.mark.parametrize(
    ("role", "made", "told"),
    [
        ("probs", lambda r: soft(r, ORDER)[:10], "has 10 rows, expected 66"),
        ("probs", lambda r: soft(r, [*ORDER, "pink"]), "expected 3, one per class in this order: red, green, blue"),
        ("probs", lambda r: soft(r, ORDER)[:, 0], "expected numbers of the shape (pictures, classes)"),
        ("probs", lambda r: np.log(soft(r, ORDER)), "row 0: holds a negative number: probabilities are expected"),
        ("probs", lambda r: soft(r, ORDER) * 3, "row 0: does not sum to 1"),
        ("probs", lambda r: np.where(np.arange(66)[:, None] == 7, np.nan, soft(r, ORDER)), "row 7: holds NaN"),
        ("embeddings", lambda r: np.where(np.arange(66)[:, None] == 7, np.inf, mean_colours(r)), "row 7: holds NaN or inf"),
        ("embeddings", lambda r: np.ones((66, 4)), "all rows are the same"),
        ("embeddings", lambda r: np.full((66, 4), "a"), "expected numbers of the shape (pictures, width)"),
        ("embeddings", lambda r: np.array([[Evil()]] * 66, dtype=object), "is no .npy file of numbers"),
    ],
)  # fmt: skip
def test_arrays_that_cannot_be_used_are_named(role, made, told, rows, data, tmp_path, capsys):
    file = save(tmp_path / "a.npy", made(rows))
    words = ["clean", data, f"--{role}", file, "--out", tmp_path / "o", "--text_encoder=tfidf"]
    code = main([*map(str, words), "--definitions", str(data.with_name("classes.yaml"))])
    out, err = capsys.readouterr()
    assert code == 2, err
    assert f"{file}" in err
    assert told in err
    assert "executed" not in out + err
    assert not (tmp_path / "o").exists()


def test_files_that_are_no_arrays_and_missing_arguments_are_named(rows, data, tmp_path, capsys):
    (tmp_path / "pickle.npy").write_bytes(pickle.dumps(Evil()))
    (tmp_path / "empty.npy").write_bytes(b"")
    save(tmp_path / "whole.npy", mean_colours(rows))
    (tmp_path / "short.npy").write_bytes((tmp_path / "whole.npy").read_bytes()[:-20])
    np.savez(tmp_path / "many.npz", a=np.eye(3))
    for name, told in (
        ("pickle.npy", "is no .npy file"), ("empty.npy", "is no .npy file"), ("short.npy", "is no .npy file"),
        ("many.npz", "is a .npz archive"), ("nothing.npy", "cannot be read: No such file"),
    ):  # fmt: skip
        assert main(["clean", str(data), "--embeddings", str(tmp_path / name), "--out", str(tmp_path / "o")]) == 2
        out, err = capsys.readouterr()
        assert f"{name}: {told}" in err
        assert "executed" not in out + err
    for words, told in (
        ([data], "is the run finished? For images and a model of your own, give --probs or --embeddings"),
        ([data, "--embeddings", tmp_path / "whole.npy"], "--out must name a folder"),
        ([data, "--embeddings", tmp_path / "whole.npy", "--out", tmp_path / "o", "--neighbours=0"], "at least 1"),
        ([data, "--embeddings", tmp_path / "whole.npy", "--out", tmp_path / "o", "--alpha=2"], "alpha must be in"),
    ):
        assert main(["clean", *map(str, words)]) == 2
        assert told in capsys.readouterr().err
    with pytest.raises(UsageError, match="give --probs, --embeddings or both"):
        clean_with_model(data, tmp_path / "o")


@pytest.mark.parametrize(
    ("method", "given"), [("confident", "probs"), ("confident", "embeddings"), ("knn", "embeddings")]
)
def test_other_methods_find_and_correct_planted_errors_without_texts(rows, tmp_path, method, given):
    data = write([r | {"text": ""} for r in rows], tmp_path / "d")
    arrays = {"embeddings": mean_colours(rows), "probs": soft(rows, ORDER)}
    table = clean(data, tmp_path / "o", method=method, **{given: arrays[given]})
    precision, recall, right = quality(table)
    assert precision >= 0.8
    assert recall >= 0.8
    assert right >= 0.8
    assert table.column_names == [*COLUMNS, "given_neighbours", "new_neighbours"]
    assert set(table.column("verdict").to_pylist()) == {"kept", "corrected"}
    assert table.column("text_match").null_count == table.column("p_off_topic").null_count == table.num_rows
    metrics = json.loads((tmp_path / "o" / "metrics.json").read_text())
    assert "anchors" not in metrics
    assert metrics["noise"]["precision"] == pytest.approx(precision)


def test_confident_learning_is_cleanlab_s_own_answer(rows, data, tmp_path):
    from cleanlab.filter import find_label_issues

    judged = [r for r in rows if r["split"] == "train" and r["query"] is not None]
    rng = np.random.default_rng(0)
    probs = rng.dirichlet([1, 1, 1], len(judged)) + soft(judged, ORDER)
    probs /= probs.sum(1, keepdims=True)
    table = clean(data, tmp_path / "o", method="confident", probs=probs)
    labels = np.array([ORDER.index(name) for name in table.column("given").to_pylist()])
    flagged = np.array(table.column("verdict").to_pylist()) == "corrected"
    np.testing.assert_array_equal(flagged, find_label_issues(labels, probs))
    new = np.array([ORDER.index(name) for name in table.column("new").to_pylist()])
    np.testing.assert_array_equal(new, np.where(flagged, probs.argmax(1), labels))


@pytest.mark.parametrize(
    ("method", "given"),
    [
        ("knn", ["probs"]),
        ("knn", ["probs", "embeddings"]),
        ("confident", ["probs", "embeddings"]),
        ("magic", ["probs"]),
    ],
)
def test_methods_say_what_they_need(rows, data, tmp_path, method, given):
    arrays = {"embeddings": mean_colours(rows), "probs": soft(rows, ORDER)}
    with pytest.raises(UsageError, match=method):
        clean(data, tmp_path / "o", method=method, **{k: arrays[k] for k in given})


def test_the_method_is_chosen_on_the_command_line(rows, data, tmp_path, capsys):
    np.save(tmp_path / "e.npy", mean_colours(rows))
    words = [
        "clean",
        str(data),
        "--embeddings",
        str(tmp_path / "e.npy"),
        "--out",
        str(tmp_path / "o"),
        "--method",
        "knn",
    ]
    assert main([*words, "--definitions", str(data.with_name("classes.yaml"))]) == 0
    assert "neighbours alone" in capsys.readouterr().out
