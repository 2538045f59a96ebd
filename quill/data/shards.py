"""Token ids on disk: bare little-endian files, as nanoGPT has them.

A split is one file, `train.bin`; a large one is several, `train-00000.bin` and so on, of SHARD_BYTES each but
the last. Where it is cut depends on the number of ids alone.

A file is read with pread, not mapped: a mapped file that another process truncates kills the reader (SIGBUS),
and one that is read ends in an error.
"""

from __future__ import annotations

import copy
import hashlib
import os
import re
import threading
import weakref
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from io import FileIO
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from quill import fsio
from quill.errors import CorruptError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from quill.tokenizers.base import Ids

# Bytes of one id, by the name of its type: uint16 up to 65,536 ids, else uint32.
WIDTHS = {"uint16": 2, "uint32": 4}
# Bytes of a file before the next one begins. A split of a terabyte stays below the 1,024 files that a process
# may usually open, and a preparation that is resumed repeats a minute or two of work.
SHARD_BYTES = 1 << 29
# Bytes read at a time while a file is hashed.
_BUFFER = 1 << 22


class Written(NamedTuple):
    """A file of ids: how many, its bytes, and its sha256 in hex."""

    tokens: int
    bytes: int
    sha256: str


class Supply:
    """Arrays of ids that are written to files of a fixed size.

    Args:
        arrays: Ids, little-endian, of one dtype.

    Attributes:
        left: Number of ids of the last array that are not written yet.
    """

    def __init__(self, arrays: Iterable[Ids]) -> None:
        self._arrays = iter(arrays)
        self._rest: Ids | None = None

    @property
    def left(self) -> int:
        return 0 if self._rest is None else len(self._rest)

    def write(self, path: Path, most: int) -> Written | None:
        """Write the next ids to a new file.

        Args:
            path: The file; its folder exists.
            most: Bytes after which the file ends.

        Returns:
            None if there are no more ids, and no file.

        Raises:
            OSError: Disk or permission.
        """
        if not self._more():
            return None
        tokens = n_bytes = 0

        def taken() -> Iterator[Ids]:
            nonlocal tokens, n_bytes
            while n_bytes < most and self._more() and self._rest is not None:
                room = (most - n_bytes) // self._rest.itemsize
                array, self._rest = self._rest[:room], self._rest[room:]
                tokens += len(array)
                n_bytes += array.nbytes
                yield array

        sha256 = fsio.create(path, taken())
        return Written(tokens, n_bytes, sha256)

    def _more(self) -> bool:
        while not self.left:
            self._rest = next(self._arrays, None)
            if self._rest is None:
                return False
        return True


def write(
    folder: Path,
    target: Path,
    split: str,
    arrays: Iterable[Ids],
    done: Sequence[Written] = (),
    note: Callable[[Written, int], None] = lambda shard, left: None,
) -> dict[str, Written]:
    """Write a split to as many files as it takes.

    Args:
        folder: Where files are written until the split is complete.
        target: The dataset's folder, on the same filesystem, or the same.
        split: The split.
        arrays: Its ids, little-endian, of one dtype; those after `done`.
        done: The first files, in the folder already.
        note: Called after each file, with the number of ids of the last array that are left for the next.

    Returns:
        The files, by name.

    Raises:
        OSError: Disk or permission.
    """
    written = list(done)
    supply = Supply(arrays)
    while shard := supply.write(folder / name(split, len(written)), SHARD_BYTES):
        written.append(shard)
        note(shard, supply.left)
    if not written:
        sha256 = fsio.create(target / name(split), [])
        return {name(split): Written(0, 0, sha256)}
    numbered = [name(split, number) for number in range(len(written))]
    final = numbered if len(written) > 1 else [name(split)]
    for old, new in zip(numbered, final, strict=True):
        _move(folder / old, target / new)
    return dict(zip(final, written, strict=True))


def _move(old: Path, new: Path) -> None:
    """Give a file another place, and where that is another folder, leave it in the old one too."""
    if old.parent != new.parent:
        with suppress(OSError):
            os.link(old, new)
            return
    if old != new:
        os.rename(old, new)


def name(split: str, number: int | None = None) -> str:
    """Return the name of a split's only file, or of one of several."""
    return f"{split}.bin" if number is None else f"{split}-{number:05}.bin"


def names(split: str, among: Iterable[str]) -> list[str]:
    """Return the names of a split's files, in order; empty if one is missing.

    Args:
        split: The split.
        among: Names of files.
    """
    among = set(among)
    if name(split) in among:
        return [name(split)]
    found = [n for n in among if re.fullmatch(rf"{split}-[0-9]{{5}}\.bin", n)]
    wanted = [name(split, number) for number in range(len(found))]
    return wanted if among.issuperset(wanted) else []


