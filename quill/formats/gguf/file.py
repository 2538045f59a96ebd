"""The GGUF container, both directions: metadata and tensors in one file, validated before it is used.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3. A magic number, counts,
metadata as typed key-value pairs, a table of tensors, then their bytes, each at a multiple of the alignment.
quill has its own reader because a hostile header must cost neither memory nor time, and its own writer so
that only one tensor is in memory at a time.
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
from quill.errors import CorruptError, InputError, shorten
from quill.formats.gguf import tensor_types
from quill.registry.files import corrupt

if TYPE_CHECKING:
    from torch import Tensor

MAGIC = b"GGUF"
ALIGNMENT = 32
_VERSION = 3
_READ = (2, 3)
# A vocabulary of 260,000 tokens with its merges takes about 10 MB.
MOST_HEADER_BYTES = 64 << 20
_MOST_ITEMS = 1 << 21
_MOST_TENSORS = 1 << 16
_MOST_KEYS = 1 << 12
_MOST_NAME = 1 << 10
_MOST_DIMENSIONS = 4

# The number and struct code of each metadata type.
_SCALARS = {
    "uint8": (0, "B"), "int8": (1, "b"), "uint16": (2, "H"), "int16": (3, "h"), "uint32": (4, "I"),
    "int32": (5, "i"), "float32": (6, "f"), "bool": (7, "?"), "uint64": (10, "Q"), "int64": (11, "q"),
    "float64": (12, "d"),
}  # fmt: skip
_STRING, _ARRAY = 8, 9
_BY_NUMBER = {number: (kind, code) for kind, (number, code) in _SCALARS.items()}

Kind = Literal["uint32", "int32", "float32", "bool", "string", "strings", "int32s"]


class Value(NamedTuple):
    """A metadata value to write, with its type."""

    kind: Kind
    value: Any


@dataclass(frozen=True)
class Stored:
    """A tensor to write.

    Attributes:
        name: Its name in the file.
        shape: Outermost dimension first, as in torch.
        dtype: A key of `tensor_types.TYPES`.
        make: Makes the float32 values when they are written.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    make: Callable[[], Tensor]


class Entry(NamedTuple):
    """A tensor in a file: its type, its shape (outermost dimension first), and its first and last offset."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def write(path: Path, metadata: Mapping[str, Value], tensors: Sequence[Stored]) -> None:
    """Write a file, one tensor at a time.

    Args:
        path: The file. The caller syncs it.
        metadata: Values by key.
        tensors: In the order of the file.

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
            # Gone before the next one is made.
            del values
            length = tensor_types.size(tensor.dtype, tensor.shape)
            yield bytes(_padded(length) - length)

    fsio.write_chunks(path, chunks(), durable=False)


