"""What a model may be called, and what a reference to one means.

`NAME[:vN|:ALIAS]`. The grammar is narrow on purpose: a name is a folder on every filesystem, a word in
every shell and a part of a URL, and two names never differ by case or look alike.
"""

from __future__ import annotations

import os
import re
from typing import NamedTuple

from quill.errors import InputError

LATEST = "latest"
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_VERSION = re.compile(r"v([1-9][0-9]{0,8})")
_NUMBERED = re.compile(r"[vV]?[0-9]+")
_RULE = "a name is 1 to 64 of a-z 0-9 . _ - and starts with a letter or digit"
_DEVICES = {"con", "prn", "aux", "nul", *(f"{p}{n}" for p in ("com", "lpt") for n in range(10))}


class Reference(NamedTuple):
    """A name, and which of its versions: a number, an alias, or neither for the newest."""

    name: str
    version: int | None = None
    alias: str | None = None

    def __str__(self) -> str:
        which = f"v{self.version}" if self.version else self.alias
        return f"{self.name}:{which}" if which else self.name


def parse(text: str) -> Reference:
    """Read a reference.

    Args:
        text: Such as "shakespeare", "shakespeare:v4" or "shakespeare:champion".

    Raises:
        InputError: It is not one.
    """
    name, colon, which = text.partition(":")
    check_name(name)
    if not colon:
        return Reference(name)
    if number := version_number(which):
        return Reference(name, version=number)
    if _NUMBERED.fullmatch(which):
        raise InputError(
            f"no version is called {_quoted(which)}",
            why="versions are v1, v2, v3 and so on",
            hint=f"quill show {name}",
        )
    return Reference(name, alias=check_alias(which))


def is_path(text: str) -> bool:
    """Whether a reference is a folder rather than a name: it holds a slash or starts with a dot."""
    return "/" in text or os.sep in text or text.startswith(".")


def version_number(text: str) -> int | None:
    """The number in "v4", or None when the text is not a version."""
    found = _VERSION.fullmatch(text)
    return int(found[1]) if found else None


def check_name(name: str) -> str:
    """Return the name if it may be a model's.

    Raises:
        InputError: It may not; the message says which rule it breaks.
    """
    return _check(name, "model")


def check_alias(alias: str) -> str:
    """Return the alias if it may be one; it is held to the rules of names.

    Raises:
        InputError: It may not.
    """
    return _check(alias, "alias")


def _check(text: str, kind: str) -> str:
    broken = _broken_rule(text)
    if broken is None:
        return text
    better = re.sub(r"[^a-z0-9._-]+", "-", text.lower()).strip("-._")[:64]
    better = re.sub(r"\.{2,}", ".", better).rstrip(".")
    usable = better != text and _broken_rule(better) is None
    raise InputError(
        f"{_quoted(text)} cannot be the name of a{'n' if kind == 'alias' else ''} {kind}",
        why=broken,
        hint=f"such as '{better}'" if usable else "",
    )


def _broken_rule(text: str) -> str | None:
    if not text:
        return f"it is empty; {_RULE}"
    if len(text) > 64:
        return f"it has {len(text)} characters; {_RULE}"
    if not _NAME.fullmatch(text):
        odd = next((c for c in text if not re.match(r"[a-z0-9._-]", c)), text[0])
        return f"it holds {_quoted(odd)} (U+{ord(odd):04X}) where that may not stand; {_RULE}"
    if ".." in text:
        return "two dots in a row mean the folder above"
    if text.endswith("."):
        return "a trailing dot is dropped by some filesystems"
    if text.split(".")[0] in _DEVICES:
        return "Windows keeps that name for a device"
    return None


def _quoted(text: str) -> str:
    """Quote so that look-alikes, control characters and endless names show for what they are."""
    shown = ascii(text)
    return shown if len(shown) <= 80 else shown[:60] + "...'"