class Shard:
    """Ids, (n,), read from a file as they are needed: those of a split, or of a part of it.

    Args:
        file: The file, open for reading; it may be closed afterwards.
        path: Where it is.
        tokens: Number of ids, n.
        dtype: Name of their type.
        vocab_size: Number of ids in the vocabulary; what is read is checked against it.
        damaged: Makes the error for a file that is not what it should be.

    Attributes:
        close: Closes the file; the end of the object's life does it too.
    """

    def __init__(
        self,
        file: FileIO,
        path: Path,
        *,
        tokens: int,
        dtype: str,
        vocab_size: int,
        damaged: Callable[[str], CorruptError],
    ) -> None:
        import numpy as np

        self.dtype: np.dtype[np.unsignedinteger[Any]] = np.dtype(dtype).newbyteorder("<")
        self._path, self._name = path, path.name
        self._first, self._tokens, self._vocab_size = 0, tokens, vocab_size
        self._fds = [os.dup(file.fileno())]
        self._ends = [tokens * self.dtype.itemsize]  # Bytes of all ids up to the end of each file.
        self._whole: tuple[Shard, ...] = ()
        self._damaged = damaged
        self.close: Callable[[], object] = weakref.finalize(self, os.close, self._fds[0])
        self._lock = threading.Lock()

    @classmethod
    def joined(cls, shards: Sequence[Shard]) -> Shard:
        """Join the files of a split to one shard, which keeps them open until it is closed.

        Args:
            shards: One for each file, in order; at least one, and all of one vocabulary.
        """
        if len(shards) == 1:
            return shards[0]
        whole = copy.copy(shards[0])
        whole._tokens = sum(map(len, shards))
        whole._fds = [fd for shard in shards for fd in shard._fds]
        whole._ends = list(accumulate(shard._ends[0] for shard in shards))
        whole._whole = tuple(shards)
        whole._name = f"one of {shards[0]._name} to {shards[-1]._name}"
        with ExitStack() as stack:
            for shard in shards:
                stack.callback(shard.close)
            whole.close = stack.pop_all().close
        return whole

    def __len__(self) -> int:
        return self._tokens

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        """Read all ids, for `numpy.asarray`."""
        ids = self[:]
        return ids if dtype is None else ids.astype(dtype)

    def __getitem__(self, where: slice) -> NDArray[np.unsignedinteger[Any]]:
        """Read a range of ids, (m,)."""
        start, stop, step = where.indices(self._tokens)
        if step != 1:
            raise ValueError("ids are read in order")
        ids: NDArray[np.unsignedinteger[Any]] = self.rows([start], max(0, stop - start))[0]
        return ids

    def part(self, start: int, stop: int) -> Shard:
        """A range of the ids as a shard, (stop - start,), which keeps the file open."""
        part = copy.copy(self)
        part._first, part._tokens, part._whole = self._first + start, stop - start, (self,)
        return part

    def rows(self, starts: Sequence[int], length: int) -> NDArray[np.unsignedinteger[Any]]:
        """Read rows of consecutive ids.

        Args:
            starts: Index of the first id of each row, (B,).
            length: Ids in a row, T.

        Returns:
            Ids, (B, T).

        Raises:
            CorruptError: The file became shorter, or an id is not in the vocabulary.
            ResourceError: It cannot be read.
        """
        import numpy as np

        width = self.dtype.itemsize
        size = length * width
        # One guard for all rows, as entering it takes longer than reading a row.
        with fsio.guard(self._path, "read"):
            data = b"".join([self._read(size, (self._first + start) * width) for start in starts])
        if len(data) != size * len(starts):
            raise self._damaged(f"{self._name} became shorter while it was in use")
        found = np.frombuffer(data, self.dtype).reshape(len(starts), length)
        self.check(found)
        return found

    def check(self, ids: NDArray[np.unsignedinteger[Any]]) -> None:
        """Refuse ids outside the vocabulary.

        Raises:
            CorruptError: Naming the largest.
        """
        if ids.size and (largest := int(ids.max())) >= self._vocab_size:
            raise self._damaged(
                f"{self._name} has the id {largest:,}, outside the vocabulary of {self._vocab_size:,}"
            )

    def sha256(self, on_bytes: Callable[[int], None] = lambda n: None) -> str:
        """Read the whole file, checking each id, and return its sha256 in hex.

        Args:
            on_bytes: Called with the number of bytes after each read.

        Raises:
            CorruptError: An id is not in the vocabulary.
            ResourceError: It cannot be read.
        """
        import numpy as np

        digest = hashlib.sha256()
        at = 0
        while data := self._chunk(at):
            digest.update(data)
            at += len(data)
            if not len(data) % self.dtype.itemsize:
                self.check(np.frombuffer(data, self.dtype))
            on_bytes(len(data))
        return digest.hexdigest()

    def _chunk(self, offset: int) -> bytes:
        with fsio.guard(self._path, "read"):
            return self._read(_BUFFER, offset)

    def _read(self, size: int, offset: int) -> bytes:
        data = self._read_some(size, offset)
        # Linux reads at most 2 GB at once, and a range may reach into the next file.
        while 0 < len(data) < size and (more := self._read_some(size - len(data), offset + len(data))):
            data += more
        return data

    def _read_some(self, size: int, offset: int) -> bytes:
        fd = self._fds[0]
        if len(self._fds) > 1:
            at = bisect_right(self._ends, offset)
            if at == len(self._fds):
                return b""
            fd, size = self._fds[at], min(size, self._ends[at] - offset)
            offset -= self._ends[at - 1] if at else 0
        if hasattr(os, "pread"):
            return os.pread(fd, size, offset)
        with self._lock:
            os.lseek(fd, offset, os.SEEK_SET)
            return os.read(fd, size)
