"""One file of a version: opened without following links, and checked while it is read."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Self

from quill import fsio
from quill.errors import CorruptError, ResourceError
from quill.units import size

if TYPE_CHECKING:
    import hashlib

    from quill.registry.manifest import FileEntry

OnBytes = Callable[[int], None]

CHUNK = 1 << 20
_LFS = b"version https://git-lfs.github.com/spec/"


def ignore(count: int) -> None:
    """Report no progress."""


class OpenFile:
    """An open file of a version.

    Args:
        path: The file.
        entry: Its size and sha256 from the manifest; None without a manifest.

    Attributes:
        file: Open for reading, unbuffered.
        size: In bytes.

    Raises:
        FileNotFoundError: There is no such file.
        CorruptError: It is not a plain file, or not of the manifest's size.
    """

    def __init__(self, path: Path, entry: FileEntry | None) -> None:
        self.path, self._entry = path, entry
        self.file = fsio.open_plain(path)
        self.size = os.fstat(self.file.fileno()).st_size
        if entry and self.size != entry["bytes"]:
            with self, fsio.guard(path, "read"):
                why = f"it has {self.size:,} bytes, the manifest says {entry['bytes']:,}"
                raise corrupt(path, self.file.read(512) or b"", self.size, why)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.file.close()

    def whole(self) -> bytes:
        """Read all of it once.

        Raises:
            CorruptError: It does not match its sha256.
            ResourceError: It cannot be read, or does not fit in memory.
        """
        import hashlib

        self.file.seek(0)
        try:
            raw = self.read_chunk(self.size)
        except MemoryError:
            why = f"it has {size(self.size)}"
            raise ResourceError(f"'{self.path}' does not fit in memory", why=why) from None
        if len(raw) < self.size:
            why = f"it ended at {len(raw):,} of {self.size:,} bytes"
            raise CorruptError(f"'{self.path}' changed while it was being read", why=why)
        self.check_sha256(hashlib.sha256(raw).hexdigest(), raw[:512])
        return raw

    def sha256(self, on_bytes: OnBytes = ignore) -> str:
        """Hash all of it, without holding it in memory.

        Args:
            on_bytes: Called with the size of each chunk read.

        Raises:
            CorruptError: It does not match its sha256.
            ResourceError: It cannot be read.
        """
        import hashlib

        sha256 = hashlib.sha256()
        for _ in self._verified(sha256, on_bytes):
            pass
        return sha256.hexdigest()

    def verified(self) -> Iterator[bytes]:
        """Read it chunk by chunk; raises as `sha256` does, after the last chunk."""
        import hashlib

        return self._verified(hashlib.sha256(), ignore)

    def _verified(self, sha256: hashlib._Hash, on_bytes: OnBytes) -> Iterator[bytes]:
        head = b""
        for chunk in self.chunks(on_bytes):
            head = head or chunk[:512]
            sha256.update(chunk)
            yield chunk
        self.check_sha256(sha256.hexdigest(), head)

    def chunks(self, on_bytes: OnBytes = ignore) -> Iterator[bytes]:
        """Read it from its start, chunk by chunk.

        Raises:
            ResourceError: It cannot be read.
        """
        self.file.seek(0)
        while chunk := self.read_chunk():
            on_bytes(len(chunk))
            yield chunk

    def read_chunk(self, most: int = CHUNK) -> bytes:
        """Read this many bytes, or fewer at its end."""
        found = b""
        with fsio.guard(self.path, "read"):
            # One read may return fewer bytes than there are.
            while len(found) < most and (more := self.file.read(most - len(found))):
                found = found + more if found else more
        return found

    def check_sha256(self, found: str, head: bytes) -> str:
        """Return the sha256 that was found, if it is the manifest's.

        Args:
            found: Hex.
            head: The file's first bytes, which may tell what happened to it.

        Raises:
            CorruptError: The manifest has another.
        """
        if self._entry and found != self._entry["sha256"]:
            why = f"its sha256 is {found[:12]}..., the manifest says {self._entry['sha256'][:12]}..."
            raise corrupt(self.path, head, self.size, why, "restore it from a copy, or train it again")
        return found


def corrupt(path: Path, head: bytes, size: int, why: str, hint: str = "") -> CorruptError:
    """Make the error for a file that is not what it should be, with the most telling reason.

    Args:
        path: The file.
        head: Its first bytes.
        size: Its size in bytes.
        why: The reason, unless its content shows a better one.
        hint: What to do then.
    """
    start = head[:256].lstrip().lower()
    if size == 0:
        why = "it is empty"
    elif head.startswith(_LFS):
        why = "it is a Git LFS pointer; the file itself was never fetched"
        hint = f"git -C '{path.parent}' lfs pull"
    elif start.startswith((b"<!doctype", b"<html", b"<?xml")):
        why = "it is a web page, perhaps an error that was saved in its place"
        hint = "download it again"
    elif not any(head):
        why = "it contains only zeros"
    return CorruptError(f"'{path}' is damaged", why=why, hint=hint)
