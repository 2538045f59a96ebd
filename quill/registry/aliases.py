"""A model's aliases, tags, former names and next version number, kept in its model.json and in a copy of it.

model.json stays when the last version is removed, so that no number is used twice. To change it, or to
remove a version that an alias may name, a process takes its lock. While it is missing or damaged no version
is removed; `restore` writes it again from the copy.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypedDict, cast

from quill import fsio, naming
from quill.errors import CorruptError, InputError, NotFoundError, QuillError, RefusedError
from quill.registry import locks, manifest, migrations, names
from quill.registry.folder import exists, is_flat, is_published, refuse_link, scan

FILE, COPY = "model.json", "model.copy.json"
_MOST_VERSIONS = 10**9


class Record(TypedDict):
    """The content of a model.json, validated.

    Attributes:
        aliases: The version number that each alias names.
        tags: Written by earlier versions of quill; kept.
        next_version: The lowest number that was never used.
        formerly: The model's former names, and the next number under each.
        removing: The files of a model put there by hand that is being removed.
        aliases_lost: Whether there may have been aliases that this record does not have: it was missing while
            there were published versions, and no alias was set or removed since.
    """

    schema: int
    aliases: dict[str, int]
    tags: dict[str, Any]
    next_version: int
    formerly: dict[str, int]
    removing: list[str]
    aliases_lost: bool


Change = Callable[[Record], Record]


def read(folder: Path | str) -> Record:
    """Read a model's model.json; a record without aliases if there is none.

    Args:
        folder: The model's folder.

    Raises:
        CorruptError: It is damaged. The versions are not.
        InputError: It was made by a newer quill.
    """
    try:
        return _parse(os.path.join(folder, FILE))
    except FileNotFoundError:
        folder = Path(folder)
        known = _copy_of(folder) or _complete({}, folder / FILE)
        published = (is_published(folder / e.name) for e in scan(folder) if names.version_number(e.name))
        return known | {"aliases_lost": any(published)}
    except CorruptError as e:
        folder = Path(folder)
        hint = f"move it elsewhere, and set the aliases again: quill alias set {folder.name} ALIAS"
        raise CorruptError(e.what, why=e.why, hint=_repair(folder) or hint) from None


def read_for_removal(folder: Path) -> dict[str, int]:
    """The version number that each alias names, for what removes the other versions.

    Raises:
        CorruptError: model.json is damaged, or was missing while there were published versions.
    """
    record = read(folder)
    if record["aliases_lost"]:
        raise _lost(folder)
    return record["aliases"]


def restore(folder: Path) -> dict[str, int]:
    """Write a lost or damaged model.json again from its copy, or else the copy from model.json.

    Args:
        folder: The model's folder.

    Returns:
        The version number that each alias names.

    Raises:
        CorruptError: Neither can be read.
        LockedError: Another process keeps the record locked.
    """
    refuse_link(folder)
    with locks.record(folder):
        known = _copy_of(folder)
        try:
            record = read(folder)
        except CorruptError:
            if known is None:
                raise
            record = known
        if record["aliases_lost"]:
            if known is None:
                raise _lost(folder)
            record = record | {"aliases": known["aliases"], "aliases_lost": False}
        _write(folder, record)
    return record["aliases"]


def has_damaged_copy(folder: Path) -> bool:
    """Whether a model's copy of its model.json cannot be read; a model of an earlier quill has none."""
    return exists(folder / COPY) and _copy_of(folder) is None


def update(folder: Path, change: Change) -> None:
    """Change model.json; changes by several processes happen one after the other.

    Args:
        folder: The model's folder.
        change: Called with the record; what it returns is written unless it is the same.

    Raises:
        LockedError: Another process keeps it locked.
    """
    with locks.record(folder):
        update_locked(folder, change)


def update_locked(folder: Path, change: Change) -> None:
    """As `update`, for a caller that has locked the record."""
    refuse_link(folder)
    before = read(folder)
    after = change(before)
    if after != before or not ((folder / FILE).exists() and (folder / COPY).exists()):
        _write(folder, after)


def _write(folder: Path, record: Record) -> None:
    content = {k: v for k, v in record.items() if v or k not in _OPTIONAL}
    if not record["aliases_lost"]:
        # First, so that the copy has every change that was reported as done.
        fsio.write_json(folder / COPY, content)
    fsio.write_json(folder / FILE, content)


_OPTIONAL = ("formerly", "removing", "aliases_lost")


def _parse(path: Path | str) -> Record:
    return _complete(migrations.migrate(manifest.read_object(path), "model", origin=str(path)), path)


