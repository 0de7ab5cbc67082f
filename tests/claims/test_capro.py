"""The machinery of the claim on its smallest form; the figures are kept under results/."""

import importlib
import json
from pathlib import Path

import numpy as np
import pytest

from contralto.claims import capro
from contralto.errors import DataError, UsageError

RESULT = Path(__file__).parents[2] / "results" / "claims" / "capro.json"


@pytest.mark.slow
def test_quick_runs_every_arm_and_judges_nothing(tmp_path):
    result = capro.reproduce_capro(
        tmp_path / "out", data="web_icons", quick=True, work=tmp_path / "work", progress=False
    )
    found = result["data"]["web_icons"]
    assert list(found["arms"]) == list(capro.ARMS)
    assert all(len(a["macro"]) == 1 and 0 < a["macro"][0] < 1 for a in found["arms"].values())
    assert found["verdict"] == "not judged"
    assert len(found["ambiguous"]) >= 10
    assert not (tmp_path / "out").exists()
    again = capro.reproduce_capro(
        tmp_path / "out", data="web_icons", quick=True, work=tmp_path / "work", progress=False
    )
    assert again["data"] == result["data"]


def test_wrong_data_are_named(tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="not on 'nothing'"):
        capro.reproduce_capro(tmp_path, data="nothing", work=tmp_path, progress=False)
    monkeypatch.setenv("CONTRALTO_DATA", str(tmp_path))
    with pytest.raises(DataError, match="set CONTRALTO_DATA"):
        capro.reproduce_capro(tmp_path, data="fashion_web", work=tmp_path, progress=False)


def test_the_table_of_the_readme_is_the_kept_result():
    readme = (RESULT.parents[2] / "README.md").read_text()
    assert capro.markdown(json.loads(RESULT.read_text())) in readme


def test_the_tables_of_the_comparison_are_the_kept_results(monkeypatch):
    root = RESULT.parents[2]
    monkeypatch.syspath_prepend(root / "benchmarks")
    results = json.loads((root / "results" / "webly.json").read_text())["results"]
    tables = importlib.import_module("webly").markdown(results)
    assert tables.count("| capro |") == len(results) > 0
    assert tables.strip() in (root / "docs" / "noisy_labels.md").read_text()


def test_the_kept_result_is_whole_and_its_verdicts_follow_the_rule():
    result = json.loads(RESULT.read_text())
    assert len(result["seeds"]) >= 3
    assert capro.DEVELOPMENT_SEED not in result["seeds"]
    for name, found in result["data"].items():
        assert {a: v["rate"] for a, v in found["arms"].items()} == capro.RATES[name]
        for c in found["comparisons"]:
            low, high = c["macro"]["low"], c["macro"]["high"]
            assert c["verdict"] == ("reproduced" if low > 0 else "not reproduced" if high < 0 else "inconclusive")
            means = [np.mean(found["arms"][a]["macro"]) for a in (c["method"], c["baseline"])]
            assert c["macro"]["value"] == pytest.approx(means[0] - means[1], abs=1e-9)
