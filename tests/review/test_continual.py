"""The page of a stream of tasks: it works without a network, shows what was forgotten, and trusts no name."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from contralto.review.charts import share_map
from contralto.systems.registry import get_job

from tests.pipelines.test_continual import SMALL, rows
from tests.review.test_report import open_page

EVIL = "<script>window.hacked = 1</script>"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Two tasks of two colours, one of which is called as markup; the second task makes the first forgotten."""
    folder = tmp_path_factory.mktemp("stream")
    pq.write_table(pa.Table.from_pylist(rows(names=(EVIL, "green", "blue", "grey"))), folder / "data.parquet")
    arguments = SMALL | {"epochs": 6, "lr": 0.1}
    run = get_job("finetune").fit(str(folder / "data.parquet"), folder / "run", **arguments, compare="seen")
    return run / "report.html"


@pytest.mark.browser
@pytest.mark.parametrize(("width", "scheme"), [(1200, "light"), (390, "dark")])
def test_it_works_in_a_browser_and_runs_nothing_foreign(browser, page, width, scheme):
    items = json.loads(page.read_text(encoding="utf-8").split('id="items">')[1].split("</script>")[0])
    assert len(items) > 3
    tab, problems, requests = open_page(browser, page, width, scheme)
    tab.wait_for_selector("#gallery .item")
    assert len(tab.query_selector_all("#gallery .item")) == len(items)
    assert len(tab.query_selector_all("#matrix svg")) == 2
    assert tab.text_content("#matrix svg >> nth=0").count("after task 2") >= 1
    tab.fill("#search", items[0]["id"])
    assert tab.inner_text("#count").startswith("1 images")
    tab.fill("#search", "script")
    lost = sum("script" in (x["t"] + x["p"]) for x in items)
    assert tab.inner_text("#count").startswith(f"{lost} images")
    assert tab.evaluate("window.hacked") is None
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    assert problems == []
    assert requests == []
    tab.close()


def test_a_share_is_a_square_with_its_number_and_none_is_empty():
    svg = share_map([[1.0, None], [0.254, 0.5]], ["a<b", "c"], ["d", "e"], label="of <all>")
    assert svg.count("<rect") == 3
    assert ">25<" in svg
    assert "a&lt;b, d: 100.0%" in svg
    assert "of &lt;all&gt;" in svg
