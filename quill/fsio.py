"""The only door to the disk for what must last: every write here is whole or not there at all.

The order is that of every careful store: write under a temporary name on the same filesystem, give it
the mode that the umask asks for, fsync it, rename it into place, fsync the folder. A reader sees the
old or the new, never a part. A rename is atomic (POSIX.1-2017, rename); it lasts only once its folder
is synced, and a file's bytes only once the file is. The few functions at the end are the only ones
that change anything on a disk.
"""

from __future__ import annotations

import errno
import os
import stat
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import Any

from quill import strictjson
from quill.errors import CorruptError, RefusedError, ResourceError

STAGING = ".staging"
TRASH = ".trash"
_TEMPORARY = ".tmp-"

_DENIED = ("you have no permission", "ls -ld '{folder}'")
_FULL = ("the disk is full", "free some space: df -h '{folder}'")
_REASONS: dict[int, tuple[str, str]] = {
    errno.ENOSPC: _FULL,
    getattr(errno, "EDQUOT", errno.ENOSPC): ("your disk quota is used up", "quota -s"),
    errno.EIO: ("the device failed to read or write", "check the disk before you trust it: dmesg | tail"),
    errno.EACCES: _DENIED,
    errno.EPERM: _DENIED,
    errno.EROFS: ("the filesystem is read-only", "choose another place: --registry DIR"),
    errno.ENOENT: ("it is not there, or was moved meanwhile", "ls -la '{folder}'"),
    errno.ENOTDIR: ("part of the path is a file, not a folder", "ls -ld '{folder}'"),
    errno.ENAMETOOLONG: ("the path is longer than the filesystem takes", "choose a shorter name"),
    errno.EMFILE: ("too many files are open", "ulimit -n 4096"),
    errno.EFBIG: ("the file would be larger than this filesystem or limit allows", "ulimit -f unlimited"),
}


@contextmanager
def guard(path: Path, doing: str) -> Iterator[None]:
    """Turn what the operating system refuses into quill's own words.

    Args:
        path: What is being worked on.
        doing: A verb, as in "cannot <doing> '<path>'".

    Raises:
        ResourceError: For any OSError inside.
    """
    try:
        yield
    except OSError as e:
        folder = path if path.is_dir() else path.parent
        why, hint = _REASONS.get(e.errno or 0, (e.strerror or str(e), ""))
        raise ResourceError(f"cannot {doing} '{path}'", why=why, hint=hint.format(folder=folder)) from e


def write_bytes(
    path: Path, data: bytes, *, durable: bool = True, check: Callable[[], object] | None = None
) -> str:
    """Write a file whole, replacing what was there in one step.

    Args:
        path: The file; its folder exists.
        data: What it shall hold.
        durable: Sync it; without, it is still whole or absent to every reader, but a power loss may undo it.
        check: Called when all is written and nothing replaced yet; what it raises leaves the old file.

    Returns:
        The sha256 of what was written, hex.

    Raises:
        ResourceError: Disk, permission or device; what was there before is untouched.
    """
    return write_chunks(path, [data], durable=durable, check=check)


def write_json(
    path: Path, value: Any, *, durable: bool = True, check: Callable[[], object] | None = None
) -> str:
    """Write a JSON document for people and programs; the rest is as for `write_bytes`."""
    # A lone surrogate (a file name that is no UTF-8 has them) is written as the escape that JSON has for it.
    raw = strictjson.dumps(value).encode("utf-8", "backslashreplace")
    return write_bytes(path, raw, durable=durable, check=check)


def write_chunks(
    path: Path, chunks: Iterable[Any], *, durable: bool = True, check: Callable[[], object] | None = None
) -> str:
    """Write a file from pieces, so that a large one is never held twice.

    Args:
        path: The file; its folder exists.
        chunks: Contiguous buffers: bytes, memoryviews, numpy arrays.
        durable: As for `write_bytes`.
        check: As for `write_bytes`.

    Returns:
        The sha256 of what was written, hex.
    """
    import hashlib

    digest = hashlib.sha256()
    temporary = _beside(path)
    with guard(path, "write"):
        _refuse_special(path)
        try:
            fd = _create(temporary)
            try:
                for chunk in chunks:
                    view = memoryview(chunk)
                    if not view.nbytes:
                        continue
                    view = view.cast("B")
                    digest.update(view)
                    _write(fd, view)
                if durable:
                    _fsync(fd)
            finally:
                os.close(fd)
            if check is not None:
                check()
            _replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary)
            raise
        if durable:
            sync_dir(path.parent)
    return digest.hexdigest()


