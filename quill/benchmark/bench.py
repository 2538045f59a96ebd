"""The speed of a model's work on this device, next to the device's limits and another program."""

from __future__ import annotations

import os
import platform
import re
import statistics
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from quill.benchmark import limits
from quill.benchmark.nanogpt import Checkout
from quill.benchmark.subject import TEXT, Subject, load
from quill.benchmark.work import TRAINING, Work, works
from quill.config.settings import RunConfig
from quill.registry import manifest
from quill.registry.folder import Folder

OWN, MEMORY = "quill", "memory"


@dataclass(frozen=True)
class Limit:
    """What the device can do at most.

    Attributes:
        name: float32 or bfloat16, of products of matrices, or memory.
        unit: FLOP/s or bytes/s.
        median: The median of the rounds.
        rounds: What was measured in each round.
    """

    name: str
    unit: str
    median: float
    rounds: list[float]


@dataclass(frozen=True)
class Figure:
    """The speed of one kind of work by one program.

    Attributes:
        work: What was done.
        program: Who did it.
        unit: tokens/s.
        median: The median of the rounds.
        rounds: What was measured in each round.
        dtype: Precision of the products.
        flops_per_token: Operations that the model needs per token; None if no model computes it.
        mfu: The share of the device's FLOP/s in that precision that they are; see `flops`.
        bytes_per_token: Bytes of weights and cache that must be read per token, where that is the bound.
        mbu: The share of the memory's bandwidth that they are.
        ratio: The median over the rounds of quill's speed divided by this one's; None for quill's own.
    """

    work: str
    program: str
    unit: str
    median: float
    rounds: list[float]
    dtype: str
    flops_per_token: float | None
    mfu: float | None
    bytes_per_token: float | None
    mbu: float | None
    ratio: float | None


@dataclass(frozen=True)
class Report:
    """All figures of a call.

    Attributes:
        limits: Of the device.
        figures: Of each kind of work.
        facts: The model, the step, the device and the versions.
    """

    limits: list[Limit]
    figures: list[Figure]
    facts: dict[str, Any]


Progress = Callable[[str, float, float | None], None]


def bench(
    config: RunConfig,
    version: Folder | None = None,
    *,
    against: Path | None = None,
    rounds: int = 5,
    seconds: float = 1.0,
    report: Progress = lambda stage, done, total: None,
) -> Report:
    """Measure how fast a config's work is done here.

    Every round measures everything, so that what disturbs the computer for a while disturbs all alike.

    Args:
        config: The run whose shape and settings are measured, on the text that comes with quill.
        version: A model whose tokenizer is used; None for the config's.
        against: A checkout of nanoGPT to measure as well.
        rounds: How often everything is measured; the medians count.
        seconds: The time for one kind of work in one round; at least one piece of it is done.
        report: Receives the stage, the rounds done, and their number.

    Raises:
        InputError: The model does not fit in memory, or the checkout cannot run it.
        NotFoundError: There is no checkout.
    """
    with tempfile.TemporaryDirectory(prefix="quill-bench-") as scratch:
        folder = Path(scratch)
        other = None if against is None else Checkout(against)
        report("loading the model", 0, None)
        subject = load(config, version, folder / "data")
        (folder / "text").mkdir()
        own = list(works(subject, folder / "text", whole_steps=other is None))
        if other is not None:
            other.take(subject, folder / "nanogpt")
        measured = _Measured(subject, own, other, seconds)
        for i, work in enumerate(own):
            report("warming up", i, len(own))
            measured.warm_up(work)
        for i in range(rounds):
            report("measuring", i, rounds)
            measured.add_round(other_first=i % 2 == 1)
        return Report(measured.limits(), measured.figures(), _facts(subject, other, rounds, seconds))


