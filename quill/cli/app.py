"""The `quill` program: finds its commands, reads the arguments, runs one command, and explains its errors.

A command is a file in this folder, named after it. Only the module of the command that was called is
imported; the help of the others is the first line of their files.
"""

from __future__ import annotations

import os
import shlex
import sys
import warnings
from collections.abc import Iterable, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import typer

from quill import __version__, discovery
from quill.cli import _environment, _flags, _help
from quill.cli._signals import end_in_order
from quill.cli._typer import Command, Group
from quill.cli.output import Output
from quill.errors import InterruptedRun

PROGRAM = "quill"
# Files of this folder that are not commands.
_SHARED = {"app", "output", "options"}
# The usual journey, in its order; every other command follows by name.
_FACE = ("prepare", "train", "sample", "eval", "export")
_COMPLETION = f"_{PROGRAM.upper()}_COMPLETE"
# Flags of every command, which may also be typed before it; True if they take a value.
_GLOBAL = {
    "--json": False,
    "-q": False,
    "--quiet": False,
    "-v": False,
    "--verbose": False,
    "--debug": False,
    "--registry": True,
}


def run() -> None:
    """The console script: `main` on the process's own arguments and streams."""
    _open_closed_streams()
    _environment.prepare()
    end_in_order()
    if not sys.warnoptions:
        # Libraries warn their programmers; users cannot act on it.
        warnings.simplefilter("ignore")
    _environment.leave(main())


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Every failure becomes a few lines on stderr and an exit code.

    Args:
        argv: The arguments after the program's name (default: the process's own).

    Returns:
        The exit code; 0 on success.
    """
    arguments = _command_first(list(sys.argv[1:] if argv is None else argv))
    _speak_utf8()
    try:
        try:
            code = _dispatch(arguments)
            if sys.stdout is not None:
                sys.stdout.flush()
            return code
        except (Exception, KeyboardInterrupt) as e:
            return _report(e, arguments)
    except KeyboardInterrupt as e:
        # A second signal, while the first or a failure was being reported.
        return _code_of(e)


def _report(failure: Exception | KeyboardInterrupt, arguments: list[str]) -> int:
    """Say in a few lines on stderr why the command ended; return its exit code."""
    if isinstance(failure, BrokenPipeError):
        return 141
    if isinstance(failure, KeyboardInterrupt):
        return _end(failure)
    from quill.cli import _errors

    error = _errors.explain(failure, arguments, _params(arguments), _every_command)
    if error.exit_code == 1 and (interrupt := _interrupt_behind(failure)):
        return _end(interrupt)
    if isinstance(error, InterruptedRun):
        Output().note(error.what, shlex.join([PROGRAM, *arguments]))
    else:
        Output().fail(error)
    if error.exit_code == 1 and "--debug" in arguments:
        import traceback

        traceback.print_exception(failure)
    return error.exit_code


def _end(interrupt: KeyboardInterrupt) -> int:
    Output().say("interrupted")
    return _code_of(interrupt)


def _interrupt_behind(failure: BaseException | None) -> KeyboardInterrupt | None:
    """The interrupt that an exception wraps, as Python's does for one that comes while a class is made."""
    while failure:
        if isinstance(failure, KeyboardInterrupt):
            return failure
        failure = failure.__cause__ or failure.__context__
    return None


def _code_of(interrupt: KeyboardInterrupt) -> int:
    return 128 + int(getattr(interrupt, "signum", 2))


def commands() -> dict[str, str]:
    """Every command's name and its one line of help, in the order of the help; imports none of them."""
    names = set(discovery.names("cli")) - _SHARED
    ordered = [n for n in _FACE if n in names] + sorted(names - set(_FACE))
    return {n: _summary(Path(__file__).with_name(f"{n}.py")) for n in ordered}


