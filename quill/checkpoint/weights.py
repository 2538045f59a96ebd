"""The safetensors format by hand, both directions: a file's layout, proven sane before it is trusted.

Format: https://github.com/huggingface/safetensors#format. Eight bytes of little-endian header length, a
JSON header of name -> {dtype, shape, data_offsets}, then the bytes of every tensor without a gap. Read by
hand because a hostile header must cost no memory; written by hand because every write of a run, and every
way in which one can fail, goes through one door. Torch is imported only
where a tensor is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from quill import fsio, strictjson
from quill.checkpoint.precision import refuse_overflow
from quill.errors import CorruptError
from quill.registry.files import corrupt

if TYPE_CHECKING:
    import torch

    from quill.model.gpt import GPT

SIZES: Mapping[str, int] = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1,
    "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip
# A tensor takes about a hundred bytes of header; the format's own bound of 100 MB is for files that
# nobody holds in one piece.
MOST_HEADER_BYTES = 4 << 20
# Types of the format by what torch calls them, and the other way round.
_DTYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16",
    "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8",
    "uint64": "U64", "uint32": "U32", "uint16": "U16", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip
_NAMES = {short: name for name, short in _DTYPES.items()}
_MOST_DIMENSIONS = 16
_ALIGNMENT = 8


class Tensor(NamedTuple):
    """One tensor of a file: its type by the format's name, its shape, and where its bytes are in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_layout(file: FileIO, size: int, path: Path) -> dict[str, Tensor]:
    """Read a file's header and prove that it describes the file, byte for byte.

    Args:
        file: Open at its start.
        size: The file's size in bytes.
        path: Its name, for messages.

    Returns:
        The tensors by name, in the order of their bytes.

    Raises:
        CorruptError: It is not safetensors, or its header does not fit it.
    """
    with fsio.guard(path, "read"):
        head = file.read(512) or b""
    if size < 8:
        raise corrupt(path, head, size, f"it has {size} bytes, a header's length alone takes 8")
    length = int.from_bytes(head[:8], "little")
    if length > MOST_HEADER_BYTES:
        most = f"at most {MOST_HEADER_BYTES:,} are read"
        raise corrupt(
            path, head, size, f"it is no safetensors file: its header would be {length:,} bytes, {most}"
        )
    if length > size - 8:
        raise corrupt(path, head, size, f"it is cut off in its header: {size:,} bytes of {length + 8:,}")
    if head[8:9] != b"{":
        raise corrupt(path, head, size, "it is no safetensors file: its header is no JSON object")
    with fsio.guard(path, "read"):
        file.seek(8)
        header = strictjson.parse(
            _exactly(file, length, path), origin=f"header of {path}", error=CorruptError
        )
    if not isinstance(header.pop("__metadata__", {}), dict):
        raise CorruptError(f"'{path}' is damaged", why="in its header, __metadata__ is no object")
    payload = 8 + length
    tensors = {name: _tensor(name, entry, payload, size, path) for name, entry in header.items()}
    _no_gap(tensors, payload, size, path)
    return dict(sorted(tensors.items(), key=lambda item: item[1].start))


