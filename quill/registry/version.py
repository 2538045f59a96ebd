"""One finished version of a model: what it says of itself, and its files, checked as they are read."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, Self

from quill import fsio, strictjson
from quill.errors import CorruptError, NotFoundError, QuillError, ResourceError
from quill.registry import manifest as manifests

_PIECE = 1 << 20
_LFS = b"version https://git-lfs.github.com/spec/"


# A NamedTuple and no dataclass: `quill list` would wait for the import of inspect.
class Version(NamedTuple):
    """A complete version on disk, or what is left of one.

    Attributes:
        name: The model's name.
        number: Its version, from 1; 0 where the folder cannot even be a model's.
        path: Its folder.
        manifest: What manifest.json holds; None for a folder put there by hand, and for a damaged one.
        damaged: Why it cannot be used, or None.
        label: How it was asked for, where that was a folder and not a name.
    """

    name: str
    number: int
    path: Path
    manifest: dict[str, Any] | None = None
    damaged: str | None = None
    label: str = ""

    @property
    def reference(self) -> str:
        """What finds it again: "name:vN", or the folder it was asked for by."""
        return self.label or (f"{self.name}:v{self.number}" if self.number else self.name)

    @property
    def digest(self) -> str | None:
        """The sha256 of its weights, hex, by which another version names it as its parent."""
        return self.manifest["files"]["model.safetensors"]["sha256"] if self.manifest else None

    @property
    def size(self) -> int:
        """What its files take, in bytes."""
        if self.manifest:
            return sum(entry["bytes"] for entry in self.manifest["files"].values())
        sizes = 0
        for name in manifests.REQUIRED:
            path = self.path / name
            sizes += path.lstat().st_size if path.exists() else 0
        return sizes

    def read_file(self, name: str) -> bytes:
        """Read one of its files whole; its size and sha256 are those of the manifest.

        Args:
            name: Relative to its folder, such as "tokenizer.json".

        Raises:
            CorruptError: It is missing, not a plain file, or not what was published.
            ResourceError: It cannot be read, or does not fit in memory.
        """
        with self.open_file(name) as reading:
            return bytes(reading.whole())

    def read_object(self, name: str) -> dict[str, Any]:
        """Read one of its files as a JSON object; the rest is as for `read_file`."""
        path, raw = self.path / name, self.read_file(name)
        if not raw.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"{"):
            refuse(path, raw[:512], len(raw), "a JSON object is needed")
        document: dict[str, Any] = strictjson.parse(raw, origin=str(path), error=CorruptError)
        return document

    def open_file(self, name: str) -> Reading:
        """Open one of its files, to look at it before room is made for all of it.

        Args:
            name: Relative to its folder.

        Raises:
            CorruptError: It is missing, not a plain file, or not of the manifest's size.
        """
        if self.damaged:
            raise CorruptError(f"'{self.reference}' is damaged", why=self.damaged)
        path = self.path / name
        listed = self.manifest["files"].get(name) if self.manifest else None
        if self.manifest and listed is None:
            raise CorruptError(f"'{path}' is not safe to read", why="the manifest does not list it")
        return Reading(path, listed)


class Reading:
    """An open file of a version.

    Args:
        path: The file.
        listed: What the manifest says of it, {bytes, sha256}; None where there is no manifest.

    Attributes:
        file: Open for reading, unbuffered.
        size: In bytes; the manifest's.

    Raises:
        CorruptError: It is missing, not a plain file, or not of that size.
    """

    def __init__(self, path: Path, listed: dict[str, Any] | None) -> None:
        self.path, self._listed = path, listed
        try:
            self.file = fsio.open_plain(path)
        except FileNotFoundError:
            why = "its version is not complete without it"
            raise CorruptError(f"'{path}' is missing", why=why) from None
        self.size = os.fstat(self.file.fileno()).st_size
        if listed and self.size != listed["bytes"]:
            with self, fsio.guard(path, "read"):
                wrong = f"it has {self.size:,} bytes, the manifest says {listed['bytes']:,}"
                refuse(path, self.file.read(512) or b"", self.size, wrong)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.file.close()

    def whole(self) -> bytearray:
        """Read all of it once, into memory that tensors may use as it is.

        Raises:
            CorruptError: It is not what was published.
            ResourceError: It cannot be read, or does not fit in memory.
        """
        import hashlib

        try:
            buffer = bytearray(self.size)
        except MemoryError:
            why = f"it has {self.size / 1e9:,.1f} GB"
            raise ResourceError(f"'{self.path}' does not fit in memory", why=why) from None
        view, sha256, done = memoryview(buffer), hashlib.sha256(), 0
        with fsio.guard(self.path, "read"):
            self.file.seek(0)
            while done < self.size:
                # Each piece is hashed while it is still in the processor's cache.
                got = self.file.readinto(view[done : done + _PIECE])
                if not got:
                    ended = f"it ended at {done:,} of {self.size:,} bytes"
                    raise CorruptError(f"'{self.path}' changed while it was read", why=ended)
                sha256.update(view[done : done + got])
                done += got
        found = sha256.hexdigest()
        if self._listed and found != self._listed["sha256"]:
            wrong = f"its sha256 is {found[:12]}..., the manifest says {self._listed['sha256'][:12]}..."
            hint = "restore it from a copy, or train it again"
            refuse(self.path, bytes(buffer[:512]), self.size, wrong, hint=hint)
        return buffer


def load(name: str, number: int, path: Path, label: str = "") -> Version:
    """Read a version's manifest and look at its files, without reading them.

    Raises:
        NotFoundError: The folder holds no complete version.
        CorruptError: It is damaged, or not safe to read.
        InputError: A newer quill wrote it.
    """
    refuse_link(path)
    if not is_complete(path):
        missing = [f for f in manifests.REQUIRED if not _there(path / f)]
        if missing and missing != ["tokenizer.json"]:
            raise NotFoundError(f"no model in '{path}'", why=f"{missing[0]} is missing", hint="quill list")
        if missing:
            why = "without it the model's tokens cannot be read as text"
            raise CorruptError(f"'{path}' has no tokenizer.json", why=why)
        return Version(name, number, path, label=label)
    document = manifests.read(path)
    if wrong := manifests.changed(path, document["files"]):
        # Opening it tells what is wrong; if nothing is any more, all the better.
        with Reading(path / wrong, document["files"][wrong]):
            pass
    return Version(name, number, path, document, label=label)


def describe(name: str, number: int, path: Path) -> Version | None:
    """As `load`, for a list: what is wrong becomes part of the description; None if it is gone."""
    try:
        return load(name, number, path)
    except NotFoundError:
        return None
    except QuillError as e:
        return Version(name, number, path, damaged=str(e))


def is_complete(folder: Path) -> bool:
    """Whether a version is published: its manifest is there, in whatever state."""
    return _there(folder / manifests.FILE)


def is_flat(folder: Path) -> bool:
    """Whether a model was put into a folder by hand, without versions."""
    return all(_there(folder / f) for f in manifests.REQUIRED[:2])


def refuse_link(path: Path) -> None:
    """Raise CorruptError for a folder that is really a link."""
    if path.is_symlink():
        raise CorruptError(
            f"'{path}' is a symbolic link",
            why="a link may point anywhere, so none is followed inside a registry",
            hint=f"use the folder itself: quill show $(readlink -f '{path}')",
        )


def refuse(path: Path, head: bytes, size: int, otherwise: str, hint: str = "") -> None:
    """Raise CorruptError with the most telling reason why a file is not what it should be.

    Args:
        path: The file.
        head: Its first bytes.
        size: Its size in bytes.
        otherwise: The reason when its content does not tell a better one.
        hint: What to do then.
    """
    start = head[:256].lstrip().lower()
    why = otherwise
    if size == 0:
        why = "it is empty"
    elif head.startswith(_LFS):
        why = "it is a Git LFS pointer; the file itself was never fetched"
        hint = f"git -C '{path.parent}' lfs pull"
    elif start.startswith((b"<!doctype", b"<html", b"<?xml")):
        why = "it is a web page, perhaps an error saved in the file's place"
        hint = "download it again"
    elif not any(head):
        why = "it holds nothing but zeros"
    raise CorruptError(f"'{path}' is damaged", why=why, hint=hint)


def _there(path: Path) -> bool:
    """Whether there is anything at a path; that it may not be looked at is no answer but an error."""
    with fsio.guard(path, "read"), suppress(FileNotFoundError, NotADirectoryError):
        os.lstat(path)
        return True
    return False
