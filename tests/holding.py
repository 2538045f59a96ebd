"""A name of a registry that another process holds, as a training does."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from quill.registry import locks


@contextmanager
def held_elsewhere(root: Path, name: str = "a") -> Iterator[int]:
    """Hold a name; gives the process that does.

    Args:
        root: The registry's folder.
        name: The model's name.
    """
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            with locks.hold(root, name):
                os.write(write, b"r")
                time.sleep(60)
        finally:
            os._exit(1)
    os.close(write)
    try:
        assert os.read(read, 1) == b"r"
        yield child
    finally:
        os.close(read)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
