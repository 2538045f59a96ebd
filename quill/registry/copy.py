"""Versions copied and models renamed, so that a crash at any write leaves every model whole.

Each has one rename at its heart: before it nothing has happened, after it all of it has.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from typing import Any

from quill import fsio
from quill.errors import CorruptError, InputError, QuillError, RefusedError
from quill.registry import aliases as ledger
from quill.registry import locks, names, version
from quill.registry import manifest as manifests
from quill.registry.hashing import OnBytes, digest, ignore, pieces
from quill.registry.remove import FLAT, under
from quill.registry.store import Registry
from quill.registry.version import Version

# What a copy's manifest says of itself, where everything else is said of the model.
_OF_THE_FOLDER = {"schema", "reference", "files", "config_sha256"}


def copy(registry: Registry, ref: str, name: str, on_bytes: OnBytes = ignore) -> Version:
    """Publish a version's files once more, as the next version of a name.

    Args:
        registry: Where both are kept.
        ref: The version, from anywhere that `Registry.resolve` looks.
        name: The name; it may be new, or the version's own.
        on_bytes: Told how many more bytes were read; every file is read twice.

    Returns:
        The copy. Its manifest says of the model what the original's does, and what it was copied from.

    Raises:
        NotFoundError: There is no such version.
        CorruptError: It is damaged, or changed while it was copied; nothing is left of the copy.
        ResourceError: Disk or permission.
    """
    _check_new(name, f"quill cp {ref}")
    source = registry.resolve(ref)
    # Before a number is taken: what is damaged is not begun to be copied.
    listed = _describe(source, on_bytes)
    fsio.require_space(registry.root, sum(e["bytes"] for e in listed.values()), f"a copy of '{ref}'")
    facts = _facts(source, listed)
    draft = registry.begin(name)
    try:
        for file, entry in listed.items():
            with source.open_file(file) as reading:
                written = draft.write_chunks(file, pieces(reading, on_bytes))
            if written != entry["sha256"]:
                why = "it is not what was read of it a moment ago"
                raise CorruptError(f"'{source.path / file}' changed while it was copied", why=why)
        return draft.publish(**facts)
    except BaseException:
        if not version.is_complete(draft.path):
            with suppress(QuillError):
                draft.discard()
        raise


def move(registry: Registry, name: str, new: str) -> list[str]:
    """Give a model another name: all of its versions, its aliases and what is unfinished, in one rename.

    Before it, the model's ledger notes which numbers were given under the old name, so that whoever takes
    that name next goes on after them.

    Args:
        registry: Where it is kept.
        name: What it is called.
        new: What it shall be called: a name that no other model has, or had.

    Returns:
        The references that it is now found by.

    Raises:
        InputError: One of them cannot be a model's name.
        NotFoundError: There is no such model.
        RefusedError: The new name is, or was, another model's.
        LockedError: A process is at work on one of them.
        CorruptError: The model's folder is a link, or its model.json is damaged.
        ResourceError: The registry cannot be written.
    """
    _check_whole(name, new)
    _check_new(new, f"quill mv {name}")
    names.check_name(name)
    if name == new:
        raise InputError(f"'{name}' is its name already", why="a model is moved to another name")
    under(registry, name)
    _refuse_taken(registry, name, new)
    folder, target = registry.root / name, registry.root / new
    with ExitStack() as held:
        for one in sorted((name, new)):
            held.enter_context(locks.hold(registry.root, one))
        there = under(registry, name)
        for place in sorted((folder, target)):
            held.enter_context(locks.ledger(place))
        _refuse_taken(registry, name, new)
        highest = max(t.number for t in there)

        def note(before: dict[str, Any]) -> dict[str, Any]:
            former = before.get("formerly", {})
            after = ledger.reserved(before, max(highest, former.get(new, 1) - 1))
            return after | {"formerly": former | {name: after["next_version"]}}

        ledger.amend(folder, note)
        fsio.rename(folder, target)
    return [f"{new}:v{t.number}" for t in there]


def _check_whole(name: str, new: str) -> None:
    """Refuse to move one version: it is known by the name that it has its number from."""
    if ":" in name:
        raise InputError(
            f"'{name}' is one version",
            why="a model moves as a whole; a version keeps the name that its number is of",
            hint=f"quill cp {name} {new} && quill rm {name}",
        )


def _check_new(name: str, command: str) -> None:
    before, colon, _ = name.partition(":")
    if colon:
        raise InputError(
            f"'{name}' is a reference", why="a name is needed; its number it gets", hint=f"{command} {before}"
        )
    names.check_name(name)


def _refuse_taken(registry: Registry, name: str, new: str) -> None:
    """Refuse a name whose numbers are, or were, another model's."""
    target = registry.root / new
    version.refuse_link(target)
    hint = f"quill cp {name} {new}"
    with fsio.guard(target, "read"):
        # An empty folder was left by a crash, and a rename takes its place.
        taken = os.path.lexists(target) and not (target.is_dir() and not os.listdir(target))
    if taken:
        have = ", ".join(f"v{v.number}" for v in registry.entries(new, all_versions=True)[:8])
        given = ledger.next_number(target) - 1 if target.is_dir() else 0
        gone = f"its numbers up to v{given} were given to models that are gone" if given else "it is no model"
        raise RefusedError(f"'{new}' is taken", why=f"it has {have}" if have else gone, hint=hint)
    others = [other for other in ledger.former_holders(registry.root, new) if other != name]
    if others:
        why = "whoever asks for one of its versions must not get one of another model"
        raise RefusedError(f"'{new}' was the name of '{others[0]}'", why=why, hint=hint)


def _describe(source: Version, on_bytes: OnBytes) -> dict[str, dict[str, Any]]:
    """What a manifest says of each file of a version, once the file was read and is that."""
    held = [f for f in FLAT if os.path.lexists(source.path / f)]
    listed: Iterable[str] = source.manifest["files"] if source.manifest else held
    found: dict[str, dict[str, Any]] = {}
    for file in listed:
        with source.open_file(file) as reading:
            expected = source.manifest["files"][file]["sha256"] if source.manifest else None
            found[file] = {"bytes": reading.size, "sha256": digest(reading, expected, on_bytes)}
    return found


def _facts(source: Version, listed: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What the copy's manifest says beyond its files."""
    weights = manifests.REQUIRED[1]
    carried = {k: v for k, v in (source.manifest or {}).items() if k not in _OF_THE_FOLDER}
    if source.manifest is None:
        carried["parameters"] = _count_parameters(source)
    known = f"{source.name}:v{source.number}"
    if source.label and source.manifest:
        # A path means something on one machine only.
        known = source.manifest.get("reference", known)
    return carried | {"copied_from": {"reference": known, "digest": listed[weights]["sha256"]}}


def _count_parameters(source: Version) -> int:
    from math import prod

    from quill.checkpoint import weights as tensors

    with source.open_file(manifests.REQUIRED[1]) as reading:
        layout = tensors.read_layout(reading.file, reading.size, reading.path)
    return sum(prod(t.shape) for t in layout.values())
