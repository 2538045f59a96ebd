"""One file into documents: decompressed, decoded and read in chunks, never whole in memory.

Text is read the way Python's text mode reads it: decoded strictly, line ends turned into "\\n", a byte order
mark at the start dropped. Nothing else changes: no Unicode normalisation, no trimming. A `.jsonl` file has
one document on each line, a `.parquet` file one in each row; any other file is one document. A NUL is refused
in a text file, where it means another encoding or a binary file; in a record it was written on purpose and
stays.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from quill.data import parquet
from quill.errors import CorruptError, InputError, ResourceError, shorten

# Larger ones only leave the processor's cache.
BUFFER = 1 << 19
# A JSON line is parsed whole, so this bounds memory; real documents are far shorter.
LONGEST_LINE = 64 << 20
COMPRESSED = (".gz", ".zst", ".xz", ".bz2")
_FIELDS_SHOWN = 8


class Fragment(NamedTuple):
    """Text of one document: all of it, or as much as was read at once.

    Attributes:
        begins: Whether it is the start of the document.
        text: The text.
        data: The same in UTF-8 where the file had it in that form, to save encoding it again; else empty.
        position: Returns how many bytes of the file have been read.
    """

    begins: bool
    text: str
    data: bytes
    position: Callable[[], int]


def read(path: Path, *, name: str, encoding: str, text_field: str) -> Iterator[Fragment]:
    """Read one file, skipping documents without any text.

    Args:
        path: The file; its suffixes decide how it is read.
        name: What messages call it.
        encoding: Encoding of a text file, as `codec` returns it; records are always UTF-8.
        text_field: Field of a record that contains the text.

    Raises:
        InputError: It is not text of that form; the message gives the line or the byte.
        CorruptError: A compressed file is damaged.
        ResourceError: It cannot be read.
    """
    with _reading(path) as file:
        records = RECORDS.get(suffixes(path)[0])
        found = records(file, name, text_field) if records else _plain(file, name, encoding)
        begins = True
        for starts, text, data in found:
            begins = begins or starts
            if text:
                yield Fragment(begins, text, data, file.position)
                begins = False


class _File(NamedTuple):
    """An open file, perhaps behind a decompressor, that knows its position on disk; `raw` if it is not."""

    read: Callable[[int], bytes]
    readline: Callable[[int], bytes]
    position: Callable[[], int]
    raw: io.FileIO | None


@contextmanager
def opened(path: Path) -> Iterator[io.FileIO]:
    """Open a file or a FIFO for reading, unbuffered.

    Raises:
        ResourceError: It cannot be opened.
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
        elif compression == ".xz":
            stream = lzma.LZMAFile(raw)  # noqa: SIM115
        elif compression == ".bz2":
            stream = bz2.BZ2File(raw)
        buffered = io.BufferedReader(stream, 1 << 20)
        try:
            plain = None if compression else raw
            yield _File(raw.read if plain else buffered.read, buffered.readline, raw.tell, plain)
        except (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError) as e:
            raise CorruptError(f"'{path}' is damaged", why=f"{compression[1:]}: {e}") from e
        except OSError as e:
            if compression and e.errno is None:  # As bz2 reports damage.
                raise CorruptError(f"'{path}' is damaged", why=f"{compression[1:]}: {e}") from e
            raise ResourceError(f"cannot read '{path}'", why=e.strerror or str(e)) from e


