"""Turn any exception into an error to print: flags instead of settings, and one next step."""

from __future__ import annotations

import errno
import os
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

import typer

from quill.cli import _flags
from quill.errors import (
    InputError,
    NotFoundError,
    QuillError,
    ResourceError,
    is_out_of_memory,
    shorten,
)

PROGRAM = "quill"

# Words of other tools, and quill's command for it.
_COMMANDS = {
    "run": "sample",
    "generate": "sample",
    "complete": "sample",
    "predict": "sample",
    "infer": "sample",
    "info": "show",
    "inspect": "show",
    "describe": "show",
    "history": "show --lineage",
    "path": "show --path",
    "delete": "rm",
    "remove": "rm",
    "uninstall": "rm",
    "rename": "mv",
    "move": "mv",
    "copy": "cp",
    "clone": "cp",
    "tag": "alias set",
    "download": "import",
    "pull": "import",
    "load": "import",
    "convert": "export",
    "save": "export",
    "fit": "train",
    "finetune": "train --from",
    "fine-tune": "train --from",
    "resume": "train --resume must",
    "evaluate": "eval",
    "score": "eval",
    "test": "eval",
    "tokenize": "prepare",
    "encode": "prepare",
    "diff": "compare",
    "models": "list",
    "ps": "list",
    "tail": "logs",
    "log": "logs",
    "clean": "gc",
    "prune": "gc",
    "check": "verify",
    "init": "config init",
    "settings": "config table",
    "options": "config table",
    "env": "doctor",
    "diagnose": "doctor",
    "autocomplete": "completion",
    "man": "help",
    "docs": "help",
    "version": "--version",
}
# Flags of other tools, and what they mean here: a flag, or an argument in capitals, of whichever command.
_FLAGS = {
    "temp": "temperature",
    "t": "temperature",
    "lr": "learning-rate",
    "iters": "iters max-iters",
    "max-iters": "max-iters iters",
    "iterations": "max-iters iters",
    "steps": "max-iters iters",
    "max-steps": "max-iters iters",
    "epochs": "max-iters",
    "num-epochs": "max-iters",
    "init-from": "from",
    "checkpoint": "from REF",
    "resume-from": "from",
    "data": "data SOURCE",
    "source": "data SOURCE",
    "text": "data SOURCE PROMPT",
    "prompt": "prompt PROMPT",
    "dataset": "data SOURCE",
    "data-path": "data SOURCE",
    "input": "data SOURCE PROMPT",
    "file": "data SOURCE prompt-file",
    "layers": "n-layer",
    "n-layers": "n-layer",
    "num-layers": "n-layer",
    "heads": "n-head",
    "n-heads": "n-head",
    "num-heads": "n-head",
    "d-model": "n-embd",
    "hidden-size": "n-embd",
    "embedding-size": "n-embd",
    "context": "block-size",
    "context-length": "block-size",
    "ctx": "block-size",
    "seq-len": "block-size",
    "max-length": "max-new-tokens block-size",
    "max-tokens": "max-new-tokens",
    "length": "max-new-tokens",
    "tokens": "max-new-tokens",
    "n": "num-samples",
    "k": "top-k",
    "p": "top-p",
    "output": "out plot",
    "dest": "out",
    "directory": "out",
    "to": "format",
    "type": "format",
    "model": "from REF",
    "ref": "REF",
    "reference": "REF",
    "name": "name REF NAME",
    "model-name": "name REF",
    "overwrite": "force",
    "f": "force",
    "grad-accum": "gradient-accumulation-steps",
    "accumulation-steps": "gradient-accumulation-steps",
    "warmup": "warmup-iters",
    "warmup-steps": "warmup-iters",
    "wd": "weight-decay",
    "clip": "grad-clip",
    "eval-every": "eval-interval",
    "eval-steps": "eval-interval",
    "early-stopping": "patience",
    "time-limit": "max-minutes",
    "timeout": "max-minutes",
    "gpu": "device",
    "cuda": "device",
    "quantize": "dtype",
    "precision": "dtype",
    "fp16": "dtype",
    "bf16": "dtype",
    "all": "all-versions",
    "recursive": "all-versions",
}
_NO_ROOM = {
    getattr(errno, name, None) for name in ("ENOSPC", "EDQUOT", "EACCES", "EPERM", "EROFS", "EIO", "ENOMEM")
} - {None}
# Beyond this many characters a hint gives one suggestion instead of three.
_LONGEST_HINT = 160


