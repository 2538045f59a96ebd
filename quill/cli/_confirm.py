"""Ask before something is removed."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import typer

from quill.cli.output import is_terminal
from quill.errors import InputError
from quill.units import size

if TYPE_CHECKING:
    from quill.cli.output import Output

_SHOWN = 6


def removal(output: Output, names: Sequence[str], total: int) -> None:
    """Ask on the terminal whether to remove something; anything but yes ends the command.

    Args:
        output: Where to ask.
        names: What would be removed.
        total: The bytes that would be freed.

    Raises:
        InputError: There is no terminal to ask on.
    """
    which = ", ".join(names[:_SHOWN])
    if len(names) > _SHOWN:
        which += f" and {len(names) - _SHOWN} more"
    if output.err is None or not is_terminal(output.err) or not is_terminal(sys.stdin):
        raise InputError(
            f"removing {which} requires a confirmation",
            why="not running in a terminal",
            hint="yes=True",
        )
    output.ask(f"remove {which} ({size(total)})? [y/N]")
    answer = sys.stdin.readline()
    if not answer.endswith("\n"):
        output.ask("")
    if answer.strip().lower() not in ("y", "yes"):
        output.say("nothing was removed")
        raise typer.Exit(4)
