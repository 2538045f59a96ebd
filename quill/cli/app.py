"""The command line, assembled: a command is a file in this folder, its name the file's name.

Only the module of the command that was called is imported; the others stand in the help with the
first line of their files. `main` is the boundary: every failure becomes a few lines on stderr and an
exit code, and nothing gets past it as a traceback.
"""

from __future__ import annotations

import errno
import os
import sys
import warnings
from collections.abc import Iterable, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import typer

from quill import __version__, discovery
from quill.cli import _environment
from quill.cli._signals import end_in_order
from quill.cli._typer import PANELS, Command, Group
from quill.cli.output import Output, is_terminal, takes_colour
from quill.errors import InputError, NotFoundError, QuillError, ResourceError

PROGRAM = "quill"
# Files of this folder that are not commands.
_SHARED = {"app", "output", "options"}
# The face of quill in the order of its journey; every other command follows by name.
_FACE = ("prepare", "train", "sample", "eval", "export")
# Characters of a hint beyond which one suggestion is clearer than three.
_TELLING = 160
_COMPLETION = f"_{PROGRAM.upper()}_COMPLETE"
_NO_ROOM = {
    getattr(errno, name, None) for name in ("ENOSPC", "EDQUOT", "EACCES", "EPERM", "EROFS", "EIO", "ENOMEM")
} - {None}


def run() -> None:
    """The console script: `main` on the process's own arguments and streams."""
    _open_closed_streams()
    _environment.prepare()
    end_in_order()
    if not sys.warnoptions:
        # What a library warns its programmers of is nothing a person here can act on.
        warnings.simplefilter("ignore")
    code = main()
    if code == 141:
        # The interpreter flushes once more on its way out, and would complain about the same pipe.
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: The arguments after the program's name; unset: the process's own.

    Returns:
        The exit code; 0 when it is done.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    _speak_utf8()
    try:
        code = _dispatch(arguments)
        if sys.stdout is not None:
            sys.stdout.flush()
        return code
    except BrokenPipeError:
        return 141
    except KeyboardInterrupt as e:
        Output().warn("interrupted")
        return 128 + int(getattr(e, "signum", 2))
    except Exception as e:
        error = _in_flags(explain(e), arguments)
        if isinstance(error, NotFoundError) and error.close and not error.hint:
            error.hint = _did_you_mean(error, arguments)
        Output().fail(error)
        if error.exit_code == 1 and "--debug" in arguments:
            import traceback

            traceback.print_exc()
        return error.exit_code


def explain(failure: Exception) -> QuillError:
    """What any exception means to the person who typed the command."""
    if isinstance(failure, QuillError):
        return failure
    if isinstance(failure, typer.TyperException):
        return _usage_error(failure)
    if _is_out_of_memory(failure):
        return ResourceError(
            "out of memory",
            why=str(failure).partition("\n")[0][:200] or "the machine has no more to give",
            hint="lower train.batch_size and raise train.gradient_accumulation_steps",
        )
    if isinstance(failure, OSError) and failure.errno in _NO_ROOM:
        return ResourceError(
            f"cannot use '{failure.filename}'" if failure.filename else "the system refused",
            why=failure.strerror or str(failure),
            hint="quill doctor",
        )
    return QuillError(
        f"quill met a bug of its own: {type(failure).__name__}: {failure}",
        why="this is no fault of yours, and nothing that was complete has changed",
        hint="the same command with --debug, and report what it prints to quill's issue tracker",
    )


def commands() -> dict[str, str]:
    """Every command's name and its one line of help, in the order of the help; imports none of them."""
    names = set(discovery.names("cli")) - _SHARED
    ordered = [n for n in _FACE if n in names] + sorted(names - set(_FACE))
    return {n: _summary(Path(__file__).with_name(f"{n}.py")) for n in ordered}


def build(load: Iterable[str], *, rich_help: bool = False) -> typer.Typer:
    """The Typer app, with some commands whole and the others as their line of help.

    Args:
        load: Names of the commands to import.
        rich_help: Draw the help for a terminal.
    """
    app = typer.Typer(
        name=PROGRAM,
        cls=Group,
        rich_markup_mode="rich" if rich_help else None,
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"], "token_normalize_func": _dashes},
    )
    app.callback(help="Train, keep, sample, measure and hand on small GPTs by name.")(_root)
    wanted = set(load)
    for name, summary in commands().items():
        panel = PANELS[name not in _FACE]
        if name not in wanted:
            app.command(name, help=summary, rich_help_panel=panel)(_stub)
            continue
        module = import_module(f"quill.cli.{name}")
        if group := getattr(module, "COMMANDS", None):
            # The parts of a command that has parts are typed after it: quill config check.
            inner = typer.Typer(cls=Group, rich_markup_mode="rich" if rich_help else None)
            for part, body in group.items():
                inner.command(part, cls=Command)(body)
            app.add_typer(inner, name=name, help=summary, rich_help_panel=panel)
        else:
            app.command(name, cls=Command, help=module.command.__doc__, rich_help_panel=panel)(module.command)
    return app


