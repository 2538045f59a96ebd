"""What a reference means where a run that is not finished may be meant, and what is stored of either."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from quill import fsio
from quill.errors import NotFoundError
from quill.registry import manifest, names
from quill.registry.draft import Draft
from quill.registry.store import Registry
from quill.registry.version import Version


def find(registry: Registry, reference: str, *, in_progress: bool = False) -> Version | Draft:
    """What a reference means where a run that is not finished may be meant too.

    Args:
        registry: Where to look.
        reference: As for `Registry.resolve`.
        in_progress: A name alone means the run in progress, if that is newer than its last version.

    Raises:
        QuillError: As for `Registry.resolve`.
    """
    if names.is_path(reference):
        return _draft_in(os.path.expanduser(reference)) or registry.resolve(reference)
    name, number, alias = names.parse(reference)
    drafts = [d for d in registry.drafts(name) if alias is None and number in (None, d.number)]
    if drafts and in_progress and number is None:
        newest = registry.newest(name)
        if newest is None or newest.number < drafts[-1].number:
            return drafts[-1]
    try:
        return registry.resolve(reference)
    except NotFoundError:
        if not drafts:
            raise
        return drafts[-1]


def _draft_in(folder: str) -> Draft | None:
    """The version in progress that a folder is, or None."""
    if not os.path.isdir(folder):
        return None
    path = Path(os.path.realpath(folder))
    number, held = names.version_number(path.name), set(os.listdir(path))
    # A run that was measured once has all of a model's files, and yet is not one that is finished.
    if number and manifest.FILE not in held and held & {manifest.STATUS, manifest.LOG}:
        return Draft(path.parent.parent, path.parent.name, number)
    return None


def settings_of(found: Version | Draft) -> dict[str, Any]:
    """The config of a version, or of one in progress, as it is stored.

    Raises:
        NotFoundError: A run was begun and never got so far as to have one.
        CorruptError: It is damaged.
    """
    name = manifest.REQUIRED[0]
    if isinstance(found, Version):
        return found.read_object(name)
    try:
        return manifest.read_object(found.path / name)
    except FileNotFoundError:
        raise NotFoundError(
            f"{found.reference} has no config yet", why=f"its folder holds no {name}", hint="quill list"
        ) from None


def metrics_of(found: Version | Draft) -> bytes:
    """The metrics of a version, or of one in progress, as they are stored; empty where there are none.

    Raises:
        CorruptError: They are damaged, or no plain file.
    """
    from quill.evaluation import curves

    if isinstance(found, Version):
        if found.manifest:
            there = curves.METRICS in found.manifest["files"]
        else:
            there = (found.path / curves.METRICS).exists()
        return found.read_file(curves.METRICS) if there else b""
    try:
        with fsio.open_plain(found.path / curves.METRICS) as file:
            return file.readall() or b""
    except FileNotFoundError:
        return b""
