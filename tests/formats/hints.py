"""Whether a hint is what errors promise: a command that runs as printed, or one sentence."""

from __future__ import annotations

import re
import shlex
from typing import Any

import typer

from quill.cli import _flags
from quill.cli.app import build, commands

# What was typed when the hint was shown; hints that are only flags are completed with it.
TYPED = ("import", "a model.pt")
PROGRAMS = ("quill", "pip", "python", "df", "git")
# A placeholder such as FILE or NAME does not run.
_PLACEHOLDER = re.compile(r"\b[A-Z]{3,}\b")


def problem(hint: str) -> str:
    """What is wrong with a hint; empty if nothing is."""
    if not hint:
        return ""
    if "--" in hint and not hint.startswith(PROGRAMS):
        return "it names a flag, and the library has no flags"
    flags: dict[str, str] = _flags.of_command(_command("import").params)
    shown = _flags.complete(_flags.spell(hint, flags), "quill", TYPED)
    if not shown.startswith(tuple(f"{program} " for program in PROGRAMS)):
        is_sentence = shown[0].islower() and not shown.endswith(".") and " " in shown
        return "" if is_sentence else "it is neither a command nor a sentence"
    try:
        program, *arguments = shlex.split(shown)
    except ValueError as e:
        return f"no shell can parse it: {e}"
    if program != "quill":
        return ""
    if not arguments or arguments[0] not in commands():
        return "quill has no such command"
    if any(_PLACEHOLDER.fullmatch(a) for a in arguments):
        return "it contains a placeholder"
    try:
        _command(arguments[0]).make_context(arguments[0], list(arguments[1:]))
    except typer.Exit:
        pass  # It was --help.
    except typer.TyperException as e:
        return f"quill cannot parse it: {e}"
    return ""


def _command(name: str) -> Any:
    return typer.main.get_command(build([name])).commands[name]  # type: ignore[attr-defined]
