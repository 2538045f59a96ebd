"""The GGUF container, both directions: metadata and tensors in one file, proven sane before it is trusted.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3. A magic, counts,
metadata as typed key-value pairs, a table of tensors, then their bytes, each at a multiple of the
alignment. Read by hand because a hostile header must cost neither memory nor time; written by hand because
a tensor at a time is all that has to be in memory.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from quill import fsio
from quill.errors import CorruptError, InputError
from quill.formats.gguf import tensor_types
from quill.registry.version import refuse

if TYPE_CHECKING:
    from torch import Tensor

MAGIC = b"GGUF"
ALIGNMENT = 32
_VERSION = 3
_READ = (2, 3)
# A vocabulary of 260,000 tokens with its merges takes about ten megabytes.
MOST_HEADER_BYTES = 64 << 20
_MOST_ITEMS = 1 << 21
_MOST_TENSORS = 1 << 16
_MOST_KEYS = 1 << 12
_MOST_NAME = 1 << 10
_MOST_DIMENSIONS = 4

# Number, and how struct spells it, of each type that metadata can have.
_SCALARS = {
    "uint8": (0, "B"), "int8": (1, "b"), "uint16": (2, "H"), "int16": (3, "h"), "uint32": (4, "I"),
    "int32": (5, "i"), "float32": (6, "f"), "bool": (7, "?"), "uint64": (10, "Q"), "int64": (11, "q"),
    "float64": (12, "d"),
}  # fmt: skip
_STRING, _ARRAY = 8, 9
_BY_NUMBER = {number: (kind, code) for kind, (number, code) in _SCALARS.items()}

Kind = Literal["uint32", "int32", "float32", "bool", "string", "strings", "int32s"]


class Value(NamedTuple):
    """One value of metadata to be written: its type, and what it is."""

    kind: Kind
    value: Any


@dataclass(frozen=True)
class Stored:
    """A tensor to be written.

    Attributes:
        name: Its name in the file.
        shape: As torch has it, outermost first.
        dtype: A name of `tensor_types.TYPES`.
        make: Gives the values, float32, when their turn has come.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    make: Callable[[], Tensor]


