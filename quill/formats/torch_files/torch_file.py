"""Torch files: the `.pt` of torch.save, read without running the pickle in it, and written.

`sandbox` returns plain values and where each tensor's bytes are. Each tensor is then checked against the
file, so that it is never larger than its bytes, and read from the file when it is looked up.
"""

from __future__ import annotations

import mmap
import os
import weakref
import zlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from quill import fsio
from quill.errors import CorruptError, ResourceError, shorten
from quill.formats.torch_files import sandbox
from quill.registry.files import corrupt

if TYPE_CHECKING:
    from torch import Tensor

_SIZES = {
    "float32": 4, "float16": 2, "bfloat16": 2, "float64": 8, "int64": 8, "int32": 4, "int16": 2,
    "int8": 1, "uint8": 1, "bool": 1,
}  # fmt: skip
_MOST_DIMENSIONS = 16
_ZIP = b"PK\3\4"
_CHUNK = 1 << 20
# What torch.compile and DistributedDataParallel add to the names of tensors, in any order.
_WRAPPERS = ("_orig_mod", "module")
# How much of a file's start contains the names of its tensors.
_NAMES_BYTES = 1 << 20


class Record(NamedTuple):
    """The bytes of a storage: where they start in the file, how many, and their CRC-32 if it was written."""

    start: int
    size: int
    crc: int | None


class Stored(NamedTuple):
    """A tensor in a file: its dtype by torch's name, its record, and its layout there, in elements."""

    dtype: str
    record: Record
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def numel(self) -> int:
        """The number of elements."""
        count = 1
        for n in self.shape:
            count *= n
        return count

    @property
    def end(self) -> int:
        """One past the last element of the record that it touches."""
        if not self.numel:
            return self.offset
        return self.offset + 1 + sum((n - 1) * s for n, s in zip(self.shape, self.stride, strict=True))


