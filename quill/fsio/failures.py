"""What the disk refused, in words, and whether there is room."""

from __future__ import annotations

import errno
import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from quill.errors import ResourceError
from quill.units import size

_DENIED = ("permission denied", "ls -ld {folder}")
REASONS: dict[int, tuple[str, str]] = {
    errno.ENOSPC: ("the disk is full", "df -h {folder}"),
    getattr(errno, "EDQUOT", errno.ENOSPC): ("the disk quota is used up", "quota -s"),
    errno.EIO: ("the disk reported an input/output error", "dmesg | tail"),
    errno.EACCES: _DENIED,
    errno.EPERM: _DENIED,
    errno.EROFS: ("the filesystem is read-only", "choose a folder on a writable filesystem"),
    errno.ENOENT: ("it does not exist, or was just moved", "ls -la {folder}"),
    errno.ENOTDIR: ("part of the path is a file, not a folder", "ls -ld {folder}"),
    errno.ENAMETOOLONG: ("the path is longer than the filesystem allows", "choose a shorter name"),
    errno.EMFILE: ("too many files are open", "ulimit -n 4096"),
    errno.EFBIG: (
        "the file would exceed the filesystem's or the process's size limit",
        "ulimit -f unlimited",
    ),
}


@contextmanager
def guard(path: Path | str, doing: str) -> Iterator[None]:
    """Turn any OSError inside into a ResourceError that says what failed and why.

    Args:
        path: What is being worked on.
        doing: A verb, as in "cannot <doing> '<path>'".

    Raises:
        ResourceError: For any OSError inside.
    """
    try:
        yield
    except OSError as e:
        folder = path if os.path.isdir(path) else os.path.dirname(path) or "."
        why, hint = REASONS.get(e.errno or 0, (e.strerror or str(e), ""))
        hint = hint.replace("{folder}", shlex.quote(str(folder)))
        raise ResourceError(f"cannot {doing} '{path}'", why=why, hint=hint) from e


def upwards(path: Path) -> Iterator[Path]:
    """A path and its parents, one by one: the first look at a path that is too long refuses it."""
    yield path
    yield from path.parents


def require_space(path: Path, needed_bytes: int, what: str) -> None:
    """Check for free disk space before starting the work.

    Args:
        path: Where the bytes will go; it need not exist yet.
        needed_bytes: How many.
        what: What needs them, for the message.

    Raises:
        ResourceError: The filesystem has less free space.
    """
    import shutil

    with guard(path, "use"):
        existing = next((p for p in upwards(path.absolute()) if p.exists()), Path("/"))
    with guard(existing, "measure"):
        free = shutil.disk_usage(existing).free
    if free < needed_bytes:
        raise ResourceError(
            f"not enough disk space for {what}",
            why=f"it needs {size(needed_bytes)}, '{existing}' has {size(free)} free",
            hint=f"df -h {shlex.quote(str(existing))}",
        )
