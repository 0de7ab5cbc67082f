"""The commands as a user types them: results, exit codes, JSON, and a sentence instead of a traceback."""

import json

import pyarrow.parquet as pq
import pytest
import yaml

from contralto.cli import main

from tests.conftest import picture
from tests.tiny import FROZEN


def run(capsys, *words):
    code = main(list(map(str, words)))
    out, err = capsys.readouterr()
    return code, out, err


def arguments(values):
    words = []
    for key, value in values.items():
        if key == "progress":
            continue
        words.append((f"--{key}" if value else f"--no_{key}") if isinstance(value, bool) else f"--{key}={value}")
    return words


@pytest.fixture(scope="module")
def finished(tiny_parquet, tmp_path_factory):
    out = tmp_path_factory.mktemp("cli") / "run"
    words = ["fit", "capro", tiny_parquet, "--out", out, "--definitions", tiny_parquet.with_name("classes.yaml")]
    assert main([*map(str, words), *arguments(FROZEN), "--json"]) == 0
    return out


def test_fit_leaves_a_whole_run_and_evaluate_measures_it(finished, tiny_parquet, capsys):
    for name in (
        "config.json",
        "environment.json",
        "metrics.json",
        "cleaned.parquet",
        "cleaned.csv",
        "report.html",
        "model",
    ):
        assert (finished / name).exists()
    code, out, _ = run(capsys, "evaluate", finished, tiny_parquet, "--json")
    result = json.loads(out)
    assert code == 0
    stored = json.loads((finished / "metrics.json").read_text())["test"]["model"]
    assert result["n"] == 18
    assert result["split"] == "test"
    assert abs(result["accuracy"] - stored["accuracy"]) < 0.06
    code, out, _ = run(capsys, "evaluate", finished, tiny_parquet)
    assert "mean over classes" in out


def test_predict_and_embed_write_a_row_per_picture(finished, tiny_parquet, capsys, tmp_path):
    code, out, _ = run(capsys, "predict", finished, tiny_parquet, "--out", tmp_path / "p.parquet", "--json")
    assert (code, json.loads(out)["n"]) == (0, 66)
    table = pq.read_table(tmp_path / "p.parquet")
    assert set(table["label"].to_pylist()) <= {"red", "green", "blue"}
    assert table["confidence"].to_numpy().min() > 1 / 3 - 1e-6
    assert run(capsys, "embed", finished, tiny_parquet, "--out", tmp_path / "e.parquet")[0] == 0
    assert len(pq.read_table(tmp_path / "e.parquet")["embedding"][0]) == 8
    (tmp_path / "one.png").write_bytes(picture((200, 30, 40), 1))
    code, out, _ = run(capsys, "predict", finished, tmp_path / "one.png", "--out", tmp_path / "o.parquet")
    assert code == 0
    assert "1 predictions" in out


def test_names_from_outside_are_no_markup_of_the_terminal(finished, capsys, tmp_path):
    (tmp_path / "data" / "red").mkdir(parents=True)
    (tmp_path / "data" / "red" / "[bold red]a\x1b[31m.png").write_bytes(picture((200, 30, 40), 1))
    code, out, _ = run(capsys, "predict", finished, tmp_path / "data", "--out", tmp_path / "o.parquet")
    assert code == 0
    assert "[bold red]a" in out
    assert "\x1b" not in out


def test_clean_and_report_write_their_files_again(finished, capsys, tmp_path):
    code, out, _ = run(capsys, "clean", finished, "--out", tmp_path / "list", "--json")
    assert code == 0
    assert sum(json.loads(out)["counts"].values()) == 48
    assert (tmp_path / "list" / "cleaned.csv").read_text().count("\n") == 49
    assert "p(wrong)" in run(capsys, "clean", finished)[1]
    code, out, _ = run(capsys, "report", finished, "--out", tmp_path / "r.html", "--json")
    assert code == 0
    assert (tmp_path / "r.html").stat().st_size > 10_000


def test_inspect_tells_people_and_machines(tiny_parquet, capsys):
    code, out, _ = run(capsys, "inspect", tiny_parquet, "--json")
    result = json.loads(out)
    assert (code, result["pictures"], result["form"]) == (0, 66, "parquet")
    assert {c["name"]: c["train"] for c in result["classes"]} == {"red": 16, "green": 16, "blue": 16}
    assert "66 pictures" in run(capsys, "inspect", tiny_parquet)[1]


def test_systems_doctor_help_and_version(capsys):
    assert json.loads(run(capsys, "systems", "--json")[1])[0]["name"] == "capro"
    assert json.loads(run(capsys, "doctor", "--json")[1])["parts"]["efficientnet-lite0 weights"] is True
    assert run(capsys, "doctor")[0] == 0
    assert run(capsys, "--version")[0] == 0
    code, out, _ = run(capsys, "fit", "--help")
    assert code == 0
    assert "--out" in out
    assert "--threshold" in out
    assert run(capsys)[0] == 2


def test_arguments_from_a_file_and_a_preset(tiny_parquet, capsys, tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text(yaml.safe_dump({k: v for k, v in FROZEN.items() if k != "progress"}))
    words = [
        "fit",
        "capro",
        tiny_parquet,
        "--out",
        tmp_path / "r",
        "--config",
        config,
        "--epochs",
        "2",
        "--no_baseline",
    ]
    assert run(capsys, *words, "--json")[0] == 0
    stored = json.loads((tmp_path / "r" / "config.json").read_text())["arguments"]
    assert (stored["epochs"], stored["hidden"], stored["baseline"]) == (2, 16, False)
    code, _, err = run(capsys, "fit", "capro", tiny_parquet, "--out", tmp_path / "s", "--preset", "huge")
    assert (code, "huge" in err) == (2, True)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["fit", "capro", "/nowhere", "--out", "{tmp}/r"], "/nowhere: there is no such file or folder"),
        (["fit", "nothing", "{data}", "--out", "{tmp}/r"], "no system is called 'nothing'"),
        (["fit", "capro", "{data}"], "out"),
        (["fit", "capro", "{data}", "--out", "{tmp}/r", "--threshold=x"], "threshold"),
        (["fit", "capro", "{data}", "--out", "{tmp}/r", "--label_column=nope"], "no column 'nope'"),
        (["fit", "capro", "{data}", "--out", "{tmp}/r", "--image_encoder=nope"], "no image encoder is called 'nope'"),
        (["inspect", "/nowhere"], "no such file"),
        (["evaluate", "/nowhere", "{data}"], "there is no model here"),
        (["predict", "/nowhere", "{data}"], "there is no model here"),
        (["clean", "/nowhere"], "is the run finished"),
        (["report", "/nowhere"], "no manifest"),
        (["reproduce", "nothing"], "no claim of 'nothing'"),
        (["nonsense"], "nonsense"),
    ],
)
def test_a_mistake_gets_a_sentence_and_exit_code_2(words, told, tiny_parquet, tmp_path, capsys):
    words = [w.format(tmp=tmp_path, data=tiny_parquet) for w in words]
    code, _, err = run(capsys, *words)
    assert code == 2, err
    assert told in err
    assert "Traceback" not in err


def test_ctrl_c_says_that_work_is_kept(tiny_parquet, tmp_path, capsys, monkeypatch):
    from contralto.systems.webly.capro import CAPro

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(CAPro, "training_step", stop)
    code, _, err = run(capsys, "fit", "capro", tiny_parquet, "--out", tmp_path / "r", *arguments(FROZEN))
    assert code == 130
    assert "Everything finished is kept" in err
