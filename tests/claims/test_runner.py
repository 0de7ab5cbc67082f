"""Running a claim: the same result in any number of processes, after kills and failures; nothing done twice or forgotten."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from contralto.claims import runner
from contralto.claims.arms import keep, load
from contralto.claims.plan import find_claim
from contralto.claims.runner import reproduce, smoke, tune
from contralto.cli import main
from contralto.errors import ContraltoError, DataError, UsageError

EVERY = sorted((p, seed) for p in (0.4, 0.8) for seed in range(5))


def run(fake, out="out", **how):
    return reproduce(fake.path, fake.folder / out, **{"work": fake.folder / "work", "jobs": 2, "progress": False} | how)


def test_processes_beside_each_other_give_what_one_gives(fake):
    one = run(fake, jobs=1, work=fake.folder / "one")
    assert len(fake.processes()) == 1
    assert fake.ran() == EVERY
    three = run(fake, jobs=3, work=fake.folder / "three")
    assert len(fake.processes()) == 3
    assert os.getpid() not in fake.processes()
    assert three == one
    assert one["data"]["blobs"]["arms"]["good"]["metrics"]["threads"]["mean"] == 1


def test_the_result_is_written_with_all_that_led_to_it(fake):
    result = run(fake)
    kept = json.loads((fake.folder / "out" / "fake.json").read_text())
    assert kept == json.loads(json.dumps(result))
    assert (fake.folder / "out" / "fake.png").stat().st_size > 5000
    assert (kept["command"], kept["seeds"], kept["budget"]) == (
        "contralto reproduce fake.yaml",
        [0, 1, 2, 3, 4],
        {"steps": 30},
    )
    assert kept["environment"]["device"] == "cpu"
    assert "torch" in kept["environment"]["packages"]
    assert kept["rule"]["version"] == 1
    assert kept["data"]["blobs"]["verdict"] == "reproduced"
    assert kept["left_out"] == []
    (plan,) = [json.loads(line) for line in (fake.folder / "work" / "fake" / "plans.jsonl").read_text().splitlines()]
    assert plan["rule"] == kept["rule"]
    assert plan["claim"] == fake.path.read_text()
    assert not list((fake.folder / "work").rglob("shared")), "what arms shared is gone when all are done"
    assert not list((fake.folder / "work").rglob("*.log"))


def test_what_is_there_is_not_run_again_and_what_changed_is(fake, capsys):
    before = run(fake)
    assert fake.ran() == EVERY
    assert run(fake, progress=True) == before
    assert fake.ran() == []
    assert "10 of 10 trainings were there already" in " ".join(capsys.readouterr().err.split())
    fake.write(arms={"good": {"p": 0.8}, "bad": {"p": 0.5}}, claim="in other words")
    run(fake)
    assert fake.ran() == [(0.5, seed) for seed in range(5)]
    fake.write()
    assert run(fake)["data"] == before["data"]
    assert fake.ran() == []
    changed = run(fake, budget={"steps": 31})
    assert fake.ran() == EVERY
    assert changed["command"] == "contralto reproduce fake.yaml --budget.steps 31"
    run(fake, seeds=[4, 5])
    assert fake.ran() == [(0.4, 5), (0.8, 5)]
    plans = (fake.folder / "work" / "fake" / "plans.jsonl").read_text().splitlines()
    assert len(plans) == 5  # as it was, changed, back, with another budget, with other seeds


def started(fake, trouble):
    """The command in a process of its own, in which one arm hangs."""
    code = "import sys; from contralto.cli import main; sys.exit(main())"
    words = [sys.executable, "-c", code, "reproduce", str(fake.path), "--jobs", "2", "--work", "work", "--out", "out"]
    environment = os.environ | {"FAKE_TROUBLE": trouble, "PYTHONPATH": os.pathsep.join([str(fake.folder), *sys.path])}
    process = subprocess.Popen(words, cwd=fake.folder, env=environment, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    hung = trouble.partition(":")[2].replace(",", " ")
    while hung not in fake.log.read_text() or len(list((fake.folder / "work").rglob("*.npz"))) < 3:
        assert time.monotonic() < deadline, process.poll()
        time.sleep(0.02)
    return process


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def all_end(pids):
    deadline = time.monotonic() + 20
    while any(map(alive, pids)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_run_that_was_killed_goes_on(fake):
    process = started(fake, "hang:0.8,2")
    process.send_signal(signal.SIGKILL)
    process.wait()
    all_end(fake.processes())  # those who train do not outlive it
    done = {path: path.stat().st_mtime_ns for path in (fake.folder / "work").rglob("*.npz")}
    before = len(fake.ran())
    result = run(fake)
    again = fake.ran()
    assert len(again) == 10 - len(done) < 10
    assert before >= len(done)
    assert {path: path.stat().st_mtime_ns for path in done} == done
    assert result == run(fake, work=fake.folder / "at once")


def test_ctrl_c_ends_it_cleanly_and_keeps_what_is_finished(fake):
    process = started(fake, "hang:0.8,2")
    process.send_signal(signal.SIGINT)
    told = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert "Everything finished is kept" in told
    assert "Traceback" not in told
    all_end(fake.processes())
    assert len(list((fake.folder / "work").rglob("*.npz"))) >= 3
    assert not list((fake.folder / "work").rglob(".*.part"))


@pytest.mark.parametrize(
    ("trouble", "reason"), [("raise", "ValueError: ran into a wall"), ("die", "its process ended with code 3")]
)
def test_an_arm_that_fails_is_named_and_the_others_are_kept(fake, monkeypatch, trouble, reason):
    monkeypatch.setenv("FAKE_TROUBLE", f"{trouble}:0.4,3")
    with pytest.raises(ContraltoError) as error:
        run(fake)
    told = str(error.value)
    assert f"arm 'bad', seed 3, on blobs: {reason}" in told
    assert "1 of 10 trainings failed; what was finished is kept" in told
    (log,) = (fake.folder / "work").rglob("*.log")
    assert str(log) in told
    if trouble == "raise":
        assert "words in between" in log.read_text()
        assert 'raise ValueError("ran into a wall")' in log.read_text()
    assert not (fake.folder / "out").exists()
    assert fake.ran() == EVERY
    monkeypatch.delenv("FAKE_TROUBLE")
    run(fake)
    assert fake.ran() == [(0.4, 3)]


def test_a_metric_that_no_arm_measures_ends_the_run_at_once(fake):
    listed = [{"method": "good", "baseline": "bad", "metric": "knn"}]
    fake.write(comparisons=listed)
    with pytest.raises(
        DataError, match=r"fake\.yaml: comparisons\[0\]\.metric: 'knn' is not among the measurements of arm 'good'"
    ):
        run(fake, jobs=1)
    assert fake.ran() == [(0.8, 0)]
    fake.write()
    run(fake)
    assert len(fake.ran()) == 9, "what was measured is kept"


def test_a_quick_run_judges_and_leaves_nothing(fake):
    result = run(fake, quick=True)
    assert fake.ran() == [(0.4, 0), (0.8, 0)]
    assert {c["verdict"] for c in result["data"]["blobs"]["comparisons"]} == {"not judged"}
    assert result["data"]["blobs"]["verdict"] == "not judged"
    assert result["budget"] == {"steps": 1}
    assert {p.name for p in fake.folder.iterdir()} <= {"fake.yaml", "fakeclaim.py", "log.txt", "__pycache__"}


def test_data_that_are_not_there_are_said(fake, monkeypatch, capsys):
    monkeypatch.setenv("CONTRALTO_DATA", str(fake.folder))
    fake.write(data={"blobs": [], "far": ["far/away.parquet"]})
    result = run(fake, seeds=[0, 1, 2], progress=True)
    assert list(result["data"]) == ["blobs"]
    assert result["left_out"] == ["far: far/away.parquet was not found under CONTRALTO_DATA"]
    assert "left out: far: far/away.parquet" in capsys.readouterr().err
    with pytest.raises(DataError, match="set CONTRALTO_DATA to the folder"):
        run(fake, data="far")
    (fake.folder / "far").mkdir()
    (fake.folder / "far" / "away.parquet").touch()
    assert list(run(fake, seeds=[0, 1, 2])["data"]) == ["blobs", "far"]
    assert run(fake, seeds=[0, 1, 2], data="far")["left_out"] == ["blobs: not asked for"]
    with pytest.raises(UsageError, match="runs on 'blobs' or 'far', not on 'near'"):
        run(fake, data="near")


def test_every_seed_may_have_other_test_samples(fake):
    fake.write(arms={"good": {"p": 0.8, "vary": True}, "bad": {"p": 0.4, "vary": True}})
    result = run(fake)["data"]["blobs"]
    assert result["test_samples"] == [60, 61, 62, 63, 64]
    for c in result["comparisons"][:2]:
        assert c["low"] < c["value"] < c["high"]
        assert c["value"] == pytest.approx(np.mean(c["seeds"]))
    fake.write(arms={"good": {"p": 0.8}, "bad": {"p": 0.4, "more": 3}})
    with pytest.raises(ContraltoError, match="arms 'good' and 'bad' of seed 0 were not tested on the same samples"):
        run(fake)


def test_values_are_tried_alike_in_all_arms_on_seeds_that_are_not_reported(fake):
    found = tune(
        fake.path, "p", [0.2, 0.9], "right", data="blobs", seeds=[100, 101], work=fake.folder / "w", progress=False
    )
    assert fake.ran() == sorted((p, seed) for p in (0.2, 0.9) for seed in (100, 101) for _ in range(2))
    assert found["good"] == found["bad"]
    assert found["good"][0.9] > found["good"][0.2]
    with pytest.raises(UsageError, match="seeds from 100 on"):
        tune(fake.path, "p", [0.2], "right", data="blobs", seeds=[0], progress=False)
    with pytest.raises(UsageError, match="no arm of fake has 'lr'"):
        tune(fake.path, "lr", [0.2], "right", data="blobs", progress=False)


def test_seeds_for_development_leave_no_result(fake, capsys):
    run(fake, seeds=[100], progress=True)
    assert fake.ran() == [(0.4, 100), (0.8, 100)]
    assert not (fake.folder / "out").exists()
    assert "no result is written" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("found", "told"),
    [
        ([1, 2], "must return a dict of measurements"),
        ({}, "must return a dict of measurements"),
        ({"knn": None}, "measurement 'knn' must be a number or an array"),
        ({"knn": np.zeros((2, 2))}, r"got shape \(2, 2\)"),
        ({"knn": ["yes"]}, "measurement 'knn' must be"),
        ({"knn": [1, 0], "groups": ["a"]}, r"same test samples, got lengths \{'knn': 2, 'groups': 1\}"),
    ],
)
def test_what_is_no_measurement_is_named(tmp_path, found, told):
    with pytest.raises(UsageError, match=told):
        keep(tmp_path / "a.npz", found)
    assert list(tmp_path.iterdir()) == []


def test_damaged_measurements_are_named(fake):
    run(fake, seeds=[0, 1, 2])
    path = next((fake.folder / "work").rglob("seed1-*.npz"))
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(DataError, match=path.name):
        run(fake, seeds=[0, 1, 2])
    with pytest.raises(DataError, match="is damaged"):
        load(path)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "name one system"),
        (["capro", "--all", "--quick"], "name one system"),
        (["--all"], "--all needs --quick"),
        (["--table", "--out", "nowhere"], "nowhere: holds no result"),
        (["fake.yaml", "--seeds", "0"], "seeds must be their number"),
        (["fake.yaml", "--seeds", "1,1"], "a seed is named twice"),
        (["fake.yaml", "--seeds", "-3"], ""),
        (["fake.yaml", "--budget.epochs", "3"], "the budget has no 'epochs'; there are: steps"),
        (["fake.yaml", "--jobs", "0"], "jobs must be"),
        (["fake.yaml", "--device", "toaster"], "device must be"),
    ],
)
def test_wrong_use_is_named(fake, words, told, capsys):
    assert main(["reproduce", *words]) == 2
    err = capsys.readouterr().err
    assert told in err
    assert "Traceback" not in err


def test_the_command_runs_judges_and_tells(fake, capsys):
    assert main(["reproduce", "fake.yaml", "--seeds", "3", "--budget.steps", "7", "--jobs", "2"]) == 0
    out = capsys.readouterr().out
    assert "good against bad" in out
    assert "blobs: reproduced (on 3 seeds)" in out
    kept = json.loads((fake.folder / "results" / "claims" / "fake.json").read_text())
    assert kept["budget"] == {"steps": 7}
    assert kept["command"] == "contralto reproduce fake.yaml --seeds 3 --budget.steps 7"
    assert main(["reproduce", "fake.yaml", "--seeds", "3", "--budget.steps", "7", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == kept
    assert main(["reproduce", "--table"]) == 0
    page = (fake.folder / "docs" / "claims.md").read_text()
    assert "| [fake](#fake) | who answers more is more often right | blobs | good against bad: right | +" in page


def test_all_claims_run_quickly_and_what_fails_or_is_left_out_is_named(fake, monkeypatch, capsys):
    far = fake.folder / "far.yaml"
    far.write_text(fake.write(data={"far": ["nowhere"]}).read_text())
    fake.write()
    monkeypatch.setattr(runner, "claims", lambda: {"fake": fake.path, "far": far})
    monkeypatch.delenv("CONTRALTO_DATA", raising=False)
    assert main(["reproduce", "--all", "--quick"]) == 0
    assert capsys.readouterr().out.split("\n")[:2] == [
        "fake: ran",
        "far: left out: far: nowhere was not found under CONTRALTO_DATA",
    ]
    assert fake.ran() == [(0.4, 0), (0.8, 0)]
    assert not (fake.folder / "results").exists()
    monkeypatch.setenv("FAKE_TROUBLE", "raise:0.4,0")
    with pytest.raises(ContraltoError, match=r"1 of 2 trainings failed.*\n  fake: arm 'bad', seed 0"):
        smoke(progress=False)


@pytest.mark.slow
def test_every_claim_that_ships_runs():
    """``contralto reproduce --all --quick``: every arm of every claim is trained, measured and judged."""
    outcome = smoke(jobs=2, progress=False)
    assert set(outcome) == set(runner.claims())
    left_out = [told for told in outcome.values() if told != "ran"]
    assert all("CONTRALTO_DATA" in told or "not there" in told or "left out" in told for told in left_out)
    ships = {name for name in outcome if not any(find_claim(name).data.values())}
    assert {name for name, told in outcome.items() if told == "ran"} >= ships
    assert len(ships) >= 15
