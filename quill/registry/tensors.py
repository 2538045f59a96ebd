"""The tensors in a safetensors file: their names, dtypes and shapes, from its header alone. Loads no torch.

The safetensors library checks that a header is well formed and describes the file byte for byte. What it
leaves open is settled here: how long a header may be, which dtypes are read, and what its errors mean.
Format: https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import NamedTuple

from quill import fsio
from quill.errors import CorruptError, shorten
from quill.registry.files import corrupt

ITEM_BYTES: Mapping[str, int] = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1,
    "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip
# A tensor takes about a hundred bytes of header. The library would parse up to 100 MB.
MAX_HEADER_BYTES = 4 << 20
_MAX_DIMENSIONS = 16
_SYSTEM_ERROR = re.compile(r"\(os error (\d+)\)")


class TensorInfo(NamedTuple):
    """One tensor of a file.

    Attributes:
        dtype: Its dtype in the format's spelling, such as "F32".
        shape: Its shape.
        start: Where its bytes start in the file.
        end: Where they end.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_layout(path: Path, origin: str = "") -> dict[str, TensorInfo]:
    """Read the header of a safetensors file.

    Args:
        path: The file.
        origin: What to call it in messages; its path by default.

    Returns:
        The tensors by name, in the order of their bytes.

    Raises:
        CorruptError: It is missing, a link or a device, or its header is not that of the file.
        ResourceError: It cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    shown = Path(origin or path)
    try:
        with fsio.open_plain(path) as file, fsio.guard(shown, "read"):
            head, file_bytes = file.read(512) or b"", os.fstat(file.fileno()).st_size
    except FileNotFoundError:
        raise CorruptError(f"'{shown}' is missing", why="it was there a moment ago") from None
    length = int.from_bytes(head[:8], "little")
    if file_bytes < 8:
        raise corrupt(
            shown, head, file_bytes, f"it has {file_bytes} bytes, less than a header's length takes"
        )
    if length > MAX_HEADER_BYTES:
        why = f"it is not a safetensors file: its header would take {length:,} bytes"
        raise corrupt(shown, head, file_bytes, why)
    found: dict[str, TensorInfo] = {}
    end = 8 + length
    try:
        with safe_open(path, "numpy", backend="pread") as tensors:
            for name in tensors.offset_keys():
                tensor = tensors.get_slice(name)
                dtype, shape = tensor.get_dtype(), tuple(tensor.get_shape())
                if dtype not in ITEM_BYTES:
                    raise CorruptError(
                        f"'{shown}' is not supported", why=f"{shorten(name)} has dtype {dtype}"
                    )
                if len(shape) > _MAX_DIMENSIONS:
                    why = f"{shorten(name)} has {len(shape):,} dimensions"
                    raise CorruptError(f"'{shown}' is damaged", why=why)
                start, end = end, end + ITEM_BYTES[dtype] * prod(shape)
                found[name] = TensorInfo(dtype, shape, start, end)
    except (SafetensorError, OSError) as e:
        with fsio.guard(shown, "read"):
            raise_system_error(e)
        message = str(e).removeprefix("Error while deserializing header: ")
        why = f"it is not a valid safetensors file: {shorten(message, 160)[1:-1]}"
        if "not fully covered" in message:
            why = "its tensors do not cover it exactly: it was cut short or appended to"
        raise corrupt(shown, head, file_bytes, why) from None
    return found


def raise_system_error(error: Exception) -> None:
    """Raise the operating system's error that an error of the safetensors library mentions, if it does."""
    if found := _SYSTEM_ERROR.search(str(error)):
        number = int(found[1])
        raise OSError(number, os.strerror(number)) from error
