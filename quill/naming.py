"""The names of models, aliases and datasets.

The grammar is narrow, so that a name is a valid folder on every filesystem, one word in every shell and a
valid part of a URL, and no two names differ only by case or look alike.
"""

from __future__ import annotations

import re

from quill.errors import InputError

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_RULE = "a name has 1 to 64 of the characters a-z 0-9 . _ - and starts with a letter or digit"
_DEVICES = {"con", "prn", "aux", "nul", *(f"{p}{n}" for p in ("com", "lpt") for n in range(10))}


def check(text: str, kind: str) -> str:
    """Return a name unchanged if it is valid.

    Args:
        text: The name.
        kind: What it names, for the message: "model", "alias", "dataset".

    Raises:
        InputError: The name is invalid; the message has the rule it breaks.
    """
    broken = _broken_rule(text)
    if broken is None:
        return text
    better = re.sub(r"[^a-z0-9._-]+", "-", text.lower()).strip("-._")[:64]
    better = re.sub(r"\.{2,}", ".", better).rstrip(".")
    usable = better != text and _broken_rule(better) is None
    raise InputError(
        f"{quoted(text)} is not a valid {kind} name",
        why=broken,
        hint=f"use '{better}'" if usable else "",
    )


def _broken_rule(text: str) -> str | None:
    if not text:
        return f"it is empty; {_RULE}"
    if len(text) > 64:
        return f"it has {len(text)} characters; {_RULE}"
    if not _NAME.fullmatch(text):
        odd = next((c for c in text if not re.match(r"[a-z0-9._-]", c)), text[0])
        return f"{quoted(odd)} (U+{ord(odd):04X}) is not allowed there; {_RULE}"
    if ".." in text:
        return "it contains '..', which means the folder above"
    if text.endswith("."):
        return "it ends with a dot, which some filesystems drop"
    if text.split(".")[0] in _DEVICES:
        return "Windows reserves that name for a device"
    return None


def quoted(text: str) -> str:
    """Quote text for a message, escaping everything but ASCII, so that look-alikes differ, and cut it."""
    shown = ascii(text)
    return shown if len(shown) <= 80 else shown[:60] + "...'"
