"""Photograph the playground with the shipped model: `python tests/docs/screenshots.py [FOLDER]`.

Without a folder the pictures of the manual are made again; with one, every view goes there, in light and
dark, wide and on a phone, to be looked at.
"""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import sync_playwright

ROOT = Path(__file__).resolve().parents[2]
IMAGES = ROOT / "quill" / "docs" / "images"
SERVE = [sys.executable, "-c", "from quill.cli.app import run; run()", "serve", "shakespeare", "--port", "0"]

WIDE, PHONE = {"width": 1280, "height": 860}, {"width": 390, "height": 844}
# The view, the height, in light or dark, and the file of each picture of the manual.
MANUAL = (("write", 1020, "light", "playground.png"), ("card", 760, "dark", "playground-card.png"))
LINK = "#model=shakespeare:v2&prompt=JULIET:%0A&seed=5&length=220&temperature=0.8"


def empty(page: Any) -> None:
    """The page as it opens."""
    page.wait_for_selector("#model option", state="attached")


def written(page: Any) -> None:
    """Two samples, and what a token could have been."""
    empty(page)
    # Twice: the first time loads the model.
    for _ in range(2):
        page.get_by_role("button", name="Generate").click()
        page.wait_for_selector(".samples:not(:has([aria-busy=true]))")
        page.locator("#stop").wait_for(state="hidden")
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
    with subprocess.Popen(
        SERVE, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
        process.terminate()


def photograph(folder: Path) -> None:
    """Write every view, in light and dark, wide and on a phone."""
    with opening() as look:
        for scheme in ("light", "dark"):
            for kind, size in (("wide", WIDE), ("phone", PHONE)):
                for name in VIEWS:
                    (folder / f"{name}-{kind}-{scheme}.png").write_bytes(look(name, size, scheme))


def illustrate() -> None:
    """Make the pictures of the manual again, in 256 colours."""
    with opening() as look:
        for name, height, scheme, file in MANUAL:
            taken = look(name, {"width": 1200, "height": height}, scheme)
            picture = Image.open(io.BytesIO(taken)).convert("RGB")
            picture.quantize(256, dither=Image.Dither.NONE).save(IMAGES / file, optimize=True)


@contextmanager
def opening() -> Iterator[Callable[..., bytes]]:
    """A function that photographs a view."""
    with serving() as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])

        def look(name: str, size: dict[str, int], scheme: str) -> bytes:
            link, prepare = VIEWS[name]
            page = browser.new_page(viewport=size, color_scheme=scheme)
            page.goto(f"{address}/{link}")
            prepare(page)
            taken: bytes = page.screenshot()
            page.close()
            return taken

        yield look
        browser.close()


if __name__ == "__main__":
    if len(sys.argv) > 1:
        photograph(Path(sys.argv[1]))
    else:
        illustrate()
