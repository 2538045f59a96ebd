"""Where a run computes and in what precision: chosen by measuring, never by habit."""

from __future__ import annotations

import ctypes
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from quill.config.settings import TrainConfig
from quill.errors import InputError, ResourceError

# mallopt's parameter numbers, from glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3


@dataclass(frozen=True)
class Machine:
    """A device and how it is used.

    Attributes:
        device: "cpu", "cuda:0", "mps" and so on.
        dtype: Precision of the arithmetic; weights are float32 throughout.
        compiled: Whether the model goes through torch.compile.
    """

    device: str
    dtype: str
    compiled: bool

    @property
    def kind(self) -> str:
        """The device without its number."""
        return self.device.partition(":")[0]

    def autocast(self) -> AbstractContextManager[object]:
        """The context in which a forward pass computes in `dtype`."""
        if self.dtype == "float32":
            return nullcontext()
        return torch.autocast(self.kind, dtype=getattr(torch, self.dtype))

    def synchronize(self) -> None:
        """Wait for the device, so that a clock read now means something."""
        if self.kind == "cuda":
            torch.cuda.synchronize()
        elif self.kind == "mps":
            torch.mps.synchronize()


def find_device(wanted: str) -> str:
    """The device a setting means.

    Args:
        wanted: auto, cpu, cuda, cuda:N or mps.

    Raises:
        ResourceError: This machine has no such device.
    """
    has_cuda, has_mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if wanted == "auto":
        return "cuda" if has_cuda else "mps" if has_mps else "cpu"
    kind, _, number = wanted.partition(":")
    present = {"cpu": True, "cuda": has_cuda, "mps": has_mps}[kind]
    if present and number and int(number) >= torch.cuda.device_count():
        present = False
    if not present:
        raise ResourceError(
            f"no device '{wanted}'",
            why=f"torch {torch.__version__} sees {_devices(has_cuda, has_mps)}",
            hint="--device auto",
        )
    return wanted


def candidates(device: str, config: TrainConfig) -> list[str]:
    """Precisions worth timing on a device, the plainest first.

    Raises:
        InputError: The setting asks for one the device does not do.
    """
    kind = device.partition(":")[0]
    if config.dtype == "float16" and kind == "cpu":
        raise InputError(
            "'train.dtype' = 'float16' does not train on a CPU",
            why="its gradients underflow without a scaler, which runs on CUDA alone",
            hint="--dtype bfloat16, float32 or auto",
        )
    if config.dtype != "auto":
        return [config.dtype]
    if kind == "cuda":
        return ["bfloat16"] if torch.cuda.is_bf16_supported() else ["float32"]
    if kind == "cpu" and torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return ["float32", "bfloat16"]
    return ["float32"]


def fastest(choices: list[str], step: Callable[[str], None], repeats: int = 3) -> tuple[str, float]:
    """The choice whose step takes least time.

    Args:
        choices: What to compare, the one to prefer first.
        step: Runs one step of a choice.
        repeats: Timed steps each, after one to warm up; the best counts, as noise only adds.

    Returns:
        The choice, and its seconds. A later choice must win by a tenth: less is noise.
    """
    best, best_seconds = choices[0], float("inf")
    for choice in choices:
        step(choice)
        seconds = float("inf")
        for _ in range(repeats):
            start = time.perf_counter()
            step(choice)
            seconds = min(seconds, time.perf_counter() - start)
            if seconds > 1:
                break
        if seconds < best_seconds * (1.0 if best_seconds == float("inf") else 0.9):
            best, best_seconds = choice, seconds
    return best, best_seconds


def can_compile(device: str) -> bool:
    """Whether torch.compile has what it needs here: a C++ compiler for a CPU, Triton for CUDA."""
    if sys.platform == "win32" or sys.platform == "darwin":
        return False
    if device.startswith("cuda"):
        from importlib.util import find_spec

        return find_spec("triton") is not None
    return device == "cpu" and any(shutil.which(c) for c in ("g++", "clang++"))


def keep_memory() -> None:
    """Let malloc keep large freed blocks instead of returning them to the system.

    A training step frees and asks for the same large blocks each time; given back, every one is
    mapped and zeroed anew, which was measured to cost as much as the arithmetic. glibc only.
    """
    if sys.platform != "linux":
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(_M_MMAP_THRESHOLD, 1 << 30)
    mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(_M_TOP_PAD, 16 << 20)


def _devices(has_cuda: bool, has_mps: bool) -> str:
    found = ["cpu"]
    if has_cuda:
        found += [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    return ", ".join(found + (["mps"] if has_mps else []))
