"""Garbage-collect: find and remove leftovers and, on request, old versions.

Leftovers are what a crash left in staging folders and the trash, temporary files, unfinished runs that a
later version superseded, and resume states beyond those that a run keeps. They are known by the names that
fsio gives; files with other names are not quill's. What is locked, has an alias or cannot be read stays, and
links are not followed.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from contextlib import suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

from quill import fsio, naming
from quill.errors import CorruptError, LockedError, QuillError, RefusedError
from quill.registry import aliases, folder, locks, manifest, remove, rename
from quill.registry.draft import Draft, ResumeState
from quill.registry.remove import Removal
from quill.registry.store import Registry
from quill.registry.version import Version

DAY = 86400.0
_KEEP_STATES = 2
_UNIQUE = re.compile(r"[0-9]+-[0-9a-f]{12}(-.*)?", re.DOTALL)
_TEMPORARY = re.compile(r"\.tmp-(lock-)?[0-9]+-[0-9a-f]{8,12}")
_DOWNLOADS = ".downloads"


class Skipped(NamedTuple):
    """Something that stays although it might go, and why."""

    what: str
    why: str


class Result(NamedTuple):
    """What a plan removed.

    Attributes:
        removed: What is gone.
        skipped: What stays, and why.
        failed: Why something could not be removed, or looked for.
    """

    removed: list[Removal]
    skipped: list[Skipped]
    failed: list[QuillError]

    @property
    def bytes(self) -> int:
        """How much was freed."""
        return sum(r.bytes for r in self.removed)


class Plan:
    """What can be removed.

    Attributes:
        skipped: What stays, and why.
        failed: Why something could not be looked for.
    """

    def __init__(self, rules: _Rules) -> None:
        self._rules = rules
        self._of_models: dict[str, list[Removal]] = {}
        self._beside: list[Removal] = []
        self.skipped: list[Skipped] = []
        self.failed: list[QuillError] = []

    @property
    def removals(self) -> list[Removal]:
        """What to remove."""
        return [r for removals in self._of_models.values() for r in removals] + self._beside

    @property
    def versions(self) -> list[Removal]:
        """Those that are published versions, which someone may miss."""
        return [r for r in self.removals if r.kind == "version"]

    @property
    def bytes(self) -> int:
        """What executing it frees."""
        return sum(r.bytes for r in self.removals)

    def execute(self) -> Result:
        """Remove what can still be removed; a failure does not keep the rest from being removed."""
        done = Result([], list(self.skipped), list(self.failed))
        for name, planned in self._of_models.items():
            try:
                with locks.hold(self._rules.registry.root, name):
                    # The process that held the lock may have changed everything.
                    still = {(r.kind, r.path): r for r in self._rules.of_model(name, [])}
                    for removal in planned:
                        if current := still.get((removal.kind, removal.path)):
                            self._remove(current, name, done)
                        elif os.path.lexists(removal.path):
                            done.skipped.append(Skipped(removal.what, "it changed in the meantime"))
            except LockedError:
                done.skipped.append(_busy(name))
            except CorruptError as e:
                done.skipped.append(Skipped(name, str(e)))
            except QuillError as e:
                done.failed.append(e)
        for removal in self._beside:
            if os.path.lexists(removal.path):
                self._remove(removal, "", done)
        return done

    def add_model(self, name: str) -> None:
        """Plan what can be removed of one model, unless a process is working on it."""
        try:
            found = list(self._rules.of_model(name, self.skipped))
        except CorruptError as e:
            self.skipped.append(Skipped(name, str(e)))
        except QuillError as e:
            self.failed.append(e)
        else:
            if found and locks.holder(self._rules.registry.root, name):
                self.skipped.append(_busy(name))
            elif found:
                self._of_models[name] = found

    def add_leftovers(self, paths: Iterator[Path]) -> None:
        """Plan to remove leftovers outside of any model."""
        self._beside += [self._rules.leftover(path) for path in paths]

    def _remove(self, removal: Removal, name: str, done: Result) -> None:
        registry, path = self._rules.registry, removal.path
        own = registry.root / name
        try:
            if removal.folder is not None:
                gone = remove.take_away(registry, removal.folder)
            elif removal.kind == "resume state":
                fsio.discard(path, remove.trash(registry))
                gone = True
            elif name and path.parent == own and path.name in remove.FLAT:
                remove.resume_flat(registry, name)
                gone = True
            elif name and path == own and rename.successor(registry.root, name):
                gone = _remove_copied(registry, name)
            elif fsio.is_removed(path):
                fsio.discard(path, remove.trash(registry))
                gone = True
            elif name and path == own:
                gone = _remove_empty(registry, own)
            else:
                # It is out of sight already, so it need not go in one step.
                fsio.delete(path)
                gone = not os.path.lexists(path)
                if not gone:
                    done.skipped.append(Skipped(removal.what, "it cannot be deleted"))
            if gone:
                done.removed.append(removal)
        except RefusedError as e:
            done.skipped.append(Skipped(removal.what, str(e)))
        except QuillError as e:
            done.failed.append(e)


def plan(
    registry: Registry,
    data_root: Path | None = None,
    *,
    glob: str | None = None,
    keep: int | None = None,
    older_than: float = DAY,
    now: float | None = None,
) -> Plan:
    """Find what can be removed.

    Args:
        registry: Where to look.
        data_root: The folder of prepared datasets, to look for leftovers too.
        glob: Only models whose names match, and nothing outside of them.
        keep: How many of the newest published versions of each model to keep, besides those with an alias;
            None for all.
        older_than: Leftovers must have been unchanged for this many seconds; use 0 only while nothing else
            writes here.
        now: The time, in seconds since the epoch; None for the present.
    """
    before = (time.time() if now is None else now) - older_than if older_than else None
    found = Plan(_Rules(registry, keep, before))
    # Asked for no name at all, the registry refuses a root that is not one, or a newer quill's.
    registry.models("/")
    for entry in folder.scan(registry.root):
        if entry.name.startswith(".") or (glob is not None and not fnmatchcase(entry.name, glob)):
            continue
        if entry.is_symlink():
            found.skipped.append(Skipped(entry.name, "it is a symbolic link"))
        elif entry.is_dir():
            with suppress(QuillError):
                found.add_model(naming.check(entry.name, "model"))
    if glob is None:
        found.add_leftovers(_leftovers(registry.root, before))
        if data_root is not None and data_root.absolute() != registry.root.absolute():
            found.add_leftovers(_leftovers_of_datasets(data_root, before))
    return found


def prune(registry: Registry, name: str, keep: int) -> list[Version]:
    """Remove all but the newest published versions of a model; those with an alias and damaged ones stay.

    Args:
        registry: Where it is.
        name: The model's name, which the caller has locked.
        keep: How many to keep, at least one.

    Returns:
        Those removed, the oldest first.

    Raises:
        CorruptError: The aliases cannot be read.
        ResourceError: The registry cannot be written.
    """
    removed = []
    for version in _surplus(registry, name, keep):
        # One that was given an alias a moment ago stays.
        with suppress(RefusedError):
            removed += [version] if remove.take_away(registry, version) else []
    return removed


class _Rules:
    """What can be removed, by the rules of one plan.

    Args:
        registry: Where to look.
        keep: Published versions to keep of each model; None for all.
        before: Leftovers unchanged since then can go, in seconds since the epoch; None for all of them.
    """

    def __init__(self, registry: Registry, keep: int | None, before: float | None) -> None:
        self.registry, self.keep, self.before = registry, keep, before

    def of_model(self, name: str, skipped: list[Skipped]) -> Iterator[Removal]:
        """What can be removed of one model, and of everything else in its folder."""
        own = self.registry.root / name
        if rename.successor(self.registry.root, name) or _is_rest(own, self.before):
            yield self.leftover(own)
            return
        if self.keep is not None:
            yield from map(remove.of, _surplus(self.registry, name, self.keep))
        model = self.registry.model(name)
        if model is None:
            return
        newest = max((v.number for v in model.versions if not v.damaged), default=0)
        for draft in model.drafts:
            if self._is_given_up(draft, newest):
                aliases.read_for_removal(own)
                yield remove.of(draft)
            else:
                yield from self._surplus_states(draft, skipped)
        for version in model.versions:
            if version.number and not version.flat:
                # Publishing removes these last; a crash may have come first.
                state, status = version.path / manifest.STATE, version.path / manifest.STATUS
                if _is_folder(state):
                    what = f"{version.reference} {manifest.STATE}"
                    yield Removal(what, "resume state", state, folder.disk_size(state))
                if status.is_file():
                    yield self.leftover(status)
        for path in [*_leftovers_below(own, self.before), *remove.rest_of_flat(own)]:
            yield self.leftover(path)
        if rename.has_stale_mark(self.registry.root, name):
            yield self.leftover(own / rename.MARK)
        if not folder.scan(own) and _is_old(own, self.before):
            yield self.leftover(own)

    def leftover(self, path: Path) -> Removal:
        shown = str(path)
        with suppress(ValueError):
            shown = str(path.relative_to(self.registry.root.parent))
        return Removal(shown, "leftover", path, folder.disk_size(path))

    def _is_given_up(self, draft: Draft, newest: int) -> bool:
        """Whether no run will resume it: a later version is published, or it never became a run."""
        if draft.status() is not None:
            return draft.number < newest
        # A copy in progress has no status either, and no lock on the name.
        return not draft.has(manifest.STATE) and _is_abandoned(draft.path, self.before)

    def _surplus_states(self, draft: Draft, skipped: list[Skipped]) -> Iterator[Removal]:
        """The resume states beyond those that the run keeps; a damaged one neither counts nor goes."""
        whole = [state for state in draft.states() if _is_whole(state)]
        if len(whole) <= 1:
            return
        try:
            outdated = whole[_keep_states(draft) :]
        except QuillError as e:
            skipped.append(Skipped(f"{draft.reference} {manifest.STATE}", str(e)))
            return
        for state in outdated:
            yield Removal(state.reference, "resume state", state.path, folder.disk_size(state.path))


def _busy(name: str) -> Skipped:
    return Skipped(name, "a process is working on it")


def _remove_empty(registry: Registry, own: Path) -> bool:
    """Remove a model's folder that a crash left empty, while no version can be begun in it."""
    with locks.record(own):
        empty = own.is_dir() and not folder.scan(own)
        if empty:
            fsio.discard(own, remove.trash(registry))
    return empty


