"""One file into documents: decompressed, decoded, cut into stretches, never whole in memory.

What is read is text the way Python's own text mode reads it: decoded strictly, line ends made "\\n", a byte
order mark at the start dropped. Nothing else is changed: no Unicode normalisation, no trimming. A file of
`.jsonl` holds one document a line; every other file is one document. A NUL is refused in a text file, where
it tells of another encoding or of no text at all; in a JSON line it was written out on purpose and stays.
"""

from __future__ import annotations

import codecs
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from quill.errors import CorruptError, InputError, ResourceError

# Larger ones only leave the processor's cache.
BUFFER = 1 << 19
# A JSON line is parsed whole, so this bounds memory; real documents are far shorter.
LONGEST_LINE = 64 << 20
COMPRESSED = (".gz", ".zst")
LINES = (".jsonl", ".ndjson")
SUFFIXES = (".txt", ".md", ".text", *LINES)


class Stretch(NamedTuple):
    """A stretch of a file's text.

    Attributes:
        begins: Whether a document begins with it.
        text: Some of a document's text, or all of it.
        data: The same in UTF-8 where it was read as that, to be spared encoding it again; else empty.
        position: Tells how many bytes of the file have been read.
    """

    begins: bool
    text: str
    data: bytes
    position: Callable[[], int]


def read(path: Path, *, name: str, encoding: str, text_field: str) -> Iterator[Stretch]:
    """Read one file; documents without any text are passed over.

    Args:
        path: The file; its suffixes tell how it is read.
        name: What it is called in messages.
        encoding: Of a text file, as `codec` names it; JSON lines are UTF-8 always.
        text_field: Where the text is in a JSON line.

    Raises:
        InputError: It is not the text it should be, with the line or byte where it is not.
        CorruptError: A compressed file is damaged.
        ResourceError: It cannot be read.
    """
    with _reading(path) as file:
        lines = suffixes(path)[0] in LINES
        found = _json_lines(file, name, text_field) if lines else _plain(file, name, encoding)
        begins = True
        for starts, text, data in found:
            begins = begins or starts
            if text:
                yield Stretch(begins, text, data, file.position)
                begins = False


class _File(NamedTuple):
    """A file being read, perhaps through a decompressor, that knows how far it is on disk."""

    read: Callable[[int], bytes]
    readline: Callable[[int], bytes]
    position: Callable[[], int]


@contextmanager
def opened(path: Path) -> Iterator[io.FileIO]:
    """Open a file or a FIFO for reading, unbuffered.

    Raises:
        ResourceError: It cannot be.
    """
    try:
        file = open(path, "rb", buffering=0)  # noqa: SIM115
    except OSError as e:
        raise ResourceError(f"cannot read '{path}'", why=e.strerror or str(e)) from e
    with file:
        yield file


@contextmanager
def _reading(path: Path) -> Iterator[_File]:
    compression = suffixes(path)[1]
    with opened(path) as raw:
        stream: Any = raw
        if compression == ".gz":
            stream = gzip.GzipFile(fileobj=raw)
        elif compression == ".zst":
            stream = _ZstStream(raw, _zst_decompressor(path))
        buffered = io.BufferedReader(stream, 1 << 20)
        try:
            yield _File(raw.read if stream is raw else buffered.read, buffered.readline, raw.tell)
        except (EOFError, gzip.BadGzipFile, zlib.error) as e:
            raise CorruptError(f"'{path}' is damaged", why=f"{compression[1:]}: {e}") from e
        except OSError as e:
            raise ResourceError(f"cannot read '{path}'", why=e.strerror or str(e)) from e


def _zst_decompressor(path: Path) -> Callable[[], Any]:
    """What makes a decompressor of one frame. Format: RFC 8878."""
    try:
        import zstandard
    except ImportError:
        raise InputError(
            f"cannot read '{path}'",
            why="reading .zst needs the zstandard package",
            hint="pip install 'quill-gpt[zst]'",
        ) from None

    class Frame:
        def __init__(self) -> None:
            self._frame = zstandard.ZstdDecompressor().decompressobj()

        def __call__(self, data: bytes) -> tuple[bytes, bytes | None]:
            try:
                return self._frame.decompress(data), self._frame.unused_data if self._frame.eof else None
            except zstandard.ZstdError as e:
                raise zlib.error(str(e)) from e

    return Frame


class _ZstStream(io.RawIOBase):
    """Decompressed bytes of a .zst file.

    The library's own reader takes a file cut short for one that ends; this one tells.
    """

    # A frame expands 32768 times at the most, so this bounds what one read can bring.
    _STEP = 1024

    def __init__(self, raw: io.FileIO, frame: Callable[[], Any]) -> None:
        self._raw = io.BufferedReader(raw, 1 << 17)
        self._new = frame
        self._frame: Any = None
        self._out = memoryview(b"")
        self._in = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._out:
            data = self._in or self._raw.read(self._STEP)
            if not data:
                if self._frame:
                    raise EOFError("the file ends in the middle of a frame")
                return 0
            self._frame = self._frame or self._new()
            out, rest = self._frame(data)
            self._out, self._in = memoryview(out), rest or b""
            if rest is not None:
                self._frame = None
        n = min(len(buffer), len(self._out))
        buffer[:n] = self._out[:n]
        self._out = self._out[n:]
        return n


