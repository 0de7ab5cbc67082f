"""A claim small enough for tests: two arms whose answers are drawn, in a module and a file of their own."""

import sys
from pathlib import Path

import pytest
import yaml

MODULE = '''
import os, time
import numpy as np

def run(arm, *, seed, data, budget, device, progress, work):
    """Draws are the same for all arms of a seed; an arm is right where they are below its `p`."""
    log = os.environ["FAKE_LOG"]
    with open(log, "a") as file:
        file.write(f"{arm['p']} {seed} {os.getpid()}\\n")
    print("words in between")
    assert work.is_dir() and device == "cpu" and data
    what, _, at = os.environ.get("FAKE_TROUBLE", "").partition(":")
    if at == f"{arm['p']},{seed}":
        if what == "hang":
            time.sleep(600)
        if what == "die":
            os._exit(3)
        raise ValueError("ran into a wall")
    rng = np.random.default_rng([seed, len(data)])
    n = 60 + arm.get("more", 0) + (seed if arm.get("vary") else 0)
    draws = rng.random(n)
    progress(0.5)
    return {
        "right": draws < arm["p"], "score": 10 * arm["p"] + rng.normal(), "threads": float(os.environ["OMP_NUM_THREADS"]),
        "labels": np.arange(n) % 3, "rare": np.arange(n) % 3 == 2, "steps": budget["steps"],
    }
'''
CLAIM = {
    "system": "fake",
    "claim": "who answers more is more often right",
    "run": "fakeclaim:run",
    "data": ["blobs"],
    "budget": {"steps": 30},
    "quick": {"steps": 1},
    "arms": {"good": {"p": 0.8}, "bad": {"p": 0.4}},
    "comparisons": [
        {"method": "good", "baseline": "bad", "metric": "right", "smallest": 0.1},
        {"method": "good", "baseline": "bad", "metric": "right", "macro": True, "part": "rare", "gate": False},
        {"method": "bad", "baseline": "good", "metric": "score", "direction": "lower", "gate": False},
        {"method": "good", "metric": "score", "above": 0, "gate": False},
    ],
}


class Fake:
    """The claim's file, and what its arms ran."""

    def __init__(self, folder: Path):
        self.folder, self.path, self.log = folder, folder / "fake.yaml", folder / "log.txt"
        self.log.touch()
        self.write()

    def write(self, **changes):
        self.path.write_text(yaml.safe_dump(CLAIM | changes, sort_keys=False))
        return self.path

    def ran(self):
        """Arms (their `p`) and seeds that ran since the last time this was asked, in order of the seeds."""
        lines = [line.split() for line in self.log.read_text().splitlines()]
        self.log.write_text("")
        return sorted((float(p), int(seed)) for p, seed, _ in lines)

    def processes(self):
        return {int(line.split()[2]) for line in self.log.read_text().splitlines()}


@pytest.fixture
def fake(tmp_path, monkeypatch):
    (tmp_path / "fakeclaim.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("FAKE_LOG", str(tmp_path / "log.txt"))
    monkeypatch.chdir(tmp_path)
    yield Fake(tmp_path)
    sys.modules.pop("fakeclaim", None)
