"""The report in headless Chromium: hostile content does nothing, no request is made, everything can be used."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from contralto.data.manifest import MANIFEST_SCHEMA, SKIPPED_SCHEMA, ClassInfo, Manifest
from contralto.errors import DataError
from contralto.pipelines.capro import fit_capro
from contralto.review.report import write_report

from tests.conftest import tiny_rows
from tests.tiny import FROZEN

HOSTILE = [
    "<script>window.hacked=1</script>",
    '"><img src=x onerror="window.hacked=1">',
    "</script><script>window.hacked=1</script>",
    "<!--<script>",
    "\u202egnp.exe\u202c right to left \u05d0\u05d1\u05d2",
    "{{ 7*7 }} ${7*7} javascript:window.hacked=1",
    "x" * 1_000_000,
    "\u2028\u2029\x00\x07 a" + "\u0301" * 500,
]


def hostile_run(folder, n=40, classes=None):
    """A finished run whose every name and text is hostile."""
    classes = classes or [HOSTILE[0], HOSTILE[1], HOSTILE[4]]
    rng = np.random.default_rng(0)
    labels = rng.integers(0, len(classes), n)
    names = [f"{HOSTILE[i % len(HOSTILE)][:5000]}{i}" for i in range(n)]
    columns = {
        "index": np.arange(n), "id": names, "source": names, "container": ["file"] * n, "member": [""] * n, "offset": [0] * n,
        "length": [1] * n, "width": [40] * n, "height": [40] * n, "format": ["PNG"] * n, "sha256": names,
        "phash": np.arange(n, dtype=np.uint64), "duplicate_group": np.arange(n), "label": labels,
        "text": [HOSTILE[i % len(HOSTILE)] for i in range(n)], "split": ["train"] * n, "clean_label": rng.integers(-1, 2, n),
        "group": [""] * n,
    }  # fmt: skip
    skipped = pa.Table.from_pylist(
        [{"id": t[:300], "source": t[:300], "row": 0, "reason": "broken image", "detail": ""} for t in HOSTILE],
        schema=SKIPPED_SCHEMA,
    )
    infos = tuple(ClassInfo(c, (c,), c) for c in classes)
    Manifest(pa.table(columns, schema=MANIFEST_SCHEMA), infos, str(folder), skipped).save(folder / "manifest")
    verdicts = [("kept", "corrected", "off-topic", "anchor")[i % 4] for i in range(n)]
    given = [classes[k] for k in labels]
    new = [classes[(labels[i] + 1) % len(classes)] if v == "corrected" else "" if v == "off-topic" else given[i]
           for i, v in enumerate(verdicts)]  # fmt: skip
    scores = {
        f"{a}_{b}": rng.random(n) for a in ("given", "new") for b in ("classifier", "auxiliary", "prototype", "fused")
    }
    near = {"nearest_prototypes": [classes[:2]] * n, "nearest_similarities": [[0.9, 0.1]] * n}
    table = {"index": np.arange(n), "id": names, "given": given, "verdict": verdicts, "new": new, **scores, **near}
    table |= {"text_match": rng.random(n), "text_rank": np.arange(n), "p_wrong": rng.random(n)}
    pq.write_table(pa.table(table), folder / "cleaned.parquet")
    places = {
        "index": [*range(n), *(-1 - np.arange(len(classes)))],
        "x": rng.random(n + len(classes)),
        "y": rng.random(n + len(classes)),
    }
    pq.write_table(pa.table(places), folder / "map.parquet")
    counts = {v: verdicts.count(v) for v in ("kept", "corrected", "off-topic", "anchor")}
    seen = {"index": np.arange(9), "confidence": rng.random(9), "predicted": labels[:9], "right": [True] * 9}
    seen["known"] = [False] * 9
    pq.write_table(pa.table(seen), folder / "open_set.parquet")
    value = dict.fromkeys(("accuracy", "accuracy_low", "accuracy_high", "macro", "macro_low", "macro_high"), 0.5)
    curves = {
        "thresholds": [0.1, 0.9],
        "rejected_known": [None, None],
        "rejected_unknown": [0.1, 0.9],
        "accepted_right": [0.5, None],
    }
    test = {"n": 9, "model": value, "open_set": {"unknown": 9, "best": 0.5} | curves}
    metrics = {"counts": counts, "test": test, "time": {"ingest": 1.0}, "memory_gib": 1.0}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    config = {
        "system": "capro",
        "version": "0",
        "data": HOSTILE[1],
        "arguments": {"data": HOSTILE[2]},
        "extensions": [],
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def read_image(row):
    return np.random.default_rng(row).integers(0, 255, (40, 40, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    folder = hostile_run(tmp_path_factory.mktemp("hostile"))
    return write_report(folder, read_image=read_image)


@pytest.fixture(scope="module")
def real(tiny_parquet, tmp_path_factory):
    run = fit_capro(str(tiny_parquet), tmp_path_factory.mktemp("real") / "run", **FROZEN)
    return run / "report.html"


def open_page(browser, path, width=1200, scheme="light"):
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    problems, requests = [], []
    page.on("console", lambda m: problems.append(m.text) if m.type in ("error", "warning") else None)
    page.on("pageerror", lambda e: problems.append(str(e)))
    page.on("request", lambda r: requests.append(r.url) if not r.url.startswith(("file:", "data:")) else None)
    page.goto(path.as_uri())
    return page, problems, requests


@pytest.mark.browser
@pytest.mark.parametrize(("width", "scheme"), [(1200, "light"), (390, "dark")])
@pytest.mark.parametrize("which", ["hostile", "real"])
def test_it_loads_without_error_or_request_and_fits_the_screen(browser, request, which, width, scheme):
    page, problems, requests = open_page(browser, request.getfixturevalue(which), width, scheme)
    page.wait_for_selector("#gallery .item")
    assert problems == []
    assert requests == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, background.strip("rgb()").split(",")[:3])) < 200) == (scheme == "dark")
    page.close()


@pytest.mark.browser
def test_hostile_names_and_texts_do_nothing(browser, hostile):
    page, problems, _ = open_page(browser, hostile)
    for item in page.query_selector_all("#gallery .item")[:12]:
        item.click()
        page.click("#detail-close")
    for selector in ("#class", "#verdict"):
        for option in page.eval_on_selector_all(f"{selector} option", "options => options.map(o => o.value)"):
            page.select_option(selector, option)
        page.select_option(selector, "")
    page.fill("#search", "<script>")
    assert page.evaluate("window.hacked") is None
    # Four blocks of JSON and the page's own script are all there is.
    assert page.evaluate("document.querySelectorAll('img[src=x], script').length") == 5
    assert len(page.query_selector_all("#openset-pictures .seen.foreign")) == 9
    assert "<script>window.hacked" in page.inner_text("#gallery")
    assert problems == []
    page.close()


@pytest.mark.browser
def test_filters_search_order_details_and_keyboard_work(browser, real):
    page, problems, _ = open_page(browser, real)

    def shown():
        return int(page.inner_text("#count").split()[0])

    rows = pq.read_table(real.parent / "cleaned.parquet").to_pylist()
    assert shown() == len(rows)
    for verdict in ("anchor", "kept", "corrected", "off-topic"):
        page.select_option("#verdict", verdict)
        assert shown() == sum(r["verdict"] == verdict for r in rows)
    page.select_option("#verdict", "")
    page.select_option("#class", "1")
    assert shown() == sum(r["given"] == "green" for r in rows)
    page.select_option("#class", "")
    page.fill("#least", "50")
    assert abs(shown() - sum(r["p_wrong"] >= 0.5 for r in rows)) <= 1
    page.fill("#least", "0")
    page.fill("#search", "train-red-3")
    assert shown() == 1
    page.focus("#gallery .item")
    page.keyboard.press("Enter")
    assert page.is_visible("#detail[open]")
    assert "train-red-3" in page.inner_text("#detail")
    page.keyboard.press("Escape")
    assert not page.is_visible("#detail[open]")
    before = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.click("#theme")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != before
    assert problems == []
    page.close()


@pytest.mark.browser
def test_the_slider_shows_what_a_threshold_rejects(browser, tmp_path):
    rows = [*tiny_rows(), *(r | {"id": f"none-{i}", "label": "grey", "split": "test", "query": None}
                            for i, r in enumerate(tiny_rows(per_class=2, test_per_class=0)))]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    run = fit_capro(str(tmp_path / "a.parquet"), tmp_path / "run", **(FROZEN | {"epochs": 2, "baseline": False}))
    seen = pq.read_table(run / "open_set.parquet").to_pylist()
    assert sum(not r["known"] for r in seen) == 6
    assert not any(r["right"] for r in seen if not r["known"])
    found = json.loads((run / "metrics.json").read_text())["test"]["open_set"]
    assert found["unknown"] == 6
    page, problems, requests = open_page(browser, run / "report.html")
    assert len(page.query_selector_all("#openset-pictures .seen")) == len(seen) == 24
    for threshold in (0, 0.35, 0.5, 1):
        page.fill("#threshold", str(threshold))
        faint = len(page.query_selector_all("#openset-pictures .rejected"))
        assert faint == sum(round(r["confidence"], 3) <= threshold for r in seen)
    assert "100 % of the pictures of the classes rejected" in page.inner_text("#threshold-told")
    assert "100 % of those of no class" in page.inner_text("#threshold-told")
    assert problems == requests == []
    page.close()


def test_the_policy_allows_nothing_from_outside(hostile):
    html = hostile.read_text()
    policy = html.split('http-equiv="Content-Security-Policy" content="')[1].split('"')[0]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "http" not in policy.replace("https", "http").replace("http-equiv", "")
    assert "window.hacked=1</script>" not in html
    assert "<img" not in html
    assert "<script>window" not in html


def test_ten_thousand_images_stay_below_15_mb(tmp_path):
    folder = hostile_run(tmp_path, n=10_000, classes=[f"class {i}" for i in range(50)])
    images = [
        np.random.default_rng(i).integers(0, 255, (48, 48, 3), dtype=np.uint8) for i in range(20)
    ]  # noise: the worst case
    path = write_report(folder, read_image=lambda row: images[row % 20])
    assert path.stat().st_size <= 15 * 2**20


def test_an_unfinished_run_is_named(tmp_path):
    with pytest.raises(DataError, match="the run is not finished"):
        write_report(tmp_path, read_image=read_image)


def test_no_more_pictures_are_decoded_than_can_fit(tmp_path):
    from contralto.review import report

    hostile_run(tmp_path, n=60)
    manifest = Manifest.load(tmp_path / "manifest")
    rows = pq.read_table(tmp_path / "cleaned.parquet").to_pylist()
    read = []

    def read_image(row):
        read.append(row)
        return np.zeros((20, 20, 3), np.uint8)

    *_, left_out = report._gallery(rows, manifest, read_image, 48, 20 * report.SMALLEST, report._items)
    worst = sorted(rows, key=lambda r: -r["p_wrong"])[:20]
    assert sorted(read) == sorted(r["index"] for r in worst)
    assert left_out >= 40
    *_, left_out = report._gallery(rows, manifest, read_image, 48, 10**7, report._items)
    assert left_out == 0
