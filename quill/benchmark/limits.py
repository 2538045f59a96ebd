"""What the device can do at most, measured with torch's own operations."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from quill.training.device import Device

# Matrices grow until a product takes this many seconds, as small ones are not the fastest.
_LONG_ENOUGH = 0.02
_SMALLEST, _LARGEST = 256, 8192
# Larger than caches.
_BUFFER_BYTES = 1 << 28
_REPEATS = 3


@torch.inference_mode()
def matmul(device: Device) -> float:
    """Operations per second of a product of square matrices in the device's dtype; the most of several sizes.

    A product of two matrices of n rows and columns takes 2 n^3 operations.
    """
    generator = torch.Generator(device.name).manual_seed(0)
    best, n = 0.0, _SMALLEST
    while True:
        a = torch.randn(n, n, generator=generator, device=device.name).to(getattr(torch, device.dtype))
        seconds = _fastest(lambda a=a: a @ a, device)  # type: ignore[misc]
        best = max(best, 2 * n**3 / seconds)
        if seconds > _LONG_ENOUGH or n == _LARGEST:
            return best
        n *= 2


@torch.inference_mode()
def bandwidth(device: Device) -> float:
    """Bytes of memory per second: reading a large buffer, or reading and writing it, whichever is more."""
    source = torch.ones(_BUFFER_BYTES // 4, device=device.name)
    target = torch.empty_like(source)
    read = source.nbytes / _fastest(source.sum, device)
    return max(read, 2 * source.nbytes / _fastest(lambda: target.copy_(source), device))


def _fastest(operation: Callable[[], object], device: Device) -> float:
    """Seconds of an operation: the fewest of several, as noise only adds."""
    best = float("inf")
    for _ in range(1 + _REPEATS):
        start = time.perf_counter()
        operation()
        device.synchronize()
        best = min(best, time.perf_counter() - start)
    return best
