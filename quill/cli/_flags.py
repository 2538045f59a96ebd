"""Spell settings and parameters as flags: the library says `train.device=auto`, a shell `--device auto`."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

# A dotted path that may have a value, or a keyword argument. Quoted text is a value from a file: it stays.
_VALUE = r""""[^"]*"|'[^']*'|(?:\.{0,2}[\w:/+-]+)+"""
_NAMED = re.compile(
    r"""(?<![\w.'"/=?&-])
    (?: (?P<path>(?:data|model|train|sample)\.[a-z][a-z0-9_]*) (?:=(?P<set>VALUE))? (?!=|\.?\w)
      | (?P<name>[a-z][a-z_]*) = (?P<to>VALUE)? (?!=|\w) )""".replace("VALUE", _VALUE),
    re.VERBOSE,
)
_FLAGS_ALONE = re.compile(r"(?:set )?((?:--[a-z][a-z-]*(?: (?:'[^']*'|[^\s-]\S*))?,? ?)+)")
# Flags that other tools spell so, and that mean exactly the same here.
_SAME = {"temp": "temperature", "lr": "learning-rate", "init-from": "from"}
_OFF = ("false", "False")
_ON = ("true", "True")
_UNSET = ("none", "None", "null")
# A hint longer than this repeats a prompt or a list of files, and loses the flag among them.
_LONGEST_HINT = 160


def normal(name: str) -> str:
    """Spell a flag or a command as quill does: with dashes, and in its own word for another tool's."""
    dashes = name[: len(name) - len(name.lstrip("-"))]
    word = name.lstrip("-").replace("_", "-")
    return dashes + _SAME.get(word, word)


def of_setting(name: str, extra: Any) -> str:
    """The flag of a setting, without dashes.

    Args:
        name: The field's name.
        extra: The field's `json_schema_extra`.
    """
    chosen = extra.get("flag") if isinstance(extra, dict) else None
    return str(chosen or name).replace("_", "-")


def of_command(params: Iterable[Any]) -> dict[str, str]:
    """Flags by the Python name of the parameter, for the parameters of one Typer command."""
    flags: dict[str, str] = {}
    for param in params:
        long = [o for o in param.opts if o.startswith("--")]
        if long:
            flags |= {param.name: long[0], long[0].strip("-").replace("-", "_"): long[0]}
    return flags


def spell(text: str, flags: Mapping[str, str]) -> str:
    """Replace settings and keyword arguments in a message by flags.

    Args:
        text: The message.
        flags: Flags of the command that was called, by parameter name. Settings and keyword arguments that it
            has no flag for stay as they are.
    """
    own = set(flags.values())

    def replace(found: re.Match[str]) -> str:
        path, value = found["path"], found["set"] if found["path"] else found["to"] or found["name"].upper()
        flag, kind = _settings().get(path, ("", None)) if path else (flags.get(found["name"], ""), None)
        if not flag or (path and flag not in own):
            return found[0]
        if value is None:
            return flag
        value = value.strip("\"'")
        switch = kind is bool or (not path and value in ("True", "False"))
        if switch and value in _ON:
            return flag
        if switch and value in _OFF:
            return f"--no-{flag.removeprefix('--')}"
        return f"{flag} {'none' if value in _UNSET else shlex.quote(value)}"

    return _NAMED.sub(replace, text)


def complete(hint: str, program: str, arguments: Sequence[str]) -> str:
    """Make a hint of flags alone the command as it was typed, with those flags.

    Args:
        hint: Any hint, already spelled in flags.
        program: What the command is called.
        arguments: What was typed after it.
    """
    found = _FLAGS_ALONE.fullmatch(hint)
    if not found or not arguments:
        return hint
    added = [word.removesuffix(",") for word in shlex.split(found[1])]
    names = {_plain(a) for a in added if a.startswith("--")}
    kept: list[str] = []
    rest = list(arguments)
    while rest and rest[0] != "--":
        word = rest.pop(0)
        if not word.startswith("--") or _plain(word) not in names:
            kept.append(word)
        elif "=" not in word and f"--{_plain(word)}" in added and rest and not rest[0].startswith("-"):
            at = added.index(f"--{_plain(word)}") + 1
            if at < len(added) and not added[at].startswith("--"):
                rest.pop(0)
    whole = shlex.join([program, *kept, *added, *rest])
    return whole if len(whole) <= _LONGEST_HINT else shlex.join(added)


def _plain(flag: str) -> str:
    return flag.partition("=")[0].strip("-").replace("_", "-").removeprefix("no-")


def _settings() -> dict[str, tuple[str, type | None]]:
    """Flag and type by dotted path; the type matters only for switches."""
    from quill.config.reading import plain_type
    from quill.config.settings import SECTIONS, SampleConfig, Section

    sections: dict[str, type[Section]] = {**SECTIONS, "sample": SampleConfig}
    return {
        f"{section}.{name}": (f"--{of_setting(name, info.json_schema_extra)}", plain_type(info.annotation)[0])
        for section, model in sections.items()
        for name, info in model.model_fields.items()
    }
