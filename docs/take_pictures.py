"""Takes the pictures of pages that README and docs show, in headless Chromium, from a finished run of the demo.

contralto demo && python docs/take_pictures.py [RUN [DISCOVERY [REGRESSION]]]   ("-" for none)

DISCOVERY, REGRESSION: runs of `contralto fit protogcd` and of `contralto fit supremix`, as in docs/discovery.md and
docs/regression.md.
"""

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

DOCS = Path(__file__).parent


def take(page: Page, name: str, first: str, last: str) -> None:
    """What lies between the top of one element and the bottom of another, as `docs/<name>.png`."""
    page.evaluate("scrollTo(0, 0)")
    top, bottom = (page.locator(s).bounding_box() for s in (first, last))
    if top is None or bottom is None:
        sys.exit(f"{first} or {last} is not on the page")
    height = bottom["y"] + bottom["height"] - top["y"]
    clip = {"x": 0.0, "y": max(0.0, top["y"] - 12), "width": 1120.0, "height": height + 24}
    page.screenshot(path=DOCS / f"{name}.png", full_page=True, clip=clip)


def report(page: Page, run: Path) -> None:
    page.goto((run / "report.html").resolve().as_uri())
    take(page, "report", "header", "#accuracy")
    page.select_option("#class", label="lock or key")
    page.evaluate("document.querySelectorAll('#gallery .item').forEach((e, i) => { if (i >= 24) e.remove(); })")
    take(page, "report_images", "#images", "#gallery")


def review(page: Page, run: Path) -> None:
    """On a copy, so that the run keeps the decisions that it has."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / run.name
        shutil.copytree(run, copy, ignore=shutil.ignore_patterns("review.sqlite*", "features", "stages"))
        command = [str(Path(sys.executable).with_name("contralto")), "review", str(copy), "--port", "0"]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            found = re.search(r"http://\S+", server.stdout.readline() if server.stdout else "")
            if found is None:
                sys.exit("the review page did not start")
            page.goto(found[0])
            page.fill("[name=name]", "Ada")
            page.keyboard.press("Enter")
            page.wait_for_selector("#start")
            page.goto(found[0] + "?label=lock+or+key")
            page.keyboard.press("Enter")
            for key in "aaa":  # what is right for these
                page.wait_for_selector("#one")
                with page.expect_navigation():
                    page.keyboard.press(key)
            page.wait_for_load_state("networkidle")
            take(page, "review", "header", ".near")
        finally:
            server.terminate()
            server.wait()


def discovery(page: Page, run: Path) -> None:
    page.goto((run / "report.html").resolve().as_uri())
    page.wait_for_selector("#gallery .item")
    page.evaluate("document.querySelectorAll('#gallery .item').forEach((e, i) => { if (i >= 12) e.remove(); })")
    take(page, "discovery", "header", "#gallery")


def regression(page: Page, run: Path) -> None:
    page.goto((run / "report.html").resolve().as_uri())
    take(page, "regression", "header", "#told")


def main(run: Path | None, discovered: Path | None, regressed: Path | None) -> None:
    program = shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1120, "height": 900})
        if run is not None:
            report(page, run)
            review(page, run)
        if discovered is not None:
            discovery(page, discovered)
        if regressed is not None:
            regression(page, regressed)
        browser.close()


if __name__ == "__main__":
    given = [Path(word) if word != "-" else None for word in sys.argv[1:4]] or [Path("runs/demo")]
    main(*given, *[None] * (3 - len(given)))
