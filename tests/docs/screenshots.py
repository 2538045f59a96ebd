"""Photograph the playground with the shipped model: `python tests/docs/screenshots.py [FOLDER]`.

Without a folder the pictures of the manual are made again; with one, every view goes there, in light and
dark, wide and on a phone, to be looked at.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright

ROOT = Path(__file__).resolve().parents[2]
IMAGES = ROOT / "quill" / "docs" / "images"
SERVE = [sys.executable, "-c", "from quill.cli.app import run; run()", "serve", "shakespeare", "--port", "0"]

WIDE, PHONE = {"width": 1280, "height": 860}, {"width": 390, "height": 844}
PROMPT = "JULIET:\n"
LINK = "#model=shakespeare:v1&prompt=JULIET:%0A&seed=5&length=220&temperature=0.8"


def empty(page: Any) -> None:
    """The page as it opens."""
    page.wait_for_selector("#model option", state="attached")


def written(page: Any) -> None:
    """Two samples, and what a token could have been."""
    empty(page)
    page.get_by_role("button", name="Generate").click()
    page.wait_for_selector(".samples:not(:has([aria-busy=true]))")
    page.locator(".sample").first.locator(".s3").nth(4).click()


def inside(page: Any) -> None:
    """The look inside."""
    page.wait_for_selector("#explanation footer")


def card(page: Any) -> None:
    """The card of the model."""
    page.wait_for_selector(".curve")


VIEWS: dict[str, tuple[str, Callable[[Any], None]]] = {
    "empty": ("#", empty),
    "write": (LINK + "&samples=2", written),
    "inside": (LINK + "&view=inside", inside),
    "card": (LINK + "&view=card", card),
}


@contextmanager
def serving() -> Iterator[str]:
    """The address of a server of the shipped model."""
    with subprocess.Popen(SERVE, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
        process.terminate()


def photograph(folder: Path, *, every: bool) -> None:
    """Write the pictures; all of them, or those of the manual."""
    with serving() as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for scheme in ("light", "dark") if every else ("light",):
            for kind, size in (("wide", WIDE), ("phone", PHONE)) if every else (("wide", WIDE),):
                for name, (link, prepare) in (
                    VIEWS.items() if every else (("write", VIEWS["write"]), ("card", VIEWS["card"]))
                ):
                    page = browser.new_page(viewport=size, color_scheme=scheme)
                    page.goto(f"{address}/{link}")
                    prepare(page)
                    page.screenshot(path=folder / f"{name}-{kind}-{scheme}.png")
                    page.close()
        browser.close()


if __name__ == "__main__":
    chosen = Path(sys.argv[1]) if len(sys.argv) > 1 else IMAGES
    photograph(chosen, every=len(sys.argv) > 1)
