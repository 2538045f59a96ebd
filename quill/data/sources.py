"""Where text comes from: files, folders, globs, standard input and sources known by name.

Found once, it can be read from start to end any number of times, as a stream of documents.
"""

from __future__ import annotations

import glob
import hashlib
import os
import re
import stat
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from quill import fsio, strictjson
from quill.data import documents, named_sources
from quill.data.named_sources import OnBytes
from quill.errors import InputError, NotFoundError, ResourceError

STDIN = "-"
# Written so shortly before it was read, a file could change again and look the same.
_SETTLED_SECONDS = 2.0


class Block(list[str]):
    """Stretches of text: the first goes on with the document before, each further one begins the next.

    Attributes:
        data: The whole in UTF-8, where it was read as that; else empty.
    """

    data = b""

    def joined(self) -> str:
        """The text, with a newline between documents."""
        return self[0] if len(self) == 1 else "\n".join(self)

    def utf8(self) -> bytes:
        """The same in UTF-8."""
        return self.data or self.joined().encode()


@dataclass
class Text:
    """Text that was found and can be read from start to end any number of times.

    Attributes:
        label: A name for it, made from the first source's.
        given: The sources as they were given.
        files: What is read, in order.
        names: What each of them is called in messages.
        encoding: Of text files; JSON lines are UTF-8 always.
        text_field: Where the text is in a JSON line.
        whence: Same for the same sources, wherever they are named from; None for a stream.
        on_bytes: Told of every stretch read: stage, bytes done, bytes in all.
    """

    label: str
    given: tuple[str, ...]
    files: tuple[Path, ...]
    names: tuple[str, ...]
    encoding: str = "utf-8"
    text_field: str = "text"
    whence: str | None = None
    on_bytes: OnBytes | None = None
    size: int = field(init=False)
    _seen: list[tuple[str, int, int, int, int]] = field(init=False)

    def __post_init__(self) -> None:
        self._seen = self._look()
        self.size = sum(entry[1] for entry in self._seen)

    def stamp(self) -> str | None:
        """Same as long as no file was touched; None where that cannot be told from the outside."""
        newest = max((max(entry[2:4]) for entry in self._seen), default=0)
        if self.whence is None or newest > (time.time() - _SETTLED_SECONDS) * 1e9:
            return None
        seen = [(os.path.abspath(entry[0]), *entry[1:]) for entry in self._seen]
        return hashlib.sha256(strictjson.canonical(seen)).hexdigest()

    def require_unchanged(self) -> None:
        """Compare every file with what it was when the text was opened.

        Raises:
            InputError: Naming the first that changed.
        """
        for before, now in zip(self._seen, self._look(), strict=True):
            if before != now:
                raise changed(before[0])

    def blocks(self, stage: str, size: int = documents.BUFFER // 2) -> Iterator[Block]:
        """Read it all.

        Args:
            stage: What the reading is for, for whoever watches.
            size: Characters in a block, or bytes, about.

        Yields:
            All of it, in order; never an empty block.
        """
        block = Block([""])
        length = 0
        first = True
        done = 0
        for path, name, entry in zip(self.files, self.names, self._seen, strict=True):
            read = documents.read(path, name=name, encoding=self.encoding, text_field=self.text_field)
            for begins, text, data, position in read:
                alone = block == [""]
                if begins and not first:
                    block.append(text)
                else:
                    block[-1] += text
                block.data = data if alone and len(block) == 1 else b""
                first = False
                length += max(len(text), len(data)) + 1
                if length >= size:
                    yield block
                    block, length = Block([""]), 0
                    if self.on_bytes:
                        self.on_bytes(stage, done + position(), self.size)
            done += entry[1]
        if block != [""]:
            yield block
        if self.on_bytes:
            self.on_bytes(stage, done, self.size)
        self.require_unchanged()

    def _look(self) -> list[tuple[str, int, int, int, int]]:
        seen = []
        for path in self.files:
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
    """Find the text that sources name; what can be read only once is kept on disk meanwhile.

    Args:
        source: Named sources, files, folders, globs, or "-" for standard input.
        root: The data root, where downloads are kept and streams spooled.
        encoding: Of text files.
        text_field: Where the text is in a JSON line.
        on_bytes: Told how far reading and downloading are.

    Raises:
        NotFoundError: There is no such file.
        InputError: It is no text, or the encoding is none.
        ResourceError: It cannot be read or downloaded.
    """
    given = (source,) if isinstance(source, str) else tuple(source)
    codec = documents.codec(encoding)
    with ExitStack() as stack:
        files: list[Path] = []
        names: list[str] = []
        streamed = False
        for one in given:
            found, stream = _locate(one, root, stack, on_bytes)
            files += found
            names += [stream] if stream else map(str, found)
            streamed = streamed or bool(stream)
        whence = strictjson.canonical(
            [one if one in named_sources.NAMED else os.path.abspath(one) for one in given]
        )
        yield Text(
            label=_label(given[0]),
            given=given,
            files=tuple(files),
            names=tuple(names),
            encoding=codec,
            text_field=text_field,
            whence=None if streamed else hashlib.sha256(whence).hexdigest(),
            on_bytes=on_bytes,
        )


def changed(path: str) -> InputError:
    """The refusal of a file that is not what it was."""
    return InputError(
        f"'{path}' changed while reading",
        why="two readings of it differ, so tokens would not be those of one text",
        hint="run it again once nothing writes to the file",
    )


def _locate(one: str, root: Path, stack: ExitStack, on_bytes: OnBytes | None) -> tuple[list[Path], str]:
    """The files that one source names; and if they are only the copy of a stream, what that is called."""
    if one == STDIN:
        if sys.stdin is None:
            raise InputError("standard input is closed", why="'-' reads the text from there")
        name = "standard input"
        return [_spool(sys.stdin.buffer, name, root, stack, on_bytes)], name
    if one in named_sources.NAMED:
        return [named_sources.fetch(one, root, on_bytes)], ""
    path = Path(one)
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return _glob(one), ""
    except ValueError:
        raise InputError(f"{one!r} is not a path", why="it holds a NUL") from None
    except OSError as e:
        raise ResourceError(f"cannot read '{one}'", why=e.strerror or str(e)) from e
    if stat.S_ISDIR(mode):
        return _folder(path), ""
    if stat.S_ISFIFO(mode):
        with documents.opened(path) as stream:
            return [_spool(stream, one, root, stack, on_bytes)], one
    if not stat.S_ISREG(mode):
        raise InputError(f"'{one}' is not a file", why="a device or a socket has no text", hint="name a file")
    return [path], ""


def _glob(pattern: str) -> list[Path]:
    if not glob.has_magic(pattern):
        raise NotFoundError(
            f"no file '{pattern}'",
            why=f"named sources are {', '.join(named_sources.NAMED)}",
            hint="check the path",
        )
    found = [Path(p) for p in sorted(glob.glob(pattern, recursive=True)) if os.path.isfile(p)]
    if not found:
        raise NotFoundError(f"no file matches '{pattern}'", hint="check the pattern; ** matches folders")
    return found


def _folder(path: Path) -> list[Path]:
    """Text files in a folder and those below, by path; hidden ones are left out."""
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
            why=f"what ends in {', '.join(documents.SUFFIXES)} is read, and each of those with "
            f"{' or '.join(documents.COMPRESSED)} behind it",
            hint=f"name the files: '{path}/*'",
        )
    return files


def _spool(stream: BinaryIO, name: str, root: Path, stack: ExitStack, on_bytes: OnBytes | None) -> Path:
    """Keep a stream on disk, since text is read more than once."""

    def stretches() -> Iterator[bytes]:
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
                on_bytes("receiving", done, None)
            yield data

    path = stack.enter_context(fsio.stage(root)) / "text"
    fsio.write_chunks(path, stretches(), durable=False)
    return path


def _label(source: str) -> str:
    """A dataset's name made from a source's: what it is called without its folders and suffixes."""
    if source in named_sources.NAMED:
        return source
    if source == STDIN:
        return "stdin"
    path = Path(os.path.abspath(source))
    while glob.has_magic(path.name):
        path = path.parent
    stem = path.name
    while Path(stem).suffix.lower() in (*documents.SUFFIXES, *documents.COMPRESSED):
        stem = Path(stem).stem
    label = re.sub(r"\.{2,}", ".", re.sub(r"[^a-z0-9._-]+", "-", stem.lower())).strip("-._")
    return label[:48].rstrip("-._") or "text"
