"""Locks that keep a dataset from being removed while a process reads or replaces it.

flock on the dataset's folder: shared by its users, exclusive for its removal. A lock ends with its process,
and needs neither a lock file nor a writable folder. Replacing a dataset takes no lock, since those who have
its files open keep them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from quill import fsio
from quill.errors import LockedError


@contextmanager
def shared(path: Path) -> Iterator[None]:
    """Keep a dataset from being removed for the length of the context.

    Args:
        path: Its folder; it need not exist.
    """
    fd = fsio.lock_folder(path, shared=True)
    try:
        yield
    finally:
        if fd is not None:
            os.close(fd)


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Keep others from starting to use a dataset while it is removed.

    Args:
        path: Its folder.

    Raises:
        LockedError: Another process is using it.
    """
    try:
        fd = fsio.lock_folder(path, shared=False)
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