def _plain(file: _File, name: str, encoding: str) -> Iterator[tuple[bool, str, bytes]]:
    """A file that is one document."""
    decoder = codecs.getincrementaldecoder(encoding)("strict")
    newlines = io.IncrementalNewlineDecoder(None, translate=True)
    offset = 0  # Of the byte that the decoder reads next.
    start = True
    while True:
        raw = file.read(BUFFER)
        data = decoder.getstate()[0] + raw
        held = len(data) - len(raw)
        try:
            text = decoder.decode(raw, not raw)
        except UnicodeDecodeError as e:
            raise _undecodable(name, encoding, e, offset - held) from None
        if "\0" in text:
            before = text[: text.index("\0")].encode(encoding)
            # Where encoding writes a byte order mark, only the first stretch has one.
            mark = len("".encode(encoding)) if offset > held else 0
            at = offset - held + len(before) - mark
            raise InputError(
                f"'{name}' is not text: byte {at:,} is a NUL",
                why="text files hold none; UTF-16 read as something else does, and binary files do",
                hint="if it is UTF-16: --encoding utf-16",
            )
        offset += len(raw)
        mended = newlines.decode(text, not raw)
        if start and text:
            mended, start = mended.removeprefix("\ufeff"), False
        if encoding != "utf-8" or len(mended) != len(text) or "\r" in text:
            data = b""
        elif cut := len(decoder.getstate()[0]):
            data = data[:-cut]
        yield False, mended, data
        if not raw:
            return


def _undecodable(name: str, encoding: str, e: UnicodeDecodeError, base: int) -> InputError:
    at = base + e.start
    data = bytes(e.object)
    value = f"{data[e.start]:#04x}" if e.start < len(data) else "missing"
    utf16 = base == 0 and data[:2] in (b"\xff\xfe", b"\xfe\xff")
    return InputError(
        f"'{name}' is not {encoding.upper()}: byte {at:,} is {value}",
        why=e.reason,
        hint="it looks like UTF-16: --encoding utf-16"
        if utf16
        else "name its encoding, such as --encoding cp1252",
    )


def _json_lines(file: _File, name: str, text_field: str) -> Iterator[tuple[bool, str, bytes]]:
    """A file of one document a line. Format: jsonlines.org, RFC 8259."""
    offset = number = 0
    while line := file.readline(LONGEST_LINE + 1):
        number += 1
        where = f"'{name}' line {number:,}"
        if len(line) > LONGEST_LINE:
            raise InputError(f"{where} is longer than {LONGEST_LINE >> 20} MB", why="a line is one document")
        try:
            record = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as e:
            raise InputError(
                f"{where} is not UTF-8: byte {offset + e.start:,} is {line[e.start]:#04x}", why=e.reason
            ) from None
        offset += len(line)
        if record.strip():
            yield True, _text_of(record, where, text_field), b""


def _text_of(record: str, where: str, text_field: str) -> str:
    try:
        value = json.loads(record)
    except (ValueError, RecursionError) as e:
        raise InputError(f"{where} is not JSON", why=str(e)) from None
    if not isinstance(value, dict) or text_field not in value:
        have = ", ".join(map(ascii, value)) if isinstance(value, dict) else "no object"
        raise InputError(
            f"{where} has no field '{text_field}'", why=f"it has {have}", hint="--text-field NAME"
        )
    text = value[text_field]
    if not isinstance(text, str):
        raise InputError(f"{where}: '{text_field}' is not a string", why=f"it is {type(text).__name__}")
    if not text.isascii() and (lone := re.search("[\ud800-\udfff]", text)):
        raise InputError(
            f"{where}: '{text_field}' holds U+{ord(lone[0]):04X}", why="a lone surrogate is not a character"
        )
    return re.sub("\r\n?", "\n", text) if "\r" in text else text


def codec(encoding: str) -> str:
    """The name of a text encoding as Python has it.

    Raises:
        InputError: There is none of that name.
    """
    try:
        info = codecs.lookup(encoding)
        "a".encode(encoding).decode(encoding)
    except (LookupError, ValueError):
        raise InputError(
            f"no text encoding is called {encoding!r}",
            why="any that Python knows will do",
            hint="--encoding utf-8, utf-16, cp1252, latin-1, shift_jis, gb18030",
        ) from None
    # A byte order mark is dropped here anyway, and offsets count from the first byte.
    return "utf-8" if info.name == "utf-8-sig" else info.name


def suffixes(path: Path) -> tuple[str, str]:
    """The suffix that tells what a file holds, and that of its compression."""
    suffixes = [s.lower() for s in path.suffixes]
    compression = suffixes.pop() if suffixes and suffixes[-1] in COMPRESSED else ""
    kind = suffixes[-1] if suffixes else ""
    return (kind or ".txt" if compression else kind), compression
