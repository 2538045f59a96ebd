"""The pictures are those of the shipped model, and the notebook runs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import figures
import pytest

DOCS = Path(__file__).resolve().parents[2] / "quill" / "docs"
# What the notebook trains in full, the test trains for two steps.
_FULL = '"max_iters": 300, "sample_every": 100'
_SHORT = '"max_iters": 2, "eval_interval": 2, "warmup_iters": 0, "eval_iters": 1, "batch_size": 2'


@pytest.fixture(scope="module")
def drawn() -> dict[str, str]:
    return figures.draw()


def _skeleton(picture: str) -> str:
    """A picture without its numbers, whose last digits depend on the processor."""
    return re.sub(r"-?\d+(\.\d+)?", "#", picture)


def test_pictures_are_current(drawn: dict[str, str]) -> None:
    assert {path.name for path in (DOCS / "images").glob("gpt-*.svg")} == set(drawn)
    for name, picture in drawn.items():
        kept = (DOCS / "images" / name).read_text(encoding="utf-8")
        assert _skeleton(kept) == _skeleton(picture), "run: python tests/docs/figures.py"


def test_pictures_are_small_valid_and_shown(drawn: dict[str, str]) -> None:
    page = (DOCS / "how-a-gpt-works.md").read_text(encoding="utf-8")
    for name, picture in drawn.items():
        assert f"](images/{name})" in page
        assert len(picture) < 40_000
        assert ElementTree.fromstring(picture).find("{http://www.w3.org/2000/svg}title") is not None


def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    book = json.loads((DOCS / "first-model.ipynb").read_text(encoding="utf-8"))
    cells = [cell for cell in book["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QUILL_REGISTRY", str(tmp_path / "weights"))
    monkeypatch.setenv("QUILL_DEVICE", "cpu")
    monkeypatch.delenv("QUILL_SHIPPED")
    code = "\n".join("".join(cell["source"]) for cell in cells)
    assert _FULL in code
    names: dict[str, object] = {}
    exec(code.replace(_FULL, _SHORT), names)
    assert names["version"].reference == "first:v1"
    assert len(names["seen"].trace.layers) == 2
    assert names["model"]._repr_html_().startswith("<b>first:v1</b>: ")
