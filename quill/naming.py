"""What anything kept by name may be called: models, their aliases, datasets.

The grammar is narrow on purpose: a name is a folder on every filesystem, a word in every shell and a
part of a URL, and two names never differ by case or look alike.
"""

from __future__ import annotations

import re

from quill.errors import InputError

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_RULE = "a name is 1 to 64 of a-z 0-9 . _ - and starts with a letter or digit"
_DEVICES = {"con", "prn", "aux", "nul", *(f"{p}{n}" for p in ("com", "lpt") for n in range(10))}


def check(text: str, kind: str) -> str:
    """Return the text if it may be a name.

    Args:
        text: What was given.
        kind: What it would name, for the message: "model", "alias", "dataset".

    Raises:
        InputError: It may not; the message says which rule it breaks.
    """
    broken = _broken_rule(text)
    if broken is None:
        return text
    better = re.sub(r"[^a-z0-9._-]+", "-", text.lower()).strip("-._")[:64]
    better = re.sub(r"\.{2,}", ".", better).rstrip(".")
    usable = better != text and _broken_rule(better) is None
    raise InputError(
        f"{quoted(text)} cannot be the name of a{'n' if kind == 'alias' else ''} {kind}",
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
        return f"it holds {quoted(odd)} (U+{ord(odd):04X}) where that may not stand; {_RULE}"
    if ".." in text:
        return "two dots in a row mean the folder above"
    if text.endswith("."):
        return "a trailing dot is dropped by some filesystems"
    if text.split(".")[0] in _DEVICES:
        return "Windows keeps that name for a device"
    return None


def quoted(text: str) -> str:
    """Quoted so that look-alikes, control characters and endless names show for what they are."""
    shown = ascii(text)
    return shown if len(shown) <= 80 else shown[:60] + "...'"
