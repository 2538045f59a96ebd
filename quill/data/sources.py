"""Where text comes from: files, folders, globs, standard input, named sources and datasets of the Hub.

Once found, a text can be read from start to end any number of times, as a stream of documents.
"""

from __future__ import annotations

import glob
import hashlib
import os
import re
import stat
import sys
import time
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from quill import fsio, strictjson
from quill.data import documents, hub, named_sources
from quill.data.named_sources import NAMED, OnBytes
from quill.errors import InputError, NotFoundError, ResourceError, shorten

STDIN = "-"
# A file written this shortly before it is read could change again and look the same.
_SETTLED_SECONDS = 2.0


class Chunk(list[str]):
    """A slice of the stream: its first string continues a document, each further one begins the next.

    Attributes:
        data: The whole chunk in UTF-8 where it was read in that form; else empty.
    """

    data = b""

    def joined(self) -> str:
        """The text, with a newline between documents."""
        return self[0] if len(self) == 1 else "\n".join(self)

    def utf8(self) -> bytes:
        """The joined text in UTF-8."""
        return self.data or self.joined().encode()


@dataclass
class Text:
    """A text that can be read from start to end any number of times.

    Attributes:
        label: A dataset name made from the first source.
        given: The sources as they were given.
        files: What is read, in order.
        names: What messages call each file.
        encoding: Encoding of text files; records are always UTF-8.
        text_field: Field of a record that contains the text.
        origin: Hash of the sources' absolute paths; None for a stream.
        downloads: Datasets of the Hub, by the folder among `files` that each is copied to when the text is
            first read, and whose files then replace it.
        on_bytes: Called with stage, bytes read, and total bytes.
        dropped: Numbers of the documents that are left out, from 0.
    """

    label: str
    given: tuple[str, ...]
    files: tuple[Path, ...]
    names: tuple[str, ...]
    encoding: str = "utf-8"
    text_field: str = "text"
    origin: str | None = None
    downloads: Mapping[Path, hub.Repository] = field(default_factory=dict)
    on_bytes: OnBytes | None = None
    dropped: Container[int] = ()
    size: int = field(init=False)
    _seen: list[tuple[str, int, int, int, int]] = field(init=False)

    def __post_init__(self) -> None:
        self._seen = self._stat()
        self.size = sum(entry[1] for entry in self._seen)

    def stamp(self) -> str | None:
        """Return a hash of the files' paths, sizes and times; None if a change could go unnoticed."""
        files = [entry for entry in self._seen if not self._is_copy(Path(entry[0]))]
        newest = max((max(entry[2:4]) for entry in files), default=0)
        if self.origin is None or newest > (time.time() - _SETTLED_SECONDS) * 1e9:
            return None
        if not all(self.revisions.values()):
            return None
        seen: list[Any] = [(os.path.abspath(entry[0]), *entry[1:]) for entry in files]
        seen += self.revisions.items()
        return hashlib.sha256(strictjson.canonical(seen)).hexdigest()

    def facts(self) -> dict[str, Any]:
        """Return what a manifest records of the sources."""
        return {"given": list(self.given), **({"revisions": self.revisions} if self.downloads else {})}

    @property
    def revisions(self) -> dict[str, str]:
        """Commit of each dataset of the Hub, by its source; empty for a folder."""
        return {found.source: found.revision for found in self.downloads.values()}

    def require_unchanged(self) -> None:
        """Compare each file's size and times with those at the start.

        Raises:
            InputError: Naming the first that changed.
        """
        for before, now in zip(self._seen, self._stat(), strict=True):
            if before != now:
                raise changed(before[0])

    def chunks(
        self, stage: str, size: int = documents.BUFFER // 2, *, span: tuple[float, float] = (0.0, 1.0)
    ) -> Iterator[Chunk]:
        """Read the whole text.

        Args:
            stage: What the reading is for, passed to `on_bytes`.
            size: Approximate characters or bytes in a chunk.
            span: Where the stage is before and after this reading, if it takes several.

        Yields:
            The text in order; never an empty chunk.
        """
        self._download()
        chunk = Chunk([""])
        length = number = done = 0
        first = True
        for path, name, entry in zip(self.files, self.names, self._seen, strict=True):
            read = documents.read(path, name=name, encoding=self.encoding, text_field=self.text_field)
            for begins, text, data, position in read:
                number += begins and not first
                if number in self.dropped:
                    continue
                alone = chunk == [""]
                if begins and not first:
                    chunk.append(text)
                else:
                    chunk[-1] += text
                chunk.data = data if alone and len(chunk) == 1 else b""
                first = False
                length += max(len(text), len(data)) + 1
                if length >= size:
                    yield chunk
                    chunk, length = Chunk([""]), 0
                    self._report(stage, span, done + position())
            done += entry[1]
        if chunk != [""]:
            yield chunk
        self._report(stage, span, done)
        self.require_unchanged()

    def _report(self, stage: str, span: tuple[float, float], done: int) -> None:
        if self.on_bytes:
            start, end = span
            self.on_bytes(stage, int(start * self.size + (end - start) * done), self.size)

    def _download(self) -> None:
        if self.downloads.keys().isdisjoint(self.files):
            return
        found: list[tuple[Path, str]] = []
        for path, name in zip(self.files, self.names, strict=True):
            dataset = self.downloads.get(path)
            copies = dataset.copy(path, self.text_field, self.on_bytes) if dataset else [path]
            found += ((copy, name) for copy in copies)
        self.files, self.names = tuple(path for path, _ in found), tuple(name for _, name in found)
        self._seen = self._stat()
        self.size = sum(entry[1] for entry in self._seen)

    def _is_copy(self, path: Path) -> bool:
        return path in self.downloads or path.parent in self.downloads

    def _stat(self) -> list[tuple[str, int, int, int, int]]:
        seen = []
        for path in self.files:
            if path in self.downloads:
                seen.append((str(path), 0, 0, 0, 0))
                continue
            try:
                s = path.stat()
            except FileNotFoundError:
                raise changed(str(path)) from None
            except OSError as e:
                raise ResourceError(f"cannot read '{path}'", why=e.strerror or str(e)) from e
            seen.append((str(path), s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino))
        return seen


