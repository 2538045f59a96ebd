"""What a run needs before anything is allocated: a shape that cannot fit is refused by arithmetic."""

from __future__ import annotations

import os
import sys

import torch

from quill.config.settings import RunConfig
from quill.errors import InputError
from quill.model.gpt import n_params

# Weights, gradients and AdamW's two momenta, float32 each.
_BYTES_PER_PARAMETER = 16


def check(config: RunConfig, device: str) -> int:
    """Refuse a model whose weights and optimizer cannot be held.

    Args:
        config: The run, vocab_size set.
        device: Where it would be.

    Returns:
        Bytes that weights, gradients and optimizer take.

    Raises:
        InputError: With the memory it would take and what there is.
    """
    parameters = n_params(config.model)
    needed, present = parameters * _BYTES_PER_PARAMETER, of_device(device)
    if needed > present:
        raise InputError(
            f"the model of {parameters:,} parameters does not fit",
            why=f"training it takes {human(needed)} before any activation; {device} has {human(present)}",
            hint="a smaller --n-layer, --n-embd or --model-vocab-size",
        )
    return needed


def of_device(device: str) -> int:
    """Bytes of memory of a device; of the machine for the CPU and whatever shares its memory."""
    if device.startswith("cuda"):
        return int(torch.cuda.get_device_properties(device).total_memory)
    if sys.platform == "win32":
        import ctypes

        class Status(ctypes.Structure):
            _fields_ = (
                ("length", ctypes.c_ulong),
                ("load", ctypes.c_ulong),
                *((f"field{i}", ctypes.c_ulonglong) for i in range(7)),
            )

        status = Status(length=ctypes.sizeof(Status))
        ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status))
        return int(status.field0)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def human(n_bytes: float) -> str:
    """Bytes in the largest unit that leaves a figure above one."""
    for unit in ("B", "KB", "MB", "GB", "TB"):
        if n_bytes < 1000:
            return f"{n_bytes:.0f} {unit}" if unit == "B" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:,.1f} PB"