def _remove_copied(registry: Registry, name: str) -> bool:
    """Complete the renaming of a model that a crash cut short after the copy."""
    new = rename.successor(registry.root, name)
    if new is None:
        return False
    with locks.hold(registry.root, new):
        rename.complete(registry, name)
    return not folder.exists(registry.root / name)


def _surplus(registry: Registry, name: str, keep: int) -> list[Version]:
    """The published versions beyond the newest few, the oldest first; neither aliased nor damaged ones."""
    assert keep >= 1, "the newest version always stays"
    model = registry.model(name)
    whole = [v for v in model.versions if v.number and not v.damaged] if model else []
    aliased = set(aliases.read_for_removal(registry.root / name).values())
    return [v for v in whole[:-keep] if v.number not in aliased]


def _keep_states(draft: Draft) -> int:
    """How many resume states a run keeps, as its config says."""
    train = draft.config().get("train")
    keep = train.get("keep_states", _KEEP_STATES) if isinstance(train, dict) else _KEEP_STATES
    if type(keep) is not int or keep < 1:
        why = "a number of at least 1 is needed"
        raise CorruptError(f"the config of '{draft.reference}' sets train.keep_states to {keep!r}", why=why)
    return keep


def _is_whole(state: ResumeState) -> bool:
    """Whether a resume state has all of its files, as far as can be seen without reading them."""
    try:
        return manifest.changed(state.path, state.load().facts["files"]) is None
    except QuillError:
        return False