@contextmanager
def workshop(target: Path) -> Iterator[Path]:
    """Give a place to make a file or folder in, under its final name, on the target's filesystem.

    A library may do there what it likes: its temporary files, modes and renames never reach the target.
    `deliver` puts what was made in its place; what is left is removed at the end.

    Args:
        target: Where it shall end up; its folder exists.

    Yields:
        A path that nothing is at, named as the target is.
    """
    place = _beside(target)
    with guard(target, "write"):
        _mkdir(place)
    try:
        yield place / target.name
    finally:
        delete(place)


def deliver(
    made: Path, target: Path, *, replace: bool = False, check: Callable[[], object] | None = None
) -> None:
    """Put what was made in a workshop in its place: all of it synced, then renamed.

    Args:
        made: The file or folder.
        target: The path that the workshop was opened for.
        replace: Take the place of a file or folder that is there.
        check: As for `write_bytes`.

    Raises:
        RefusedError: Something is there already.
        ResourceError: Disk or permission; the target is as it was.
    """
    if not replace and os.path.lexists(target):
        raise RefusedError(
            f"'{target}' exists already", why="nothing is written over unasked", hint="--force"
        )
    with guard(target, "write"):
        if not made.is_dir():
            _refuse_special(target)
            _settle(made, durable=True)
            if check is not None:
                check()
            _replace(made, target)
        else:
            settle(made)
            if check is not None:
                check()
            if os.path.lexists(target):
                # Two renames: a folder cannot take the place of one that is not empty.
                _rename(target, made.with_name(".old"))
            _rename(made, target)
        sync_dir(target.parent)


