"""Ask before something is removed."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import typer

from quill.cli.output import is_terminal, safe_line
from quill.errors import InputError
from quill.units import size

if TYPE_CHECKING:
    from quill.cli.output import Output
    from quill.registry.remove import Removal

_SHOWN = 6


def removal(output: Output, removals: Sequence[Removal]) -> None:
    """Ask on the terminal whether to remove versions; anything but yes ends the command.

    Raises:
        InputError: There is no terminal to ask on.
    """
    which = ", ".join(r.what for r in removals[:_SHOWN])
    if len(removals) > _SHOWN:
        which += f" and {len(removals) - _SHOWN} more"
    if output.err is None or not is_terminal(output.err) or not is_terminal(sys.stdin):
        raise InputError(
            f"removing {which} requires a confirmation",
            why="not running in a terminal",
            hint="yes=True",
        )
    output.err.write(f"remove {safe_line(which)} ({size(sum(r.bytes for r in removals))})? [y/N] ")
    output.err.flush()
    answer = sys.stdin.readline()
    if not answer.endswith("\n"):
        output.err.write("\n")
    if answer.strip().lower() not in ("y", "yes"):
        output.say("nothing was removed")
        raise typer.Exit(4)
