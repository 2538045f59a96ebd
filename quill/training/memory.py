"""What a run needs in memory, known by arithmetic before anything is allocated."""

from __future__ import annotations

import os
import sys

import torch

from quill.config.settings import RunConfig
from quill.errors import InputError
from quill.model.gpt import n_params
from quill.units import size

# Weights, gradients and AdamW's two momenta, float32 each.
_BYTES_PER_PARAMETER = 16


def check(config: RunConfig, device: str) -> int:
    """Refuse a model whose weights and optimizer do not fit.

    Args:
        config: The run, with vocab_size set.
        device: Where it would run.

    Returns:
        Bytes of weights, gradients and optimizer.

    Raises:
        InputError: With the memory it would need and what there is.
    """
    parameters = n_params(config.model.shape())
    needed, present = parameters * _BYTES_PER_PARAMETER, of_device(device)
    if needed > present:
        raise InputError(
            f"the model of {parameters:,} parameters does not fit in memory",
            why=f"training it needs {size(needed)} before any activation; {device} has {size(present)}",
            hint="lower model.n_layer, model.n_embd or model.vocab_size",
        )
    return needed


def of_device(device: str) -> int:
    """Bytes of a device's memory; for the CPU and what shares its memory, the computer's."""
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
