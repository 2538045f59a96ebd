"""Write the pages of the manual that are made from the code: `python tests/docs/generate.py`."""

from __future__ import annotations

import contextlib
import io
import os
from pathlib import Path

from quill.cli import app
from quill.config import schema

DOCS = Path(__file__).resolve().parents[2] / "quill" / "docs"


def commands() -> str:
    """The command reference: the help of every command, as it is printed at 80 columns."""
    parts = [
        "# Commands\n",
        "Generated from the help of each command.\n",
    ]
    for name in app.commands():
        parts.append(f"## quill {name}\n\n```text\n{help_text(name)}```\n")
    return "\n".join(parts)


def settings() -> str:
    """The settings page."""
    return (
        "# Settings\n\n"
        "Generated from their declarations. In a config file `train.batch_size` is `batch_size` in the\n"
        "section `train`, on the command line it is `--batch-size`, in Python the keyword `batch_size`.\n\n"
        + schema.table()
    )


def help_text(*command: str) -> str:
    """What `quill COMMAND --help` prints in a pipe, 80 columns wide."""
    before = dict(os.environ)
    os.environ.update({"COLUMNS": "80", "NO_COLOR": "1"})
    try:
        with contextlib.redirect_stdout(io.StringIO()) as out:
            assert app.main([*command, "--help"]) == 0
    finally:
        os.environ.clear()
        os.environ.update(before)
    return out.getvalue().strip("\n") + "\n"


PAGES = {"commands.md": commands, "settings.md": settings}


if __name__ == "__main__":
    for page, make in PAGES.items():
        (DOCS / page).write_text(make(), encoding="utf-8")
