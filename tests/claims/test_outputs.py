"""The page of claims is what the kept results give, and those are what the claims' files say."""

import json
from pathlib import Path

import numpy as np
import pytest

from contralto.claims.judge import verdict_of_bound, verdict_of_difference
from contralto.claims.outputs import kept_results, page
from contralto.claims.plan import DEVELOPMENT_SEED, claims, find_claim
from contralto.evaluation.classification import Interval

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "results" / "claims"
KEPT = kept_results(RESULTS)


def test_the_page_of_claims_is_what_the_results_give():
    assert (ROOT / "docs" / "claims.md").read_text() == page(KEPT), "run `contralto reproduce --table`"


@pytest.mark.parametrize("name", KEPT)
def test_a_kept_result_is_that_of_its_claim_and_its_verdicts_follow_the_rule(name):
    result, claim = KEPT[name], find_claim(name)
    assert name in claims()
    assert result["claim"] == claim.claim
    assert result["budget"] == dict(claim.budget)
    assert result["decides"] == {"which": claim.verdict, "comparisons": claim.deciding()}
    assert len(result["seeds"]) >= 3
    assert max(result["seeds"]) < DEVELOPMENT_SEED
    assert (RESULTS / f"{name}.png").is_file()
    for found in result["data"].values():
        assert {a: v["settings"] for a, v in found["arms"].items()} == json.loads(json.dumps(claim.arms))
        bare = []
        for c, wanted in zip(found["comparisons"], claim.comparisons, strict=True):
            assert (c["metric"], c["macro"], c["part"], c["gate"]) == (
                wanted.metric,
                wanted.macro,
                wanted.part,
                wanted.gate,
            )
            assert c["value"] == pytest.approx(np.mean(c["seeds"]), abs=1e-9)
            effect = Interval(*(np.nan if c[k] is None else c[k] for k in ("value", "low", "high")))
            if c["baseline"]:
                bare.append(verdict_of_difference(effect, c["smallest"]))
            else:
                bare.append(verdict_of_bound(c["seeds"], c.get("above"), c.get("below")))
            assert c["verdict"].startswith(bare[-1])
            for side, arms in (("method", wanted.method), ("baseline", wanted.baseline)):
                assert c[side] == (" - ".join(arms) or None)
        deciding = {bare[i] for i in claim.deciding()}
        verdict = next((v for v in ("not reproduced", "inconclusive") if v in deciding), "reproduced")
        assert found["verdict"].startswith(verdict)


@pytest.mark.parametrize("name", KEPT)
def test_differences_are_those_of_the_arms(name):
    for found in KEPT[name]["data"].values():
        for c in found["comparisons"]:
            if c["method"] in found["arms"] and c["baseline"] in found["arms"]:
                key = ", ".join(
                    [c["metric"], *(["mean over classes"] * c["macro"]), *([c["part"]] if c["part"] else [])]
                )
                means = [found["arms"][c[side]]["metrics"][key]["mean"] for side in ("method", "baseline")]
                sign = -1 if c["direction"] == "lower" else 1
                assert c["value"] == pytest.approx(sign * (means[0] - means[1]), abs=1e-9)


def test_the_page_tells_all_kinds_of_claims():
    c = {"method": "a", "metric": "right", "macro": False, "part": None, "gate": True, "value": 0.1, "low": 0.05, "high": 0.2,
         "seeds": [0.1, 0.1], "share": True}  # fmt: skip
    both = c | {"baseline": "b", "direction": "higher", "smallest": 0.0, "verdict": "reproduced (on 2 seeds)"}
    bound = c | {"baseline": None, "above": 3.0, "metric": "x", "share": False, "value": 4.0, "low": None, "high": None,
                 "verdict": "inconclusive (on 2 seeds)"}  # fmt: skip
    metric = {"mean": 0.5, "sd": 0.1, "seeds": [0.4, 0.6]}
    arms = {"a": {"metrics": {"right": metric, "x": metric | {"sd": None}}}, "b": {"metrics": {"right": metric}}}
    result = {
        "system": "s", "claim": "a | b", "paper": "P", "command": "contralto reproduce s", "rule": {"version": 1, "text": "T"},
        "decides": {"which": "all", "comparisons": [0, 1]}, "left_out": ["far: nothing"],
        "data": {"d": {"verdict": "inconclusive (on 2 seeds)", "arms": arms, "comparisons": [both, bound]}},
    }  # fmt: skip
    told = page({"s": result})
    assert (
        "| [s](#s) | a \\| b | d | a against b: right | +10.0 | +5.0, +20.0 | 2 | reproduced (on 2 seeds) | `contralto"
        in told
    )
    assert (
        "| d | a against b | right | 50.0 ± 10.0 | 50.0 ± 10.0 | +10.0 [+5.0, +20.0] | reproduced (on 2 seeds) |"
        in told
    )
    assert "| d | a above 3 | x | 0.5 |  | 4 [-, -] | inconclusive (on 2 seeds) |" in told
    assert "Left out: far: nothing." in told
    assert "d: **inconclusive (on 2 seeds)**" in told