class File:
    """An open file with a validated header.

    Args:
        path: The file. A link is followed.

    Attributes:
        tensors: Each tensor's type, shape and place, by name.

    Raises:
        CorruptError: It is not a GGUF file, or its header contradicts its content.
        InputError: quill does not read its version or a tensor's type.
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
                raise self.damaged(f"the key {shorten(key)} occurs twice")
            self._metadata[key] = self._value(key)
        alignment = self.get("general.alignment", int, ALIGNMENT)
        if alignment < 1 or alignment & (alignment - 1) or alignment > 1 << 20:
            raise self.damaged(f"general.alignment is {alignment}")
        found = [self._entry(alignment) for _ in range(n_tensors)]
        self.tensors = self._placed(found, -(-self._at // alignment) * alignment)
        self.version = version

    def get(self, key: str, type_: type[Any], default: Any = None) -> Any:
        """Read a metadata value.

        Args:
            key: Its key.
            type_: int, float (also accepts an int), bool or str; list for an array of strings, tuple for one
                of numbers.
            default: The value of a missing key; None if the key is required.

        Raises:
            CorruptError: It is missing or has another type.
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
            raise self.damaged(f"{key} does not have the type {type_.__name__}")
        return value

    def __contains__(self, key: str) -> bool:
        return key in self._metadata

    def tensor(self, name: str) -> Tensor:
        """A tensor's values: a view of the file if torch has its type, else unpacked to float32."""
        entry = self.tensors[name]
        return tensor_types.decode(self._bytes, entry.dtype, entry.shape, entry.start)

    def damaged(self, why: str) -> CorruptError:
        """The error for this file."""
        return CorruptError(f"'{self.path}' is damaged", why=why)

    def _head(self) -> tuple[int, int, int]:
        head = bytes(self._bytes[:512])
        if head[:4] != MAGIC:
            raise corrupt(self.path, head, self._size, f"it is not a GGUF file: it begins with {head[:4]!a}")
        self._at = 4
        version, n_tensors, n_keys = self._unpack("IQQ")
        if version not in _READ:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in _READ
            why = "it is big-endian" if swapped else f"it has version {version} of the format"
            raise InputError(f"quill cannot read '{self.path}'", why=f"{why}; quill reads versions 2 and 3")
        if n_tensors > _MOST_TENSORS or n_keys > _MOST_KEYS:
            raise self.damaged(f"it claims {n_keys:,} keys and {n_tensors:,} tensors")
        return version, n_tensors, n_keys

    def _unpack(self, codes: str) -> tuple[Any, ...]:
        layout = struct.Struct("<" + codes)
        start = self._skip(layout.size)
        return layout.unpack_from(self._bytes, start)

    def _skip(self, length: int) -> int:
        """Skip bytes of the header; return the offset of the first."""
        start = self._at
        if length > self._size - start:
            raise self.damaged(f"its header is cut off at byte {self._size:,}")
        if start + length > MOST_HEADER_BYTES:
            raise self.damaged(f"its header is larger than {MOST_HEADER_BYTES:,} bytes")
        self._at = start + length
        return start

    def _name(self, what: str) -> str:
        (length,) = self._unpack("Q")
        if not 0 < length <= _MOST_NAME:
            raise self.damaged(f"{what} claims {length:,} bytes")
        return self._decoded(self._skip(length), length)

    def _decoded(self, start: int, length: int) -> str:
        try:
            return self._bytes[start : start + length].decode()
        except UnicodeDecodeError:
            raise self.damaged(f"the text at byte {start:,} is not UTF-8") from None

    def _value(self, key: str) -> tuple[str, Any]:
        (number,) = self._unpack("I")
        if number in _BY_NUMBER:
            kind, code = _BY_NUMBER[number]
            if kind == "bool":
                (flag,) = self._unpack("B")
                if flag > 1:
                    raise self.damaged(f"{shorten(key)} is neither true nor false")
                return kind, bool(flag)
            return kind, self._unpack(code)[0]
        if number == _STRING:
            (length,) = self._unpack("Q")
            return "string", self._decoded(self._skip(length), length)
        if number == _ARRAY:
            return self._array(key)
        raise self.damaged(f"{shorten(key)} has the unknown type {number}")

    def _array(self, key: str) -> tuple[str, Any]:
        number, count = self._unpack("IQ")
        self._items += count
        if self._items > _MOST_ITEMS:
            raise self.damaged(f"with {shorten(key)} its arrays claim {self._items:,} items")
        start = self._at
        if number == _STRING:
            for _ in range(count):
                (length,) = self._unpack("Q")
                self._skip(length)
            return "strings", (start, count)
        if number not in _BY_NUMBER:
            raise self.damaged(f"{shorten(key)} is an array of the unknown type {number}")
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
            raise self.damaged(f"the tensor {shorten(name)} has {n} dimensions")
        shape = self._unpack(f"{n}Q")[::-1]
        number, offset = self._unpack("IQ")
        dtype = tensor_types.name_of(number, f"the tensor {shorten(name)} of '{self.path}'")
        if 0 in shape or offset % alignment or shape[-1] % tensor_types.TYPES[dtype].values:
            raise self.damaged(f"the tensor {shorten(name)} is {dtype} {list(shape)} at byte {offset:,}")
        return name, Entry(dtype, shape, offset, offset + tensor_types.size(dtype, shape))

    def _placed(self, found: list[tuple[str, Entry]], payload: int) -> dict[str, Entry]:
        """Turn offsets into places in the file, none of which may overlap or leave it."""
        tensors: dict[str, Entry] = {}
        for name, entry in found:
            if name in tensors:
                raise self.damaged(f"the tensor {shorten(name)} occurs twice")
            if payload + entry.end > self._size:
                ends = f"ends at byte {payload + entry.end:,}; the file is cut off at {self._size:,}"
                raise self.damaged(f"the tensor {shorten(name)} {ends}")
            tensors[name] = entry._replace(start=payload + entry.start, end=payload + entry.end)
        at = 0
        for name, entry in sorted(tensors.items(), key=lambda item: item[1].start):
            if entry.start < at:
                raise self.damaged(f"the tensor {shorten(name)} overlaps the one before it")
            at = entry.end
        return tensors


def _map(path: Path) -> tuple[mmap.mmap, int]:
    """Map a file into memory."""
    try:
        file = fsio.open_plain(Path(os.path.realpath(path)))
    except FileNotFoundError:
        raise CorruptError(f"'{path}' is missing", why="it was deleted, or links to a deleted file") from None
    with file, fsio.guard(path, "read"):
        size = os.fstat(file.fileno()).st_size
        if not size:
            raise corrupt(path, b"", 0, "")
        # Private and writable, because torch takes no read-only buffer. Nothing is written.
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
