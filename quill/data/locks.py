"""Locks that keep a dataset from being removed while a process reads or replaces it.

flock on the dataset's folder: shared by its users, exclusive for its removal. A lock ends with its process,
and needs neither a lock file nor a writable folder. Replacing a dataset takes no lock, since those who have
its files open keep them.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from quill.errors import LockedError


@contextmanager
def shared(path: Path) -> Iterator[None]:
    """Keep a dataset from being removed for the length of the context.

    Args:
        path: Its folder; it need not exist.
    """
    fd = _flock(path, shared=True)
    try:
        yield
    finally:
        if fd is not None:
            os.close(fd)


def share(owner: object, path: Path) -> None:
    """Keep a dataset from being removed for the life of an object.

    Args:
        owner: The object.
        path: The dataset's folder.
    """
    fd = _flock(path, shared=True)
    if fd is not None:
        weakref.finalize(owner, os.close, fd)


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Keep others from starting to use a dataset while it is removed.

    Args:
        path: Its folder.

    Raises:
        LockedError: Another process is using it.
    """
    try:
        fd = _flock(path, shared=False)
    except BlockingIOError:
        raise LockedError(
            f"dataset '{path.name}' is in use",
            why="a training, an evaluation or quill prepare is reading it",
            hint="wait until it has finished",
        ) from None
    try:
        yield
    finally:
        if fd is not None:
            os.close(fd)


def _flock(folder: Path, *, shared: bool) -> int | None:
    """Lock a folder; None where folders or the filesystem have no locks.

    Raises:
        BlockingIOError: An exclusive lock is wanted, and another process has one.
    """
    try:
        import fcntl
    except ImportError:
        return None
    try:
        fd = os.open(folder, os.O_RDONLY)
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