def _zst_decompressor(path: Path) -> Callable[[], Any]:
    """Return a constructor of decompressors for one frame. Format: RFC 8878."""
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

    The library's own reader takes a truncated file for a complete one; this one raises EOFError.
    """

    # A frame expands 32768 times at most, so this bounds what one read can return.
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
    """Read a file that is one document."""
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
            # Encoding writes a byte order mark each time; only the first chunk really has one.
            mark = len("".encode(encoding)) if offset > held else 0
            at = offset - held + len(before) - mark
            raise InputError(
                f"'{name}' is not text: byte {at:,} is a NUL",
                why="text files have none; binary files do, and so does UTF-16 read as something else",
                hint="" if encoding.startswith("utf-16") else "set data.encoding=utf-16",
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
    utf16 = base == 0 and data[:2] in (b"\xff\xfe", b"\xfe\xff") and encoding != "utf-16"
    return InputError(
        f"'{name}' is not {encoding.upper()}: byte {at:,} is {value}",
        why=f"{e.reason}; {'it looks like UTF-16' if utf16 else 'it is damaged or has another encoding'}",
        hint=f"set data.encoding={'utf-16' if utf16 else 'cp1252' if encoding == 'utf-8' else 'utf-8'}",
    )


def _json_lines(file: _File, name: str, text_field: str) -> Iterator[tuple[bool, str, bytes]]:
    """Read a file of one document per line. Format: jsonlines.org, RFC 8259."""
    offset = number = 0
    while line := file.readline(LONGEST_LINE + 1):
        number += 1
        where = f"'{name}' line {number:,}"
        if len(line) > LONGEST_LINE:
            raise InputError(f"{where} is longer than {LONGEST_LINE >> 20} MB", why="a line is one document")
        if number == 1 and line.startswith(codecs.BOM_UTF8):
            line, offset = line[len(codecs.BOM_UTF8) :], len(codecs.BOM_UTF8)
        try:
            record = line.decode()
        except UnicodeDecodeError as e:
            raise InputError(
                f"{where} is not UTF-8: byte {offset + e.start:,} is {line[e.start]:#04x}", why=e.reason
            ) from None
        offset += len(line)
        if not record.isspace():
            text = _text_of(record, where, text_field)
            # A line may be large, and what it contains is in use for a while.
            del line, record
            yield True, text, b""


def _text_of(record: str, where: str, text_field: str) -> str:
    try:
        value = json.loads(record)
    except json.JSONDecodeError as e:
        raise InputError(f"{where} is not JSON", why=f"column {e.colno:,}: {e.msg}") from None
    except ValueError:
        raise InputError(f"{where} has a number that is too long", why="it has over 4,300 digits") from None
    except RecursionError:
        raise InputError(f"{where} is nested too deeply", why="it cannot be parsed") from None
    field = shorten(text_field)
    if not isinstance(value, dict):
        raise InputError(f"{where} is not a JSON object", why=f"the text is read from its field {field}")
    if text_field not in value:
        other = next((k for k, v in value.items() if isinstance(v, str) and k.isidentifier()), None)
        raise InputError(
            f"{where} has no field {field}",
            why=f"it has {_fields(value)}",
            hint=f"set data.text_field={other}" if other and len(other) <= 40 else "",
        )
    text = value[text_field]
    if not isinstance(text, str):
        raise InputError(f"{where}: the field {field} is not a string", why=f"it is {shorten(text)}")
    if not text.isascii() and (lone := re.search("[\ud800-\udfff]", text)):
        raise InputError(
            f"{where}: the field {field} contains U+{ord(lone[0]):04X}",
            why="a lone surrogate is not a character",
        )
    return re.sub("\r\n?", "\n", text) if "\r" in text else text


def _parquet(file: _File, name: str, text_field: str) -> Iterator[tuple[bool, str, bytes]]:
    """Read a file of one document per row."""
    if file.raw is None:
        raise InputError(
            f"cannot read '{name}' while it is compressed", why="a Parquet file is read from its end"
        )
    for text in parquet.read(file.raw, name, text_field):
        yield True, re.sub("\r\n?", "\n", text) if "\r" in text else text, b""


# How a file of many documents is read, by its suffix.
RECORDS: dict[str, Callable[[_File, str, str], Iterator[tuple[bool, str, bytes]]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".parquet": _parquet,
}
SUFFIXES = (".txt", ".md", ".text", *RECORDS)


def _fields(record: dict[str, Any]) -> str:
    shown = ", ".join(shorten(key) for key, _ in zip(record, range(_FIELDS_SHOWN), strict=False))
    more = len(record) - _FIELDS_SHOWN
    return f"{shown} and {more:,} more" if more > 0 else shown or "none"


def codec(encoding: str) -> str:
    """Return Python's name of a text encoding.

    Raises:
        InputError: There is no such encoding.
    """
    try:
        info = codecs.lookup(encoding)
        "a".encode(encoding).decode(encoding)
    except (LookupError, ValueError):
        raise InputError(
            f"no text encoding is called {shorten(encoding)}",
            why="Python's encodings are known, such as utf-8, utf-16, cp1252, latin-1, shift_jis, gb18030",
            hint="set data.encoding=utf-8",
        ) from None
    # A byte order mark is dropped anyway, and offsets count from the first byte.
    return "utf-8" if info.name == "utf-8-sig" else info.name


def suffixes(path: Path) -> tuple[str, str]:
    """Return the suffix of a file's content and that of its compression, each possibly empty."""
    suffixes = [s.lower() for s in path.suffixes]
    compression = suffixes.pop() if suffixes and suffixes[-1] in COMPRESSED else ""
    kind = suffixes[-1] if suffixes else ""
    return (kind or ".txt" if compression else kind), compression
