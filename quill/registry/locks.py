"""Which process is working on a name: flock, and in the lock file a note of who holds it.

A lock keeps two trainings of one name apart and lets the second one say which process it waits for. Readers
take none. Correctness does not depend on locks: on some network filesystems flock succeeds and does nothing,
so numbers are taken by exclusive mkdir and published versions never change. The note helps there too: the
lock counts as held while the process that the note names is alive. Lock files are never deleted, because a
process that has the old file open would hold a lock that no other process sees.

Semantics: flock(2) of Linux and the BSDs; a lock ends with its process, however that ends.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from quill import fsio
from quill.errors import CorruptError, LockedError

FOLDER = ".locks"
# Locks on a name's model.json, in a separate folder: a name cannot contain a slash.
_RECORDS = "ledgers"
_FOLDERS = (FOLDER, _RECORDS)
# Seconds to wait for a process that only looks at a lock, or finds that it has nothing to do.
_PATIENCE = 0.5
_RECORD_WAIT = 60.0
_NOTE_BYTES = 4096
# The errors of a filesystem without locks.
_NO_LOCKS = {getattr(errno, n, None) for n in ("ENOLCK", "ENOSYS", "EOPNOTSUPP", "ENOTSUP", "EINVAL")} - {
    None
}


def path_of(root: Path, name: str) -> Path:
    """The lock file of a name."""
    return root / FOLDER / f"{name}.lock"


@contextmanager
def hold(root: Path, name: str, wait: float | None = None) -> Iterator[None]:
    """Lock a name: for a whole training, or while its versions are renamed or removed.

    Args:
        root: The registry; made when missing.
        name: The model's name, checked.
        wait: Seconds to wait for another process; None where the caller has no choice.

    Raises:
        LockedError: Another process has locked it; the message names process, host and start.
        CorruptError: The lock file is a link.
        ResourceError: The registry cannot be written.
    """
    path = path_of(root, name)
    fsio.make_dir(path.parent)
    deadline = time.monotonic() + max(wait or 0.0, _PATIENCE)
    pause = 0.02
    while True:
        fd = _take(path)
        if fd is not None and not is_alive(note := _read(fd)):
            break
        if fd is not None:
            # flock succeeded although the holder is alive: it does nothing on this filesystem.
            os.close(fd)
        if time.monotonic() >= deadline:
            raise _locked(name, note if fd is not None else _read_path(path), wait)
        time.sleep(min(pause, max(deadline - time.monotonic(), 0.0)))
        pause = min(pause * 2, 1.0)
    try:
        _write(fd, me())
        yield
    finally:
        # The note is removed before the lock, so that a note without a lock always is a dead process's.
        with suppress(OSError):
            _write(fd, {})
        # An error of closing the lock file must not hide what happened under the lock.
        with suppress(OSError):
            os.close(fd)


@contextmanager
def record(folder: Path) -> Iterator[None]:
    """Lock a model's model.json while it is changed.

    Args:
        folder: The model's folder.

    Raises:
        LockedError: Another process kept it locked for a minute.
    """
    path = folder.parent / FOLDER / _RECORDS / f"{folder.name}.lock"
    fsio.make_dir(path.parent)
    deadline = time.monotonic() + _RECORD_WAIT
    while (fd := _take(path)) is None:
        if time.monotonic() >= deadline:
            raise LockedError(
                f"the aliases and numbers of '{folder.name}' are locked",
                why=f"another process has kept '{path}' locked for a minute",
                hint="try again later",
            )
        time.sleep(0.003)
    try:
        yield
    finally:
        with suppress(OSError):
            os.close(fd)


def holder(root: Path, name: str) -> dict[str, Any] | None:
    """The process that has locked a name, {"pid", "host", "started"}, or None; nothing is changed.

    A note left by a process that died, on this computer or another, does not count.
    """
    path = path_of(root, name)
    note = _read_path(path)
    if not note:
        return None
    if note.get("host") == socket.gethostname():
        return note if is_alive(note) else None
    try:
        fd = _open(path, create=False)
    except (OSError, CorruptError):
        return None
    try:
        # Only a lock shows whether another computer's process is alive; a shared one disturbs no reader.
        return None if _flock(fd, shared=True) else note
    finally:
        os.close(fd)


def works(folder: Path) -> bool:
    """Whether flock works on this filesystem; False where it succeeds and does nothing.

    Args:
        folder: Where to try; nothing stays in it.
    """
    path = folder / f".tmp-lock-{os.getpid()}-{os.urandom(4).hex()}"
    try:
        first, second = _open(path), _open(path)
        try:
            return _flock(first) and not _flock(second)
        finally:
            os.close(first)
            os.close(second)
    finally:
        fsio.remove_file(path)


def me() -> dict[str, Any]:
    """What identifies this process in a lock file or a status, even once it is gone."""
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "process": _process(os.getpid()),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def is_alive(note: dict[str, Any]) -> bool:
    """Whether a note made by `me` names a live process of this computer, not a later one with its pid."""
    pid, host, process = note.get("pid"), note.get("host"), note.get("process")
    if type(pid) is not int or pid <= 0 or host != socket.gethostname():
        return False
    if sys.platform == "win32":
        # os.kill would send Ctrl-C there, and locks are reliable there.
        return pid == os.getpid()
    try:
        os.kill(pid, 0)
    except PermissionError:
        pass
    except (OSError, OverflowError):
        return False
    return process == _process(pid)


def _process(pid: int) -> str | None:
    """What distinguishes a process from a later one with the same pid: the boot, and its start in ticks.

    Source: proc_pid_stat(5), fields 3 and 22. None for a zombie, and without /proc, where the pid must do.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        # A zombie is a pid that its parent has not collected yet, not a running process.
        return None if fields[0] in (b"Z", b"X") else f"{boot}/{int(fields[19])}"
    except (OSError, IndexError, ValueError):
        return None


