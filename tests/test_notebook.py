"""What a real notebook shows: the progress of a run, tables, and errors with what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")
pytest.importorskip("ipykernel", reason="ipykernel is not installed")
pytestmark = pytest.mark.slow

SETTINGS = (
    "n_layer=1, n_head=1, n_embd=8, block_size=8, batch_size=2, max_iters=4, eval_interval=2, "
    "warmup_iters=0, sample_every=4, dtype='float32', compile='off', registry='weights'"
)
CELLS = [
    "import quill",
    f"quill.train('tide.txt', {SETTINGS})",
    "quill.models(registry='weights')",
    "quill.load('tide', registry='weights').generate(num_samples=2, max_new_tokens=5)",
    "quill.explain('tide', '3 bells', registry='weights')",
    f"quill.train('tide.txt', learning_rate=1.0, {SETTINGS})",
]


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory, tiny_text: str, root: Path) -> list[list[Any]]:
    folder = tmp_path_factory.mktemp("notebook")
    (folder / "tide.txt").write_text(tiny_text, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(root), prepend=":")
        book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in CELLS])
        client = nbclient.NotebookClient(book, timeout=120, allow_errors=True)
        client.execute(cwd=str(folder))
    return [cell.outputs for cell in book.cells]


def streams(outputs: list[Any]) -> dict[str, str]:
    found: dict[str, str] = {}
    for output in outputs:
        if output.output_type == "stream":
            found[output.name] = found.get(output.name, "") + output.text
    return found


def test_a_run_shows_its_progress_and_its_version(outputs: list[list[Any]]) -> None:
    shown = streams(outputs[1])
    assert set(shown) == {"stdout"}, "stderr would be shown as an alarm"
    lines = shown["stdout"].splitlines()
    for start in ("tide:v1: training for 4 steps", "step 2: val loss", "step 4: sample", "tide:v1: trained"):
        assert any(line.startswith(start) for line in lines), start
    assert outputs[1][-1].data["text/html"].startswith("<table>")


def test_tables_and_samples_are_html(outputs: list[list[Any]]) -> None:
    assert "<td>tide:v1</td>" in outputs[2][0].data["text/html"]
    assert outputs[3][0].data["text/html"].count("<pre>") == 2


def test_an_explanation_is_a_page_in_a_frame(outputs: list[list[Any]]) -> None:
    frame = outputs[4][0].data["text/html"]
    assert frame.startswith("<iframe sandbox=")
    assert "tide:v1: a look inside" in frame
    assert outputs[4][0].data["text/plain"].startswith("<tide:v1 after 7 tokens: ")


def test_an_error_ends_with_what_to_do(outputs: list[list[Any]]) -> None:
    [error] = [output for output in outputs[5] if output.output_type == "error"]
    assert error.ename == "RefusedError"
    assert "new_version=True" in "\n".join(error.traceback)
