"""Locks on folders, which tell whether a process is still working in one."""

from __future__ import annotations

import os
import weakref
from pathlib import Path


def lock_folder(folder: Path, *, shared: bool) -> int | None:
    """Lock a folder with flock, until the returned file is closed or the process ends.

    Args:
        folder: The folder.
        shared: Allow other shared locks next to it.

    Returns:
        None where it is not a folder, folders or the filesystem have no locks, or another process has a lock
        and `shared` is set.

    Raises:
        BlockingIOError: An exclusive lock is wanted, and another process has one.
    """
    try:
        import fcntl
    except ImportError:
        return None
    try:
        # Opening a FIFO in its place would wait for its other end.
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as e:
        os.close(fd)
        if isinstance(e, BlockingIOError) and not shared:
            raise
        return None
    return fd


def keep_locked(owner: object, folder: Path) -> None:
    """Hold a shared lock on a folder for the life of an object.

    Args:
        owner: The object.
        folder: The folder.
    """
    fd = lock_folder(folder, shared=True)
    if fd is not None:
        weakref.finalize(owner, os.close, fd)


def is_in_use(folder: Path) -> bool:
    """Whether a process holds a lock on a folder, whatever the clock says of its age."""
    try:
        fd = lock_folder(folder, shared=False)
    except BlockingIOError:
        return True
    if fd is not None:
        os.close(fd)
    return False
