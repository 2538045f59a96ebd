"""A browser for the tests of pages, and axe-core for their accessibility; a pytest plugin."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# Longest wait for a browser on a busy computer.
_PATIENCE = 120_000
WIDE, PHONE = {"width": 1200, "height": 900}, {"width": 320, "height": 700}

# Runs axe-core on a page that was opened with bypass_csp; returns its violations and where they are.
Axe = Callable[[Any], list[tuple[str, list[str]]]]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with playwright.sync_playwright() as running:
        if found is None and not Path(running.chromium.executable_path).exists():
            pytest.skip("no Chromium is installed")
        # Its sandbox cannot start in most containers; the only pages it opens are quill's.
        flags = ["--no-sandbox", "--disable-dev-shm-usage"]
        launched = running.chromium.launch(executable_path=found, args=flags, timeout=_PATIENCE)
        yield launched
        launched.close()


def new_context(browser: Any, **options: Any) -> Any:
    """A window with storage of its own."""
    context = browser.new_context(**options)
    context.set_default_timeout(_PATIENCE)
    return context


@pytest.fixture(scope="session")
def axe(root: Path) -> Axe:
    """Find what makes a page hard to use."""
    path = Path(os.environ.get("AXE_CORE", root / "node_modules/axe-core/axe.min.js"))
    if not path.is_file():
        pytest.skip("axe-core is not installed: npm install --no-save axe-core")
    script = path.read_text(encoding="utf-8")

    def run(window: Any) -> list[tuple[str, list[str]]]:
        window.evaluate(script)
        found = window.evaluate("axe.run()")["violations"]
        return [(v["id"], [n["html"] for n in v["nodes"]]) for v in found]

    return run