def _take(path: Path) -> int | None:
    """Take an exclusive lock and return its open file; None if another process has it."""
    while True:
        with fsio.guard(path, "lock"):
            fd = _open(path)
        try:
            if not _flock(fd):
                os.close(fd)
                return None
            # The file may have been deleted after it was opened and before it was locked.
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(fd), os.stat(path, follow_symlinks=False)):
                    return fd
        except BaseException:
            with suppress(OSError):
                os.close(fd)
            raise
        os.close(fd)


def _open(path: Path, *, create: bool = True) -> int:
    flags = os.O_RDWR | (os.O_CREAT if create else 0) | getattr(os, "O_NOFOLLOW", 0)
    for folder in (path.parent, path.parent.parent):
        if folder.name in _FOLDERS and folder.is_symlink():
            raise _link(folder)
    is_new = create and not os.path.lexists(path)
    try:
        fd = os.open(path, flags | getattr(os, "O_NONBLOCK", 0), 0o666)
    except OSError as e:
        if e.errno == errno.ELOOP:
            raise _link(path) from None
        raise
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise CorruptError(f"'{path}' is not a plain file", why="a lock is a file", hint=f"ls -l '{path}'")
    if is_new:
        # Another process may have created it, or deleted it, since it was looked for.
        with suppress(PermissionError, FileNotFoundError):
            fsio.open_to_group(path)
    return fd


def _link(path: Path) -> CorruptError:
    why = "links are not followed for writing: they may point anywhere"
    return CorruptError(f"'{path}' is a symbolic link", why=why, hint=f"rm '{path}'")


def _flock(fd: int, *, shared: bool = False) -> bool:
    """Try to lock an open file; a filesystem without locks counts as locked."""
    if sys.platform == "win32":
        import msvcrt

        try:
            # One byte far behind the note, which may still be read.
            os.lseek(fd, 1 << 30, os.SEEK_SET)
            msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True
    import fcntl

    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as e:
        if e.errno in (errno.EWOULDBLOCK, errno.EACCES, errno.EINTR):
            return False
        if e.errno in _NO_LOCKS:
            return True
        raise
    return True


def _read(fd: int) -> dict[str, Any]:
    with suppress(OSError, ValueError, RecursionError):
        os.lseek(fd, 0, os.SEEK_SET)
        note = json.loads(os.read(fd, _NOTE_BYTES))
        return note if isinstance(note, dict) else {}
    return {}


def _read_path(path: Path) -> dict[str, Any]:
    try:
        fd = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    except OSError:
        return {}
    try:
        return _read(fd)
    finally:
        os.close(fd)


def _write(fd: int, note: dict[str, Any]) -> None:
    """Replace the note. It is not synced: nothing depends on it after a power loss."""
    text = json.dumps(note).encode() if note else b""
    with suppress(OSError):
        os.ftruncate(fd, 0)
        if sys.platform == "win32":
            os.lseek(fd, 0, os.SEEK_SET)
            os.write(fd, text)
        else:
            os.pwrite(fd, text, 0)


def _locked(name: str, note: dict[str, Any], wait: float | None) -> LockedError:
    pid, host, started = note.get("pid", "?"), note.get("host", "?"), note.get("started", "?")
    return LockedError(
        f"another process is working on '{name}'",
        why=f"pid {pid} on {host} since {started}" if note else "the holder is unknown",
        hint="try again later" if wait is None else "try again later, or wait for it: wait=3600",
    )