def write_header(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> tuple[bytes, list[str]]:
    """Make the header of a file.

    Args:
        tensors: The format's type name and the shape, by name.

    Returns:
        What the file begins with, and the order in which the tensors' bytes follow.
    """
    # Wide types first, so that each tensor starts at a multiple of its own width.
    order = sorted(tensors, key=lambda n: (-SIZES[tensors[n][0]], n))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name in order:
        dtype, shape = tensors[name]
        end = start + _bytes(dtype, shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
        start = end
    text = strictjson.canonical(header)
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text, order


def write(path: Path, values: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Write tensors as safetensors, one at a time, from wherever they are.

    Args:
        path: The file.
        values: By name.

    Returns:
        What a manifest says of the file: its bytes and sha256.
    """
    kinds = {n: (_DTYPES[str(t.dtype).removeprefix("torch.")], tuple(t.shape)) for n, t in values.items()}
    header, order = write_header(kinds)
    size = len(header) + sum(t.numel() * t.element_size() for t in values.values())
    fsio.require_space(path.parent, size, f"'{path.name}'")

    def chunks() -> Iterator[Any]:
        yield header
        for name in order:
            yield _bytes_of(values[name])

    return {"bytes": size, "sha256": fsio.write_chunks(path, chunks())}


def save_weights(
    path: Path,
    model: GPT,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
) -> None:
    """Write a model's weights; of tied ones a model has but one tensor, and so has the file.

    Args:
        path: The safetensors file.
        model: Whose.
        dtype: How they are kept; they are read back as float32.

    Raises:
        InputError: A weight is too large for the dtype.
        ResourceError: Disk or permission.
    """
    import torch

    refuse_overflow(model.state_dict(), dtype)
    kind: torch.dtype = getattr(torch, dtype)
    weights = {name: t.detach().to(kind) for name, t in model.state_dict().items()}
    write(path, weights)


def views(layout: Mapping[str, Tensor], buffer: bytearray) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors over a file's bytes, sharing its memory where their place in it allows."""
    import torch

    for name, t in layout.items():
        dtype: torch.dtype = getattr(torch, _NAMES[t.dtype])
        if t.start == t.end:
            yield name, torch.empty(t.shape, dtype=dtype)
            continue
        if t.start % dtype.itemsize:
            flat = torch.frombuffer(bytearray(buffer[t.start : t.end]), dtype=dtype)
        else:
            flat = torch.frombuffer(
                buffer, dtype=dtype, count=(t.end - t.start) // dtype.itemsize, offset=t.start
            )
        yield name, flat.reshape(t.shape)


def _exactly(file: FileIO, length: int, path: Path) -> bytes:
    raw = bytearray()
    while len(raw) < length:
        piece = file.read(length - len(raw))
        if not piece:
            raise CorruptError(f"'{path}' changed while it was read", why="its header ended early")
        raw += piece
    return bytes(raw)


def _tensor(name: str, entry: Any, payload: int, size: int, path: Path) -> Tensor:
    """Check one entry by itself."""

    def damaged(why: str) -> CorruptError:
        return CorruptError(f"'{path}' is damaged", why=f"in its header, {_short(name)} {why}")

    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise damaged("has not just dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in SIZES:
        raise damaged(f"is of type {_short(dtype)}; there is {', '.join(SIZES)}")
    if not _counts(shape) or len(shape) > _MOST_DIMENSIONS:
        raise damaged(f"has the shape {_short(shape)}")
    if not _counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise damaged(f"lies at {_short(offsets)}")
    start, end = offsets
    if end - start != _bytes(dtype, shape):
        raise damaged(
            f"takes {_bytes(dtype, shape):,} bytes as {dtype} {_short(shape)}, and has {end - start:,}"
        )
    if payload + end > size:
        raise damaged(f"ends at byte {payload + end:,}; the file is cut off at {size:,}")
    return Tensor(dtype, tuple(shape), payload + start, payload + end)


def _no_gap(tensors: Mapping[str, Tensor], payload: int, size: int, path: Path) -> None:
    """Hold the tensors together to the format's rule: one after the other, up to the end."""
    at = payload
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if tensor.start != at:
            fault = "overlaps what is before it" if tensor.start < at else "leaves a hole before it"
            raise CorruptError(f"'{path}' is damaged", why=f"in its header, {_short(name)} {fault}")
        at = tensor.end
    if at != size:
        extra = size - at
        raise CorruptError(
            f"'{path}' is damaged", why=f"{extra:,} byte{'s' * (extra > 1)} follow its last tensor"
        )


def _counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**63 for n in value)


def _bytes(dtype: str, shape: Any) -> int:
    count = SIZES[dtype]
    for n in shape:
        count *= n
    return count


def _short(value: Any) -> str:
    shown = ascii(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."


def _bytes_of(tensor: torch.Tensor) -> Any:
    import torch

    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy() if flat.numel() else b""