class Log:
    """An open file that lines are appended to, not synced: a log may lose its tail to a power loss.

    Lines go to the file that was opened, even after another process has put a new one in its place.

    Args:
        path: Its path.
        content: What a new file starts with, which replaces the old one; None to append to the old one,
            whose last line is ended if a crash tore it.
        check: As for `write_bytes`.

    Raises:
        ResourceError: It cannot be written.
    """

    def __init__(
        self, path: Path, content: bytes | None = None, check: Callable[[], object] | None = None
    ) -> None:
        self._path = path
        if content is None:
            with guard(path, "write"):
                self._fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | _NOFOLLOW | _BINARY, 0o666)
                self._end_line()
            return
        temporary = _beside(path)
        with guard(path, "write"):
            _refuse_special(path)
            self._fd = os.open(temporary, _NEW | os.O_APPEND, 0o666)
            try:
                _write(self._fd, memoryview(content))
                _fsync(self._fd)
                if check is not None:
                    check()
                _replace(temporary, path)
                sync_dir(path.parent)
            except BaseException:
                with suppress(OSError):
                    os.unlink(temporary)
                self.close()
                raise

    def append(self, text: str) -> None:
        """Append one line, given without its newline, in one write: lines of several writers never mix."""
        assert "\n" not in text, "one line at a time"
        with guard(self._path, "write"):
            _write(self._fd, memoryview(text.encode() + b"\n"))

    def close(self) -> None:
        """Close the file; closing it twice is fine."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            with guard(self._path, "write"):
                os.close(fd)

    def _end_line(self) -> None:
        size = os.lseek(self._fd, 0, os.SEEK_END)
        if size:
            os.lseek(self._fd, size - 1, os.SEEK_SET)
            if os.read(self._fd, 1) != b"\n":
                _write(self._fd, memoryview(b"\n"))


def sha256(path: Path) -> str:
    """The sha256 of a file, hex, read in a stream."""
    import hashlib

    with guard(path, "read"), open(path, "rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def open_plain(path: Path) -> FileIO:
    """Open a file for reading, unbuffered, if it is a plain one.

    Raises:
        FileNotFoundError: There is none; what that means only the caller knows.
        CorruptError: It is a link, which might point anywhere, or not a file at all.
        ResourceError: It cannot be read.
    """
    # Without O_NONBLOCK a FIFO would hold the reader until somebody writes to it.
    flags = os.O_RDONLY | _NOFOLLOW | _BINARY | getattr(os, "O_NONBLOCK", 0)
    try:
        fd = os.open(path, flags)
    except FileNotFoundError:
        raise
    except OSError as e:
        if e.errno == errno.ELOOP:
            raise CorruptError(
                f"'{path}' is a symbolic link",
                why="a link may point anywhere, so none is followed",
                hint=f"put the file itself there: cp --remove-destination $(readlink -f '{path}') '{path}'",
            ) from None
        with guard(path, "read"):
            raise
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise CorruptError(f"'{path}' is not a plain file", why="it is a folder or a device")
    return FileIO(fd, "rb", closefd=True)


def make_dir(path: Path) -> None:
    """Make a folder and those above it, lastingly; one that exists already is fine."""
    with guard(path, "create"):
        missing = [p for p in (path, *path.parents) if not p.is_dir()]
        for folder in reversed(missing):
            with suppress(FileExistsError):
                _mkdir(folder)
            if not folder.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, "it is a file, not a folder")
            sync_dir(folder.parent)


def claim(path: Path) -> bool:
    """Make a folder that nobody else has made: of any number of callers one gets True.

    Args:
        path: The folder; the one above it exists.
    """
    with guard(path, "create"):
        try:
            _mkdir(path)
        except FileExistsError:
            return False
        sync_dir(path.parent)
    return True


@contextmanager
def stage(parent: Path) -> Iterator[Path]:
    """Give a new empty folder to build something in, on the filesystem where it shall end up.

    Args:
        parent: The folder that the result belongs in; made when missing.

    Yields:
        `parent/.staging/<unique>`; removed at the end unless it was published.
    """
    make_dir(parent / STAGING)
    staged = parent / STAGING / _unique()
    with guard(staged, "create"):
        _mkdir(staged)
    try:
        yield staged
    finally:
        delete(staged)


def publish(staged: Path, target: Path, *, check: Callable[[], object] | None = None) -> None:
    """Put a finished folder in its place: everything in it synced, then one rename.

    Args:
        staged: The folder from `stage`.
        target: Where it shall be, on the same filesystem.
        check: As for `write_bytes`.

    Raises:
        RefusedError: Something is there already.
    """
    taken = RefusedError(f"'{target}' exists already", why="what is published is never written over")
    if os.path.lexists(target):
        raise taken
    settle(staged)
    if check is not None:
        check()
    with guard(target, "publish"):
        try:
            _rename(staged, target)
        except OSError as e:
            if e.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                raise taken from None
            raise
        sync_dir(target.parent)


def settle(folder: Path) -> None:
    """Make everything in a folder last: modes as the umask has them, every file and folder synced.

    Raises:
        CorruptError: Something in it is neither a file nor a folder.
    """
    with guard(folder, "save"):
        for entry in sorted(os.scandir(folder), key=lambda e: e.name):
            if entry.is_dir(follow_symlinks=False):
                settle(Path(entry.path))
            elif entry.is_file(follow_symlinks=False):
                _settle(Path(entry.path), durable=True)
            else:
                raise CorruptError(f"'{entry.path}' is a link or a device", why="only plain files are kept")
        sync_dir(folder)


def rename(source: Path, target: Path) -> None:
    """Rename a folder, lastingly; the caller has seen to it that nothing is at the target."""
    with guard(source, "rename"):
        _rename(source, target)
        sync_dir(target.parent)


def discard(path: Path, trash: Path | None = None) -> None:
    """Remove a file or folder: out of sight in one rename, then deleted. Links are never followed.

    Args:
        path: What to remove.
        trash: A folder on the same filesystem; unset: `.trash` beside it. What a crash leaves lies there.
    """
    trash = trash or path.parent / TRASH
    make_dir(trash)
    grave = trash / f"{_unique()}-{path.name}"
    with guard(path, "remove"):
        _rename(path, grave)
        sync_dir(path.parent)
    delete(grave)


def delete(path: Path) -> None:
    """Delete what nobody looks at any more; what cannot go now is left for a later cleanup."""
    import shutil

    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            _unlink(path)


def remove_file(path: Path) -> None:
    """Remove one file; that it is gone already is fine."""
    with guard(path, "remove"), suppress(FileNotFoundError):
        _unlink(path)


def expanded(path: str | Path) -> Path:
    """A path with its ~ spelled out; where nobody has that home, as it stands: cron may know of none."""
    try:
        # pathlib's own would take './~' for a home, and raises where there is none.
        return Path(os.path.expanduser(path))
    except ValueError:
        return Path(path)


def require_space(path: Path, needed_bytes: int, what: str) -> None:
    """Refuse before the work rather than in the middle of it.

    Args:
        path: Where the bytes will go; it need not exist yet.
        needed_bytes: How many.
        what: What needs them, for the message.

    Raises:
        ResourceError: The filesystem has less room than that.
    """
    import shutil

    there = next((p for p in (path, *path.absolute().parents) if p.exists()), Path("/"))
    with guard(there, "measure"):
        free = shutil.disk_usage(there).free
    if free < needed_bytes:
        raise ResourceError(
            f"not enough disk for {what}",
            why=f"it needs {needed_bytes / 1e6:,.1f} MB, '{there}' has {free / 1e6:,.1f} MB free",
            hint=f"free some space: df -h '{there}'",
        )


def sync_dir(path: Path) -> None:
    """Make renames and creations in a folder last."""
    if os.name == "nt":
        return  # Windows has no handle to sync a folder by; its journal orders renames.
    fd = os.open(path, os.O_RDONLY)
    try:
        _fsync(fd)
    except OSError as e:
        # Some network filesystems cannot sync a folder at all; their rename is synchronous.
        if e.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(fd)


_NOFOLLOW = getattr(os, "O_NOFOLLOW", 0)
_BINARY = getattr(os, "O_BINARY", 0)
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | _NOFOLLOW | _BINARY


def _unique() -> str:
    return f"{os.getpid()}-{os.urandom(6).hex()}"


def _beside(path: Path) -> Path:
    return path.parent / (_TEMPORARY + _unique())


def _refuse_special(path: Path) -> None:
    """A rename would put a plain file in the place of a device or a FIFO."""
    with suppress(FileNotFoundError):
        mode = os.lstat(path).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISLNK(mode)):
            raise OSError(errno.EINVAL, "it is a folder or a device, not a file")


def _settle(path: Path, *, durable: bool) -> None:
    """Give a file that a library wrote the mode that the umask gives, and sync it."""
    # The folder was made under the same umask, so its mode tells what the file's should be;
    # asking for the umask itself would set it for every thread for a moment.
    wanted = stat.S_IMODE(os.stat(path.parent).st_mode) & 0o666
    fd = os.open(path, os.O_RDONLY | _NOFOLLOW | _BINARY)
    try:
        if os.name != "nt" and stat.S_IMODE(os.fstat(fd).st_mode) != wanted:
            _chmod(fd, wanted)
        if durable:
            _fsync(fd)
    finally:
        os.close(fd)


def _create(path: Path) -> int:
    return os.open(path, _NEW, 0o666)


def _write(fd: int, data: memoryview) -> None:
    while data:
        written = os.write(fd, data)
        if written <= 0:
            raise OSError(errno.EIO, "the device took no bytes")
        data = data[written:]


def _fsync(fd: int) -> None:
    if sys.platform == "darwin":
        import fcntl

        # There fsync stops at the drive's own cache (Apple, fsync(2)); this does not.
        fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
        return
    os.fsync(fd)


def _chmod(fd: int, mode: int) -> None:
    os.fchmod(fd, mode)


def _replace(source: Path, target: Path) -> None:
    os.replace(source, target)


def _rename(source: Path, target: Path) -> None:
    os.rename(source, target)


def _mkdir(path: Path) -> None:
    os.mkdir(path)


def _unlink(path: Path) -> None:
    os.unlink(path)
