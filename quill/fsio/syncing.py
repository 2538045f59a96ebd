"""Make what was written survive a power loss."""

from __future__ import annotations

import errno
import os
import stat
import sys
from pathlib import Path

from quill.errors import CorruptError
from quill.fsio.failures import guard
from quill.fsio.reading import BINARY, NOFOLLOW
from quill.fsio.sharing import open_to_group


def sync_dir(path: Path) -> None:
    """Make renames and new files in a folder durable."""
    if os.name == "nt":
        return  # Windows has no handle to sync a folder by; its journal orders renames.
    fd = os.open(path, os.O_RDONLY)
    try:
        fsync(fd)
    except OSError as e:
        # Some network filesystems cannot sync a folder; their renames are synchronous.
        if e.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(fd)


def settle(folder: Path) -> None:
    """Sync everything in a folder and give files the mode that the umask asks for.

    Raises:
        CorruptError: It contains something other than files and folders.
    """
    with guard(folder, "save"):
        open_to_group(folder)
        for entry in sorted(os.scandir(folder), key=lambda e: e.name):
            if entry.is_dir(follow_symlinks=False):
                settle(Path(entry.path))
            elif entry.is_file(follow_symlinks=False):
                settle_file(Path(entry.path), durable=True)
            else:
                raise CorruptError(
                    f"'{entry.path}' is a link or a device", why="only regular files are saved"
                )
        sync_dir(folder)


def settle_file(path: Path, *, durable: bool) -> None:
    # The folder was created under the same umask, so its mode shows what the file's should be;
    # os.umask would change it for every thread for a moment.
    wanted = stat.S_IMODE(os.stat(path.parent).st_mode) & 0o666
    fd = os.open(path, os.O_RDONLY | NOFOLLOW | BINARY)
    try:
        found = os.fstat(fd)
        # In a shared registry another user may have written the file; its mode is theirs to change.
        if os.name != "nt" and stat.S_IMODE(found.st_mode) != wanted and _is_ours(found):
            os.fchmod(fd, wanted)
        if durable:
            fsync(fd)
    finally:
        os.close(fd)


def _is_ours(found: os.stat_result) -> bool:
    return os.geteuid() in (0, found.st_uid)


def fsync(fd: int) -> None:
    if sys.platform == "darwin":
        import fcntl

        # fsync stops at the drive's own cache there (Apple, fsync(2)); this does not.
        fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
        return
    os.fsync(fd)
