"""The parts of CAPro's claim, and its figures in the docs."""

import importlib
import json
from pathlib import Path

import numpy as np
import pytest

from contralto.claims import capro
from contralto.claims.plan import find_claim
from contralto.errors import DataError, UsageError

RESULT = Path(__file__).parents[2] / "results" / "claims" / "capro.json"


@pytest.mark.slow
def test_an_arm_is_measured_on_every_test_picture(tmp_path):
    claim = find_claim("capro")
    how = {"seed": 0, "data": "web_icons", "device": "cpu", "progress": lambda _: None, "work": tmp_path}
    budget = claim.budget | claim.quick | {"vanilla_epochs": 1, "epochs": 3, "pictures": 0.1}
    plain = capro.run(claim.arms["plain"], budget=budget, **how)
    found = capro.run(claim.arms["capro"], budget=budget, **how)
    assert set(plain) == {"right", "labels", "groups", "ambiguous"}
    assert {"anchors", "noise_precision"} <= set(found) - set(plain)
    for key in ("labels", "groups", "ambiguous"):
        assert np.array_equal(plain[key], found[key])
    assert len(np.unique(found["labels"][found["ambiguous"]])) >= 10
    again = capro.run(claim.arms["capro"], budget=budget, **how)
    assert np.array_equal(again["right"], found["right"])


def test_wrong_data_are_named(tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="not on 'nothing'"):
        capro.shared_manifest("nothing", tmp_path)
    monkeypatch.setenv("CONTRALTO_DATA", str(tmp_path))
    with pytest.raises(DataError, match="set CONTRALTO_DATA"):
        capro.shared_manifest("fashion_web", tmp_path)


def test_the_tables_of_the_comparison_are_the_kept_results(monkeypatch):
    root = RESULT.parents[2]
    monkeypatch.syspath_prepend(root / "benchmarks")
    results = json.loads((root / "results" / "webly.json").read_text())["results"]
    tables = importlib.import_module("webly").markdown(results)
    assert tables.count("| capro |") == len(results) > 0
    assert tables.strip() in (root / "docs" / "noisy_labels.md").read_text()


def test_the_rates_are_the_best_of_those_that_were_tried():
    tried = json.loads(RESULT.with_name("capro_rates.json").read_text())["scores"]
    for arm, settings in find_claim("capro").arms.items():
        for name, rate in settings["rate"].items():
            assert rate == float(max(tried[name][arm], key=tried[name][arm].get))