def _dispatch(arguments: list[str]) -> int:
    known = commands()
    if _COMPLETION in os.environ:
        # A shell asks what could be typed: `eval "$(_QUILL_COMPLETE=source_bash quill)"` makes bash do so.
        from quill.cli import _completion

        def load(name: str | None) -> Any:
            return typer.main.get_command(build([name] if name else []))

        Output().write(_completion.answer(os.environ[_COMPLETION], os.environ, load))
        return 0
    if not arguments:
        _help_on_stderr()
        return 2
    name = _dashes(next((a for a in arguments if not a.startswith("-")), ""))
    if name and name not in known:
        raise _no_such_command(name, list(known))
    group = typer.main.get_command(build([name], rich_help=_rich_help()))
    try:
        # Typer's own main answers a closed pipe with exit code 1 and draws its errors itself.
        with group.make_context(PROGRAM, arguments) as context:
            group.invoke(context)
    except typer.Exit as e:
        return e.exit_code
    except typer.Abort:
        raise KeyboardInterrupt from None
    return 0


def _help_on_stderr() -> None:
    group = typer.main.get_command(build([]))
    with group.make_context(PROGRAM, [], resilient_parsing=True) as context:
        Output().say(group.get_help(context))


def _root(
    version: bool = typer.Option(
        False, "--version", help="Print the version.", is_eager=True, callback=lambda v: _print_version(v)
    ),
    debug: bool = typer.Option(False, "--debug", help="On a bug of ours: the traceback."),
) -> None:
    pass


def _print_version(wanted: bool) -> None:
    if wanted:
        Output().write(f"{PROGRAM} {__version__}\n")
        raise typer.Exit


def _stub() -> None:
    raise AssertionError("only named commands run, and those are loaded")


def _summary(path: Path) -> str:
    """The first line of a file's docstring, read without importing it."""
    with suppress(OSError), path.open(encoding="utf-8") as file:
        return file.readline().strip().strip('"')
    return ""


def _no_such_command(name: str, known: list[str]) -> InputError:
    from difflib import get_close_matches

    close = get_close_matches(name, known, 3)
    return InputError(
        f"no command '{name}'",
        why=f"did you mean {' or '.join(close)}?" if close else f"there is {', '.join(known)}",
        hint=f"{PROGRAM} {close[0]} --help" if close else f"{PROGRAM} --help",
    )


def _in_flags(error: QuillError, arguments: list[str]) -> QuillError:
    """Turn the settings and parameters that an error names into the flags of the command that raised it."""
    from quill.cli import _flags

    flags: dict[str, str] = {}
    name = _dashes(next((a for a in arguments if not a.startswith("-")), ""))
    if name in commands():
        command: Any = typer.main.get_command(build([name])).commands[name]  # type: ignore[attr-defined]
        for each in getattr(command, "commands", {"": command}).values():
            flags |= _flags.of_command(each.params)
    error.what, error.why = _flags.spell(error.what, flags), _flags.spell(error.why, flags)
    error.hint = _flags.complete(_flags.spell(error.hint, flags), PROGRAM, arguments)
    return error


def _did_you_mean(error: NotFoundError, arguments: list[str]) -> str:
    """The command as it was typed, with each of the close names in the place of the one that is not there."""
    import shlex

    command = next((i for i, a in enumerate(arguments) if not a.startswith("-")), 0)
    for i, typed in enumerate(arguments):
        if i > command and any(f"'{t}'" in error.what for t in (typed, typed.partition(":")[0])):
            lines = [
                shlex.join([PROGRAM, *arguments[:i], name, *arguments[i + 1 :]]) for name in error.close[:3]
            ]
            # A prompt may be long; what it is typed for is not to be lost among its repetitions.
            return " or ".join(lines if sum(map(len, lines)) < _TELLING else lines[:1])
    # It was not typed, as where a config file names it.
    return " or ".join(f"{PROGRAM} show {name}" for name in error.close[:3])


def _usage_error(failure: typer.TyperException) -> InputError:
    """Typer's own refusals in quill's words; told apart by what they carry, as their classes are private."""
    context: Any = getattr(failure, "ctx", None)
    path = context.command_path if context is not None else PROGRAM
    option = getattr(failure, "option_name", None)
    possibilities = getattr(failure, "possibilities", None)
    message = failure.format_message().strip().rstrip(".")
    message = message.replace("Value error, ", "")
    what, why = message[:1].lower() + message[1:], ""
    if possibilities is not None and option:
        what = f"no flag '{option}'"
        close = " or ".join(possibilities)
        why = f"did you mean {close}?" if close else f"{path} does not take it"
        if path == PROGRAM:
            why = "flags come after the command, as in: quill list --json"
    elif message.startswith("Missing command"):
        what, why = f"'{path}' needs one more word", f"there is {', '.join(context.command.commands)}"
    return InputError(what.replace("\n\t", " "), why=why, hint=f"{path} --help")


def _is_out_of_memory(failure: BaseException) -> bool:
    """Python's, CUDA's, and torch's allocator on the CPU, which has no class of its own."""
    if isinstance(failure, MemoryError) or type(failure).__name__ == "OutOfMemoryError":
        return True
    words = ("can't allocate memory", "not enough memory", "out of memory")
    return isinstance(failure, RuntimeError) and any(w in str(failure) for w in words)


def _rich_help() -> bool:
    """Typer would draw for GitHub's runners in a pipe too; here only a terminal, or who asks, gets it."""
    env = os.environ
    if env.get("TERM") == "dumb" and not env.get("FORCE_COLOR"):
        return False
    return is_terminal(sys.stdout) or takes_colour(sys.stdout, env)


def _dashes(text: str) -> str:
    return text.replace("_", "-")


def _speak_utf8() -> None:
    """Text is UTF-8 whatever the locale says; what no UTF-8 can hold shows as its escape."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, ValueError):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")  # type: ignore[union-attr]


def _open_closed_streams() -> None:
    """A process started with a standard stream closed would get its first file in that place."""
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
