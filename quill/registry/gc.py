"""What nobody will miss, found and removed: only on request, and never what might still be somebody's.

What a crash or a kill left in staging folders, the trash, under temporary names; runs that a later version
superseded, and states that a run no longer goes on from; on request versions beyond the newest few. What is
locked, aliased or cannot be read stays, and so does every file that quill did not name itself.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from contextlib import suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal, NamedTuple

from quill import fsio, naming
from quill.errors import CorruptError, LockedError, QuillError, RefusedError
from quill.registry import aliases as ledger
from quill.registry import leftovers, locks, version
from quill.registry import manifest as manifests
from quill.registry import remove as removal
from quill.registry.store import Draft, Registry
from quill.registry.version import Version

DAY = 86400.0
_KEEP_STATES = 2

Kind = Literal["version", "unfinished run", "resume state", "leftover"]


class Thing(NamedTuple):
    """Something to remove.

    Attributes:
        what: A reference, or a path as it is seen from beside the registry.
        kind: What it is.
        path: Where it is.
        bytes: What it takes on the disk.
        target: The version that it is, complete or not; None for a state or a leftover.
    """

    what: str
    kind: Kind
    path: Path
    bytes: int
    target: removal.Target | None = None


class Skipped(NamedTuple):
    """Something that stays although it might go, and why."""

    what: str
    why: str


class Cleaning(NamedTuple):
    """What was removed, or would be.

    Attributes:
        things: Each of them.
        skipped: What stays, and why.
        failed: What could not be removed.
    """

    things: list[Thing]
    skipped: list[Skipped]
    failed: list[QuillError]

    @property
    def bytes(self) -> int:
        """What is free again."""
        return sum(t.bytes for t in self.things)


def clean(
    registry: Registry,
    data_root: Path | None = None,
    *,
    glob: str | None = None,
    keep: int | None = None,
    older_than: float = DAY,
    now: float | None = None,
    dry_run: bool = False,
) -> Cleaning:
    """Remove what nobody will miss.

    Args:
        registry: Where to look.
        data_root: The folder of prepared datasets, where leftovers are looked for too.
        glob: Only models whose names match, and nothing beside them.
        keep: How many complete versions of each model to keep, the newest; aliased ones stay besides.
        older_than: Leftovers go that nothing was done to for so long, in seconds; 0 for all of them, which
            must only be asked for while nothing else writes here.
        now: The time, in seconds since the epoch; unset: this moment.
        dry_run: Only say what would be removed.

    Returns:
        What was removed. A thing that cannot be removed keeps no other from being.
    """
    sweep = _Sweep(registry, keep, (time.time() if now is None else now) - older_than if older_than else None)
    found = Cleaning([], [], [])
    for name in _names(registry, glob, found.skipped):
        _clean_name(sweep, name, found, dry_run=dry_run)
    if glob is None:
        nobodys = list(leftovers.beside(registry.root, sweep.before))
        if data_root is not None and data_root.absolute() != registry.root.absolute():
            nobodys += leftovers.of_datasets(data_root, sweep.before)
        for path in nobodys:
            _remove(registry, sweep.leftover(path), found, dry_run=dry_run)
    return found


def prune(registry: Registry, name: str, keep: int) -> list[Version]:
    """Remove all but the newest complete versions of a model; aliased and damaged ones stay.

    Args:
        registry: Where it is.
        name: The model's name; the caller holds it.
        keep: How many to keep, at least one.

    Returns:
        Those removed, the oldest first.

    Raises:
        CorruptError: The aliases cannot be read.
        ResourceError: The registry cannot be written.
    """
    removed = []
    for v in _surplus(registry, name, keep):
        # One that was given an alias a moment ago stays.
        with suppress(RefusedError):
            removed += [v] if removal.take_away(registry, removal.target(registry, v)) else []
    return removed


class _Sweep:
    """What may go, by the rules of one call.

    Args:
        registry: Where to look.
        keep: Complete versions to keep of each model; None for all.
        before: Leftovers older than this go, in seconds since the epoch; None for all of them.
    """

    def __init__(self, registry: Registry, keep: int | None, before: float | None) -> None:
        self.registry, self.keep, self.before = registry, keep, before

    def of_name(self, name: str, skipped: list[Skipped]) -> Iterator[Thing]:
        """What may go of one model, and of what its folder holds besides."""
        folder = self.registry.root / name
        if self.keep is not None:
            for v in _surplus(self.registry, name, self.keep):
                target = removal.target(self.registry, v)
                yield Thing(v.reference, "version", v.path, target.size, target)
        versions = self.registry.entries(name, all_versions=True)
        newest = max((v.number for v in versions if not v.damaged), default=0)
        for draft in self.registry.drafts(name):
            if self._is_given_up(draft, newest):
                target = removal.Target(name, draft.number, draft.path, complete=False)
                yield Thing(draft.reference, "unfinished run", draft.path, target.size, target)
            else:
                yield from self._surplus_states(draft, skipped)
        for v in versions:
            # Publishing removes these last; a crash may have come between.
            state, status = v.path / manifests.STATE, v.path / manifests.STATUS
            if v.number and v.path != folder and leftovers.is_folder(state):
                what = f"{v.reference} {manifests.STATE}"
                yield Thing(what, "resume state", state, removal.size_of(state))
            if v.number and v.path != folder and status.is_file():
                yield self.leftover(status)
        for path in [*leftovers.below(folder, self.before), *removal.rest_of_flat(folder)]:
            yield self.leftover(path)
        if not leftovers.scan(folder) and leftovers.is_old(folder, self.before):
            yield self.leftover(folder)

    def leftover(self, path: Path) -> Thing:
        """Something that nobody looks at, as a thing to remove."""
        shown = str(path)
        with suppress(ValueError):
            shown = str(path.relative_to(self.registry.root.parent))
        return Thing(shown, "leftover", path, removal.size_of(path))

    def _is_given_up(self, draft: Draft, newest: int) -> bool:
        """Whether no run will go on with it: a later version is complete, or it never got to be a run."""
        if draft.status() is not None:
            return draft.number < newest
        # A copy that is under way has no status either, and no lock.
        return not (draft.path / manifests.STATE).exists() and leftovers.is_old(draft.path, self.before)

    def _surplus_states(self, draft: Draft, skipped: list[Skipped]) -> Iterator[Thing]:
        """The resume states beyond those that the run keeps; a damaged one neither counts nor goes."""
        states = leftovers.scan(draft.path / manifests.STATE)
        found = {int(e.name[5:]): Path(e.path) for e in states if re.fullmatch(r"step-[0-9]+", e.name)}
        whole = sorted((step for step, path in found.items() if _is_whole(path)), reverse=True)
        if len(whole) <= 1:
            return
        try:
            outdated = whole[_keep_states(draft) :]
        except (QuillError, FileNotFoundError) as e:
            skipped.append(Skipped(f"{draft.reference} {manifests.STATE}", str(e)))
            return
        for path in (found[step] for step in outdated):
            yield Thing(f"{draft.reference} {path.name}", "resume state", path, removal.size_of(path))


def _clean_name(sweep: _Sweep, name: str, found: Cleaning, *, dry_run: bool) -> None:
    """Remove what may go of one model, unless a process is at work on it."""
    registry = sweep.registry
    busy = Skipped(name, "a process is at work on it")
    try:
        if not list(sweep.of_name(name, [])):
            # Nothing to do, so no lock is left behind; but what was passed over is told.
            list(sweep.of_name(name, found.skipped))
        elif dry_run and locks.holder(registry.root, name):
            found.skipped.append(busy)
        elif dry_run:
            found.things.extend(sweep.of_name(name, found.skipped))
        else:
            with locks.hold(registry.root, name):
                # Looked for again: whoever held the name until now may have changed everything.
                for thing in list(sweep.of_name(name, found.skipped)):
                    _remove(registry, thing, found, dry_run=False, name=name)
    except LockedError:
        found.skipped.append(busy)
    except CorruptError as e:
        found.skipped.append(Skipped(name, str(e)))
    except QuillError as e:
        found.failed.append(e)


def _remove(registry: Registry, thing: Thing, found: Cleaning, *, dry_run: bool, name: str = "") -> None:
    """Remove one thing and take note of it, or of why it stays."""
    if dry_run:
        found.things.append(thing)
        return
    try:
        if thing.target is not None:
            if not removal.take_away(registry, thing.target):
                return
        elif thing.kind == "resume state":
            fsio.discard(thing.path, removal.trash(registry))
        elif name and thing.path.parent == registry.root / name and thing.path.name in removal.FLAT:
            removal.finish_removal(registry, name)
        elif name and thing.path == registry.root / name:
            if not _remove_empty(registry, thing.path):
                return
        elif not os.path.lexists(thing.path):
            return
        else:
            # It is out of sight already, so it need not go in one step.
            fsio.delete(thing.path)
            if os.path.lexists(thing.path):
                found.skipped.append(Skipped(thing.what, "it could not be deleted"))
                return
        found.things.append(thing)
    except RefusedError as e:
        found.skipped.append(Skipped(thing.what, str(e)))
    except QuillError as e:
        found.failed.append(e)


def _remove_empty(registry: Registry, folder: Path) -> bool:
    """Remove a model's folder that a crash left empty, while nobody can begin a version in it."""
    with locks.ledger(folder):
        empty = folder.is_dir() and not leftovers.scan(folder)
        if empty:
            fsio.discard(folder, removal.trash(registry))
    return empty


