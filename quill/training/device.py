"""The device a setting means, and how a run computes on it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from quill.errors import ResourceError


@dataclass(frozen=True)
class Device:
    """A device and how a run computes on it.

    Attributes:
        name: "cpu", "cuda:0", "mps" and so on.
        dtype: Precision of the arithmetic; weights are float32 throughout.
        compiled: Whether the model goes through torch.compile.
        micro_batch_size: Most sequences of a batch in one forward pass; None for the whole batch.
        checkpointing: Whether activations are computed again for the backward pass instead of stored.
    """

    name: str
    dtype: str
    compiled: bool
    micro_batch_size: int | None = None
    checkpointing: bool = False

    @property
    def kind(self) -> str:
        """The device without its index."""
        return self.name.partition(":")[0]

    @property
    def instructions(self) -> str | None:
        """The instruction set of a CPU that torch uses, such as "AVX512"; sums differ between them."""
        return torch.backends.cpu.get_cpu_capability() if self.kind == "cpu" else None

    @property
    def runs_ahead(self) -> bool:
        """Whether steps are queued without waiting for their results; scaling float16 needs each of them."""
        return self.kind != "cpu" and self.dtype != "float16"

    @property
    def records(self) -> bool:
        """Whether a compiled pass is recorded, and then run again without waiting for Python."""
        return self.compiled and self.kind == "cuda"

    def compile(self, module: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Compile a model, or a function of one, for a single shape of its arguments."""
        if not self.records:
            return torch.compile(module)
        # "reduce-overhead" is torch's name for CUDA graphs; a graph has fixed shapes.
        return torch.compile(module, mode="reduce-overhead", dynamic=False)

    def put(self, x: Tensor) -> Tensor:
        """Copy a tensor from the CPU to the device, while that computes."""
        # Only from pinned memory does a copy not wait for what is queued.
        return (x.pin_memory() if self.kind == "cuda" else x).to(self.name, non_blocking=True)

    def autocast(self) -> AbstractContextManager[object]:
        """The context in which a forward pass computes in `dtype`."""
        if self.dtype == "float32":
            return nullcontext()
        return torch.autocast(self.kind, dtype=getattr(torch, self.dtype))

    def repeatable(self) -> AbstractContextManager[None]:
        """A context in which equal passes give equal gradients, bit for bit.

        On CUDA the environment must say how cuBLAS uses memory, as the command line makes it do.
        """
        # With any other value torch refuses products in such a context.
        is_told = os.environ.get("CUBLAS_WORKSPACE_CONFIG") in (":4096:8", ":16:8")
        return _repeatable() if self.kind == "cuda" and is_told else nullcontext()

    def seeded(self, seed: int) -> AbstractContextManager[None]:
        """A context in which torch's generators start at `seed`; the caller's are restored at its end."""
        return _seeded([torch.device(self.name)] if self.kind == "cuda" else [], seed)

    def synchronize(self) -> None:
        """Wait until the device is idle, before reading a clock."""
        if self.kind == "cuda":
            torch.cuda.synchronize()
        elif self.kind == "mps":
            torch.mps.synchronize()

    def release(self) -> None:
        """Give memory that torch has cached back to the device, after a step that ran out of it."""
        if self.kind == "cuda":
            torch.cuda.empty_cache()
        elif self.kind == "mps":
            torch.mps.empty_cache()


@contextmanager
def _seeded(devices: list[torch.device], seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        yield


@contextmanager
def _repeatable() -> Iterator[None]:
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True)
    # Nothing here reads memory that it has not written.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def find_device(wanted: str) -> str:
    """The device that a setting means.

    Args:
        wanted: auto, cpu, cuda, cuda:N or mps.

    Raises:
        ResourceError: There is no such device here.
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
            hint="set train.device=auto",
        )
    return wanted


def _devices(has_cuda: bool, has_mps: bool) -> str:
    found = ["cpu"]
    if has_cuda:
        found += [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    return ", ".join(found + (["mps"] if has_mps else []))