class Entry(NamedTuple):
    """A tensor of a file: its type by the name quill has for it, its shape, outermost first, its place."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def write(path: Path, metadata: Mapping[str, Value], tensors: Sequence[Stored]) -> None:
    """Write a file, a tensor at a time.

    Args:
        path: The file; syncing it is the caller's.
        metadata: By key.
        tensors: In the order of their bytes.

    Raises:
        InputError: A weight does not fit its type.
        ResourceError: Disk or permission.
    """
    parts = [MAGIC, struct.pack("<IQQ", _VERSION, len(tensors), len(metadata))]
    for key, value in metadata.items():
        parts += [_text(key), _encode(value)]
    at = 0
    for tensor in tensors:
        dimensions = tensor.shape[::-1]
        parts += [_text(tensor.name), struct.pack(f"<I{len(dimensions)}Q", len(dimensions), *dimensions)]
        parts.append(struct.pack("<IQ", tensor_types.TYPES[tensor.dtype].number, at))
        at += _padded(tensor_types.size(tensor.dtype, tensor.shape))
    header = b"".join(parts)
    header += bytes(_padded(len(header)) - len(header))
    fsio.require_space(path.parent, len(header) + at, f"'{path.name}'")

    def chunks() -> Iterator[Any]:
        yield header
        for tensor in tensors:
            values = tensor.make()
            assert tuple(values.shape) == tensor.shape, tensor.name
            yield from tensor_types.encode(values, tensor.dtype, tensor.name)
            length = tensor_types.size(tensor.dtype, tensor.shape)
            yield bytes(_padded(length) - length)

    fsio.write_chunks(path, chunks(), durable=False)


class File:
    """An open file, its header checked against it.

    Args:
        path: The file; a link is followed, as it is the one the person named.

    Attributes:
        tensors: Where each is, by name.

    Raises:
        CorruptError: It is no GGUF file, or its header does not fit it.
        InputError: It is of a version or a kind of number that quill does not read.
        ResourceError: It cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._bytes, self._size = _map(path)
        self._at = 0
        self._items = 0
        version, n_tensors, n_keys = self._head()
        self._metadata: dict[str, tuple[str, Any]] = {}
        for _ in range(n_keys):
            key = self._name("a key")
            if key in self._metadata:
                raise self.damaged(f"the key {_shown(key)} is there twice")
            self._metadata[key] = self._value(key)
        alignment = self.get("general.alignment", int, ALIGNMENT)
        if alignment < 1 or alignment & (alignment - 1) or alignment > 1 << 20:
            raise self.damaged(f"general.alignment is {alignment}")
        found = [self._entry(alignment) for _ in range(n_tensors)]
        self.tensors = self._placed(found, -(-self._at // alignment) * alignment)
        self.version = version

    def get(self, key: str, type_: type[Any], default: Any = None) -> Any:
        """One value of the metadata.

        Args:
            key: Its key.
            type_: int, float (an int will do), bool or str; list gives the strings of an array, tuple its
                numbers.
            default: What a key that is not there stands for; None: it has to be there.

        Raises:
            CorruptError: It is missing or of another type.
        """
        if key not in self._metadata:
            if default is None:
                raise self.damaged(f"it has no {key}")
            return default
        kind, value = self._metadata[key]
        if type_ is list and kind == "strings":
            return list(self._strings(*value))
        if type_ is tuple and kind == "numbers":
            code, start, count = value
            return struct.unpack_from(f"<{count}{code}", self._bytes, start)
        if type_ is float and type(value) in (int, float):
            return float(value)
        if type(value) is not type_ or kind in ("strings", "numbers"):
            raise self.damaged(f"{key} is of another type than {type_.__name__}")
        return value

    def __contains__(self, key: str) -> bool:
        return key in self._metadata

    def tensor(self, name: str) -> Tensor:
        """A tensor's values: a view of the file where its type is one of torch's, else unpacked."""
        entry = self.tensors[name]
        return tensor_types.decode(self._bytes, entry.dtype, entry.shape, entry.start)

    def damaged(self, why: str) -> CorruptError:
        """The refusal of this file."""
        return CorruptError(f"'{self.path}' is damaged", why=why)

    def _head(self) -> tuple[int, int, int]:
        head = bytes(self._bytes[:512])
        if head[:4] != MAGIC:
            refuse(self.path, head, self._size, f"it is no GGUF file: it begins with {head[:4]!a}")
        self._at = 4
        version, n_tensors, n_keys = self._unpack("IQQ")
        if version not in _READ:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in _READ
            why = "it is for big-endian machines" if swapped else f"it is version {version} of the format"
            raise InputError(f"quill does not read '{self.path}'", why=f"{why}; versions 2 and 3 are read")
        if n_tensors > _MOST_TENSORS or n_keys > _MOST_KEYS:
            raise self.damaged(f"it would have {n_keys:,} keys and {n_tensors:,} tensors")
        return version, n_tensors, n_keys

    def _unpack(self, codes: str) -> tuple[Any, ...]:
        layout = struct.Struct("<" + codes)
        start = self._skip(layout.size)
        return layout.unpack_from(self._bytes, start)

    def _skip(self, length: int) -> int:
        """Go past some bytes of the header; where they start."""
        start = self._at
        if length > self._size - start:
            raise self.damaged(f"it is cut off in its header, at byte {self._size:,}")
        if start + length > MOST_HEADER_BYTES:
            raise self.damaged(f"its header takes more than the {MOST_HEADER_BYTES:,} bytes that are read")
        self._at = start + length
        return start

    def _name(self, what: str) -> str:
        (length,) = self._unpack("Q")
        if not 0 < length <= _MOST_NAME:
            raise self.damaged(f"{what} would have {length:,} bytes")
        return self._decoded(self._skip(length), length)

    def _decoded(self, start: int, length: int) -> str:
        try:
            return self._bytes[start : start + length].decode()
        except UnicodeDecodeError:
            raise self.damaged(f"the text at byte {start:,} is no UTF-8") from None

    def _value(self, key: str) -> tuple[str, Any]:
        (number,) = self._unpack("I")
        if number in _BY_NUMBER:
            kind, code = _BY_NUMBER[number]
            if kind == "bool":
                (flag,) = self._unpack("B")
                if flag > 1:
                    raise self.damaged(f"{_shown(key)} is neither true nor false")
                return kind, bool(flag)
            return kind, self._unpack(code)[0]
        if number == _STRING:
            (length,) = self._unpack("Q")
            return "string", self._decoded(self._skip(length), length)
        if number == _ARRAY:
            return self._array(key)
        raise self.damaged(f"{_shown(key)} is of the unknown type {number}")

    def _array(self, key: str) -> tuple[str, Any]:
        number, count = self._unpack("IQ")
        self._items += count
        if self._items > _MOST_ITEMS:
            raise self.damaged(f"up to {_shown(key)} it would have {self._items:,} items in arrays")
        start = self._at
        if number == _STRING:
            for _ in range(count):
                (length,) = self._unpack("Q")
                self._skip(length)
            return "strings", (start, count)
        if number not in _BY_NUMBER:
            raise self.damaged(f"{_shown(key)} is an array of the type {number}")
        code = _BY_NUMBER[number][1]
        self._skip(count * struct.calcsize("<" + code))
        return "numbers", (code, start, count)

    def _strings(self, start: int, count: int) -> Iterator[str]:
        for _ in range(count):
            (length,) = struct.unpack_from("<Q", self._bytes, start)
            yield self._decoded(start + 8, length)
            start += 8 + length

    def _entry(self, alignment: int) -> tuple[str, Entry]:
        name = self._name("a tensor's name")
        (n,) = self._unpack("I")
        if not 0 < n <= _MOST_DIMENSIONS:
            raise self.damaged(f"the tensor {_shown(name)} has {n} dimensions")
        shape = self._unpack(f"{n}Q")[::-1]
        number, offset = self._unpack("IQ")
        dtype = tensor_types.name_of(number, f"the tensor {_shown(name)} of '{self.path}'")
        if 0 in shape or offset % alignment or shape[-1] % tensor_types.TYPES[dtype].values:
            raise self.damaged(f"the tensor {_shown(name)} is {dtype} {list(shape)} at byte {offset:,}")
        return name, Entry(dtype, shape, offset, offset + tensor_types.size(dtype, shape))

    def _placed(self, found: list[tuple[str, Entry]], payload: int) -> dict[str, Entry]:
        """The tensors where they are in the file, which none may leave and no two share."""
        tensors: dict[str, Entry] = {}
        for name, entry in found:
            if name in tensors:
                raise self.damaged(f"the tensor {_shown(name)} is there twice")
            if payload + entry.end > self._size:
                ends = f"ends at byte {payload + entry.end:,}; the file is cut off at {self._size:,}"
                raise self.damaged(f"the tensor {_shown(name)} {ends}")
            tensors[name] = entry._replace(start=payload + entry.start, end=payload + entry.end)
        at = 0
        for name, entry in sorted(tensors.items(), key=lambda item: item[1].start):
            if entry.start < at:
                raise self.damaged(f"the tensor {_shown(name)} overlaps the one before it")
            at = entry.end
        return tensors


def _map(path: Path) -> tuple[mmap.mmap, int]:
    """A file's bytes, which take memory only while they are looked at."""
    try:
        file = fsio.open_plain(Path(os.path.realpath(path)))
    except FileNotFoundError:
        raise CorruptError(f"'{path}' is missing", why="it is gone, or a link to what is gone") from None
    with file, fsio.guard(path, "read"):
        size = os.fstat(file.fileno()).st_size
        if not size:
            refuse(path, b"", 0, "")
        # Private and writable: torch takes no buffer that it must not write to. Nothing writes.
        return mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY), size


def _encode(value: Value) -> bytes:
    kind, content = value
    if kind == "string":
        return struct.pack("<I", _STRING) + _text(content)
    if kind == "strings":
        return struct.pack("<IIQ", _ARRAY, _STRING, len(content)) + b"".join(map(_text, content))
    if kind == "int32s":
        number, code = _SCALARS["int32"]
        return struct.pack(f"<IIQ{len(content)}{code}", _ARRAY, number, len(content), *content)
    number, code = _SCALARS[kind]
    return struct.pack("<I" + code, number, content)


def _text(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _padded(length: int) -> int:
    return -(-length // ALIGNMENT) * ALIGNMENT


def _shown(text: str) -> str:
    shown = ascii(text)
    return shown if len(shown) <= 60 else shown[:57] + "...'"