def _complete(document: dict[str, Any], path: Path | str) -> Record:
    """Validate a record, and give the fields that are missing their defaults."""
    blank: dict[str, Any] = {"schema": 1, "aliases": {}, "tags": {}, "next_version": 1, "formerly": {}}
    document = blank | {"removing": [], "aliases_lost": False} | document
    numbers: list[Any] = [document["next_version"]]
    for key in ("aliases", "formerly"):
        numbers += document[key].values() if isinstance(document[key], dict) else [None]
    if any(type(n) is not int or not 1 <= n < _MOST_VERSIONS for n in numbers):
        why = "its next_version, an alias or a former name has no version number"
        raise CorruptError(f"'{path}' is damaged", why=why)
    if not isinstance(document["removing"], list):
        document["removing"] = []
    document["aliases_lost"] = bool(document["aliases_lost"])
    document["aliases"] = dict(sorted(document["aliases"].items()))
    return cast(Record, document)


def _copy_of(folder: Path) -> Record | None:
    """The copy of a model.json; None if there is none that can be read."""
    with suppress(FileNotFoundError, QuillError):
        return _parse(folder / COPY)
    return None


def _lost(folder: Path) -> CorruptError:
    return CorruptError(
        f"the aliases of '{folder.name}' are lost",
        why=f"'{folder / FILE}' was missing, and a version that has an alias must not be removed",
        hint=_repair(folder) or f"set the aliases again: quill alias set {folder.name} ALIAS",
    )


def _repair(folder: Path) -> str:
    """The command that restores model.json; empty if there is no copy of it."""
    return f"quill alias restore {folder.name}" if _copy_of(folder) else ""


def reserve(folder: Path, number: int) -> None:
    """Keep a number and all below it from being used again, even once its folder is gone."""
    update(folder, lambda record: reserved(record, number))


def reserved(record: Record, number: int) -> Record:
    """The record once a number and all below it are in use."""
    return record | {"next_version": max(record["next_version"], number + 1)}


def former_holders(root: Path, name: str) -> dict[str, int]:
    """The models that were once called this, and the name's next number at the time.

    Damaged models are skipped: they must not keep another one from being made.

    Args:
        root: The registry.
        name: The former name.
    """
    found: dict[str, int] = {}
    with fsio.guard(root, "read"), suppress(FileNotFoundError), os.scandir(root) as entries:
        folders = [e for e in entries if not e.name.startswith(".") and e.is_dir(follow_symlinks=False)]
        for entry in folders:
            with suppress(QuillError):
                number = read(Path(entry.path))["formerly"].get(name)
                found |= {entry.name: number} if number else {}
    return found


def check_alias(alias: str) -> str:
    """Return a word if it can be made an alias.

    Raises:
        InputError: It breaks the rules of names, or already means a version.
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
    """Make an alias name a version, whether or not it named another one before.

    Args:
        folder: The model's folder.
        alias: The alias.
        number: The version's number.

    Returns:
        The number that it named before, or None.

    Raises:
        InputError: The word cannot be an alias.
        NotFoundError: The version is not published, or is gone.
    """
    check_alias(alias)
    before: list[int | None] = []

    def change(record: Record) -> Record:
        if not is_published(folder / f"v{number}") and not (number == 1 and is_flat(folder)):
            raise NotFoundError(
                f"'{folder.name}' has no version v{number}",
                why="it was removed or renamed in the meantime, or never published",
                hint=f"quill list --all-versions {folder.name}",
            )
        before.append(record["aliases"].get(alias))
        return record | {"aliases": record["aliases"] | {alias: number}, "aliases_lost": False}

    update(folder, change)
    return before[0]


def remove_alias(folder: Path, alias: str) -> int | None:
    """Remove an alias; the version stays.

    Returns:
        The number that it named; None if there was no such alias.
    """
    before: list[int | None] = []

    def change(record: Record) -> Record:
        before.append(record["aliases"].get(alias))
        return record | {"aliases": {a: n for a, n in record["aliases"].items() if a != alias}}

    # If there is none, nothing changes and no lock file is left behind.
    if alias in read(folder)["aliases"]:
        update(folder, change)
    return before[0] if before else None


@contextmanager
def releasing(folder: Path, number: int) -> Iterator[None]:
    """Remove a version inside this block: no alias can come to name it, and its number stays used.

    Args:
        folder: The model's folder.
        number: The version's number.

    Raises:
        RefusedError: An alias names it.
    """
    with locks.record(folder):
        refuse_aliased(folder, number)
        update_locked(folder, lambda record: reserved(record, number))
        yield


def refuse_aliased(folder: Path, number: int) -> None:
    """Raise RefusedError for a version that an alias names.

    Raises:
        CorruptError: The aliases are not known.
    """
    own = [f"{folder.name}:{a}" for a, n in read_for_removal(folder).items() if n == number]
    if own:
        raise RefusedError(
            f"'{folder.name}:v{number}' has an alias",
            why=f"it is {', '.join(own)}",
            hint=f"quill alias rm {' '.join(own)}",
        )