def _names(registry: Registry, glob: str | None, skipped: list[Skipped]) -> Iterator[str]:
    """The models' folders; what is none, or a link, is left alone."""
    # No name matches that; asking refuses what is no registry, or a later quill's.
    registry.entries("/")
    for entry in sorted(leftovers.scan(registry.root), key=lambda e: e.name):
        if entry.name.startswith(".") or (glob is not None and not fnmatchcase(entry.name, glob)):
            continue
        if entry.is_symlink():
            skipped.append(Skipped(entry.name, "it is a symbolic link"))
        elif entry.is_dir():
            with suppress(QuillError):
                yield naming.check(entry.name, "model")


def _surplus(registry: Registry, name: str, keep: int) -> list[Version]:
    """The complete versions beyond the newest few, the oldest first; neither aliased nor damaged ones."""
    assert keep >= 1, "the newest version always stays"
    whole = [v for v in registry.entries(name, all_versions=True) if v.number and not v.damaged]
    aliased = set(ledger.aliases(registry.root / name).values())
    return [v for v in whole[:-keep] if v.number not in aliased]


def _keep_states(draft: Draft) -> int:
    """How many resume states a run keeps, as its config says."""
    train = manifests.read_object(draft.path / manifests.REQUIRED[0]).get("train")
    keep = train.get("keep_states", _KEEP_STATES) if isinstance(train, dict) else _KEEP_STATES
    if type(keep) is not int or keep < 1:
        raise CorruptError(f"{draft.reference} says keep_states {keep!r}", why="a number from 1 is needed")
    return keep


def _is_whole(state: Path) -> bool:
    """Whether a resume state has all of its files, as far as can be told without reading them."""
    try:
        version.refuse_link(state)
        return manifests.changed(state, manifests.read(state)["files"]) is None
    except QuillError:
        return False
