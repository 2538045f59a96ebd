"""Remove versions and unfinished runs: out of sight in one rename each, then deleted.

Their numbers stay used. `quill gc` finds what a crash leaves in between.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Literal, NamedTuple

from quill import fsio
from quill.errors import CorruptError, InputError, NotFoundError
from quill.registry import aliases, locks, manifest, names
from quill.registry import folder as folders
from quill.registry.aliases import Record
from quill.registry.folder import Folder, Kind
from quill.registry.store import Registry

# What a model put there by hand may consist of; without the first of them the others are not a model.
FLAT = (*manifest.REQUIRED, manifest.METRICS, manifest.CARD)


class Removal(NamedTuple):
    """Something to remove.

    Attributes:
        what: A reference, or a path relative to the folder that the registry is in.
        kind: What it is.
        path: Where it is.
        bytes: What removing it frees.
        folder: The version or draft that it is; None for a resume state or a leftover.
    """

    what: str
    kind: Kind | Literal["leftover"]
    path: Path
    bytes: int
    folder: Folder | None = None


class Plan:
    """Versions and unfinished runs to remove.

    Attributes:
        removals: What to remove.
        missing: The references that mean nothing.
    """

    def __init__(self, registry: Registry, removals: Iterable[Removal], missing: list[str]) -> None:
        self._registry = registry
        self.removals, self.missing = list(removals), missing

    @property
    def bytes(self) -> int:
        """What executing it frees."""
        return sum(r.bytes for r in self.removals)

    def execute(self) -> list[Removal]:
        """Remove them.

        Returns:
            Those that were still there.

        Raises:
            RefusedError: One of them has an alias by now.
            LockedError: A process is working on one of the names; nothing is removed.
            ResourceError: The registry cannot be written.
        """
        # The newest last: until then the name alone means what it did.
        ordered = [(r.folder, r) for r in self.removals if r.folder is not None]
        ordered.sort(key=lambda pair: (pair[0].name, pair[0].number))
        with ExitStack() as held:
            for name in sorted({f.name for f, _ in ordered}):
                held.enter_context(locks.hold(self._registry.root, name))
            return [r for f, r in ordered if take_away(self._registry, f)]


def plan(
    registry: Registry, references: Iterable[str], *, all_versions: bool = False, missing_ok: bool = False
) -> Plan:
    """Find out what references mean to someone who wants it removed.

    Args:
        registry: Where to look.
        references: "name", "name:vN" or "name:alias"; a name alone means its only version. Damaged
            versions and unfinished runs are found too.
        all_versions: A name means all of its versions.
        missing_ok: Skip references that mean nothing.

    Raises:
        InputError: One is not a reference, or a name with several versions.
        NotFoundError: One means nothing.
        RefusedError: An alias names one of the versions.
        CorruptError: One is a link, or the model's folder cannot be read.
    """
    found: dict[str, Removal] = {}
    missing: list[str] = []
    for ref in references:
        try:
            found |= {f.reference: of(f) for f in _find(registry, ref, all_versions=all_versions)}
        except NotFoundError:
            if not missing_ok:
                raise
            missing.append(ref)
    return Plan(registry, found.values(), missing)


def of(folder: Folder) -> Removal:
    """The removal of a version or draft."""
    return Removal(folder.reference, folder.kind, folder.path, folder.disk_size, folder)


def under(registry: Registry, name: str, ref: str = "") -> list[Folder]:
    """Everything under a name by number: versions, whole or damaged, and drafts.

    Args:
        registry: Where to look.
        name: The model's name.
        ref: The reference, for the message if there is nothing.

    Raises:
        NotFoundError: There is nothing.
        CorruptError: The model's folder is a link, or cannot be read.
    """
    folders.refuse_link(registry.root / names.check_name(name))
    found: list[Folder] = []
    if model := registry.model(name):
        if broken := next((v for v in model.versions if not v.number), None):
            raise CorruptError(f"'{name}' cannot be read", why=broken.damaged or "")
        found += [*model.versions, *model.drafts]
    if not found:
        raise _missing(registry, ref or name)
    return sorted(found, key=lambda f: f.number)


def take_away(registry: Registry, folder: Folder) -> bool:
    """Remove one version or draft; the caller has locked its name.

    Returns:
        Whether it was still there, and still a version or a draft.

    Raises:
        RefusedError: An alias names it.
        LockedError: A process is writing it.
        CorruptError: A link leads out of the registry, or model.json is damaged.
        ResourceError: The registry cannot be written.
    """
    own = registry.root / folder.name
    folders.refuse_link(own)
    with aliases.releasing(own, folder.number):
        if folder.flat:
            return _take_flat(registry, own)
        folders.refuse_link(folder.path)
        folders.refuse_busy(folder)
        if not folder.path.is_dir() or folders.is_published(folder.path) != (folder.kind == "version"):
            return False
        fsio.discard(folder.path, trash(registry))
    return True


def resume_flat(registry: Registry, name: str) -> None:
    """Complete the removal of a model put there by hand that a crash cut short; its name is locked."""
    own = registry.root / name
    with locks.record(own):
        for file in rest_of_flat(own):
            fsio.discard(file, trash(registry))
        aliases.update_locked(own, _removed)


def rest_of_flat(own: Path) -> list[Path]:
    """The remaining files of a model put there by hand whose removal a crash cut short."""
    listed = aliases.read(own)["removing"]
    return [] if folders.is_flat(own) else [own / f for f in FLAT if f in listed and folders.exists(own / f)]


def trash(registry: Registry) -> Path:
    """The folder that what is removed is moved to first.

    Raises:
        CorruptError: It is a link, which would lead a version out of the registry.
    """
    path = registry.root / fsio.TRASH
    folders.refuse_link(path)
    return path


def _take_flat(registry: Registry, own: Path) -> bool:
    """Remove a model put there by hand, file by file: other versions may be in the same folder."""
    if not folders.is_flat(own):
        return False
    files = [f for f in FLAT if folders.exists(own / f)]
    aliases.update_locked(own, lambda record: record | {"removing": files})
    for file in files:
        fsio.discard(own / file, trash(registry))
    aliases.update_locked(own, _removed)
    return True


def _removed(record: Record) -> Record:
    return record | {"removing": []}


def _find(registry: Registry, ref: str, *, all_versions: bool) -> list[Folder]:
    if names.is_path(ref):
        raise InputError(f"'{ref}' is a path", why="models are removed by name", hint="quill list")
    name, number, alias = names.parse(ref)
    if all_versions and (number or alias):
        raise InputError(f"'{ref}' is one version", why="all_versions=True needs a name alone")
    there = under(registry, name, ref)
    if alias == names.LATEST:
        number = max((f.number for f in there if f.is_published), default=0)
    elif alias:
        number = aliases.read(registry.root / name)["aliases"].get(alias, 0)
    meant = [f for f in there if number in (None, f.number)]
    if not meant:
        raise _missing(registry, ref)
    if number is None and len(meant) > 1 and not all_versions:
        have = ", ".join(f"v{f.number}" + ("" if f.is_published else " (unfinished)") for f in meant)
        raise InputError(
            f"'{name}' has {len(meant)} versions", why=have, hint=f"quill rm {name} --all-versions"
        )
    for folder in meant:
        if not folder.flat:
            folders.refuse_link(folder.path)
        aliases.refuse_aliased(registry.root / name, folder.number)
    return meant


def _missing(registry: Registry, ref: str) -> NotFoundError:
    """The error that says what there is instead, as for every reference."""
    try:
        registry.resolve(ref, shipped=False)
    except NotFoundError as e:
        return e
    return NotFoundError(f"no model '{ref}'", why="it was removed in the meantime", hint="quill list")