def _leftovers(place: Path, before: float | None) -> Iterator[Path]:
    """The leftovers in a folder, and in its staging and trash.

    Args:
        place: Where to look.
        before: Only those unchanged since then, in seconds since the epoch; None for all.
    """
    for entry in folder.scan(place):
        path = Path(entry.path)
        if entry.name in (fsio.STAGING, fsio.TRASH):
            inside = folder.scan(path) if _is_folder(path) else []
            found = [Path(e.path) for e in inside if _UNIQUE.fullmatch(e.name)]
        else:
            mark = entry.name == fsio.REMOVED and not fsio.is_removed(place)
            found = [path] if mark or _TEMPORARY.fullmatch(entry.name) else []
        yield from (p for p in found if _is_abandoned(p, before))


def _leftovers_below(place: Path, before: float | None) -> Iterator[Path]:
    """The leftovers in a folder, and in every folder in it."""
    yield from _leftovers(place, before)
    for entry in folder.scan(place):
        path = Path(entry.path)
        hidden = entry.name in (fsio.STAGING, fsio.TRASH) or _TEMPORARY.fullmatch(entry.name)
        if _is_rest(path, before):
            yield path
        elif _is_folder(path) and not hidden:
            yield from _leftovers_below(path, before)


def _leftovers_of_datasets(root: Path, before: float | None) -> Iterator[Path]:
    """The leftovers in a folder of datasets, which may contain much that is not quill's."""
    yield from _leftovers(root, before)
    for entry in folder.scan(root):
        path = Path(entry.path)
        if _is_rest(path, before):
            yield path
        elif _is_folder(path) and (entry.name == _DOWNLOADS or (path / manifest.FILE).is_file()):
            yield from _leftovers(path, before)


def _is_rest(path: Path, before: float | None) -> bool:
    """Whether a folder is what a crash left of one that was being removed in place."""
    if not _is_folder(path):
        return False
    is_state = path.parent.name == manifest.STATE and path.name.startswith("step-")
    rest = fsio.is_removed(path) or (is_state and not folder.scan(path))
    return rest and _is_abandoned(path, before)


def _is_old(path: Path, before: float | None) -> bool:
    """Whether a file or folder, and everything in it, has not changed since `before`."""
    return before is None or _last_change(path) < before


def _is_abandoned(path: Path, before: float | None) -> bool:
    """Whether something is old and no process is working in it: clocks jump, and its own may be wrong."""
    return _is_old(path, before) and not (_is_folder(path) and fsio.is_in_use(path))


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _last_change(path: Path) -> float:
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return 0.0
    inside = (_last_change(Path(e.path)) for e in (folder.scan(path) if _is_folder(path) else ()))
    # Renaming changes the ctime alone; a copied folder may have old mtimes.
    return max([found.st_mtime, found.st_ctime, *inside])
