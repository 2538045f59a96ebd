"""The names of models, and references to their versions.

`NAME[:vN|:ALIAS]`; each part follows the rules of `quill.naming`.
"""

from __future__ import annotations

import os
import re
from typing import NamedTuple

from quill import naming
from quill.errors import InputError

LATEST = "latest"
_VERSION = re.compile(r"v([1-9][0-9]{0,8})")
_NUMBERED = re.compile(r"[vV]?[0-9]+")


class Reference(NamedTuple):
    """A model's name, and which of its versions: a number, an alias, or neither for the newest."""

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
        InputError: It is not a reference.
    """
    name, colon, which = text.partition(":")
    check_name(name)
    if not colon:
        return Reference(name)
    if number := version_number(which):
        return Reference(name, version=number)
    if _NUMBERED.fullmatch(which):
        raise InputError(
            f"{naming.quoted(which)} is not a version",
            why="versions are v1, v2, v3 and so on",
            hint=f"quill show {name}",
        )
    return Reference(name, alias=check_alias(which))


def is_path(text: str) -> bool:
    """Whether a reference is a path rather than a name: it contains a slash or starts with a dot."""
    return "/" in text or os.sep in text or text.startswith(".")


def version_number(text: str) -> int | None:
    """The number in "v4"; None for a text that is not a version."""
    found = _VERSION.fullmatch(text)
    return int(found[1]) if found else None


def check_name(name: str) -> str:
    """Return a name if it can be a model's.

    Raises:
        InputError: It breaks a rule of names.
    """
    return naming.check(name, "model")


def check_alias(alias: str) -> str:
    """Return an alias if it follows the rules of names.

    Raises:
        InputError: It breaks one.
    """
    return naming.check(alias, "alias")
