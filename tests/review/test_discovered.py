"""The page of discovered classes, and the server on which people name them: useful, and deaf to hostile names."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from starlette.testclient import TestClient

from contralto.cli import main
from contralto.data.ingest import ingest
from contralto.data.names import called, new_names, read_names, save_names
from contralto.errors import DataError, UsageError
from contralto.pipelines.outputs import environment
from contralto.review.discovered import Discoveries, write_discovery_report
from contralto.review.export import export_review
from contralto.review.server import create_app

from tests.conftest import picture
from tests.review.test_report import HOSTILE, open_page
from tests.review.test_review import HERE, say, visitor
from tests.review.test_review_browser import serve, visit  # noqa: F401 (a fixture)

EVIL, QUOTED = HOSTILE[0], HOSTILE[1]
OLD = [EVIL, QUOTED, "__proto__"]
NEW = ["new 1", "new 2", "new 3"]
PER_CLASS = 20


def discovered_run(folder, old=OLD, new=NEW, per_class=PER_CLASS, estimate=True):
    """A finished discovery whose old classes, ids and arguments are markup; in two sources, half of the old pictures labelled."""
    classes, k = [*old, *new], len(old) + len(new)
    folder.mkdir(parents=True, exist_ok=True)
    found = np.repeat(np.arange(k), per_class)
    n = len(found)
    ids = [f"{HOSTILE[i % len(HOSTILE)][:300]}{i}" for i in range(n)]
    given = [classes[c] if c < len(old) and i % 2 else None for i, c in enumerate(found)]
    images = [picture(tuple(40 * (c % 6) + np.arange(3) * 20), seed=i, side=20) for i, c in enumerate(found)]
    first = n - per_class // 2
    for name, part in (("manifest", slice(0, first)), ("unlabelled", slice(first, n))):
        rows = pa.table({"id": ids[part], "image": images[part], "class_name": pa.array(given[part], pa.string())})
        pq.write_table(rows, folder / f"{name}.parquet")
        ingest(str(folder / f"{name}.parquet"), unlabelled=True, min_side=8, blank_share=None).save(folder / name)
    rng = np.random.default_rng(0)
    table = {
        "id": ids, "given": pa.array(given, pa.string()), "found": [classes[c] for c in found],
        "confidence": rng.random(n).astype(np.float32), "is_new": found >= len(old),
        "part": pa.array([0] * first + [1] * (n - first), pa.int8()), "index": [*range(first), *range(n - first)],
    }  # fmt: skip
    pq.write_table(pa.table(table), folder / "discovered.parquet")
    near = [[c for c in old if c != name][:2] for name in classes]
    about = {
        "class": classes, "is_new": np.arange(k) >= len(old), "nearest": pa.array(near, pa.list_(pa.string())),
        "similarity": pa.array([[0.5, 0.25][: len(x)] for x in near], pa.list_(pa.float32())),
    }  # fmt: skip
    pq.write_table(pa.table(about), folder / "classes.parquet")
    places = {"row": [*range(n), *(-1 - np.arange(k))], "x": rng.random(n + k), "y": rng.random(n + k)}
    pq.write_table(pa.table(places), folder / "map.parquet")
    tried = {"3": 0.4, "6": 0.9, "9": 0.5}
    metrics = {
        "pictures": n, "labelled": sum(g is not None for g in given), "unlabelled": sum(g is None for g in given),
        "old_classes": len(old), "new_classes": len(new), "asked": len(new), "in_new": per_class * len(new),
        "estimate": {"number": k, "low": k - 1, "high": k + 2, "tried": tried} if estimate else None,
        "numbers": [4, 5, k], "seconds": {"training": 1.0}, "memory_gib": 1.0, "files": {},
        "scores": {"new classes": {"value": len(new), "low": 2, "high": 5}, EVIL: {"value": 0.5, "percent": True}},
    }  # fmt: skip
    (folder / "metrics.json").write_text(json.dumps(metrics))
    config = {"system": "protogcd", "version": "1", "arguments": {"x": EVIL}, "extensions": []}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "environment.json").write_text(json.dumps(environment()))
    (folder / "training").mkdir(exist_ok=True)
    lines = [json.dumps({"epoch": e, "lr": 0.1, "loss": 2.0 - e, "entropy": 0.5}) for e in range(2)]
    (folder / "training" / "metrics.jsonl").write_text("\n".join(lines))
    save_names(folder, dict.fromkeys(new, ""))
    return folder


@pytest.fixture
def discovered(tmp_path):
    return discovered_run(tmp_path / "run")


def test_names_are_cleaned_and_checked(tmp_path):
    assert read_names(tmp_path) == {}
    save_names(tmp_path, {"new 1": " \u202eheron\x07 ", "new 2": "x" * 100_000, "new 3": " "})
    found = read_names(tmp_path)
    assert found["new 1"] == "heron"
    assert len(found["new 2"]) == 200
    assert "new 3" not in found
    assert called(["a", "new 1", "new 3"], found) == ["a", "heron", "new 3"]
    assert new_names(2, ["new 1"]) == ["new 2", "new 3"]
    for wrong in ("[]", '{"new 1": 1}', "{", "\ud800".encode("utf-8", "surrogatepass").decode("latin-1")):
        (tmp_path / "names.json").write_text(wrong, encoding="latin-1")
        with pytest.raises(DataError, match=r"names\.json"):
            read_names(tmp_path)


def test_what_was_found_is_read_class_by_class(discovered):
    found = Discoveries(discovered)
    assert found.new_classes == NEW
    for k in range(6):
        inside = found.members(k)
        assert (found.found[inside] == k).all()
        assert not any(found.given[n] for n in inside)
        assert (np.diff(found.confidence[inside]) <= 0).all()
        typical, unsure = found.shown(k, 6)
        assert not set(typical) & set(unsure)
        if len(unsure):
            assert found.confidence[unsure].max() <= found.confidence[typical].min()
    assert [found.labelled(k) for k in range(6)] == [10, 10, 10, 0, 0, 0]
    assert found.by_size()[:3] == [3, 4, 5]  # new ones first
    sources = [pq.read_table(discovered / f"{name}.parquet") for name in ("manifest", "unlabelled")]
    images = [image for table in sources for image in table.column("image").to_pylist()]
    assert [found.read_bytes(n) for n in range(len(found))] == images
    save_names(discovered, {"new 1": "heron", "no such class": "x", EVIL: "an old class keeps its name"})
    assert found.names == {"new 1": "heron"}


def test_an_unfinished_or_damaged_run_is_refused(discovered, tmp_path):
    with pytest.raises(DataError, match="not finished"):
        write_discovery_report(tmp_path)
    (discovered / "classes.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(DataError, match="damaged"):
        write_discovery_report(discovered)


def test_a_page_of_very_many_classes_stays_small_and_says_what_it_leaves_out(tmp_path):
    many = [f"new {i + 1}" for i in range(1100)]
    run = discovered_run(tmp_path / "run", old=["a", "b"], new=many, per_class=2)
    save_names(run, {"new 1": "heron", "new 1100": "crane"})
    page = write_discovery_report(run).read_text(encoding="utf-8")
    assert "102 of the smallest classes are left out" in page
    names = json.loads(page.split('id="names">')[1].split("</script>")[0])
    assert dict(names)["new 1100"] == "crane"  # a download loses no name
    assert len(page) < 15 * 2**20


@pytest.mark.browser
@pytest.mark.parametrize(("width", "scheme"), [(1200, "light"), (390, "dark")])
def test_the_page_names_classes_and_runs_nothing_foreign(browser, discovered, tmp_path, width, scheme):
    page = write_discovery_report(discovered)
    tab, problems, requests = open_page(browser, page, width, scheme)
    tab.wait_for_selector("#gallery .item")
    assert len(tab.query_selector_all("#gallery .item")) == 3
    tab.fill("#gallery .item:nth-child(1) input", EVIL)
    tab.fill("#gallery .item:nth-child(3) input", "  heron ")
    assert "2 of 3 new classes have a name" in tab.inner_text("#count")
    with tab.expect_download() as waiting:
        tab.click("#save")
    assert waiting.value.suggested_filename == "names.json"
    waiting.value.save_as(discovered / "names.json")
    assert sorted(read_names(discovered).values()) == sorted([EVIL, "heron"])
    tab.select_option("#which", "open")
    assert len(tab.query_selector_all("#gallery .item")) == 1
    tab.select_option("#which", "all")
    assert len(tab.query_selector_all("#gallery .item")) == 6
    for order in ("p", "near", "size"):
        tab.select_option("#order", order)
    tab.select_option("#which", "new")
    tab.fill("#search", "heron")
    assert len(tab.query_selector_all("#gallery .item")) == 1
    tab.click("#gallery .item .more-images")
    assert tab.is_visible("#detail[open]")
    assert tab.inner_text("#detail-body h3").strip() == "heron"
    assert len(tab.query_selector_all("#detail-body .thumb")) == PER_CLASS
    tab.keyboard.press("Escape")
    assert len(tab.query_selector_all("#number figure")) == 2
    assert tab.evaluate("window.hacked") is None
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    assert problems == []
    assert requests == []
    tab.close()
    again, problems, _ = open_page(browser, write_discovery_report(discovered), width, scheme)
    again.wait_for_selector("#gallery .item")
    values = again.evaluate("[...document.querySelectorAll('#gallery input')].map((e) => e.value)")
    assert sorted(values) == sorted([EVIL, "heron", ""])
    assert again.evaluate("window.hacked") is None
    assert problems == []
    again.close()


def test_report_is_written_again_by_its_command(discovered, tmp_path, capsys):
    assert main(["report", str(discovered), "--out", str(tmp_path / "r.html")]) == 0
    assert "new classes" in (tmp_path / "r.html").read_text(encoding="utf-8")
    assert EVIL not in (tmp_path / "r.html").read_text(encoding="utf-8")


# The server.


def test_a_name_is_saved_at_once_and_can_be_taken_back(discovered):
    client = visitor(create_app(discovered))
    answer = say(client, "/name", **{"class": 3, "name": " \u202eheron ", "page": 0})
    assert (answer.status_code, answer.headers["location"]) == (303, "/?page=0#class-3")
    assert read_names(discovered) == {"new 1": "heron"}
    assert json.loads((discovered / "names.json").read_text()) == {"new 1": "heron", "new 2": "", "new 3": ""}
    assert "<b>1</b> of 3 new classes" in client.get("/").text
    assert (
        say(client, "/name", **{"class": 4, "name": "heron", "back": "class"}).headers["location"] == "/class/4?page=0"
    )
    assert read_names(discovered) == {"new 1": "heron", "new 2": "heron"}
    say(client, "/name", **{"class": 3, "name": ""})
    assert read_names(discovered) == {"new 2": "heron"}


def test_a_name_written_by_hand_meanwhile_stays(discovered):
    client = visitor(create_app(discovered))
    save_names(discovered, {"new 3": "crane"})
    say(client, "/name", **{"class": 3, "name": "heron"})
    assert read_names(discovered) == {"new 1": "heron", "new 3": "crane"}


def test_only_people_who_came_in_by_the_page_name_only_new_classes(discovered):
    app = create_app(discovered)
    client = visitor(app)
    stranger = TestClient(app, base_url=HERE, follow_redirects=False)
    stranger.headers["origin"] = HERE
    assert stranger.post("/name", data={"class": 3, "name": "x"}).status_code == 401
    assert stranger.get("/class/3").headers["location"] == "/"
    assert stranger.get("/image/0/96").status_code == 401
    assert client.post("/name", data={"class": 3, "name": "x", "key": "no"}).status_code == 403
    assert client.post("/name", data={"class": 3}, headers={"origin": "http://evil.example"}).status_code == 403
    assert say(client, "/name", **{"class": 0, "name": "x"}).status_code == 422
    for wrong in ("6", "-1", "x", "9" * 50, ""):
        assert say(client, "/name", **{"class": wrong, "name": "x"}).status_code == 404
        assert client.get(f"/class/{wrong or 'y'}").status_code == 404
    assert read_names(discovered) == {}
    assert client.get("/", headers={"host": "evil.example"}).status_code == 421
    with pytest.raises(UsageError, match="token"):
        create_app(discovered, host="0.0.0.0")


def test_every_page_escapes_what_is_hostile_and_shows_pictures(discovered):
    save_names(discovered, {"new 1": EVIL, "new 2": QUOTED})
    client = visitor(create_app(discovered))
    for path in ("/", *(f"/class/{k}" for k in range(6)), "/class/0?page=7", "/?page=9", "/class/5?page=-1"):
        answer = client.get(path)
        assert answer.status_code == 200
        assert "<script>window" not in answer.text
        assert "<img src=x" not in answer.text
        assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert client.get("/image/0/96").headers["content-type"] == "image/jpeg"
    assert client.get("/image/119/480").status_code == 200  # of the second source
    assert client.get("/image/120/96").status_code == 404
    assert client.get("/reviewers").status_code == 404


def test_the_outcome_is_exported_under_the_names_of_people(discovered, tmp_path):
    save_names(discovered, {"new 1": "heron"})
    assert export_review(discovered, tmp_path / "labels.parquet") == 120
    table = pq.read_table(tmp_path / "labels.parquet")
    assert set(table.column("label").to_pylist()) == {*OLD, "heron", "new 2", "new 3"}
    found = Discoveries(discovered)
    labels = table.column("label").to_pylist()
    assert all(labels[n] == g for n, g in enumerate(found.given) if g)
    assert table.column("reviewed").to_pylist().count(True) == PER_CLASS
    export_review(discovered, tmp_path / "labels.csv")
    assert "heron" in (tmp_path / "labels.csv").read_text()
    with pytest.raises(UsageError, match="parquet"):
        export_review(discovered, tmp_path / "folder")


@pytest.mark.browser
@pytest.mark.parametrize(("width", "scheme"), [(1200, "light"), (390, "dark")])
def test_a_person_names_classes_by_keys_and_a_killed_server_has_lost_nothing(browser, serve, discovered, width, scheme):  # noqa: F811
    server = serve(discovered)
    page = visit(browser, server, EVIL, width, scheme)
    page.wait_for_selector(".found")
    assert page.locator(".found").count() == 6
    page.focus("#class-4 input[name=name]")
    page.keyboard.type("heron")
    with page.expect_navigation():
        page.keyboard.press("Enter")
    assert read_names(discovered) == {"new 2": "heron"}
    page.wait_for_load_state("networkidle")  # pictures that are on their way when it dies are an error of their own
    server.kill()
    server = serve(discovered, server.port)
    page.reload()
    assert page.input_value("#class-4 input[name=name]") == "heron"
    page.click("#class-3 h3 a")
    page.fill("input[name=name]", QUOTED)
    with page.expect_navigation():
        page.click("text=save")
    assert "/class/3" in page.url
    page.wait_for_load_state("networkidle")
    assert page.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
    assert read_names(discovered) == {"new 1": QUOTED, "new 2": "heron"}
    for path in ("", "class/0", "class/1", "class/5"):
        page.goto(server.address + path)
        assert page.evaluate("window.hacked") is None
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.trouble == []