class _Measured:
    """What was measured, round by round.

    Args:
        subject: The model and its device.
        own: The kinds of work.
        other: Another program, if there is one.
        seconds: The time for one kind of work in one round.
    """

    def __init__(self, subject: Subject, own: list[Work], other: Checkout | None, seconds: float) -> None:
        self._device, self._own, self._other, self._seconds = subject.device, own, other, seconds
        self._limits: dict[str, list[float]] = {
            name: [] for name in ("float32", "bfloat16", subject.device.dtype, MEMORY)
        }
        self._speeds: dict[str, list[float]] = {work.name: [] for work in own}
        self._others: dict[str, list[float]] = {}
        self._pace = 0.0

    def warm_up(self, work: Work) -> None:
        """Do a piece of the work, which allocates what later ones reuse."""
        speed = work.speed(0.0)
        if work.name == TRAINING:
            self._pace = speed

    def add_round(self, *, other_first: bool) -> None:
        """Measure everything once.

        Args:
            other_first: Whether the other program comes first, as what is measured first may find the
                computer in another state.
        """
        for name, found in self._limits.items():
            device = self._device if name == MEMORY else replace(self._device, dtype=name)
            found.append(limits.bandwidth(device) if name == MEMORY else limits.matmul(device))
        if other_first:
            self._measure_other()
        for work in self._own:
            self._speeds[work.name].append(work.speed(self._seconds))
        if not other_first:
            self._measure_other()

    def _measure_other(self) -> None:
        if self._other is not None:
            for name, speed in self._other.speeds(self._seconds, self._pace).items():
                self._others.setdefault(name, []).append(speed)

    def limits(self) -> list[Limit]:
        """The device's limits."""
        return [
            Limit(name, "bytes/s" if name == MEMORY else "FLOP/s", statistics.median(found), found)
            for name, found in self._limits.items()
        ]

    def figures(self) -> list[Figure]:
        """The figures of each kind of work, quill's before the other program's."""
        figures = []
        for work in self._own:
            mine, theirs = self._speeds[work.name], self._others.get(work.name)
            figures.append(self._figure(work, OWN, mine, None))
            if self._other is not None and theirs:
                ratio = statistics.median(a / b for a, b in zip(mine, theirs, strict=True))
                figures.append(self._figure(self._other.like(work), self._other.name, theirs, ratio))
        return figures

    def _figure(self, work: Work, program: str, rounds: list[float], ratio: float | None) -> Figure:
        def share(needed: float | None, limit: str) -> float | None:
            return None if needed is None else needed * median / statistics.median(self._limits[limit])

        median = statistics.median(rounds)
        return Figure(
            work=work.name,
            program=program,
            unit="tokens/s",
            median=median,
            rounds=rounds,
            dtype=work.dtype,
            flops_per_token=work.flops,
            mfu=share(work.flops, work.dtype),
            bytes_per_token=work.bytes,
            mbu=share(work.bytes, MEMORY),
            ratio=ratio,
        )


def _facts(subject: Subject, other: Checkout | None, rounds: int, seconds: float) -> dict[str, Any]:
    device, step = subject.device, subject.step
    whole = subject.config.train
    return {
        "name": subject.config.name,
        "model": subject.config.model.model_dump(),
        "parameters": sum(p.numel() for p in subject.model.parameters()),
        "text": TEXT,
        "tokenizer": subject.dataset.tokenizer.kind,
        "step": {
            "optimizer": whole.optimizer,
            "batch_size": whole.batch_size,
            "gradient_accumulation_steps": whole.gradient_accumulation_steps,
            "timed_sequences": step.batch_size,
            "micro_batch_size": device.micro_batch_size or step.batch_size,
            "gradient_checkpointing": device.checkpointing,
            "compiled": device.compiled,
        },
        "device": {"name": device.name, "dtype": device.dtype, "threads": torch.get_num_threads()}
        | _hardware(device.name),
        "versions": manifest.versions() | {"numpy": np.__version__},
        "against": None if other is None else other.facts(),
        "rounds": rounds,
        "seconds": seconds,
    }


def _hardware(device: str) -> dict[str, Any]:
    """What computes: the processor, or the GPU."""
    if device.startswith("cuda"):
        return {"hardware": torch.cuda.get_device_name(device)}
    cpu = platform.processor() or platform.machine()
    with suppress(OSError):
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        cpu = found[1] if found else cpu
    return {
        "hardware": cpu,
        "processors": os.cpu_count(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
    }
