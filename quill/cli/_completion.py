"""What a shell is told when somebody presses Tab: commands, flags, choices, and what the registry holds.

The shell's part is a script of a few lines, from `quill completion bash` or from
`_QUILL_COMPLETE=source_bash quill`. It hands over the line's words in COMP_WORDS, one on each line, and
in COMP_CWORD the number of the one at the cursor, as bash counts them. What a value may be is read off
its metavar: REF is a model, NAME a model's name, a|b|c one of those. For anything else nothing is
answered, and the shell offers files.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from quill.errors import InputError, QuillError

SHELLS = ("bash", "zsh", "fish")

# A candidate and what it is.
Candidate = tuple[str, str]

# What may follow the name of a model, by the metavar of a value that begins with one.
_AFTER_NAME: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("REF", "REF1", "REF2", "FILE|REF"), ("version", "alias")),
    **dict.fromkeys(("NAME", "GLOB"), ()),
    "NAME:ALIAS": ("alias",),
}
# Commands to which a version in progress means something.
_OF_DRAFTS = {"show", "logs", "compare", "rm", "mv", "verify", "gc", "list", "ls"}
_LONGEST_HELP = 60

_SCRIPTS = {
    "bash": r"""_quill_completion() {
    local IFS=$'\n'
    COMPREPLY=( $( env COMP_WORDS="${COMP_WORDS[*]}" COMP_CWORD="$COMP_CWORD" \
        _QUILL_COMPLETE=complete_bash "$1" 2>/dev/null ) )
}
complete -o default -F _quill_completion quill
""",
    "zsh": r"""#compdef quill
_quill() {
    local -a found
    found=("${(@f)$(env COMP_WORDS="${(F)words}" COMP_CWORD=$((CURRENT - 1)) \
        _QUILL_COMPLETE=complete_zsh "${words[1]}" 2>/dev/null)}")
    if [[ -n "${found[*]}" ]]; then
        _describe -V quill found
    else
        _files
    fi
}
if [[ "${funcstack[1]}" == _quill ]]; then
    _quill "$@"
else
    compdef _quill quill
fi
""",
    "fish": r"""function __quill_complete
    set -l before (commandline -opc)
    set -l found (env COMP_WORDS=(string join \n -- $before (commandline -ct) | string collect) \
        COMP_CWORD=(count $before) _QUILL_COMPLETE=complete_fish $before[1] 2>/dev/null)
    if set -q found[1]
        string join \n -- $found
    else
        __fish_complete_path (commandline -ct)
    end
end
complete -c quill -f -a '(__quill_complete)'
""",
}


def script(shell: str) -> str:
    """What a shell has to read so that it asks quill.

    Raises:
        InputError: quill has no script for that shell.
    """
    if shell not in _SCRIPTS:
        raise InputError(f"no completion for '{shell}'", why=f"there is {', '.join(SHELLS)}")
    return _SCRIPTS[shell]


def answer(question: str, env: Mapping[str, str], load: Callable[[str | None], Any]) -> str:
    """What a shell that asks is told: its script, or a candidate on each line.

    Nothing that is wrong with the registry or the line is the business of somebody who is still typing:
    what can be found is answered, and no word is said of the rest.

    Args:
        question: "source_bash" for the script, "complete_bash" for what could be typed; zsh and fish alike.
        env: The environment, with the line in it.
        load: Makes the group of commands, the one of a name whole.

    Raises:
        InputError: It asks for the script of a shell that quill has none for.
    """
    task, _, shell = question.partition("_")
    if task == "source":
        return script(shell)
    with suppress(Exception):
        words, given = _split(env)
        found = [c for c in _candidates(words, load) if c[0].startswith(words[-1])]
        return "".join(f"{_written(value, help, shell, given)}\n" for value, help in dict(found).items())
    return ""


def _split(env: Mapping[str, str]) -> tuple[list[str], str]:
    """The words up to the cursor, without the program's, and how much of the last the shell keeps.

    bash takes ":" and "=" for words of their own, and replaces only what is after them.
    """
    text, at = env["COMP_WORDS"], int(env["COMP_CWORD"])
    pieces = text.split("\n") if "\n" in text else text.split()
    pieces = [*pieces, ""][1 : at + 1]
    words: list[str] = []
    kept = ""
    for i, piece in enumerate(pieces):
        before = pieces[i - 1] if i else ""
        if words and (piece == ":" or before == ":"):
            words[-1] += piece
            kept = words[-1].rpartition(":")[0] + ":"
        elif piece == "=" and words and words[-1].startswith("-"):
            if i == len(pieces) - 1:
                words.append("")
        else:
            words.append(piece)
            kept = ""
    return words or [""], kept


def _written(value: str, help: str, shell: str, kept: str) -> str:
    """A candidate as the shell's script reads it."""
    if shell == "fish":
        return f"{value}\t{help}" if help else value
    if shell == "zsh":
        # What `_describe` takes apart at the first colon that has no backslash.
        escaped = value.replace("\\", "\\\\").replace(":", "\\:")
        return f"{escaped}:{help}" if help else escaped
    return value.removeprefix(kept)


