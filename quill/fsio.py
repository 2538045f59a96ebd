"""Durable writes: every file or folder appears whole or not at all.

Each write is made under a temporary name on the same filesystem, synced, renamed to its target, and the
target's folder synced. Readers see the old content or the new, never a mixture. A rename is atomic
(POSIX.1-2017, rename), but it survives a power loss only once its folder is synced, and a file's bytes only
once the file is.
"""

from __future__ import annotations

import errno
import os
import shlex
import stat
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import Any

from quill import strictjson
from quill.errors import CorruptError, RefusedError, ResourceError
from quill.units import size

# Older versions staged folders here; `quill gc` still removes what they left.
STAGING = ".staging"
TRASH = ".trash"
_TEMPORARY = ".tmp-"

_DENIED = ("permission denied", "ls -ld {folder}")
_REASONS: dict[int, tuple[str, str]] = {
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
def guard(path: Path, doing: str) -> Iterator[None]:
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
        folder = path if path.is_dir() else path.parent
        why, hint = _REASONS.get(e.errno or 0, (e.strerror or str(e), ""))
        hint = hint.replace("{folder}", shlex.quote(str(folder)))
        raise ResourceError(f"cannot {doing} '{path}'", why=why, hint=hint) from e


@contextmanager
def stage(
    target: Path,
    *,
    replace: bool = True,
    durable: bool = True,
    fence: Callable[[], object] | None = None,
) -> Iterator[Path]:
    """Make a file or folder in a temporary place, then sync it and rename it to its target.

    The body creates it at the path it is given, inside a new folder on the target's filesystem. Libraries
    may write there as they like: their temporary files, modes and renames never reach the target.

        with fsio.stage(path) as place:
            library.save(place)

    Args:
        target: The final path; its folder exists.
        replace: Replace an existing file or folder instead of refusing to.
        durable: Sync it. Without, readers still see all or nothing, but a power loss may undo the write.
        fence: Called when everything is written and nothing replaced yet; an exception from it leaves the
            target unchanged.

    Yields:
        The path to create, named as the target is.

    Raises:
        RefusedError: The target exists and `replace` is False.
        CorruptError: The target is a device, a FIFO, or a folder where a file is to be.
        ResourceError: The disk failed or refused; the target is unchanged.
    """
    with guard(target, "write"), scratch(target.parent) as folder:
        place = folder / target.name
        yield place
        if not replace and os.path.lexists(target):
            raise _exists(target)
        is_folder = place.is_dir()
        if is_folder:
            settle(place)
        else:
            _refuse_special(target)
            _settle_file(place, durable=durable)
        if fence is not None:
            fence()
        if is_folder:
            _put_folder(place, target, replace=replace)
        else:
            os.replace(place, target)
        if durable:
            sync_dir(target.parent)


@contextmanager
def scratch(parent: Path) -> Iterator[Path]:
    """Create a new empty folder that is deleted at the end, and is locked until then.

    Args:
        parent: The folder to create it in; it exists.
    """
    folder = parent / f"{_TEMPORARY}{_unique()}"
    with guard(parent, "write to"):
        os.mkdir(folder)
    fd = lock_folder(folder, shared=True)
    try:
        yield folder
    finally:
        delete(folder)
        if fd is not None:
            os.close(fd)


def lock_folder(folder: Path, *, shared: bool) -> int | None:
    """Lock a folder with flock, until the returned file is closed or the process ends.

    Args:
        folder: The folder.
        shared: Allow other shared locks next to it.

    Returns:
        None where folders or the filesystem have no locks, or another process has a lock and `shared` is set.

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


def create(path: Path, chunks: Iterable[Any]) -> str:
    """Write a new file in a folder that is being staged; `stage` syncs it.

    Args:
        path: The file; nothing exists there yet.
        chunks: Contiguous buffers: bytes, memoryviews, numpy arrays. A large file is never in memory twice.

    Returns:
        The sha256 of what was written, hex.

    Raises:
        OSError: The disk failed or refused; `stage` turns it into a ResourceError.
    """
    import hashlib

    digest = hashlib.sha256()
    fd = os.open(path, _NEW, 0o666)
    try:
        for chunk in chunks:
            view = memoryview(chunk)
            if view.nbytes:
                view = view.cast("B")
                digest.update(view)
                _write(fd, view)
    finally:
        os.close(fd)
    return digest.hexdigest()


def write_chunks(path: Path, chunks: Iterable[Any], *, durable: bool = True) -> str:
    """Write a file, replacing any existing one in a single step.

    Args:
        path: The file; its folder exists.
        chunks: As for `create`.
        durable: As for `stage`.

    Returns:
        The sha256 of what was written, hex.

    Raises:
        ResourceError: The disk failed or refused; the old file is unchanged.
    """
    with stage(path, durable=durable) as place:
        return create(place, chunks)


def write_bytes(path: Path, data: bytes, *, durable: bool = True) -> str:
    """Write a file as `write_chunks` does."""
    return write_chunks(path, [data], durable=durable)


def write_json(path: Path, value: Any, *, durable: bool = True) -> str:
    """Write a JSON document as `write_chunks` does."""
    return write_chunks(path, [strictjson.encode(value)], durable=durable)


class Log:
    """An open file that lines are appended to. It is not synced: a power loss may cut off its end.

    Lines go to the file that was opened, even after another process has replaced it.

    Args:
        path: The file.
        content: What a new file starts with, which replaces the old one; None to append to the old one, whose
            last line is completed if a crash cut it short.
        fence: As for `stage`.

    Raises:
        CorruptError: It is a link, or not a regular file.
        ResourceError: It cannot be written.
    """

    def __init__(
        self, path: Path, content: bytes | None = None, fence: Callable[[], object] | None = None
    ) -> None:
        self._path, self._fd = path, -1
        try:
            if content is None:
                self._open(path, os.O_CREAT)
                self._end_line()
            else:
                with stage(path, fence=fence) as place:
                    create(place, [content])
                    self._open(place)
        except BaseException:
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

    def _open(self, path: Path, flags: int = 0) -> None:
        self._fd = _open_regular(path, os.O_RDWR | os.O_APPEND | flags, "write")

    def _end_line(self) -> None:
        with guard(self._path, "write"):
            size = os.lseek(self._fd, 0, os.SEEK_END)
            if size:
                os.lseek(self._fd, size - 1, os.SEEK_SET)
                if os.read(self._fd, 1) != b"\n":
                    _write(self._fd, memoryview(b"\n"))


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
    return FileIO(_open_regular(path, os.O_RDONLY, "read"), "rb", closefd=True)


def read_plain(path: Path, most: int) -> bytes:
    """Read a regular file whole.

    Args:
        path: The file.
        most: The most bytes that such a file may have; nothing of a larger one is read.

    Raises:
        FileNotFoundError: It does not exist.
        CorruptError: It is larger, or as for `open_plain`.
        ResourceError: It cannot be read, or does not fit in memory.
    """
    with open_plain(path) as file, guard(path, "read"):
        check_size(path, os.fstat(file.fileno()).st_size, most)
        return file.readall() or b""


def check_size(path: Path, found: int, most: int) -> None:
    """Refuse a file that is larger than any of its kind.

    Raises:
        CorruptError: It is.
    """
    if found > most:
        why = f"it has {size(found)}, and a file of this kind at most {size(most)}"
        raise CorruptError(f"'{path}' is not safe to read", why=why)


def make_dir(path: Path) -> None:
    """Create a folder and its missing parents, durably; an existing one is fine."""
    with guard(path, "create"):
        missing = [p for p in (path, *path.parents) if not p.is_dir()]
        for folder in reversed(missing):
            with suppress(FileExistsError):
                os.mkdir(folder)
            if not folder.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, "it is a file, not a folder")
            sync_dir(folder.parent)


def claim(path: Path) -> bool:
    """Create a folder and return whether it is new: of any number of callers, one gets True.

    Args:
        path: The folder; its parent exists.
    """
    with guard(path, "create"):
        try:
            os.mkdir(path)
        except FileExistsError:
            return False
        sync_dir(path.parent)
    return True


def settle(folder: Path) -> None:
    """Sync everything in a folder and give files the mode that the umask asks for.

    Raises:
        CorruptError: It contains something other than files and folders.
    """
    with guard(folder, "save"):
        for entry in sorted(os.scandir(folder), key=lambda e: e.name):
            if entry.is_dir(follow_symlinks=False):
                settle(Path(entry.path))
            elif entry.is_file(follow_symlinks=False):
                _settle_file(Path(entry.path), durable=True)
            else:
                raise CorruptError(
                    f"'{entry.path}' is a link or a device", why="only regular files are saved"
                )
        sync_dir(folder)


def rename(source: Path, target: Path) -> None:
    """Rename a folder durably; the caller has made sure that the target does not exist."""
    with guard(source, "rename"):
        os.rename(source, target)
        sync_dir(target.parent)


def discard(path: Path, trash: Path | None = None) -> None:
    """Remove a file or folder: one rename hides it, then it is deleted. Links are never followed.

    Args:
        path: What to remove.
        trash: A folder on the same filesystem, `.trash` next to it by default. A crash leaves the rest there.

    Raises:
        CorruptError: The trash is a link.
        ResourceError: It cannot be removed.
    """
    trash = trash or path.parent / TRASH
    refuse_link(trash)
    make_dir(trash)
    grave = trash / f"{_unique()}-{path.name}"
    with guard(path, "remove"):
        os.rename(path, grave)
        sync_dir(path.parent)
    delete(grave)


def refuse_link(folder: Path) -> None:
    """Raise CorruptError for a folder to write into that is really a link."""
    if folder.is_symlink():
        why = "nothing is written or moved through a link, which may point anywhere"
        raise CorruptError(f"'{folder}' is a symbolic link", why=why, hint=shlex.join(["rm", str(folder)]))


def delete(path: Path) -> None:
    """Delete a temporary file or folder; if that fails now, `quill gc` does it later."""
    import shutil

    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            os.unlink(path)


def remove_file(path: Path) -> None:
    """Remove one file, unless it is already gone."""
    with guard(path, "remove"), suppress(FileNotFoundError):
        os.unlink(path)


def expanded(path: str | Path) -> Path:
    """Expand ~ in a path; without a home folder, as under cron, the path stays as it is."""
    try:
        # pathlib would expand './~' too, and raises where there is no home.
        return Path(os.path.expanduser(path))
    except ValueError:
        return Path(path)


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

    existing = next((p for p in (path, *path.absolute().parents) if p.exists()), Path("/"))
    with guard(existing, "measure"):
        free = shutil.disk_usage(existing).free
    if free < needed_bytes:
        raise ResourceError(
            f"not enough disk space for {what}",
            why=f"it needs {size(needed_bytes)}, '{existing}' has {size(free)} free",
            hint=f"df -h {shlex.quote(str(existing))}",
        )


def sync_dir(path: Path) -> None:
    """Make renames and new files in a folder durable."""
    if os.name == "nt":
        return  # Windows has no handle to sync a folder by; its journal orders renames.
    fd = os.open(path, os.O_RDONLY)
    try:
        _fsync(fd)
    except OSError as e:
        # Some network filesystems cannot sync a folder; their renames are synchronous.
        if e.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(fd)


_NOFOLLOW = getattr(os, "O_NOFOLLOW", 0)
_BINARY = getattr(os, "O_BINARY", 0)
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | _NOFOLLOW | _BINARY


def _unique() -> str:
    return f"{os.getpid()}-{os.urandom(6).hex()}"


def _exists(target: Path) -> RefusedError:
    return RefusedError(f"'{target}' already exists", why="it is not overwritten")


def _open_regular(path: Path, flags: int, doing: str) -> int:
    """Open a regular file, whatever else is in its place; raises as `open_plain` does."""
    # Without O_NONBLOCK opening a FIFO waits for its other end.
    flags |= _NOFOLLOW | _BINARY | getattr(os, "O_NONBLOCK", 0)
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
            raise _special(path) from None
        with guard(path, doing):
            raise
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise _special(path)
    return fd


def _special(path: Path) -> CorruptError:
    return CorruptError(f"'{path}' is not a regular file", why="it is a folder or a device")


def _put_folder(place: Path, target: Path, *, replace: bool) -> None:
    """Rename a folder to its target, in exchange for the old one, which is then where the new one was."""
    if replace and os.path.lexists(target):
        if not _exchange(place, target):
            _replace_folder(place, target)
        return
    try:
        os.rename(place, target)
    except OSError as e:
        if e.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            raise _exists(target) from None  # Another process was faster.
        raise


def _exchange(first: Path, second: Path) -> bool:
    """Exchange two files or folders in one step (renameat2(2) of Linux); False where that is not possible."""
    if not sys.platform.startswith("linux"):
        return False
    import ctypes

    at_fdcwd, rename_exchange = -100, 2
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    if not renameat2(at_fdcwd, os.fsencode(first), at_fdcwd, os.fsencode(second), rename_exchange):
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM):
        return False
    raise OSError(number, os.strerror(number))


def _replace_folder(place: Path, target: Path) -> None:
    """Replace a folder in two steps; an error or a signal between them puts the old one back."""
    old = target.with_name(f"{_TEMPORARY}{_unique()}")
    try:
        os.rename(target, old)
        os.rename(place, target)
    except BaseException as e:
        if os.path.lexists(old) and not os.path.lexists(target):
            try:
                os.rename(old, target)
            except OSError as last:
                raise ResourceError(
                    f"cannot write '{target}'",
                    why=f"{last.strerror}, and what was there before is now '{old}'",
                    hint=shlex.join(["mv", str(old), str(target)]),
                ) from e
        raise
    delete(old)


def _refuse_special(path: Path) -> None:
    """Refuse to replace a device or a FIFO: the rename would leave a regular file in its place."""
    with suppress(FileNotFoundError):
        mode = os.lstat(path).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISLNK(mode)):
            raise _special(path)


def _settle_file(path: Path, *, durable: bool) -> None:
    # The folder was created under the same umask, so its mode shows what the file's should be;
    # os.umask would change it for every thread for a moment.
    wanted = stat.S_IMODE(os.stat(path.parent).st_mode) & 0o666
    fd = os.open(path, os.O_RDONLY | _NOFOLLOW | _BINARY)
    try:
        if os.name != "nt" and stat.S_IMODE(os.fstat(fd).st_mode) != wanted:
            os.fchmod(fd, wanted)
        if durable:
            _fsync(fd)
    finally:
        os.close(fd)


def _write(fd: int, data: memoryview) -> None:
    while data:
        written = os.write(fd, data)
        if written <= 0:
            raise OSError(errno.EIO, "the device accepted no bytes")
        data = data[written:]


def _fsync(fd: int) -> None:
    if sys.platform == "darwin":
        import fcntl

        # fsync stops at the drive's own cache there (Apple, fsync(2)); this does not.
        fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
        return
    os.fsync(fd)
