"""Find NaN and infinity in a file of weights while it is hashed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from quill.errors import CorruptError, shorten
from quill.registry.files import CHUNK, OnBytes, OpenFile, ignore
from quill.registry.tensors import ITEM_BYTES, read_layout

_FLOATS = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}
_SHOWN = 3


def check_finite(file: OpenFile, on_bytes: OnBytes = ignore) -> None:
    """Read a safetensors file once, in chunks: hash all of it, and check that every number is finite.

    Args:
        file: The file.
        on_bytes: Called with the size of each chunk read.

    Raises:
        CorruptError: It does not match its sha256, its header is not valid, or it contains NaN or infinity.
        ResourceError: It cannot be read.
    """
    try:
        layout = read_layout(file.path)
    except CorruptError:
        file.sha256(on_bytes)  # Another sha256 is the better explanation.
        raise
    sha256 = hashlib.sha256()

    def chunks(count: int) -> Iterator[bytes]:
        while count:
            chunk = file.read_chunk(min(CHUNK, count))
            if not chunk:
                raise CorruptError(f"'{file.path}' changed while it was being read", why="it became shorter")
            count -= len(chunk)
            sha256.update(chunk)
            on_bytes(len(chunk))
            yield chunk

    file.file.seek(0)
    header = b"".join(chunks(min((t.start for t in layout.values()), default=file.size)))
    found: list[str] = []
    for name, tensor in layout.items():
        size = tensor.end - tensor.start
        count = sum(count_not_finite(chunk, tensor.dtype) for chunk in chunks(size))
        if count:
            found.append(f"{count:,} of {size // ITEM_BYTES[tensor.dtype]:,} in {shorten(name, 60)}")
    file.check_sha256(sha256.hexdigest(), header[:512])
    if found:
        more = f"; and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        raise CorruptError(
            f"'{file.path}' contains NaN or infinity",
            why="; ".join(found[:_SHOWN]) + more,
            hint="it was published that way; an earlier version may be better",
        )


def count_not_finite(chunk: bytes, dtype: str) -> int:
    """Count the NaNs and infinities in a chunk of a tensor.

    Args:
        chunk: Whole numbers, little-endian.
        dtype: Their dtype in safetensors' spelling; those that are not floats are always finite.
    """
    if dtype not in _FLOATS:
        return 0
    import torch

    values = torch.frombuffer(bytearray(chunk), dtype=getattr(torch, _FLOATS[dtype]))
    return int((~values.isfinite()).sum())
