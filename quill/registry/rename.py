"""Rename a model: all of its versions, its aliases and its unfinished run, in one rename."""

from __future__ import annotations

import os
from contextlib import ExitStack

from quill import fsio
from quill.errors import InputError, RefusedError
from quill.registry import aliases, folder, locks, names, remove
from quill.registry.aliases import Record
from quill.registry.store import Registry


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
        """Rename it; a crash leaves it whole under one of the two names.

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
            _refuse_taken(self._registry, self.name, new)
            for found in there:
                folder.refuse_busy(found)
            highest = max(f.number for f in there)

            def note(record: Record) -> Record:
                former = record["formerly"]
                after = aliases.reserved(record, max(highest, former.get(new, 1) - 1))
                return after | {"formerly": former | {self.name: after["next_version"]}}

            aliases.update_locked(own, note)
            fsio.rename(own, target)
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
    _refuse_taken(registry, name, new)
    return found


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
