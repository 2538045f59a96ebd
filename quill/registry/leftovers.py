"""What a crash or a kill left: staging folders, the trash, files half written; known by the names fsio gives.

What has another name is not quill's, wherever it lies. Links are not followed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from quill import fsio
from quill.registry import manifest as manifests

_UNIQUE = re.compile(r"[0-9]+-[0-9a-f]{12}(-.*)?", re.DOTALL)
_TEMPORARY = re.compile(r"\.tmp-(lock-)?[0-9]+-[0-9a-f]{8,12}")
_DOWNLOADS = ".downloads"


def beside(folder: Path, before: float | None) -> Iterator[Path]:
    """The leftovers in a folder, and in its staging and trash.

    Args:
        folder: Where to look.
        before: Only what nothing was done to since then, in seconds since the epoch; None for all.
    """
    for entry in scan(folder):
        path = Path(entry.path)
        if entry.name in (fsio.STAGING, fsio.TRASH):
            inside = scan(path) if is_folder(path) else []
            found = [Path(e.path) for e in inside if _UNIQUE.fullmatch(e.name)]
        else:
            found = [path] if _TEMPORARY.fullmatch(entry.name) else []
        yield from (p for p in found if is_old(p, before))


def below(folder: Path, before: float | None) -> Iterator[Path]:
    """As `beside`, and the same of every folder in it."""
    yield from beside(folder, before)
    for entry in scan(folder):
        path = Path(entry.path)
        hidden = entry.name in (fsio.STAGING, fsio.TRASH) or _TEMPORARY.fullmatch(entry.name)
        if is_folder(path) and not hidden:
            yield from below(path, before)


def of_datasets(root: Path, before: float | None) -> Iterator[Path]:
    """The leftovers in a folder of datasets, which may hold much that is none of quill's.

    Args:
        root: The folder.
        before: As for `beside`.
    """
    yield from beside(root, before)
    for entry in scan(root):
        path = Path(entry.path)
        if is_folder(path) and (entry.name == _DOWNLOADS or (path / manifests.FILE).is_file()):
            yield from beside(path, before)


def is_old(path: Path, before: float | None) -> bool:
    """Whether nothing was done to a file or folder, or to anything in it, since `before`."""
    return before is None or _last_change(path) < before


def is_folder(path: Path) -> bool:
    """Whether it is a folder itself, and no link to one."""
    return path.is_dir() and not path.is_symlink()


def scan(folder: Path) -> list[os.DirEntry[str]]:
    """What is in a folder, by name; nothing where there is none."""
    with (
        fsio.guard(folder, "read"),
        suppress(FileNotFoundError, NotADirectoryError),
        os.scandir(folder) as found,
    ):
        return sorted(found, key=lambda e: e.name)
    return []


def _last_change(path: Path) -> float:
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return 0.0
    inside = (_last_change(Path(e.path)) for e in (scan(path) if is_folder(path) else ()))
    # Renaming something changes its ctime alone; a copied folder may have old mtimes.
    return max([found.st_mtime, found.st_ctime, *inside])