# Imports every command, and returns them by name.
Commands = Callable[[], Mapping[str, Any]]


def explain(
    failure: Exception, arguments: Sequence[str] = (), params: Iterable[Any] = (), commands: Commands = dict
) -> QuillError:
    """Turn any exception into an error to print.

    Args:
        failure: What was raised.
        arguments: What was typed after the program's name.
        params: The parameters of the command that ran.
        commands: Called where another command may have what was asked for.
    """
    params = list(params)
    error = _translate(failure, params, arguments, commands)
    flags = _flags.of_command(params)
    error.what, error.why = _flags.spell(error.what, flags), _flags.spell(error.why, flags)
    error.hint = _flags.complete(_flags.spell(error.hint, flags), PROGRAM, arguments)
    if isinstance(error, NotFoundError) and error.close and not error.hint:
        error.hint = _did_you_mean(error, arguments)
    return error


def no_such_command(name: str, known: Sequence[str], rest: Sequence[str] = ()) -> InputError:
    """The error for a command that does not exist.

    Args:
        name: What was typed.
        known: The commands that exist.
        rest: What was typed after it.
    """
    what = f"no command {shorten(name)}"
    meant = _COMMANDS.get(name.lower(), "")
    if meant.startswith("-") or meant.split(" ")[0] in known:
        typed = shlex.join([PROGRAM, *meant.split(), *rest])
        return InputError(what, why=f"quill calls it '{meant}'", hint=typed)
    close = get_close_matches(name, known, 3)
    if close:
        return InputError(
            what, why=f"did you mean {' or '.join(close)}?", hint=shlex.join([PROGRAM, close[0], *rest])
        )
    return InputError(what, why=f"the commands are {', '.join(known)}", hint=f"{PROGRAM} --help")


def _called(arguments: Sequence[str]) -> str:
    """The program and the command that was called."""
    return " ".join([PROGRAM, *[a for a in arguments[:1] if not a.startswith("-")]])


def _translate(
    failure: Exception, params: list[Any], arguments: Sequence[str], commands: Commands
) -> QuillError:
    if isinstance(failure, QuillError):
        return failure
    if isinstance(failure, typer.TyperException):
        return _usage_error(failure, params, arguments, commands)
    if is_out_of_memory(failure):
        return ResourceError(
            "out of memory",
            why=str(failure).partition("\n")[0][:200] or "the system has no memory left",
            hint="set train.micro_batch_size, to less than train.batch_size"
            if "train__micro_batch_size" in {p.name for p in params}
            else "close other programs, or use a smaller model",
        )
    if isinstance(failure, OSError) and failure.errno in _NO_ROOM:
        return ResourceError(
            f"cannot use '{failure.filename}'" if failure.filename else "the system refused",
            why=failure.strerror or str(failure),
            hint=f"{PROGRAM} doctor",
        )
    if isinstance(failure, OSError) and failure.errno == errno.ENAMETOOLONG:
        name = shorten(os.path.basename(os.fsdecode(failure.filename or "")))
        return InputError(f"the path of {name} is too long", why="the filesystem allows no such name")
    if isinstance(failure, UnicodeEncodeError) and (wrong := _first_lone(arguments)):
        return InputError(f"the argument {shorten(wrong)} is not text", why="it contains a lone surrogate")
    return QuillError(
        f"internal error: {type(failure).__name__}: {failure}",
        why="this is a bug in quill; your models are unchanged",
        hint="run the same command with --debug and report the traceback to quill's issue tracker",
    )


def _first_lone(arguments: Sequence[str]) -> str | None:
    """The first argument that cannot be written anywhere, because it has a lone surrogate."""
    return next((a for a in arguments if any("\ud800" <= c <= "\udfff" for c in a)), None)


