"""The review page in headless Chromium, served by the real command: keys alone, two people at once, a server that is killed."""

import re
import subprocess
import sys

import numpy as np
import pytest

from contralto.data.decisions import Decisions
from contralto.pipelines.capro_multilabel import fit_capro_multilabel
from contralto.review.listing import Filter, Listing

from tests.review.test_report import hostile_run
from tests.tiny import TAGGED

pytestmark = pytest.mark.browser


class Server:
    """`contralto review RUN` in a process of its own."""

    def __init__(self, run, port=0):
        main = "import sys; from contralto.cli import main; sys.exit(main())"
        command = [sys.executable, "-c", main, "review", str(run), "--port", str(port)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.address = re.search(r"http://\S+", self.process.stdout.readline())[0]
        self.port = int(self.address.rstrip("/").rpartition(":")[2])

    def kill(self):
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()


@pytest.fixture
def serve():
    servers = []

    def start(run, port=0):
        servers.append(Server(run, port))
        return servers[-1]

    yield start
    for server in servers:
        if server.process.poll() is None:
            server.kill()


def visit(browser, server, name, width=1200, scheme="light"):
    """A page of a new visitor who has said who they are; everything that goes wrong or leads elsewhere is in `page.trouble`."""
    page = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme).new_page()
    page.trouble = []
    page.on("console", lambda m: page.trouble.append(m.text) if m.type in ("error", "warning") else None)
    page.on("pageerror", lambda e: page.trouble.append(str(e)))
    page.on("request", lambda r: page.trouble.append(r.url) if not r.url.startswith(server.address) else None)
    page.goto(server.address)
    page.wait_for_function("document.activeElement.name === 'name'")  # the field takes the focus by itself
    page.keyboard.type(name)
    with page.expect_navigation():
        page.keyboard.press("Enter")
    return page


def press(page, *keys):
    """Keys of which the last leads to another page."""
    for key in keys[:-1]:
        page.keyboard.press(key)
    with page.expect_navigation():
        page.keyboard.press(keys[-1])


def at(page):
    return int(re.search(r"/picture/(\d+)", page.url)[1])


def test_keys_alone_are_enough_and_two_decide_an_image(browser, run, serve):
    listing = Listing(run)
    order = listing.find(Filter()).tolist()
    page = visit(browser, serve(run), "ada")
    press(page, "Enter")
    assert at(page) == order[0]
    third = listing.manifest.class_names[2]
    expected = {}
    for n, keys, labels in (
        (order[0], "k", listing.given[order[0]]), (order[1], "o", ()), (order[2], "02", (third,)), (order[3], "o", ()),
    ):  # fmt: skip
        assert at(page) == n
        press(page, *keys)
        expected[listing.ids[n]] = labels
    assert {i: d.labels for i, d in Decisions(run).holding().items()} == expected
    press(page, "u")
    assert at(page) == order[3]
    assert Decisions(run).holding().keys() == {listing.ids[n] for n in order[:3]}
    press(page, "n")
    assert at(page) == order[4]
    press(page, "p")
    assert at(page) == order[3]
    press(page, "l")
    assert "/picture/" not in page.url
    assert page.trouble == []


def test_pictures_definitions_and_neighbours_are_beside_each_other(browser, run, serve):
    page = visit(browser, serve(run), "ada")
    press(page, "Enter")
    page.wait_for_load_state("networkidle")
    assert page.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
    assert page.locator(".near .item").count() == 8
    assert page.locator("dt").count() >= 1
    page.click(".near .item >> nth=0")
    assert page.locator("#one").is_visible()
    assert page.trouble == []


def test_two_people_at_once_see_where_they_differ(browser, run, serve):
    server = serve(run)
    listing = Listing(run)
    ada, ben = (visit(browser, server, name) for name in ("ada", "ben"))
    for page in (ada, ben):
        page.select_option("[name=state]", "own")
        with page.expect_navigation():
            page.click("#filter button")
    press(ada, "Enter")
    press(ben, "Enter")
    for i in range(4):  # in turns, on the same images
        assert at(ada) == at(ben)
        press(ada, "k")
        press(ben, "o" if i % 2 else "k")
    said = Decisions(run).every()
    assert len(said) == 4
    assert [set(s) for s in said.values()] == 4 * [{"ada", "ben"}]
    ada.goto(server.address + "reviewers")
    assert "50 %" in ada.inner_text("table")
    ada.click("text=/^2$/")  # reviewers differ on 2
    assert ada.locator(".gallery .item").count() == 2
    assert listing.progress()["differ"] == 2
    assert ada.trouble == ben.trouble == []


def test_a_killed_server_has_lost_nothing_and_the_session_goes_on(browser, run, serve):
    server = serve(run)
    listing = Listing(run)
    page = visit(browser, server, "ada")
    press(page, "Enter")
    decided = []
    rng = np.random.default_rng(0)
    for _ in range(3):
        for _ in range(int(rng.integers(1, 4))):
            decided.append(listing.ids[at(page)])
            press(page, str(rng.choice(["k", "o"])))
        server.kill()
        assert list(Decisions(run).holding()) == decided
        server = serve(run, server.port)
        page.reload()
        assert page.locator("#one").is_visible()
    press(page, "k")
    assert len(Decisions(run).holding()) == len(decided) + 1


def test_a_batch_needs_a_tick_and_undo_takes_it_back(browser, run, serve):
    page = visit(browser, serve(run), "ada")
    total = len(Listing(run).find(Filter()))
    page.select_option("#batch-action", "off-topic")
    page.click("text=do it")  # not ticked: the browser asks for it
    assert not Decisions(run).holding()
    page.check(".batch [type=checkbox]")
    with page.expect_navigation():
        page.click("text=do it")
    assert len(Decisions(run).holding()) == total
    assert "No image is left" in page.inner_text("main")
    press(page, "u")
    assert not Decisions(run).holding()
    assert page.trouble == []


@pytest.mark.parametrize(("width", "scheme"), [(1200, "light"), (390, "dark")])
def test_hostile_content_does_nothing_and_fits_the_screen(browser, serve, tmp_path, width, scheme):
    run = hostile_run(tmp_path)
    server, listing = serve(run), Listing(run)
    page = visit(browser, server, "<script>window.hacked=1</script>", width, scheme)
    for path in ("?verdict=any&state=any", "picture/0", "picture/5", "picture/6", "reviewers"):
        page.goto(server.address + path)
        assert page.evaluate("window.hacked") is None
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    corrected = listing.verdict.index("corrected")
    page.goto(server.address + f"picture/{corrected}")
    press(page, "a")
    assert listing.decision(corrected).labels == listing.new[corrected] != listing.given[corrected]
    assert [t for t in page.trouble if "410" not in t] == []  # its pictures do not exist


def test_several_labels_are_ticked_and_taken(browser, serve, tagged_parquet, tmp_path):
    arguments = TAGGED | {"epochs": 2, "baseline": False, "definitions": tagged_parquet.with_name("classes.yaml")}
    run = fit_capro_multilabel(str(tagged_parquet), tmp_path / "run", **arguments)
    page = visit(browser, serve(run), "ada")
    listing = Listing(run)
    n = next(n for n in range(len(listing)) if listing.given[n])
    page.goto(page.url + f"picture/{n}?verdict=any")
    names = listing.manifest.class_names
    other = next(c for c, name in enumerate(names) if name not in listing.given[n])
    page.keyboard.press("0")
    page.keyboard.press(str(other))
    press(page, "Enter")
    expected = tuple(name for name in names if name in listing.given[n] or name == names[other])
    assert Decisions(run).of(listing.ids[n]).labels == expected
    assert page.trouble == []
