"""Takes the pictures of pages that README and docs show, in headless Chromium, from a finished run of the demo.

contralto demo && python docs/take_pictures.py [RUN]
"""

import shutil
import sys
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

DOCS = Path(__file__).parent


def take(page: Page, name: str, first: str, last: str) -> None:
    """What lies between the top of one element and the bottom of another, as `docs/<name>.png`."""
    top, bottom = (page.locator(s).bounding_box() for s in (first, last))
    if top is None or bottom is None:
        sys.exit(f"{first} or {last} is not on the page")
    height = bottom["y"] + bottom["height"] - top["y"]
    clip = {"x": 0.0, "y": max(0.0, top["y"] - 24), "width": 1120.0, "height": height + 48}
    page.screenshot(path=DOCS / f"{name}.png", full_page=True, clip=clip)


def report(page: Page, run: Path) -> None:
    page.goto((run / "report.html").resolve().as_uri())
    take(page, "report", "header", "#accuracy")
    page.select_option("#class", label="lock or key")
    page.locator("#gallery .item").nth(29).scroll_into_view_if_needed()
    page.evaluate("document.querySelectorAll('#gallery .item').forEach((e, i) => { e.hidden = i >= 30; })")
    take(page, "report_images", "#images", "#gallery")
    take(page, "report_openset", "#openset", "#openset")


def main(run: Path) -> None:
    program = shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1120, "height": 900})
        report(page, run)
        browser.close()


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/demo"))