def _usage_error(
    failure: typer.TyperException, params: list[Any], arguments: Sequence[str], commands: Commands
) -> InputError:
    """Typer's refusals in quill's words, told apart by their attributes: their classes are private."""
    context: Any = getattr(failure, "ctx", None)
    path = context.command_path if context is not None else _called(arguments)
    option = getattr(failure, "option_name", None)
    param = getattr(failure, "param", None)
    message = failure.format_message().strip().rstrip(".").replace("Value error, ", "").replace("\n\t", " ")
    hint = f"{path} --help"
    if option and hasattr(failure, "possibilities"):
        command = context.command if context is not None else None
        typed = (a.partition("=")[0] for a in arguments)
        option = next((a for a in typed if a.startswith("-") and _flags.normal(a) == option), option)
        return _no_such_flag(option, command.params if command else params, path, commands)
    if message.startswith("Missing command"):
        return InputError(
            f"'{path}' requires a subcommand", why=_choices(context.command.commands), hint=hint
        )
    if message.startswith("No such command") and context is not None:
        name = message.partition("'")[2].partition("'")[0]
        return InputError(
            f"no command {shorten(name)} in '{path}'", why=_choices(context.command.commands), hint=hint
        )
    if message.startswith("Missing ") and param is not None:
        what = f"missing {param.metavar or param.name}"
        return InputError(what, why=f"{path} requires {'it' if param.metavar else what}", hint=hint)
    return InputError(message[:1].lower() + message[1:], hint=hint)


def _no_such_flag(flag: str, params: Iterable[Any], path: str, commands: Commands) -> InputError:
    """The error for an unknown flag: what means the same here, what is spelled alike, or who has it."""
    params = list(params)
    known = {o.removeprefix("--") for p in params for o in (*p.opts, *p.secondary_opts) if o.startswith("--")}
    arguments = {p.metavar for p in params if p.param_type_name == "argument"}
    word = _flags.normal(flag.strip("-").lower())
    meanings = _FLAGS.get(word, word).split()
    if "epoch" in word and "max-iters" in known:
        why = "quill counts optimizer steps (--max-iters), not epochs; --dry-run shows both"
    elif meant := next((m for m in meanings if m in known), None):
        why = f"quill calls it --{meant}"
    elif meant := next((m for m in meanings if m in arguments), None):
        why = f"it is an argument without a flag: {path} {meant}"
    elif meanings and (where := _elsewhere(meanings[0], commands())):
        why = f"{path} has no --{meanings[0]}, but {where} has"
    elif close := _close_flags(word, known):
        why = f"did you mean {' or '.join(f'--{name}' for name in close)}?"
    else:
        why = f"{path} has no such flag"
    return InputError(f"no flag {shorten(flag)}", why=why, hint=f"{path} --help")


def _elsewhere(flag: str, commands: Mapping[str, Any]) -> str:
    """The first command that has a flag; empty if none has."""
    for name, command in commands.items():
        if any(f"--{flag}" in p.opts for p in command.params):
            return f"{PROGRAM} {name}"
    return ""


def _close_flags(word: str, known: set[str]) -> list[str]:
    """Flags that begin like a word, are spelled like it, or mean what a word spelled like it means."""
    meanings = {
        other: name
        for other, names in _FLAGS.items()
        for name in reversed(names.split())
        if name in known and len(other) > 2
    }
    meanings |= {name: name for name in known}
    begun = sorted(name for name in known if len(word) > 2 and name.startswith(word))
    alike = [meanings[m] for m in get_close_matches(word, meanings, 3, cutoff=0.75)]
    return list(dict.fromkeys([*begun, *alike]))[:3]


def _choices(names: Iterable[str]) -> str:
    return f"choose from {', '.join(names)}"


def _did_you_mean(error: NotFoundError, arguments: Sequence[str]) -> str:
    """The command as it was typed, with each close name in place of the missing one."""
    command = next((i for i, a in enumerate(arguments) if not a.startswith("-")), 0)
    for i, typed in enumerate(arguments):
        if i > command and any(f"'{t}'" in error.what for t in (typed, typed.partition(":")[0])):
            before, after = arguments[:i], arguments[i + 1 :]
            lines = [shlex.join([PROGRAM, *before, name, *after]) for name in error.close[:3]]
            # A long prompt would be repeated for each name.
            return " or ".join(lines if sum(map(len, lines)) < _LONGEST_HINT else lines[:1])
    return " or ".join(f"{PROGRAM} show {name}" for name in error.close[:3])
