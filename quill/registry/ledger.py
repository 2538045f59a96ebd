"""What is known of a name beyond its versions: aliases, tags, and the next number, in model.json."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from quill import fsio
from quill.errors import CorruptError
from quill.registry import locks, manifest

FILE = "model.json"
_MOST_VERSIONS = 10**9
_BLANK: dict[str, Any] = {"schema": 1, "aliases": {}, "tags": {}, "next_version": 1}


def read(folder: Path) -> dict[str, Any]:
    """What model.json in a model's folder says; empty without one.

    Raises:
        CorruptError: It is damaged. The versions beside it are not.
    """
    path = folder / FILE
    try:
        ledger = manifest.read_object(path)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    following, aliases = ledger.get("next_version", 1), ledger.get("aliases", {})
    numbers = [following, *(aliases.values() if isinstance(aliases, dict) else [None])]
    if any(type(n) is not int or not 1 <= n < _MOST_VERSIONS for n in numbers):
        raise CorruptError(
            f"'{path}' is damaged",
            why="its next_version or an alias is no version number",
            hint="mend it, or delete it: the versions stay, the aliases are lost",
        )
    return ledger


def update(folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Replace model.json by what a function makes of it; changes of several processes follow each other.

    Args:
        folder: The model's folder.
        change: Called with what model.json says; what it returns is written unless it is the same.

    Raises:
        LockedError: Another change does not come to its end.
    """
    with locks.ledger(folder):
        before = _BLANK | read(folder)
        after = change(before)
        if after != before or not (folder / FILE).exists():
            fsio.write_json(folder / FILE, after)


def next_number(folder: Path) -> int:
    """The lowest number that was never given."""
    return int(read(folder).get("next_version", 1))


def reserve(folder: Path, number: int) -> None:
    """Keep a number and all below it from being given again, also once its folder is gone."""
    update(folder, lambda ledger: ledger | {"next_version": max(ledger["next_version"], number + 1)})