def _candidates(words: list[str], load: Callable[[str | None], Any]) -> Iterator[Candidate]:
    """What could stand in the place of the last word, whether or not it begins like it."""
    group = load(next((w for w in words[:-1] if not w.startswith("-")), None))
    command, name, expecting, given, flags = group, "", None, 0, True
    for word in words[:-1]:
        if expecting is not None:
            expecting = None
        elif flags and word == "--":
            flags = False
        elif flags and word.startswith("-") and word != "-":
            flag, joined, _ = word.partition("=")
            option = _option(command, flag)
            expecting = option if option is not None and _takes_value(option) and not joined else None
        elif hasattr(command, "commands"):
            command, name = command.commands[word], name or word
        else:
            given += 1
    last = words[-1]
    if expecting is not None:
        yield from _values(expecting, words, name)
    elif flags and last.startswith("-"):
        flag, joined, _ = last.partition("=")
        if joined:
            option = _option(command, flag)
            yield from (
                (f"{flag}={v}", h) for v, h in _values(option, [*words[:-1], last[len(flag) + 1 :]], name)
            )
        else:
            yield from _flags(command)
    elif hasattr(command, "commands"):
        yield from ((n, _short(c.get_short_help_str(_LONGEST_HELP))) for n, c in command.commands.items())
    else:
        arguments = [p for p in command.params if p.param_type_name == "argument"]
        if arguments and (given < len(arguments) or arguments[-1].nargs == -1):
            yield from _values(arguments[min(given, len(arguments) - 1)], words, name)


def _option(command: Any, flag: str) -> Any:
    """The option of a flag however it is spelled, or None."""
    flag = flag.replace("_", "-") if flag.startswith("--") else flag
    return next((p for p in command.params if flag in (*p.opts, *p.secondary_opts)), None)


def _takes_value(option: Any) -> bool:
    return not (getattr(option, "is_flag", False) or getattr(option, "count", False))


def _flags(command: Any) -> Iterator[Candidate]:
    for param in command.params:
        if param.param_type_name == "option" and not param.hidden:
            for flag in (*param.opts, *param.secondary_opts):
                if flag.startswith("--"):
                    yield flag, _short(param.help or "")
    yield "--help", "Show this message and exit."


def _values(param: Any, words: list[str], command: str) -> Iterator[Candidate]:
    """What a parameter may be, as far as its metavar tells."""
    metavar = (param.metavar or "") if param is not None else ""
    yield from ((choice, "") for choice in metavar.split("|") if choice.islower())
    if metavar in _AFTER_NAME:
        from quill.registry import store

        root = store.locate(_registry_flag(words)).root
        for value in _models(root, words[-1], _AFTER_NAME[metavar], command in _OF_DRAFTS):
            yield value, ""


def _registry_flag(words: list[str]) -> str | None:
    """What `--registry` gives somewhere in the line."""
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if word == "--registry":
            return following or None
        if word.startswith("--registry="):
            return word.partition("=")[2] or None
    return None


def _models(root: Path, typed: str, after: Container[str], drafts: bool) -> Iterator[str]:
    """Names in a registry; of a name that is typed in full, its versions and aliases too.

    Only folders are looked at, and nothing in them is read but the aliases.

    Args:
        root: The registry.
        typed: What the names begin with.
        after: What follows them: "version", "alias".
        drafts: Whether a version in progress counts.
    """
    from quill.registry import aliases, names
    from quill.registry import folder as folders

    name, colon, _ = typed.partition(":")
    for entry in sorted(os.listdir(root)):
        if not entry.startswith(typed) and entry != name:
            continue
        with suppress(QuillError, OSError):
            folder = root / names.check_name(entry)
            numbers = sorted(filter(None, map(names.version_number, os.listdir(folder))))
            complete = [n for n in numbers if folders.is_published(folder / f"v{n}")]
            complete += [1] if 1 not in numbers and folders.is_flat(folder) else []
            numbers = numbers if drafts else complete
            if not numbers:
                # A name whose versions were all removed is there only to keep its numbers.
                continue
            if not colon:
                yield entry
            if entry == name:
                if "version" in after:
                    yield from (f"{entry}:v{n}" for n in sorted({*numbers, *complete}))
                    yield from [f"{entry}:{names.LATEST}"] if complete else []
                if "alias" in after:
                    known = aliases.read(folder)["aliases"]
                    yield from (f"{entry}:{names.check_alias(a)}" for a in known)


def _short(help: str) -> str:
    """The beginning of a help text, in one line."""
    text = " ".join(help.split())
    return text if len(text) <= _LONGEST_HELP else text[: _LONGEST_HELP - 3].rstrip() + "..."
