"""Write files and folders: staged, synced, renamed into place."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from quill import strictjson
from quill.fsio.failures import guard
from quill.fsio.folders import already_exists, put_folder, scratch
from quill.fsio.reading import BINARY, NOFOLLOW, open_regular, refuse_special
from quill.fsio.sharing import open_to_group
from quill.fsio.syncing import settle, settle_file, sync_dir

_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | NOFOLLOW | BINARY
# A line of a log takes less time to write.
_LINE_SECONDS = 0.05


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
            raise already_exists(target)
        is_folder = place.is_dir()
        if is_folder:
            settle(place)
        else:
            refuse_special(target)
            settle_file(place, durable=durable)
        if fence is not None:
            fence()
        if is_folder:
            put_folder(place, target, replace=replace)
        else:
            os.replace(place, target)
        if durable:
            sync_dir(target.parent)


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
            # Gone before the next one is made.
            del chunk, view
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
        content: Chunks that a new file starts with, which replaces the old one; None to append to the old
            one, whose last line is completed if a crash cut it short.
        fence: As for `stage`.

    Raises:
        CorruptError: It is a link, or not a regular file.
        ResourceError: It cannot be written.
    """

    def __init__(
        self, path: Path, content: Iterable[bytes] | None = None, fence: Callable[[], object] | None = None
    ) -> None:
        self._path, self._fd = path, -1
        try:
            if content is None:
                self._open(path, os.O_CREAT)
                self._end_line()
            else:
                with stage(path, fence=fence) as place:
                    create(place, content)
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
        is_new = flags and not os.path.lexists(path)
        self._fd = open_regular(path, os.O_RDWR | os.O_APPEND | flags, "write")
        if is_new:
            with guard(path, "write"):
                open_to_group(path)

    def _end_line(self) -> None:
        with guard(self._path, "write"):
            size = -1
            while not self._ends():
                before, size = size, os.lseek(self._fd, 0, os.SEEK_END)
                if size == before:
                    _write(self._fd, memoryview(b"\n"))
                    return
                # Perhaps another process is in the middle of a line.
                time.sleep(_LINE_SECONDS)

    def _ends(self) -> bool:
        """Whether the file is empty, or its last line is complete."""
        size = os.lseek(self._fd, 0, os.SEEK_END)
        if size:
            os.lseek(self._fd, size - 1, os.SEEK_SET)
        return not size or os.read(self._fd, 1) == b"\n"


def _write(fd: int, data: memoryview) -> None:
    while data:
        written = os.write(fd, data)
        if written <= 0:
            raise OSError(errno.EIO, "the device accepted no bytes")
        data = data[written:]
