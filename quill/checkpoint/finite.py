"""Whether the numbers in a file of weights are finite, found while it is hashed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping

from quill.checkpoint import weights as tensors
from quill.errors import CorruptError
from quill.registry.files import CHUNK, OnBytes, OpenFile, ignore

_SHOWN = 3
# The bits that are all set in infinity and NaN, by safetensors' name of the dtype: the exponent of IEEE 754
# binary16, 32 and 64, and of bfloat16.
_EXPONENTS: Mapping[str, tuple[str, int]] = {
    "F16": ("<u2", 0x7C00),
    "BF16": ("<u2", 0x7F80),
    "F32": ("<u4", 0x7F80_0000),
    "F64": ("<u8", 0x7FF0_0000_0000_0000),
}


def check(file: OpenFile, on_bytes: OnBytes = ignore) -> None:
    """Read a safetensors file once: hash all of it, and look at every number.

    Args:
        file: The file.
        on_bytes: Called with the size of each chunk read.

    Raises:
        CorruptError: It does not match its sha256, its header is wrong, or it contains NaN or infinity.
        ResourceError: It cannot be read.
    """
    layout: dict[str, tensors.Tensor] = {}
    broken: CorruptError | None = None
    try:
        layout = tensors.read_layout(file.file, file.size, file.path)
    except CorruptError as e:
        broken = e
    sha256, head, at = hashlib.sha256(), b"", 0
    found: list[str] = []

    def chunks_to(end: int) -> Iterator[bytes]:
        nonlocal at, head
        while at < end:
            chunk = file.read_chunk(min(CHUNK, end - at))
            if not chunk:
                raise CorruptError(f"'{file.path}' changed while it was read", why="it became shorter")
            head = head or chunk[:512]
            at += len(chunk)
            sha256.update(chunk)
            on_bytes(len(chunk))
            yield chunk

    file.file.seek(0)
    for name, tensor in layout.items():
        for _ in chunks_to(tensor.start):
            pass
        count = sum(count_not_finite(chunk, tensor.dtype) for chunk in chunks_to(tensor.end))
        if count:
            of = (tensor.end - tensor.start) // tensors.SIZES[tensor.dtype]
            found.append(f"{count:,} of {of:,} in {ascii(name)[1:-1][:60]}")
    for _ in chunks_to(file.size):
        pass
    file.check_sha256(sha256.hexdigest(), head)
    if broken:
        raise broken
    if found:
        more = f"; and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        raise CorruptError(
            f"'{file.path}' contains NaN or infinity",
            why="; ".join(found[:_SHOWN]) + more,
            hint="it was published that way; an earlier version may be better",
        )


def count_not_finite(chunk: bytes, dtype: str) -> int:
    """Count the infinities and NaNs in a chunk of a tensor; 0 for dtypes that are not floats.

    Args:
        chunk: Whole numbers, little-endian.
        dtype: safetensors' name of their dtype.
    """
    if dtype not in _EXPONENTS:
        return 0
    import numpy as np

    unsigned, exponent = _EXPONENTS[dtype]
    bits = np.frombuffer(chunk, dtype=unsigned)
    return int(np.count_nonzero((bits & exponent) == exponent))
