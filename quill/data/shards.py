"""Token ids on disk: one bare little-endian file per split, as nanoGPT has them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from quill import fsio

if TYPE_CHECKING:
    from quill.data.batches import Tokens
    from quill.tokenizers.base import Ids

# Bytes of one id, by the name of its type: uint16 up to 65,536 ids, else uint32.
WIDTHS = {"uint16": 2, "uint32": 4}


class Written(NamedTuple):
    """A file of ids: how many, its bytes, and its sha256 in hex."""

    tokens: int
    bytes: int
    sha256: str


def write(path: Path, arrays: Iterable[Ids]) -> Written:
    """Write ids to a file, one array after the other.

    Args:
        path: A new file in a folder that is being staged.
        arrays: Ids, little-endian, of one dtype.

    Raises:
        OSError: Disk or permission.
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


def open_tokens(path: Path, dtype: str, tokens: int) -> Tokens:
    """Map a file of ids, (tokens,), without reading it into memory."""
    import numpy as np

    plain: np.dtype[Any] = np.dtype(dtype).newbyteorder("<")
    return np.memmap(path, dtype=plain, mode="r") if tokens else np.empty(0, plain)
