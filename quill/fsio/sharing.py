"""Folders that a group of users shares: setgid and writable for the group.

The kernel gives what is made in a setgid folder the folder's group, but takes its permissions from the
maker's umask, which usually locks the rest of the group out. As with git's core.sharedRepository, what is
made in a shared folder is therefore opened to the group (inode(7), "the set-group-ID bit").
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_SHARED = stat.S_ISGID | stat.S_IWGRP
_OF_FILES = stat.S_IRGRP | stat.S_IWGRP
_OF_FOLDERS = _OF_FILES | stat.S_IXGRP | stat.S_ISGID


class Shared(NamedTuple):
    """What was opened to a group.

    Attributes:
        changed: How many files and folders were changed.
        refused: Those that belong to other users, who alone can change them.
    """

    changed: int
    refused: list[Path]


def is_shared(folder: Path) -> bool:
    """Whether a folder is shared with its group."""
    return os.name != "nt" and os.stat(folder).st_mode & _SHARED == _SHARED


def open_to_group(path: Path) -> None:
    """Give a new file or folder the permissions of the group, if the folder that it is in is shared."""
    if is_shared(path.parent):
        _open(path)


def share(folder: Path, group: int | None = None) -> Shared:
    """Share an existing folder, and everything in it, with a group. Links are not followed.

    Args:
        folder: The folder.
        group: The group's number; None for the folder's own group.

    Raises:
        PermissionError: The folder itself belongs to another user, or the group is not one of the user's.
    """
    group = os.stat(folder).st_gid if group is None else group
    changed, refused = 0, []
    for path in _everything(folder):
        try:
            changed += _open(path, group)
        except PermissionError:
            if path == folder:
                raise
            refused.append(path)
    return Shared(changed, refused)


def _everything(folder: Path) -> Iterator[Path]:
    yield folder
    for entry in sorted(os.scandir(folder), key=lambda e: e.name):
        if entry.is_dir(follow_symlinks=False):
            yield from _everything(Path(entry.path))
        elif entry.is_file(follow_symlinks=False):
            yield Path(entry.path)


def _open(path: Path, group: int | None = None) -> bool:
    """Give the group its permissions, never through a link, and return whether it lacked some."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        found = os.fstat(fd)
        changed = group not in (None, found.st_gid)
        if group is not None and changed:
            os.fchown(fd, -1, group)
            found = os.fstat(fd)
        wanted = _OF_FOLDERS if stat.S_ISDIR(found.st_mode) else _OF_FILES
        if found.st_mode & wanted != wanted:
            os.fchmod(fd, stat.S_IMODE(found.st_mode) | wanted)
            changed = True
        return changed
    finally:
        os.close(fd)
