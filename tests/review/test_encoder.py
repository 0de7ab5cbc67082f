"""The page of a pretraining: it works without a network, shows neighbours, and trusts no name."""

import json

import numpy as np
import pytest

from contralto.pipelines.outputs import environment
from contralto.review.encoder import write_encoder_report

from tests.review.test_report import open_page

EVIL = "<script>window.hacked = 1</script>"
N = 30


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Three kinds of pictures, alike by their colour; a name and a label are markup."""
    run = tmp_path_factory.mktemp("encoder") / "run"
    (run / "training").mkdir(parents=True)
    lines = [{"epoch": e, "lr": 0.1, "loss": 2.0 - e, "probe": 0.5, "knn": 0.4} for e in range(2)]
    (run / "training" / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (run / "config.json").write_text(
        json.dumps({"system": "simclr", "version": "1", "arguments": {"x": EVIL}, "extensions": []})
    )
    metrics = {"pictures": N, "seconds": {"training": 1.0}, "memory_gib": 1.0, **lines[-1]}
    (run / "metrics.json").write_text(json.dumps(metrics))
    (run / "environment.json").write_text(json.dumps(environment()))
    kind = np.arange(N) % 3
    rng = np.random.default_rng(0)
    embeddings = (np.eye(8)[kind] + 0.05 * rng.normal(size=(N, 8))).astype(np.float32)
    pictures = [np.full((16, 12, 3), 60 * k + 40, np.uint8) for k in kind]
    names = [EVIL if i == 4 else f"p{i}" for i in range(N)]
    return write_encoder_report(run, embeddings, pictures, names, [("a", "b", EVIL)[k] for k in kind])


def test_neighbours_are_of_the_same_kind(page):
    text = page.read_text(encoding="utf-8")
    items = json.loads(text.split('id="items">')[1].split("</script>")[0])
    assert len(items) == N
    for i, item in enumerate(items):
        assert i not in item["n"]
        assert all(j % 3 == i % 3 for j in item["n"][: N // 3 - 1])


@pytest.mark.browser
@pytest.mark.parametrize(("width", "scheme"), [(1200, "light"), (390, "dark")])
def test_it_works_in_a_browser_and_runs_nothing_foreign(browser, page, width, scheme):
    tab, problems, requests = open_page(browser, page, width, scheme)
    tab.wait_for_selector("#gallery .item")
    assert len(tab.query_selector_all("#gallery .item")) == N
    first = tab.query_selector("#gallery .item")
    first.click()
    assert tab.is_visible("#detail[open]")
    assert len(tab.query_selector_all("#detail-body .strip .thumb")) == 24
    tab.keyboard.press("Escape")
    tab.fill("#search", "p7")
    assert tab.inner_text("#count").startswith("1 images")
    tab.fill("#search", "script")
    assert tab.evaluate("window.hacked") is None
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    assert len(tab.query_selector_all("#curves figure")) == 3
    assert problems == []
    assert requests == []
    tab.close()