class TorchFile:
    """An open torch file.

    Args:
        path: The file.

    Attributes:
        value: Its plain values, with a `Stored` for each tensor.

    Raises:
        CorruptError: It is missing, damaged, or not safe to read.
        ResourceError: It cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = sandbox.open_file(path)
        except FileNotFoundError:
            raise CorruptError(f"'{path}' is missing", why="it was moved, or is a link to nothing") from None
        weakref.finalize(self, self._file.close)
        self._size = os.fstat(self._file.fileno()).st_size
        head = sandbox.head(self._file, path)
        if head[:1] in (b"\x80", b"(", b"c"):
            why = "it is a bare pickle, as torch.save wrote before 2020"
            raise CorruptError(f"'{path}' is not safe to read", why=why, hint=sandbox.resave(path))
        if not head.startswith(_ZIP):
            raise corrupt(path, head, self._size, "it is not a file of torch.save")
        answer = sandbox.ask(self._file, "torch", path)
        self._records = answer["records"]
        self._claimed: dict[Stored, int] = {}
        self.value = sandbox.decode(answer["value"], self._checked)
        if sum(self._claimed.values()) > self._size:
            claimed = f"its tensors would take {sum(self._claimed.values()):,} bytes"
            raise self._unsafe(f"{claimed}; the file has {self._size:,}")

    def verify(self, tensors: Mapping[str, Stored]) -> None:
        """Check the bytes of some tensors against their checksums.

        Raises:
            CorruptError: They are not as they were written.
        """
        for record in sorted({t.record for t in tensors.values() if t.record.crc is not None}):
            left, crc = record.size, 0
            with fsio.guard(self.path, "read"):
                self._file.seek(record.start)
                while left:
                    chunk = self._file.read(min(left, _CHUNK))
                    if not chunk:
                        raise self._damaged("it became shorter while it was read")
                    crc = zlib.crc32(chunk, crc)
                    left -= len(chunk)
            if crc != record.crc:
                raise self._damaged(f"the checksum of the bytes from {record.start:,} on does not match")

    def tensor(self, stored: Stored) -> Tensor:
        """Map a tensor into memory; its bytes are read when they are used."""
        import torch

        dtype: torch.dtype = getattr(torch, stored.dtype)
        if not stored.numel:
            return torch.empty(stored.shape, dtype=dtype)
        start = stored.record.start + stored.offset * dtype.itemsize
        length = (stored.end - stored.offset) * dtype.itemsize
        page = start % mmap.ALLOCATIONGRANULARITY
        try:
            with fsio.guard(self.path, "read"):
                # A private mapping: writing to the tensor does not change the file.
                mapped = mmap.mmap(
                    self._file.fileno(), page + length, access=mmap.ACCESS_COPY, offset=start - page
                )
        except ValueError:
            raise self._damaged("it became shorter while it was read") from None
        # torch.save aligns every record to 64 bytes; a file that does not is copied.
        buffer: Any = mapped if start % dtype.itemsize == 0 else bytearray(mapped[page:])
        flat = torch.frombuffer(
            buffer, dtype=dtype, count=length // dtype.itemsize, offset=page if buffer is mapped else 0
        )
        return flat.as_strided(stored.shape, stored.stride)

    def _checked(self, dtype: str, key: str, numel: int, offset: int, shape: Any, stride: Any) -> Stored:
        """A tensor that is proven to be within its record, and its record within the file."""
        record = Record(*self._records[key])
        stored = Stored(dtype, record, offset, tuple(shape), tuple(stride))
        if record.start < 0 or record.size < 0 or record.start + record.size > self._size:
            raise self._damaged(f"its record {shorten(f'data/{key}')} would be outside the file")
        if numel * _SIZES[dtype] != record.size:
            claimed = f"a tensor's storage would have {numel:,} {dtype} elements"
            raise self._unsafe(f"{claimed}; its record has {record.size:,} bytes")
        if len(shape) > _MOST_DIMENSIONS:
            raise self._unsafe(f"a tensor has {len(shape)} dimensions; at most {_MOST_DIMENSIONS} are read")
        claimed_bytes = stored.numel * _SIZES[dtype]
        if claimed_bytes > record.size or stored.end > numel:
            shown = shorten("x".join(map(str, shape)))
            claimed = f"a {dtype} tensor of shape {shown} would take {claimed_bytes:,} bytes"
            raise self._unsafe(f"{claimed}; its record has {record.size:,}")
        self._claimed[stored] = claimed_bytes
        return stored

    def _damaged(self, why: str) -> CorruptError:
        return sandbox.damaged(self.path, why)

    def _unsafe(self, why: str) -> CorruptError:
        return CorruptError(f"'{self.path}' is not safe to read", why=why)


def save(weights: Mapping[str, Tensor], value: Any, path: Path) -> None:
    """Write a file with torch.save.

    Args:
        weights: The tensors in it, to check the free space.
        value: What to save.
        path: The file; its folder exists.

    Raises:
        ResourceError: Disk or permission.
    """
    import torch

    fsio.require_space(path.parent, sum(t.nbytes for t in weights.values()), f"'{path.name}'")
    with fsio.guard(path, "write"):
        try:
            torch.save(value, path)
        except RuntimeError:
            # For a short write torch's own writer raises this, with a message about its source code.
            raise ResourceError(
                f"cannot write '{path.name}'",
                why="not all of it could be written: the disk is full, or a quota or limit is reached",
                hint="df -h",
            ) from None


def unwrapped(name: str) -> str:
    """A tensor's name in the model itself, without the wrappers that it was trained in."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def looks_like(path: Path, *words: bytes) -> bool:
    """Whether a torch file names some tensors near its start; never raises."""
    with suppress(Exception), sandbox.open_file(path) as file:
        head = file.read(_NAMES_BYTES) or b""
        return head.startswith(_ZIP) and any(word in head for word in words)
    return False
