"""Token ids on disk: one bare little-endian file per split, as nanoGPT has them.

A file is read with pread, not mapped: a mapped file that another process truncates kills the reader (SIGBUS),
and one that is read ends in an error.
"""

from __future__ import annotations

import copy
import hashlib
import os
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from io import FileIO
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
# Bytes read at a time while a file is hashed.
_BUFFER = 1 << 22


class Written(NamedTuple):
    """A file of ids: how many, its bytes, and its sha256 in hex."""

    tokens: int
    bytes: int
    sha256: str


def write(path: Path, arrays: Iterable[Ids]) -> Written:
    """Write ids to a file, one array after the other.

    Args:
        path: The file; its folder exists.
        arrays: Ids, little-endian, of one dtype.

    Raises:
        ResourceError: Disk or permission.
    """
    tokens = n_bytes = 0

    def counted() -> Iterator[Ids]:
        nonlocal tokens, n_bytes
        for array in arrays:
            tokens += len(array)
            n_bytes += array.nbytes
            yield array

    sha256 = fsio.create(path, counted())
    return Written(tokens, n_bytes, sha256)


class Shard:
    """The ids of one split, (n,), read from a file as they are needed.

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
        self._fd, self._path, self._name = os.dup(file.fileno()), path, path.name
        self._first, self._tokens, self._vocab_size = 0, tokens, vocab_size
        self._whole: Shard | None = None
        self._damaged = damaged
        self.close: Callable[[], object] = weakref.finalize(self, os.close, self._fd)
        self._lock = threading.Lock()

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
        part._first, part._tokens, part._whole = self._first + start, stop - start, self
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
        # Linux reads at most 2 GB at once.
        while 0 < len(data) < size and (more := self._read_some(size - len(data), offset + len(data))):
            data += more
        return data

    def _read_some(self, size: int, offset: int) -> bytes:
        if hasattr(os, "pread"):
            return os.pread(self._fd, size, offset)
        with self._lock:
            os.lseek(self._fd, offset, os.SEEK_SET)
            return os.read(self._fd, size)
