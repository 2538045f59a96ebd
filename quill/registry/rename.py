"""Rename a model: all of its versions, its aliases and its unfinished run, in one rename.

A folder of a lower layer of overlayfs cannot be renamed. It is copied in one step and then removed; both
contain a mark with the new name, by which a second try and `quill gc` complete what a crash cut short.
"""

from __future__ import annotations

import os
from contextlib import ExitStack, suppress
from pathlib import Path

from quill import fsio
from quill.errors import InputError, QuillError, RefusedError
from quill.registry import aliases, folder, locks, manifest, names, remove
from quill.registry.aliases import Record
from quill.registry.store import Registry

MARK = ".renaming"


class Plan:
    """A model to rename.

    Attributes:
        name: Its present name.
        new: Its new name.
        references: What its versions and drafts will be found by.
    """

    def __init__(self, registry: Registry, name: str, new: str) -> None:
        self._registry, self.name, self.new = registry, name, new
        self.references = self._references()

    def execute(self) -> list[str]:
        """Rename it; a crash leaves it whole under one of the two names, or under both.

        Before the rename, model.json notes which numbers were used under the old name, so that the next model
        of that name continues after them.

        Returns:
            The references that it is now found by.

        Raises:
            NotFoundError: It was removed in the meantime.
            RefusedError: The new name was taken in the meantime.
            LockedError: A process is working on one of the names.
            CorruptError: The model's folder is a link, or its model.json is damaged.
            ResourceError: The registry cannot be written.
        """
        root, new = self._registry.root, self.new
        own, target = root / self.name, root / new
        with ExitStack() as held:
            for name in sorted((self.name, new)):
                held.enter_context(locks.hold(root, name))
            there = remove.under(self._registry, self.name)
            for place in sorted((own, target)):
                held.enter_context(locks.record(place))
            if successor(root, self.name) == new:
                complete(self._registry, self.name)
                return self.references
            _refuse_taken(self._registry, self.name, new)
            for found in there:
                folder.refuse_busy(found)
            highest = max(f.number for f in there)

            def note(record: Record) -> Record:
                former = record["formerly"]
                after = aliases.reserved(record, max(highest, former.get(new, 1) - 1))
                return after | {"formerly": former | {self.name: after["next_version"]}}

            aliases.update_locked(own, note)
            if not fsio.rename(own, target):
                fsio.write_json(own / MARK, {"from": self.name, "to": new, "by": locks.me()})
                fsio.copy_folder(own, target)
                complete(self._registry, self.name)
            self.references = [f"{new}:v{f.number}" for f in there]
        return self.references

    def _references(self) -> list[str]:
        return [f"{self.new}:v{f.number}" for f in remove.under(self._registry, self.name)]


def plan(registry: Registry, name: str, new: str) -> Plan:
    """Check that a model can be renamed.

    Args:
        registry: Where it is.
        name: Its present name.
        new: Its new name: one that no other model has, or had.

    Raises:
        InputError: One of them is not a valid name.
        NotFoundError: There is no such model.
        RefusedError: The new name is, or was, another model's.
        CorruptError: The model's folder is a link, or its model.json is damaged.
    """
    if ":" in name:
        raise InputError(
            f"'{name}' is one version",
            why="a model is renamed as a whole: version numbers belong to the name",
            hint=f"quill cp {name} {new} && quill rm {name}",
        )
    check_new(new, f"quill mv {name}")
    names.check_name(name)
    if name == new:
        raise InputError(f"'{name}' is already its name", why="the new name must differ")
    found = Plan(registry, name, new)
    if successor(registry.root, name) != new:
        _refuse_taken(registry, name, new)
    return found


def successor(root: Path, name: str) -> str | None:
    """The new name of a model that was copied to it and is still to be removed; None for any other model.

    Everything that the model has is there under the new name too.
    """
    own = root / name
    with suppress(FileNotFoundError, QuillError):
        names.check_name(name)
        mark = manifest.read_object(own / MARK)
        new = names.check_name(str(mark.get("to")))
        copied = root / new
        if new == name or manifest.read_object(copied / MARK) != mark:
            return None
        same = aliases.read(own) == aliases.read(copied) and folder.is_flat(own) <= folder.is_flat(copied)
        if same and all(_is_copy(own / f"v{n}", copied / f"v{n}") for n in folder.numbers(own)):
            return new
    return None


def complete(registry: Registry, name: str) -> None:
    """Remove a model that has a successor; the caller has locked both names."""
    new = successor(registry.root, name)
    if new is not None:
        fsio.discard(registry.root / name, remove.trash(registry))
        fsio.remove_file(registry.root / new / MARK)


def has_stale_mark(root: Path, name: str) -> bool:
    """Whether a model contains a mark that no longer means anything: it was renamed, or changed since."""
    mark = root / name / MARK
    with suppress(FileNotFoundError, QuillError):
        return successor(root, str(manifest.read_object(mark).get("from"))) is None
    return folder.exists(mark)


def _is_copy(version: Path, of: Path) -> bool:
    """Whether a folder is the same version or draft as another, as far as it is still there."""
    if fsio.is_removed(version):
        return True
    said = []
    for path in (version, of):
        file = path / (manifest.FILE if folder.is_published(version) else manifest.STATUS)
        said.append(manifest.read_object(file) if folder.exists(file) else None)
    return of.is_dir() and said[0] == said[1]


def check_new(name: str, command: str) -> None:
    """Raise InputError unless this can be a new name; the hint is the command with the name alone."""
    before, colon, _ = name.partition(":")
    if colon:
        why = "a name is needed; the version number is assigned"
        raise InputError(f"'{name}' is a reference", why=why, hint=f"{command} {before}")
    names.check_name(name)


def _refuse_taken(registry: Registry, name: str, new: str) -> None:
    """Refuse a name whose numbers are, or were, another model's."""
    target = registry.root / new
    folder.refuse_link(target)
    hint = f"quill cp {name} {new}"
    with fsio.guard(target, "read"):
        # A crash leaves an empty folder, which the rename replaces.
        taken = os.path.lexists(target) and not (target.is_dir() and not os.listdir(target))
    if taken:
        have = ", ".join(f"v{v.number}" for v in registry.entries(new, all_versions=True)[:8])
        used = aliases.read(target)["next_version"] - 1 if target.is_dir() else 0
        gone = f"versions up to v{used} once had it" if used else "it is not a model"
        raise RefusedError(f"'{new}' is taken", why=f"it has {have}" if have else gone, hint=hint)
    if registry.shipped and registry.shipped.newest(new):
        raise RefusedError(f"'{new}' is taken", why="a model of that name comes with quill", hint=hint)
    others = [other for other in aliases.former_holders(registry.root, new) if other != name]
    if others:
        why = "an old reference must not find another model's version"
        raise RefusedError(f"'{new}' was the name of '{others[0]}'", why=why, hint=hint)
