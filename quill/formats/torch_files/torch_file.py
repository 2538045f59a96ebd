"""Foreign pickles: `.pt` files of torch.save and nanoGPT's meta.pkl, read without ever running one.

The container is checked here; the pickle in it goes to a process of its own, that gives back plain values
and where tensors would lie (`child`). Each of these is then held against the bytes there are, so
that a tensor is never more than its share of the file, and is read from the file itself when it is asked for.
"""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
import weakref
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from quill import fsio, strictjson
from quill.errors import CorruptError, ResourceError
from quill.formats.torch_files import child
from quill.formats.torch_files.zip import TorchZip
from quill.registry.version import refuse

if TYPE_CHECKING:
    from torch import Tensor

WALL_SECONDS = 120
_HEAD_BYTES = 1 << 20
_SIZES = {
    "float32": 4, "float16": 2, "bfloat16": 2, "float64": 8, "int64": 8, "int32": 4, "int16": 2,
    "int8": 1, "uint8": 1, "bool": 1,
}  # fmt: skip
_MOST_DIMENSIONS = 16
# What a Python outside the system's own places needs to find its libraries.
_KEPT_ENVIRONMENT = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT")


class Stored(NamedTuple):
    """A tensor in a file: its type by torch's name, its record, and how it lies in it, in elements."""

    dtype: str
    record: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def numel(self) -> int:
        """How many numbers it has."""
        count = 1
        for n in self.shape:
            count *= n
        return count

    @property
    def end(self) -> int:
        """One beyond the last element of the record that it touches."""
        if not self.numel:
            return self.offset
        return self.offset + 1 + sum((n - 1) * s for n, s in zip(self.shape, self.stride, strict=True))


class TorchFile:
    """What a file of torch.save holds.

    Args:
        path: The file.

    Attributes:
        value: Its plain values, with a `Stored` in the place of each tensor.

    Raises:
        CorruptError: It is damaged, or not safe to read.
        ResourceError: It cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._zip = TorchZip(path)
        weakref.finalize(self, self._zip.close)
        records = self._zip.records
        if "data.pkl" not in records or "constants.pkl" in records:
            program = any(name.startswith("code/") for name in records)
            shown = "it is a TorchScript program" if program else "it has no data.pkl"
            raise self._zip.unsafe(f"{shown}, not a file of weights")
        if "byteorder" in records and self._zip.read("byteorder", 16) != b"little":
            raise self._zip.damaged("its numbers are not little-endian")
        pickled = self._zip.read("data.pkl", child.MOST_BYTES)
        self._claimed: dict[Stored, int] = {}
        self.value = self._resolve(_ask(pickled, "checkpoint", path))
        if sum(self._claimed.values()) > self._zip.size:
            raise self._zip.unsafe(
                f"its tensors would be {sum(self._claimed.values()):,} bytes, the file has {self._zip.size:,}"
            )

    def verify(self, tensors: Mapping[str, Stored]) -> None:
        """Hold the bytes of some tensors against their checksums.

        Raises:
            CorruptError: A bit of them is not what was written.
        """
        for record in sorted({t.record for t in tensors.values()}):
            self._zip.verify(record)

    def tensor(self, stored: Stored) -> Tensor:
        """A tensor over the bytes of the file, which are read when it is."""
        import torch

        dtype: torch.dtype = getattr(torch, stored.dtype)
        if not stored.numel:
            return torch.empty(stored.shape, dtype=dtype)
        start = self._zip.start(stored.record) + stored.offset * dtype.itemsize
        length = (stored.end - stored.offset) * dtype.itemsize
        page = start % mmap.ALLOCATIONGRANULARITY
        file = self._zip.file.fileno()
        try:
            with fsio.guard(self.path, "read"):
                mapped = mmap.mmap(file, page + length, access=mmap.ACCESS_COPY, offset=start - page)
        except ValueError:
            raise self._zip.damaged("it became shorter while it was read") from None
        # torch.save puts every record at a multiple of 64 bytes; a file that does not is copied.
        buffer: Any = mapped if start % dtype.itemsize == 0 else bytearray(mapped[page:])
        flat = torch.frombuffer(
            buffer, dtype=dtype, count=length // dtype.itemsize, offset=page if buffer is mapped else 0
        )
        return flat.as_strided(stored.shape, stored.stride)

    def _resolve(self, value: Any) -> Any:
        """The child's answer as Python's own values, every tensor in it proven to be in the file."""
        if isinstance(value, list):
            return [self._resolve(v) for v in value]
        if not isinstance(value, dict):
            return value
        if "tensor" in value:
            stored = self._proven(*value["tensor"])
            self._claimed[stored] = stored.numel * _SIZES[stored.dtype]
            return stored
        return {k: self._resolve(v) for k, v in value["map"]}

    def _proven(self, dtype: str, key: str, numel: int, offset: int, shape: Any, stride: Any) -> Stored:
        name = f"data/{key}"
        stored = Stored(dtype, name, offset, tuple(shape), tuple(stride))
        record = self._zip.records.get(name)
        if record is None:
            raise self._zip.damaged(f"the bytes of a tensor are missing: record '{_short(name)}'")
        there = record.size
        if numel * _SIZES[dtype] != there:
            raise self._zip.unsafe(
                f"a tensor's storage would be {numel:,} {dtype}, its record has {there:,} bytes"
            )
        if len(shape) > _MOST_DIMENSIONS:
            raise self._zip.unsafe(f"a tensor has {len(shape)} dimensions")
        claimed = stored.numel * _SIZES[dtype]
        if claimed > there or stored.end > numel:
            shown = _short("x".join(map(str, shape)))
            raise self._zip.unsafe(
                f"a tensor of {shown} {dtype} would be {claimed:,} bytes in a record of {there:,}"
            )
        return stored


def read_plain(path: Path) -> Any:
    """Read a pickle that holds dicts, lists, text and whole numbers, and nothing else.

    Args:
        path: The file, such as nanoGPT's meta.pkl.

    Raises:
        FileNotFoundError: There is none; what that means only the caller knows.
        CorruptError: It holds something else, or is too large to hold a vocabulary.
        ResourceError: It cannot be read.
    """
    with fsio.open_plain(Path(os.path.realpath(path))) as file, fsio.guard(path, "read"):
        size = os.fstat(file.fileno()).st_size
        raw = b"" if size > child.MOST_BYTES else file.read(size)
    if raw[:1] != b"\x80":
        too_large = f"it has {size:,} bytes, at most {child.MOST_BYTES:,} are read"
        refuse(path, raw[:512] or b"?", size, "it is no pickle" if raw else too_large)
    return _plain(_ask(raw, "plain", path))


def save(weights: Mapping[str, Tensor], value: Any, path: Path) -> None:
    """Write a file with torch.save.

    Args:
        weights: The tensors in it, for the room that they need.
        value: What the file shall hold.
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
            # torch's own writer tells of a write that came short by its place in torch's source.
            raise ResourceError(
                f"cannot write '{path.name}'",
                why="it could not be written whole: the disk, a quota or a limit is full",
                hint="free some space: df -h",
            ) from None


