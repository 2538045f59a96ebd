"""Files of any size read once and in pieces: their sha256, and whether weights in them are numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

from quill import fsio
from quill.errors import CorruptError
from quill.registry import version
from quill.registry.version import Reading

if TYPE_CHECKING:
    import hashlib

    from quill.checkpoint.weights import Tensor

OnBytes = Callable[[int], None]

_PIECE = 1 << 20
_SHOWN = 3
# The bits that are all set in a number that is infinite or none, by the format's name of its type: the
# exponent of IEEE 754 binary16, 32 and 64, and of bfloat16.
_EXPONENTS: Mapping[str, tuple[str, int]] = {
    "F16": ("<u2", 0x7C00),
    "BF16": ("<u2", 0x7F80),
    "F32": ("<u4", 0x7F80_0000),
    "F64": ("<u8", 0x7FF0_0000_0000_0000),
}


def ignore(count: int) -> None:
    """Take no note of progress."""


def digest(reading: Reading, expected: str | None = None, on_bytes: OnBytes = ignore) -> str:
    """The sha256 of an open file, hex, read in pieces from its start.

    Args:
        reading: The file.
        expected: What it must be; None where nobody knows.
        on_bytes: Told how many more bytes were read.

    Raises:
        CorruptError: It is another.
    """
    import hashlib

    sha256 = hashlib.sha256()
    head = b""
    for piece in pieces(reading, on_bytes):
        head = head or piece[:512]
        sha256.update(piece)
    return _compare(reading, sha256, expected, head)


def pieces(reading: Reading, on_bytes: OnBytes = ignore) -> Iterator[bytes]:
    """An open file from its start, in pieces.

    Raises:
        ResourceError: It cannot be read.
    """
    reading.file.seek(0)
    while piece := _read(reading, _PIECE):
        on_bytes(len(piece))
        yield piece


def check_tensors(reading: Reading, expected: str | None, on_bytes: OnBytes = ignore) -> None:
    """Read a safetensors file once: hash all of it, and look at every number.

    Args:
        reading: The file.
        expected: The sha256 that it must have, hex; None where nobody knows.
        on_bytes: Told how many more bytes were read.

    Raises:
        CorruptError: It is another, its header lies, or a number in it is infinite or none.
        ResourceError: It cannot be read.
    """
    import hashlib

    from quill.checkpoint import weights as tensors

    layout: dict[str, Tensor] = {}
    broken: CorruptError | None = None
    try:
        layout = tensors.read_layout(reading.file, reading.size, reading.path)
    except CorruptError as e:
        broken = e
    sha256, head, at = hashlib.sha256(), b"", 0
    not_finite: list[str] = []

    def stretch(end: int) -> Iterator[bytes]:
        nonlocal at, head
        while at < end:
            piece = _read(reading, min(_PIECE, end - at))
            if not piece:
                raise CorruptError(f"'{reading.path}' changed while it was read", why="it became shorter")
            head = head or piece[:512]
            at += len(piece)
            sha256.update(piece)
            on_bytes(len(piece))
            yield piece

    reading.file.seek(0)
    for name, tensor in layout.items():
        for _ in stretch(tensor.start):
            pass
        count = sum(count_not_finite(piece, tensor.dtype) for piece in stretch(tensor.end))
        if count:
            of = (tensor.end - tensor.start) // tensors.SIZES[tensor.dtype]
            not_finite.append(f"{count:,} of {of:,} in {ascii(name)[1:-1][:60]}")
    for _ in stretch(reading.size):
        pass
    _compare(reading, sha256, expected, head)
    if broken:
        raise broken
    if not_finite:
        more = f"; and {len(not_finite) - _SHOWN} more" if len(not_finite) > _SHOWN else ""
        raise CorruptError(
            f"'{reading.path}' holds numbers that are not finite",
            why="; ".join(not_finite[:_SHOWN]) + more,
            hint="they were published so; an earlier version may be better",
        )


def count_not_finite(piece: bytes, dtype: str) -> int:
    """How many numbers of a stretch of a tensor are infinite or none; other types than floats never are.

    Args:
        piece: Whole numbers, little-endian.
        dtype: The format's name of their type.
    """
    if dtype not in _EXPONENTS:
        return 0
    import numpy as np

    unsigned, exponent = _EXPONENTS[dtype]
    bits = np.frombuffer(piece, dtype=unsigned)
    return int(np.count_nonzero((bits & exponent) == exponent))


def _compare(reading: Reading, sha256: hashlib._Hash, expected: str | None, head: bytes) -> str:
    found: str = sha256.hexdigest()
    if expected and found != expected:
        wrong = f"its sha256 is {found[:12]}..., the manifest says {expected[:12]}..."
        hint = "restore it from a copy, or train it again"
        version.refuse(reading.path, head, reading.size, wrong, hint=hint)
    return found


def _read(reading: Reading, most: int) -> bytes:
    """So many bytes, or those up to the end; a read may return fewer than there are."""
    found = b""
    with fsio.guard(reading.path, "read"):
        while len(found) < most and (more := reading.file.read(most - len(found))):
            found = found + more if found else more
    return found
