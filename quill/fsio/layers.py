"""Folders that cannot be renamed, because they come from a lower layer of overlayfs, as in a container.

Renaming them fails with EXDEV (Linux, Documentation/filesystems/overlayfs.rst, "Non-directories" and
"Directories"), while their files can be linked, renamed and removed.
"""

from __future__ import annotations

import errno
import os
import stat
from contextlib import suppress
from pathlib import Path

from quill.fsio.reading import BINARY, NOFOLLOW, open_regular
from quill.fsio.syncing import fsync, sync_dir

# A folder without a manifest that contains this file is being removed.
REMOVED = ".removed"
# What makes a folder a version, a resume state or a dataset.
MANIFEST = "manifest.json"
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | NOFOLLOW | BINARY
_CHUNK = 1 << 22


def is_fixed(error: OSError) -> bool:
    """Whether a folder could not be renamed because of the layer that it is in."""
    return error.errno == errno.EXDEV


def is_removed(folder: Path) -> bool:
    """Whether a folder's removal was begun; a crash may have left the rest of it."""
    return os.path.lexists(folder / REMOVED) and not os.path.lexists(folder / MANIFEST)


def clone(source: Path, target: Path) -> None:
    """Copy a folder durably, without following links; files are linked where the filesystem allows.

    Args:
        source: The folder.
        target: The folder to create.
    """
    os.mkdir(target)
    for entry in sorted(os.scandir(source), key=lambda e: e.name):
        path = Path(entry.path)
        if entry.name == REMOVED:
            continue
        if entry.is_dir(follow_symlinks=False):
            clone(path, target / entry.name)
            continue
        try:
            os.link(path, target / entry.name, follow_symlinks=False)
        except OSError:
            if not entry.is_file(follow_symlinks=False):
                raise
            _copy(path, target / entry.name)
    wanted = stat.S_IMODE(os.stat(source).st_mode)
    if stat.S_IMODE(os.stat(target).st_mode) != wanted:
        os.chmod(target, wanted)
    sync_dir(target)


def remove(folder: Path) -> None:
    """Remove a folder where it is, so that no part of it is ever taken for the whole.

    It is marked first, and then loses its manifest, without which it is neither a version nor a dataset.
    """
    mark = folder / REMOVED
    with suppress(FileExistsError):
        os.close(os.open(mark, _NEW, 0o666))
    sync_dir(folder)
    with suppress(FileNotFoundError):
        os.unlink(folder / MANIFEST)
        sync_dir(folder)
    entries = sorted(os.scandir(folder), key=lambda e: e.name)
    # What a model's own files say of it counts until its versions are gone.
    for entry in [e for e in entries if e.is_dir(follow_symlinks=False)]:
        remove(Path(entry.path))
    for entry in [e for e in entries if not e.is_dir(follow_symlinks=False) and e.name != REMOVED]:
        os.unlink(entry.path)
    sync_dir(folder)
    os.unlink(mark)
    os.rmdir(folder)
    sync_dir(folder.parent)


def _copy(source: Path, target: Path) -> None:
    read = open_regular(source, os.O_RDONLY, "copy")
    try:
        write = os.open(target, _NEW, stat.S_IMODE(os.fstat(read).st_mode))
        try:
            while data := os.read(read, _CHUNK):
                while data:
                    data = data[os.write(write, data) :]
            fsync(write)
        finally:
            os.close(write)
    finally:
        os.close(read)