def looks_like(path: Path, *words: bytes) -> bool:
    """Whether a file of torch.save names some tensors near its start; never raises."""
    with suppress(Exception), fsio.open_plain(Path(os.path.realpath(path))) as file:
        head = file.read(_HEAD_BYTES) or b""
        return head.startswith(b"PK\3\4") and any(word in head for word in words)
    return False


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(v) for v in value]
    return {k: _plain(v) for k, v in value["map"]} if isinstance(value, dict) else value


def _ask(pickled: bytes, kind: str, path: Path) -> Any:
    """Have a process of its own read a pickle.

    Raises:
        CorruptError: It refused, or broke on it.
        ResourceError: It could not be started.
    """
    # Isolated and without site packages: nothing but the standard library is in reach of it.
    command = [sys.executable, "-I", "-S", "-B", child.__file__, kind]
    environment = {k: v for k in _KEPT_ENVIRONMENT if (v := os.environ.get(k))}
    unsafe = f"'{path}' is not safe to read"
    try:
        done = subprocess.run(
            command,
            input=pickled,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            timeout=WALL_SECONDS,
        )
    except subprocess.TimeoutExpired:
        raise CorruptError(unsafe, why=f"reading it takes more than {WALL_SECONDS} seconds") from None
    except OSError as e:
        raise _no_process(path, e.strerror or str(e)) from None
    if not done.stdout.startswith(child.READY):
        raise _no_process(path, f"it ended with {done.returncode} before it began")
    if done.returncode:
        stopped = "it took too much time or memory" if done.returncode < 0 else "it broke its reader"
        raise CorruptError(unsafe, why=f"{stopped} (exit {done.returncode})")
    origin = f"the reader of {path}"
    answer = strictjson.parse(done.stdout[len(child.READY) :], origin=origin, error=CorruptError)
    if "refused" in answer:
        raise CorruptError(unsafe, why=answer["refused"])
    return answer["value"]


def _no_process(path: Path, why: str) -> ResourceError:
    return ResourceError(
        f"cannot read '{path}'", why=f"a process of its own reads it, and none could be started: {why}"
    )


def _short(text: str) -> str:
    shown = ascii(text)[1:-1]
    return shown if len(shown) <= 60 else shown[:57] + "..."
