"""The page of a fine-tuning: classes from the worst to the best, the usual mistakes, and no trust in any name."""

import json
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from contralto.errors import ContraltoError
from contralto.pipelines.outputs import environment
from contralto.review.tuned import write_tuned_report

from tests.review.test_report import open_page

EVIL = "<script>window.hacked = 1</script>"
LONG = "w" * 200
LABEL = ["cat"] * 4 + [EVIL] * 2 + [LONG]
SAID = ["cat", "cat", "cat", EVIL, "cat", "cat", LONG]
PLAIN = ["cat", "cat", EVIL, EVIL, EVIL, "cat", LONG]


@pytest.fixture
def run(tmp_path):
    """A folder as a fine-tuning leaves it, as far as the page looks at it."""
    (tmp_path / "training").mkdir()
    (tmp_path / "training" / "metrics.jsonl").write_text(json.dumps({"epoch": 0, "lr": 0.1, "loss": 2.0}))
    config = {"system": "core_tuning", "version": "1", "arguments": {"x": EVIL}, "extensions": []}
    (tmp_path / "config.json").write_text(json.dumps(config))
    scores = {"accuracy": {"value": 4 / 7, "low": 0.2, "high": 0.9, "percent": True}}
    metrics = {"pictures": 1234, "loss": 2.0, "seconds": {"training": 1.0}, "memory_gib": 1.0, "scores": scores}
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    (tmp_path / "environment.json").write_text(json.dumps(environment()))
    table = {"id": [str(i) for i in range(7)], "label": LABEL, "predicted": SAID, "baseline": PLAIN}
    pq.write_table(pa.table(table), tmp_path / "predictions.parquet")
    Image.new("RGB", (900, 300), (200, 30, 30)).save(tmp_path / "answers.png")
    return tmp_path


def page_of(run):
    pictures = [np.full((16, 12, 3), 30 * i, np.uint8) for i in range(7)]
    embeddings = np.random.default_rng(0).normal(size=(7, 8)).astype(np.float32)
    return write_tuned_report(run, embeddings, pictures, [f"p{i}" for i in range(7)], LABEL)


def test_classes_come_from_the_worst_with_both_accuracies(run):
    text = page_of(run).read_text()
    bars = re.findall(r"<title>([^<]*), (cross-entropy|this run): ([\d.]+)%</title>", text)
    evil = "&lt;script&gt;window.hacked = 1&lt;/script&gt;"
    assert bars[:4] == [
        (evil, "cross-entropy", "50.0"),
        (evil, "this run", "0.0"),
        ("cat", "cross-entropy", "50.0"),
        ("cat", "this run", "75.0"),
    ]
    assert "1 images are right that were wrong, and 1 wrong that were right" in text
    rows = re.findall(r'<td class="n">(\d+)</td><td class="n">(\d+) %</td>', text)
    assert rows == [("2", "100"), ("1", "25")]  # of two, both are taken for cats; of four cats, one for the other
    assert "A classifier from 1,234 images" in text


def test_many_classes_are_cut_and_a_run_without_baseline_or_tests_has_a_page(run):
    many = [f"class {i}" for i in range(40)]
    said = [name if i % 2 else many[0] for i, name in enumerate(many)]
    pq.write_table(pa.table({"id": many, "label": many, "predicted": said}), run / "predictions.parquet")
    text = page_of(run).read_text()
    assert "The 30 classes of 40 that are worst" in text
    assert len(re.findall(r"this run: ", text)) == 30
    assert "cross-entropy</span>" not in text
    (run / "predictions.parquet").unlink()
    (run / "answers.png").unlink()
    assert 'id="answers"' not in page_of(run).read_text()


def test_a_broken_table_is_named(run):
    (run / "predictions.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(ContraltoError, match=r"predictions\.parquet"):
        page_of(run)


@pytest.mark.browser
@pytest.mark.parametrize(("width", "scheme"), [(1200, "light"), (390, "dark")])
def test_it_works_in_a_browser_and_runs_nothing_foreign(browser, run, width, scheme):
    tab, problems, requests = open_page(browser, page_of(run), width, scheme)
    tab.wait_for_selector("#gallery .item")
    assert tab.evaluate("window.hacked") is None
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    assert tab.evaluate("document.querySelector('#answers img').getBoundingClientRect().width") > 300
    assert (problems, requests) == ([], [])
    tab.close()
