"""What is known of a name beyond its versions: aliases, tags, earlier names and the next number.

It is kept in model.json, which stays when the last version goes: it is the tombstone that keeps a number
from being given twice. Whoever changes it, or takes away what an alias might mean, holds its lock.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from quill import fsio, naming
from quill.errors import CorruptError, InputError, NotFoundError, QuillError, RefusedError
from quill.registry import locks, manifest, names, version

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
    numbers: list[Any] = [ledger.get("next_version", 1)]
    for table in (ledger.get("aliases", {}), ledger.get("formerly", {})):
        numbers += table.values() if isinstance(table, dict) else [None]
    if any(type(n) is not int or not 1 <= n < _MOST_VERSIONS for n in numbers):
        raise CorruptError(
            f"'{path}' is damaged",
            why="its next_version, an alias or a former name has no version number",
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
        amend(folder, change)


def amend(folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """As `update`, for who holds the ledger's lock already."""
    version.refuse_link(folder)
    before = _BLANK | read(folder)
    after = change(before)
    if after != before or not (folder / FILE).exists():
        fsio.write_json(folder / FILE, after)


def next_number(folder: Path) -> int:
    """The lowest number that was never given."""
    return int(read(folder).get("next_version", 1))


def reserve(folder: Path, number: int) -> None:
    """Keep a number and all below it from being given again, also once its folder is gone."""
    update(folder, lambda ledger: reserved(ledger, number))


def reserved(ledger: dict[str, Any], number: int) -> dict[str, Any]:
    """A ledger by which a number and all below it are given."""
    return ledger | {"next_version": max(ledger["next_version"], number + 1)}


def former_holders(root: Path, name: str) -> dict[str, int]:
    """The models that were moved away from a name, and for each the next number that the name had then.

    What is damaged is passed over: a model's fault must not keep another from being made.

    Args:
        root: The registry.
        name: The earlier name.
    """
    found: dict[str, int] = {}
    with fsio.guard(root, "read"), suppress(FileNotFoundError), os.scandir(root) as entries:
        folders = [e for e in entries if not e.name.startswith(".") and e.is_dir(follow_symlinks=False)]
        for entry in folders:
            with suppress(QuillError):
                number = read(Path(entry.path)).get("formerly", {}).get(name)
                found |= {entry.name: number} if number else {}
    return found


def aliases(folder: Path) -> dict[str, int]:
    """The aliases of a model, by name, and the number that each means.

    Raises:
        CorruptError: model.json is damaged.
    """
    return dict(sorted(read(folder).get("aliases", {}).items()))


def check_alias(alias: str) -> str:
    """Return a word if it may be made an alias.

    Raises:
        InputError: It may not: it breaks the rules of names, or means a version already.
    """
    names.check_alias(alias)
    if alias == names.LATEST:
        why = "it always means the newest version"
    elif names.parse(f"x:{alias}").version:
        why = "it is the number of a version"
    else:
        return alias
    raise InputError(f"{naming.quoted(alias)} cannot be an alias", why=why, hint="such as 'champion'")


def set_alias(folder: Path, alias: str, number: int) -> int | None:
    """Let an alias mean a version; one that meant another moves.

    Args:
        folder: The model's folder.
        alias: What to call the version.
        number: The version's.

    Returns:
        The number that it meant before, or None.

    Raises:
        InputError: It cannot be an alias.
        NotFoundError: The version is not complete, or is gone.
    """
    check_alias(alias)
    before: list[int | None] = []

    def change(ledger: dict[str, Any]) -> dict[str, Any]:
        there = version.is_complete(folder / f"v{number}")
        if not there and not (number == 1 and version.is_flat(folder)):
            raise NotFoundError(
                f"'{folder.name}' has no complete version v{number}",
                why="it was removed or renamed meanwhile, or never finished",
                hint=f"quill list --all-versions {folder.name}",
            )
        before.append(ledger["aliases"].get(alias))
        return ledger | {"aliases": ledger["aliases"] | {alias: number}}

    update(folder, change)
    return before[0]


def remove_alias(folder: Path, alias: str) -> int | None:
    """Take an alias away; the version stays.

    Returns:
        The number that it meant; None where there was no such alias.
    """
    before: list[int | None] = []

    def change(ledger: dict[str, Any]) -> dict[str, Any]:
        before.append(ledger["aliases"].get(alias))
        return ledger | {"aliases": {a: n for a, n in ledger["aliases"].items() if a != alias}}

    # Without one there is nothing to change, and no lock to leave behind.
    if alias in aliases(folder):
        update(folder, change)
    return before[0] if before else None


@contextmanager
def releasing(folder: Path, number: int) -> Iterator[None]:
    """Take a version away in here: no alias means it, none comes to mean it, and its number stays taken.

    Args:
        folder: The model's folder.
        number: The version's.

    Raises:
        RefusedError: An alias means it.
    """
    with locks.ledger(folder):
        refuse_aliased(folder, number)
        amend(folder, lambda ledger: reserved(ledger, number))
        yield


def refuse_aliased(folder: Path, number: int) -> None:
    """Raise RefusedError for a version that an alias means."""
    meaning = [f"{folder.name}:{a}" for a, n in aliases(folder).items() if n == number]
    if meaning:
        also = f", and so do {', '.join(meaning[1:])}" if meaning[1:] else ""
        raise RefusedError(
            f"'{folder.name}:v{number}' has an alias",
            why=f"'{meaning[0]}' means it{also}",
            hint=f"quill alias rm {' '.join(meaning)}",
        )
