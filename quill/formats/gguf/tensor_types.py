"""How a GGUF file stores the values of a tensor: as plain floats, or quantized in groups.

Q8_0 is ggml's: 32 values of a row share one float16 scale, the largest magnitude over 127, and are stored as
signed bytes (ggml-quants.c, quantize_row_q8_0_ref).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

from quill.checkpoint.precision import refuse_overflow
from quill.errors import CorruptError, InputError

if TYPE_CHECKING:
    from mmap import mmap

    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

Q8_VALUES = 32
# Values converted at a time, so that a large embedding is not in memory twice.
_CHUNK = 1 << 20


class Type(NamedTuple):
    """A tensor type: its number in the format, and the values and bytes of one quantization group."""

    number: int
    values: int
    bytes: int


TYPES = {
    "float32": Type(0, 1, 4),
    "float16": Type(1, 1, 2),
    "q8_0": Type(8, Q8_VALUES, 2 + Q8_VALUES),
    "bfloat16": Type(30, 1, 2),
}
# ggml's other types, to tell a model that is quantized further from a damaged file.
_OTHERS = {
    2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K",
    14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL",
    21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64",
    29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4",
}  # fmt: skip


def name_of(number: int, what: str) -> str:
    """Look up a type by its number.

    Args:
        number: The number in the file.
        what: The tensor of that type, for messages.

    Raises:
        InputError: quill does not read the type.
        CorruptError: There is no such type.
    """
    for name, known in TYPES.items():
        if known.number == number:
            return name
    if number in _OTHERS:
        raise InputError(
            f"{what} has the type {_OTHERS[number]}",
            why="quill reads F32, F16, BF16 and Q8_0; coarser types are not worth training on",
            hint="import the model's F16 or Q8_0 file",
        )
    raise CorruptError(f"{what} is damaged", why=f"its type {number} is unknown")


def size(dtype: str, shape: Sequence[int]) -> int:
    """The bytes of a tensor whose rows are whole quantization groups."""
    known = TYPES[dtype]
    return prod(shape) // known.values * known.bytes


def encode(values: Tensor, dtype: str, name: str) -> Iterator[Any]:
    """Convert a tensor to bytes, chunk by chunk.

    Args:
        values: Float32, on the CPU.
        dtype: One of "float32", "float16", "q8_0".
        name: The tensor's name, for messages.

    Raises:
        InputError: A value is too large for the type, or is not finite.
    """
    refuse_overflow({name: values}, dtype)
    flat = values.detach().contiguous().reshape(-1)
    if dtype == "float32":
        yield flat.numpy()
        return
    for start in range(0, len(flat), _CHUNK):
        chunk = flat[start : start + _CHUNK]
        if not bool(chunk.isfinite().all()):
            why = f"'{name}' contains NaN or infinity"
            raise InputError(f"the weights do not fit {dtype}", why=why, hint="dtype=float32")
        yield quantize(chunk.numpy()) if dtype == "q8_0" else chunk.half().numpy()


def decode(buffer: mmap | bytearray, dtype: str, shape: Sequence[int], start: int) -> Tensor:
    """Make a tensor of bytes: a view of them if torch has the type, else float32.

    Args:
        buffer: The file's content.
        dtype: A key of `TYPES`.
        shape: Outermost dimension first.
        start: Offset of the first byte.
    """
    import torch

    if dtype == "q8_0":
        packed = torch.frombuffer(buffer, dtype=torch.uint8, count=size(dtype, shape), offset=start)
        return torch.from_numpy(dequantize(packed.numpy())).reshape(tuple(shape))
    kind: torch.dtype = getattr(torch, dtype)
    if start % kind.itemsize:
        flat = torch.frombuffer(bytearray(buffer[start : start + size(dtype, shape)]), dtype=kind)
    else:
        flat = torch.frombuffer(buffer, dtype=kind, count=prod(shape), offset=start)
    return flat.reshape(tuple(shape))


def quantize(values: NDArray[np.float32]) -> NDArray[np.void]:
    """Quantize float32 values, a multiple of 32 of them, to Q8_0."""
    import numpy as np

    rows = values.reshape(-1, Q8_VALUES)
    scale = np.abs(rows).max(axis=1, keepdims=True) / np.float32(127)
    # The inverse of a subnormal scale overflows, and its values round to zero anyway.
    inverse = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale > np.finfo("f4").tiny)
    scaled = rows * inverse
    whole = np.floor(np.abs(scaled))
    # Halves round away from zero, as in C's roundf; numpy rounds them to even.
    rounded = whole + (np.abs(scaled) - whole >= 0.5)
    groups = np.empty(len(rows), _group())
    groups["scale"] = scale[:, 0]
    groups["values"] = np.copysign(rounded, scaled)
    return groups


def dequantize(packed: NDArray[np.uint8]) -> NDArray[np.float32]:
    """The float32 values of Q8_0."""
    import numpy as np

    groups = packed.view(_group())
    with np.errstate(invalid="ignore"):  # a damaged scale gives NaN
        return (groups["values"] * groups["scale"].astype(np.float32)[:, None]).reshape(-1)


def _group() -> np.dtype[np.void]:
    import numpy as np

    return np.dtype([("scale", "<f2"), ("values", "i1", (Q8_VALUES,))])
