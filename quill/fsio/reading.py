"""Read plain files alone: never through a link, never a device, never more than a file of its kind has."""

from __future__ import annotations

import errno
import os
import shlex
import stat
from contextlib import suppress
from io import FileIO
from pathlib import Path

from quill.errors import CorruptError
from quill.fsio.failures import guard
from quill.units import size

NOFOLLOW = getattr(os, "O_NOFOLLOW", 0)
BINARY = getattr(os, "O_BINARY", 0)
_NONBLOCK = getattr(os, "O_NONBLOCK", 0)


def sha256(path: Path) -> str:
    """Compute the sha256 of a file, hex, in a stream."""
    import hashlib

    with guard(path, "read"), open(path, "rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def open_plain(path: Path) -> FileIO:
    """Open a regular file for reading, unbuffered.

    Raises:
        FileNotFoundError: It does not exist; only the caller knows what that means.
        CorruptError: It is a symbolic link, which might point anywhere, or not a regular file.
        ResourceError: It cannot be read.
    """
    return FileIO(open_regular(path, os.O_RDONLY, "read"), "rb", closefd=True)


def read_plain(path: Path | str, most: int) -> bytes:
    """Read a regular file whole.

    Args:
        path: The file.
        most: The most bytes that such a file may have; nothing of a larger one is read.

    Raises:
        FileNotFoundError: It does not exist.
        CorruptError: It is larger, or as for `open_plain`.
        ResourceError: It cannot be read, or does not fit in memory.
    """
    fd, found = _opened(path, os.O_RDONLY, "read")
    try:
        needed = found.st_size
        check_size(path, needed, most)
        raw = os.read(fd, needed)
        # One read may return fewer bytes than there are.
        while len(raw) < needed and (more := os.read(fd, needed - len(raw))):
            raw += more
        return raw
    except OSError:
        with guard(path, "read"):
            raise
    finally:
        os.close(fd)


def check_size(path: Path | str, found: int, most: int) -> None:
    """Refuse a file that is larger than any of its kind.

    Raises:
        CorruptError: It is.
    """
    if found > most:
        why = f"it has {size(found)}, and a file of this kind at most {size(most)}"
        raise CorruptError(f"'{path}' is not safe to read", why=why)


def expanded(path: str | Path) -> Path:
    """Expand ~ in a path; without a home folder, as under cron, the path stays as it is."""
    try:
        # pathlib would expand './~' too, and raises where there is no home.
        return Path(os.path.expanduser(path))
    except ValueError:
        return Path(path)


def open_regular(path: Path | str, flags: int, doing: str) -> int:
    """Open a regular file, whatever else is in its place; raises as `open_plain` does."""
    return _opened(path, flags, doing)[0]


def _opened(path: Path | str, flags: int, doing: str) -> tuple[int, os.stat_result]:
    """As `open_regular`; what it is too."""
    # Without O_NONBLOCK opening a FIFO waits for its other end.
    flags |= NOFOLLOW | BINARY | _NONBLOCK
    try:
        fd = os.open(path, flags, 0o666)
    except FileNotFoundError:
        raise
    except OSError as e:
        if e.errno == errno.ELOOP:
            link = shlex.quote(str(path))
            raise CorruptError(
                f"'{path}' is a symbolic link",
                why="links are not followed, because they may point anywhere",
                hint=f'cp --remove-destination "$(readlink -f {link})" {link}',
            ) from None
        # A socket, and a FIFO or a device that cannot be opened this way.
        if e.errno in (errno.ENXIO, errno.ENODEV, errno.EISDIR):
            raise special(path) from None
        with guard(path, doing):
            raise
    found = os.fstat(fd)
    if not stat.S_ISREG(found.st_mode):
        os.close(fd)
        raise special(path)
    return fd, found


def refuse_special(path: Path) -> None:
    """Refuse to replace a device or a FIFO: the rename would leave a regular file in its place."""
    with suppress(FileNotFoundError):
        mode = os.lstat(path).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISLNK(mode)):
            raise special(path)


def special(path: Path | str) -> CorruptError:
    return CorruptError(f"'{path}' is not a regular file", why="it is a folder or a device")
