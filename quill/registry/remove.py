"""Versions removed: out of sight in one rename, then deleted; their numbers stay taken.

What a crash leaves behind is nobody's and lies where `quill gc` finds it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from quill import fsio
from quill.errors import CorruptError, InputError, NotFoundError
from quill.registry import aliases as ledger
from quill.registry import locks, names, version
from quill.registry import manifest as manifests
from quill.registry.store import Registry
from quill.registry.version import Version

# What a model that was put there by hand may consist of. The first to go is the one without which the
# others are no model.
FLAT = (*manifests.REQUIRED, "metrics.jsonl", "README.md")


class Target(NamedTuple):
    """A version as something to remove: complete, damaged or unfinished.

    Attributes:
        name: The model's name.
        number: Its version.
        path: Its folder; the model's own where it was put there by hand.
        complete: Whether it is published, in whatever state.
        flat: Whether its files lie in the model's own folder, put there by hand.
    """

    name: str
    number: int
    path: Path
    complete: bool = True
    flat: bool = False

    @property
    def reference(self) -> str:
        """What it is found by, "name:vN"."""
        return f"{self.name}:v{self.number}"

    @property
    def size(self) -> int:
        """What it takes on the disk, in bytes."""
        return sum(size_of(self.path / f) for f in FLAT) if self.flat else size_of(self.path)


def target(registry: Registry, complete: Version) -> Target:
    """A version as something to remove."""
    flat = complete.path == registry.root / complete.name
    return Target(complete.name, complete.number, complete.path, flat=flat)


def find(registry: Registry, ref: str, *, all_versions: bool = False) -> list[Target]:
    """What a reference means to who wants it removed; a name alone means its only version.

    Args:
        registry: Where to look.
        ref: "name", "name:vN" or "name:alias"; what is damaged or unfinished is found too.
        all_versions: A name means every version of it.

    Raises:
        InputError: It is no reference, or a name with several versions.
        NotFoundError: There is nothing of that name.
        RefusedError: An alias means it.
        CorruptError: It is a link, or the model's folder cannot be read.
    """
    if names.is_path(ref):
        raise InputError(f"'{ref}' is a folder", why="models are removed by name", hint="quill list")
    name, number, alias = names.parse(ref)
    if all_versions and (number or alias):
        raise InputError(f"'{ref}' is one version", why="--all-versions goes with a name alone")
    folder = registry.root / name
    there = under(registry, name, ref)
    if alias == names.LATEST:
        number = max((t.number for t in there if t.complete), default=0)
    elif alias:
        number = ledger.aliases(folder).get(alias, 0)
    meant = [t for t in there if number in (None, t.number)]
    if not meant:
        raise _missing(registry, ref)
    if number is None and len(meant) > 1 and not all_versions:
        have = ", ".join(f"v{t.number}" + ("" if t.complete else " (unfinished)") for t in meant)
        raise InputError(
            f"'{name}' has {len(meant)} versions",
            why=have,
            hint=f"quill rm {meant[0].reference}, or all of them: quill rm {name} --all-versions",
        )
    for one in meant:
        if not one.flat:
            version.refuse_link(one.path)
        ledger.refuse_aliased(folder, one.number)
    return meant


def remove(registry: Registry, targets: Sequence[Target]) -> list[Target]:
    """Remove versions: out of sight in one rename each, then deleted. Their numbers stay taken.

    Args:
        registry: Where they are.
        targets: From `find`.

    Returns:
        Those that were still there.

    Raises:
        RefusedError: An alias means one of them by now.
        LockedError: A process is at work on one of the names; nothing is removed.
        ResourceError: The registry cannot be written.
    """
    with ExitStack() as held:
        for name in sorted({t.name for t in targets}):
            held.enter_context(locks.hold(registry.root, name))
        # The newest last: until then the name alone means what it did.
        return [t for t in sorted(targets) if take_away(registry, t)]


def take_away(registry: Registry, target: Target) -> bool:
    """Remove one version; the caller holds its name.

    Returns:
        Whether it was there as it was found.

    Raises:
        RefusedError: An alias means it.
        CorruptError: A link leads out of the registry, or model.json is damaged.
        ResourceError: The registry cannot be written.
    """
    folder = registry.root / target.name
    version.refuse_link(folder)
    with ledger.releasing(folder, target.number):
        if target.flat:
            return _take_flat(registry, folder)
        version.refuse_link(target.path)
        if not target.path.is_dir() or version.is_complete(target.path) != target.complete:
            return False
        fsio.discard(target.path, trash(registry))
    return True


def finish_removal(registry: Registry, name: str) -> None:
    """Take away what a crash left of a removed model that was put there by hand.

    Args:
        registry: Where it was.
        name: Its name; the caller holds it.
    """
    folder = registry.root / name
    with locks.ledger(folder):
        for file in rest_of_flat(folder):
            fsio.discard(file, trash(registry))
        ledger.amend(folder, _without_note)


def rest_of_flat(folder: Path) -> list[Path]:
    """The files of a model that was put there by hand and whose removal a crash cut short."""
    listed = ledger.read(folder).get("removing")
    if version.is_flat(folder) or not isinstance(listed, list):
        return []
    return [folder / f for f in FLAT if f in listed and os.path.lexists(folder / f)]


def trash(registry: Registry) -> Path:
    """Where what is removed goes first.

    Raises:
        CorruptError: It is a link, which would lead a version out of the registry.
    """
    path = registry.root / fsio.TRASH
    version.refuse_link(path)
    return path


def size_of(path: Path) -> int:
    """What a file or folder takes, in bytes; what another folder has a hard link to counts there."""
    try:
        found = os.lstat(path)
        if not os.path.isdir(path) or os.path.islink(path):
            return found.st_size if found.st_nlink == 1 else 0
        return sum(size_of(Path(e.path)) for e in os.scandir(path))
    except OSError:
        return 0


def _take_flat(registry: Registry, folder: Path) -> bool:
    """Remove a model that was put there by hand, file by file, as other versions may lie beside."""
    if not version.is_flat(folder):
        return False
    files = [f for f in FLAT if os.path.lexists(folder / f)]
    ledger.amend(folder, lambda held: held | {"removing": files})
    for file in files:
        fsio.discard(folder / file, trash(registry))
    ledger.amend(folder, _without_note)
    return True


def _without_note(held: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in held.items() if k != "removing"}


def under(registry: Registry, name: str, ref: str = "") -> list[Target]:
    """Everything under a name by number: versions, whole or damaged, and what is unfinished.

    Args:
        registry: Where to look.
        name: The model's name.
        ref: What was asked for, for the message where there is nothing.

    Raises:
        NotFoundError: There is nothing.
        CorruptError: The model's folder is a link, or cannot be read.
    """
    version.refuse_link(registry.root / names.check_name(name))
    found = [target(registry, v) for v in _versions(registry, name)]
    found += [Target(d.name, d.number, d.path, complete=False) for d in registry.drafts(name)]
    if not found:
        raise _missing(registry, ref or name)
    return sorted(found)


def _versions(registry: Registry, name: str) -> Iterator[Version]:
    for found in registry.entries(name, all_versions=True):
        if not found.number:
            raise CorruptError(f"'{name}' cannot be read", why=found.damaged or "")
        yield found


def _missing(registry: Registry, ref: str) -> NotFoundError:
    """Say what exists in its place, as for every reference."""
    try:
        registry.resolve(ref)
    except NotFoundError as e:
        return e
    return NotFoundError(f"no model '{ref}'", why="it is gone by now", hint="quill list")
