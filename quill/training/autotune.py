"""Choosing a run's precision and compilation by measurement."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from quill.config.settings import RunConfig, TrainConfig
from quill.errors import InputError
from quill.model.gpt import GPT
from quill.training.device import Device
from quill.training.trainer import Trainer

if TYPE_CHECKING:
    from quill.data.store import Dataset

# Compiling takes about a minute, so a run must be long enough to win it back.
_COMPILE_PAYS_AFTER_SECONDS = 600.0


def choose(
    model: GPT, config: RunConfig, dataset: Dataset, device: str, earlier: dict[str, Any] | None
) -> Device:
    """Choose precision and compilation by timing the run's own first step.

    Args:
        model: On the device; its weights do not change.
        config: The run.
        dataset: Its data.
        device: Where it runs.
        earlier: The choice of the interrupted run, kept so that it resumes bit for bit.
    """
    c = config.train
    if earlier is not None and earlier["device"].partition(":")[0] == device.partition(":")[0]:
        return Device(device, earlier["dtype"], earlier["compiled"])

    def trial(using: Device) -> Callable[[str], None]:
        trainers: dict[str, Trainer] = {}

        def step(dtype: str) -> None:
            chosen = Device(device, dtype, using.compiled)
            trainer = trainers.setdefault(dtype, Trainer(model, c, dataset.train, chosen))
            model.train()
            trainer.gradients()
            model.zero_grad(set_to_none=True)
            chosen.synchronize()

        return step

    dtypes = candidates(device, c)
    wants_timing = len(dtypes) > 1 or (c.compile == "auto" and can_compile(device))
    dtype, seconds = dtypes[0], 0.0
    if wants_timing:
        dtype, seconds = fastest(dtypes, trial(Device(device, dtypes[0], False)))
    plain = Device(device, dtype, False)
    if c.compile == "off" or (c.compile == "auto" and not can_compile(device)):
        return plain
    if c.compile == "auto" and seconds * c.max_iters < _COMPILE_PAYS_AFTER_SECONDS:
        return plain
    compiled = Device(device, dtype, True)
    try:
        _, with_compiler = fastest([dtype], trial(compiled))
    except Exception as e:  # torch's compiler fails in as many ways as there are toolchains
        if c.compile == "on":
            raise InputError(
                "torch.compile does not work here",
                why=str(e).splitlines()[0][:200],
                hint="set train.compile=off",
            ) from e
        torch.compiler.reset()
        return plain
    return compiled if c.compile == "on" or with_compiler < 0.9 * seconds else plain


def candidates(device: str, config: TrainConfig) -> list[str]:
    """Precisions worth timing on a device, float32 first.

    Raises:
        InputError: The device cannot train in the precision that is set.
    """
    kind = device.partition(":")[0]
    if config.dtype == "float16" and kind == "cpu":
        raise InputError(
            "'train.dtype' = 'float16' does not train on a CPU",
            why="its gradients underflow without loss scaling, which needs CUDA",
            hint="set train.dtype=auto",
        )
    if config.dtype != "auto":
        return [config.dtype]
    if kind == "cuda":
        return ["bfloat16"] if torch.cuda.is_bf16_supported() else ["float32"]
    if kind == "cpu" and torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return ["float32", "bfloat16"]
    return ["float32"]


def fastest(choices: list[str], step: Callable[[str], None], repeats: int = 3) -> tuple[str, float]:
    """The fastest choice and the seconds of its step.

    Args:
        choices: What to compare, the preferred one first; a later one must win by a tenth, which is noise.
        step: Runs one step of a choice.
        repeats: Timed steps per choice after a warm-up step; the fastest counts, as noise only adds.
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
    """Whether torch.compile can run here: it needs a C++ compiler for the CPU, Triton for CUDA."""
    if sys.platform == "win32" or sys.platform == "darwin":
        return False
    if device.startswith("cuda"):
        from importlib.util import find_spec

        return find_spec("triton") is not None
    return device == "cpu" and any(shutil.which(c) for c in ("g++", "clang++"))