def build(load: Iterable[str], *, others: bool = True, completion: bool = False) -> typer.Typer:
    """The Typer app, with some commands imported and only the names of the others.

    Args:
        load: Names of the commands to import.
        others: Whether to list the other commands, for the help and for completion.
        completion: Let Typer answer the questions of shells.
    """
    settings = {"help_option_names": ["-h", "--help"], "token_normalize_func": _flags.normal}
    app = typer.Typer(
        name=PROGRAM,
        cls=Group,
        rich_markup_mode=None,
        add_completion=completion,
        pretty_exceptions_enable=False,
        context_settings=settings,
        epilog="quill train notes.txt\nquill sample notes 'Once upon a time'\nquill list",
    )
    app.callback(help="Train, version, sample, evaluate and export small GPTs.")(_root)
    wanted = set(load)
    for name, summary in commands().items():
        panel = _help.PANELS[name not in _FACE]
        if name not in wanted:
            if not others:
                continue
            app.command(name, cls=Command, help=summary, rich_help_panel=panel)(_stub)
            continue
        module = import_module(f"quill.cli.{name}")
        if group := getattr(module, "COMMANDS", None):
            inner = typer.Typer(cls=Group, rich_markup_mode=None, context_settings=settings)
            for part, body in group.items():
                inner.command(part, cls=Command, epilog=body.examples, context_settings=settings)(body)
            app.add_typer(inner, name=name, help=summary, rich_help_panel=panel)
        else:
            body = module.command
            app.command(
                name, cls=Command, epilog=body.examples, rich_help_panel=panel, context_settings=settings
            )(body)
    return app


def _dispatch(arguments: list[str]) -> int:
    known = commands()
    if question := os.environ.get(_COMPLETION):
        from quill.cli import _completion

        _completion.answer(question, lambda name: build([name] if name else [], completion=True))
        return 0
    if not arguments:
        group = typer.main.get_command(build([]))
        with group.make_context(PROGRAM, [], resilient_parsing=True) as context:
            Output().say(group.get_help(context))
        return 2
    name = _flags.normal(arguments[0])
    if not name.startswith("-") and name not in known:
        from quill.cli import _errors

        raise _errors.no_such_command(arguments[0], list(known), arguments[1:])
    target: Any = typer.main.get_command(build([name], others=name not in known))
    path, rest = PROGRAM, arguments
    if name in known:
        # Straight to the command: the group would only look it up again.
        target, path, rest = target.commands[name], f"{PROGRAM} {name}", arguments[1:]
    try:
        # Typer's own `main` answers a closed pipe with exit code 1 and prints its errors itself.
        with target.make_context(path, rest) as context:
            target.invoke(context)
    except typer.Exit as e:
        return e.exit_code
    except typer.Abort:
        raise KeyboardInterrupt from None
    return 0


def _command_first(arguments: list[str]) -> list[str]:
    """Move flags of every command that were typed before the command to its end."""
    moved: list[str] = []
    rest = list(arguments)
    while rest and (takes_value := _GLOBAL.get(rest[0].partition("=")[0])) is not None:
        moved.append(rest.pop(0))
        if takes_value and "=" not in moved[-1] and rest:
            moved.append(rest.pop(0))
    if not rest:
        return arguments
    end = rest.index("--") if "--" in rest else len(rest)
    return [*rest[:end], *moved, *rest[end:]]


def _every_command() -> dict[str, Any]:
    """All commands by name, imported."""
    group: Any = typer.main.get_command(build(commands()))
    return dict(group.commands)


def _params(arguments: list[str]) -> list[Any]:
    """The parameters of the command that the arguments call, and of its parts."""
    name = _flags.normal(next((a for a in arguments if not a.startswith("-")), ""))
    if name not in commands():
        return []
    command: Any = typer.main.get_command(build([name])).commands[name]  # type: ignore[attr-defined]
    return [p for each in getattr(command, "commands", {"": command}).values() for p in each.params]


def _root(
    version: bool = typer.Option(
        False,
        "-V",
        "--version",
        help="Print the version and exit.",
        is_eager=True,
        callback=lambda v: _print_version(v),
    ),
) -> None:
    pass


def _print_version(wanted: bool) -> None:
    if wanted:
        Output().write(f"{PROGRAM} {__version__}\n")
        raise typer.Exit


def _stub() -> None:
    raise AssertionError("only the command that was called runs, and it is imported")


def _summary(path: Path) -> str:
    """The first line of a file's docstring, read without importing it."""
    with suppress(OSError), path.open(encoding="utf-8") as file:
        return file.readline().strip().strip('"')
    return ""


def _speak_utf8() -> None:
    """Write UTF-8 in every locale, and escape what is not valid in it."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, ValueError):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")  # type: ignore[union-attr]


def _open_closed_streams() -> None:
    """Open closed standard streams, or the first file of a run would become one of them."""
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