@contextmanager
def find(
    source: str | Sequence[str],
    root: Path,
    *,
    encoding: str = "utf-8",
    text_field: str = "text",
    on_bytes: OnBytes | None = None,
) -> Iterator[Text]:
    """Find the text of one or more sources; a stream is copied to disk until the end of the context.

    Args:
        source: Named sources, files, folders, globs, datasets of the Hub, or "-" for standard input.
        root: The data root, for downloads and copies of streams.
        encoding: Encoding of text files.
        text_field: Field of a record that contains the text.
        on_bytes: Called with the progress of reading and downloading.

    Raises:
        NotFoundError: There is no such file or dataset.
        InputError: It is not text, or there is no such encoding.
        ResourceError: It cannot be read or downloaded.
    """
    given = (source,) if isinstance(source, str) else tuple(source)
    codec = documents.codec(encoding)
    with ExitStack() as stack:
        files: list[Path] = []
        names: list[str] = []
        downloads: dict[Path, hub.Repository] = {}
        streamed = False
        for one in given:
            if hub.is_hub(one):
                found = hub.find(one)
                folder = stack.enter_context(found.folder(root, text_field))
                downloads[folder] = found
                files.append(folder)
                names.append(one)
                continue
            located, stream = _locate(one, root, stack, on_bytes)
            files += located
            names += [stream] if stream else map(str, located)
            streamed = streamed or bool(stream)
        paths = strictjson.canonical(
            [one if one in NAMED or hub.is_hub(one) else os.path.abspath(one) for one in given]
        )
        yield Text(
            label=_label(given[0]),
            given=given,
            files=tuple(files),
            names=tuple(names),
            encoding=codec,
            text_field=text_field,
            origin=None if streamed else hashlib.sha256(paths).hexdigest(),
            downloads=downloads,
            on_bytes=on_bytes,
        )


def changed(path: str) -> InputError:
    """Return the error for a file that changed between or during two readings."""
    return InputError(
        f"'{path}' changed while reading",
        why="two readings of it differ",
        hint="wait until nothing writes to the file",
    )


