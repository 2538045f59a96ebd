"""Tensors on disk: safetensors files, written and read with the safetensors library."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from quill import fsio
from quill.checkpoint.precision import refuse_overflow
from quill.errors import CorruptError, ResourceError, shorten
from quill.registry.files import OpenFile
from quill.registry.tensors import TensorInfo, raise_system_error
from quill.units import size

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from quill.model.gpt import GPT

# The dtypes of weights by their names in a file, in the order in which the library writes their tensors.
_NAMES = {"torch.float32": "F32", "torch.bfloat16": "BF16", "torch.float16": "F16"}


def save_weights(
    path: Path,
    model: GPT,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    temperature: float = 1.0,
) -> None:
    """Write a model's weights. Tied weights are one tensor of the model, and one of the file.

    Args:
        path: As for `save_tensors`.
        model: The model.
        dtype: The dtype to store; weights are read back as float32.
        temperature: Divisor of the network's logits, which the stored weights include.

    Raises:
        InputError: A weight is too large for the dtype.
        ResourceError: The disk is too full.
        OSError: The disk failed or refused.
    """
    import torch

    weights = model.divided(temperature)
    refuse_overflow(weights, dtype)
    stored: torch.dtype = getattr(torch, dtype)
    save_tensors(path, {name: t.to(stored) if t.is_floating_point() else t for name, t in weights.items()})


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors from any device to a safetensors file.

    Args:
        path: The file, in a place that `fsio.stage` gave: the library neither syncs nor sets the mode.
        tensors: The tensors by name.

    Raises:
        ResourceError: The disk is too full.
        OSError: The disk failed or refused; `fsio.stage` turns it into a ResourceError.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    plain = {name: t.detach().to("cpu").contiguous() for name, t in tensors.items()}
    fsio.require_space(path.parent, sum(t.nbytes for t in plain.values()), f"'{path.name}'")
    end = 0
    for name in sorted(plain, key=lambda n: plain[n].data_ptr()):
        if plain[name].data_ptr() < end:
            # The library refuses tensors that share memory.
            plain[name] = plain[name].clone()
        else:
            end = plain[name].data_ptr() + plain[name].nbytes
    try:
        save_file(plain, path, metadata={"format": "pt"})
    except SafetensorError as e:
        raise_system_error(e)
        raise


def stream_tensors(
    path: Path, layout: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], tensors: Mapping[str, Tensor]
) -> None:
    """Write weights to a safetensors file one at a time, where the library needs all of them in memory.

    The file is the one that the library writes. Format: https://github.com/huggingface/safetensors#format.

    Args:
        path: As for `save_tensors`.
        layout: The dtype and shape of each tensor: float32, float16 or bfloat16.
        tensors: The tensors by name; each is looked up once.

    Raises:
        ResourceError: The disk is too full.
        OSError: The disk failed or refused; `fsio.stage` turns it into a ResourceError.
    """
    import torch

    order = sorted(layout, key=lambda n: (list(_NAMES).index(str(layout[n][0])), n))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        dtype, shape = layout[name]
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[str(dtype)], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)

    def chunks() -> Iterator[Any]:
        yield len(text).to_bytes(8, "little") + text
        for name in order:
            tensor = tensors[name].detach().to("cpu").contiguous()
            assert (tensor.dtype, tuple(tensor.shape)) == layout[name], name
            yield tensor.reshape(-1).view(torch.uint8).numpy()
            # Gone before the next one is made.
            del tensor

    fsio.require_space(path.parent, 8 + len(text) + end, f"'{path.name}'")
    fsio.create(path, chunks())


class StoredWeights(Mapping[str, "Tensor"]):
    """The weights in a file, each read when it is looked up, as float32 on the CPU.

    Args:
        file: The file; its sha256 was checked.
        layout: What `read_layout` says of it.
    """

    def __init__(self, file: OpenFile, layout: Mapping[str, TensorInfo]) -> None:
        self._file, self._layout = file, layout

    def __getitem__(self, name: str) -> Tensor:
        import torch
        from safetensors import SafetensorError, safe_open

        if name not in self._layout:
            raise KeyError(name)
        try:
            # Not mapped into memory, as in `read_tensors`.
            with safe_open(self._file.path, "pt", backend="pread") as tensors:
                found: Tensor = tensors.get_tensor(name)
        except (SafetensorError, OSError) as e:
            raise _changed(self._file.path, e) from None
        return found.to(torch.float32)

    def __iter__(self) -> Iterator[str]:
        return iter(self._layout)

    def __len__(self) -> int:
        return len(self._layout)

    def __contains__(self, name: object) -> bool:
        return name in self._layout


def _changed(path: Path, error: Exception) -> CorruptError:
    """The error for a file that could be opened, and then not be read."""
    with fsio.guard(path, "read"):
        raise_system_error(error)
    why = shorten(str(error), 200)
    return CorruptError(f"'{path}' changed while it was being read", why=why)


def read_tensors(file: OpenFile, layout: Mapping[str, TensorInfo]) -> dict[str, Tensor]:
    """Read every tensor of a file once, and check the sha256 of what was read.

    Args:
        file: The file.
        layout: What `read_layout` says of it.

    Returns:
        The tensors by name, on the CPU.

    Raises:
        CorruptError: Its sha256 is not the manifest's, or it changed while it was being read.
        ResourceError: It cannot be read, or does not fit in memory.
    """
    import hashlib

    import torch
    from safetensors import SafetensorError, safe_open

    header_bytes = min((t.start for t in layout.values()), default=file.size)
    file.file.seek(0)
    header = file.read_chunk(header_bytes)
    sha256 = hashlib.sha256(header)
    found: dict[str, Tensor] = {}
    try:
        # Not mapped into memory: there a failing disk would kill the process instead of raising an error.
        with safe_open(file.path, "pt", backend="pread") as tensors:
            for name in layout:
                found[name] = tensors.get_tensor(name)
                sha256.update(found[name].reshape(-1).view(torch.uint8).numpy().data)
    except MemoryError:
        why = f"it has {size(file.size)}"
        raise ResourceError(f"'{file.path}' does not fit in memory", why=why) from None
    except (SafetensorError, OSError) as e:
        raise _changed(file.path, e) from None
    file.check_sha256(sha256.hexdigest(), header[:512])
    return found