def _locate(one: str, root: Path, stack: ExitStack, on_bytes: OnBytes | None) -> tuple[list[Path], str]:
    """Return the files of one source and, if they are the copy of a stream, the stream's name."""
    if one == STDIN:
        if sys.stdin is None:
            raise InputError("standard input is closed", why="'-' reads the text from there")
        name = "standard input"
        return [_copy_stream(sys.stdin.buffer, name, root, stack, on_bytes)], name
    if one in NAMED:
        return [named_sources.fetch(one, root, on_bytes)], ""
    path = Path(one)
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return _glob(one), ""
    except ValueError:
        raise InputError(f"{shorten(one)} is not a path", why="it contains a NUL") from None
    except OSError as e:
        raise ResourceError(f"cannot read '{one}'", why=e.strerror or str(e)) from e
    if stat.S_ISDIR(mode):
        return _folder(path), ""
    if stat.S_ISFIFO(mode):
        with documents.opened(path) as stream:
            return [_copy_stream(stream, one, root, stack, on_bytes)], one
    if not stat.S_ISREG(mode):
        raise InputError(f"'{one}' is not a file", why="it is a device or a socket")
    return [path], ""


def _glob(pattern: str) -> list[Path]:
    if not glob.has_magic(pattern):
        raise NotFoundError(
            f"no file '{pattern}'",
            why=f"it is not one of the named sources either: {', '.join((*NAMED, *hub.NAMED))}",
            hint="check the path",
        )
    found = [Path(p) for p in sorted(glob.glob(_literal(pattern), recursive=True)) if os.path.isfile(p)]
    if not found:
        raise NotFoundError(f"no file matches '{pattern}'", hint="check the pattern; ** matches folders")
    return found


def _literal(pattern: str) -> str:
    """Escape the folders at the start of a pattern that exist as they are written."""
    parts = Path(pattern).parts
    for n in range(len(parts) - 1, 0, -1):
        if os.path.isdir(folder := os.path.join(*parts[:n])):
            return os.path.join(glob.escape(folder), *parts[n:])
    return pattern


def _folder(path: Path) -> list[Path]:
    """List the text files in a folder and its subfolders, sorted by path, without hidden ones."""
    found = []
    for folder, below, names in os.walk(path):
        below[:] = [b for b in below if not b.startswith(".")]
        found += [
            Path(folder, n)
            for n in names
            if not n.startswith(".") and documents.suffixes(Path(n))[0] in documents.SUFFIXES
        ]
    files = sorted((f for f in found if f.is_file()), key=lambda f: f.relative_to(path).parts)
    if not files:
        raise InputError(
            f"no text in the folder '{path}'",
            why=f"files ending in {', '.join(documents.SUFFIXES)} are read, and text also compressed: "
            f"{', '.join(documents.COMPRESSED)}",
            hint=f"name the files: '{path}/*'",
        )
    return files


def _copy_stream(stream: BinaryIO, name: str, root: Path, stack: ExitStack, on_bytes: OnBytes | None) -> Path:
    """Copy a stream to disk, since text is read more than once."""
    total = _length(stream)

    def chunks() -> Iterator[bytes]:
        done = 0
        while True:
            try:
                data = stream.read(documents.BUFFER)
            except OSError as e:
                raise InputError(f"cannot read {name}", why=e.strerror or str(e)) from e
            if not data:
                return
            done += len(data)
            if on_bytes:
                on_bytes("receiving", done, total)
            yield data

    fsio.make_dir(root)
    path = stack.enter_context(fsio.scratch(root)) / "text"
    with fsio.guard(path, "write"):
        fsio.create(path, chunks())
    return path


def _length(stream: BinaryIO) -> int | None:
    """Return the bytes left of a stream, if it is a file: standard input may have been redirected."""
    with suppress(OSError, ValueError):
        found = os.fstat(stream.fileno())
        if stat.S_ISREG(found.st_mode):
            return found.st_size - stream.tell()
    return None


def _label(source: str) -> str:
    """Make a dataset name from a source: the last folder or file without its suffixes."""
    if source in NAMED or source in hub.NAMED:
        return source
    if hub.is_hub(source):
        # The repository's name, without its owner, revision, configuration and split.
        source = source.removeprefix(hub.PREFIX).partition(":")[0].partition("@")[0]
    if source == STDIN:
        return "stdin"
    path = Path(os.path.abspath(source))
    # A pattern gives no name; an existing file does, whatever characters are in it.
    while glob.has_magic(path.name) and not path.exists():
        path = path.parent
    stem = path.name
    while Path(stem).suffix.lower() in (*documents.SUFFIXES, *documents.COMPRESSED):
        stem = Path(stem).stem
    label = re.sub(r"\.{2,}", ".", re.sub(r"[^a-z0-9._-]+", "-", stem.lower())).strip("-._")
    return label[:48].rstrip("-._") or "text"
