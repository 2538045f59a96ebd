"""The loss curves of a run: the points in its metrics.jsonl, and a smoothed line through them."""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from quill import fsio

METRICS = "metrics.jsonl"

# If losses above this quantile would take more than half of the axis, they are not drawn: a first step or
# a spike would flatten everything else.
_SHOWN = 0.97
_LARGEST = 1e30
_LAST_STEP = 2**53

# The metrics of a hundred million steps.
_MOST_BYTES = 1 << 34
_LONGEST_LINE = 1 << 24
_BUFFER = 1 << 20
# More training losses than this show nothing more.
_MOST_POINTS = 200_000


class Point(NamedTuple):
    """A loss in nats per token after a number of steps."""

    step: int
    loss: float


@dataclass(frozen=True)
class Curves:
    """A run's finite losses by step.

    Attributes:
        train: Losses of single batches.
        val: Losses of the validation split.
    """

    train: tuple[Point, ...]
    val: tuple[Point, ...]

    @property
    def best(self) -> Point | None:
        """The lowest validation loss, the first of equals; its weights are the published ones."""
        return min(self.val, key=lambda p: p.loss, default=None)

    def __bool__(self) -> bool:
        return bool(self.train or self.val)

    def smooth(self) -> tuple[Point, ...]:
        """A centred running mean of the training loss, or the loss itself if that is smooth.

        The window is a 25th of the run and narrows towards both ends, so that they are not bent.
        """
        half = len(self.train) // 50
        if not half:
            return self.train
        low, high = span(self.train)
        if self._noise() < 0.005 * (high - low):
            return self.train
        sums, fallen = [0.0], False
        for p in self.train:
            # A spike would lift its neighbours; the high losses of the first steps are not a spike.
            fallen = fallen or p.loss <= high
            sums.append(sums[-1] + (min(p.loss, high) if fallen else p.loss))
        points = []
        for i, p in enumerate(self.train):
            h = min(half, i, len(self.train) - 1 - i)
            points.append(Point(p.step, (sums[i + h + 1] - sums[i - h]) / (2 * h + 1)))
        return tuple(points)

    def _noise(self) -> float:
        """The standard deviation of single losses, from second differences, which ignore any trend."""
        a = [p.loss for p in self.train]
        bends = [abs(a[i + 1] - 2 * a[i] + a[i - 1]) for i in range(1, len(a) - 1)]
        return median(bends) / (0.6745 * math.sqrt(6)) if bends else 0.0


def span(*series: Sequence[Point]) -> tuple[float, float]:
    """The range of an axis for these losses, widened if all are equal."""
    losses = [p.loss for points in series for p in points]
    low, high = min(losses), max(losses)
    usual = max(_quantile([p.loss for p in points]) for points in series if points)
    if low < usual < low + (high - low) / 2:
        high = usual
    if high - low < 1e-9 * max(abs(low), abs(high), 1.0):
        pad = 0.5 * max(abs(low), 0.1)
        return low - pad, high + pad
    return low, high


def parse(raw: bytes) -> list[dict[str, Any]]:
    """Read the lines of a metrics.jsonl, without a last one that a crash cut off."""
    return [line for text in raw.splitlines() if (line := _line(text)) is not None]


def stream(path: Path) -> Iterator[dict[str, Any]]:
    """Read a metrics.jsonl line by line, as `parse` does; a missing file has no lines.

    Raises:
        CorruptError: It is a link, not a regular file, or larger than any metrics.
        ResourceError: It cannot be read.
    """
    return (line for text in _texts(path) if (line := _line(text)) is not None)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read a whole metrics.jsonl; raises as `stream` does."""
    return list(stream(path))


def read(path: Path) -> Curves:
    """Read the curves of a metrics.jsonl in little memory: of very many training losses only every n-th.

    Raises:
        QuillError: As for `stream`.
    """
    train: dict[int, float] = {}
    val: dict[int, float] = {}
    stride = 1
    for number, text in enumerate(_texts(path)):
        # Most lines are training losses; those left out are not even parsed.
        if (number % stride and b"val_loss" not in text) or (line := _line(text)) is None:
            continue
        _add(line, train, val)
        if len(train) > _MOST_POINTS:
            train, stride = dict(list(train.items())[::2]), 2 * stride
    return _curves(train, val)


def curves(lines: Iterable[dict[str, Any]]) -> Curves:
    """Collect the points from the lines of a metrics.jsonl; the later of two lines for a step counts."""
    train: dict[int, float] = {}
    val: dict[int, float] = {}
    for line in lines:
        _add(line, train, val)
    return _curves(train, val)


def _texts(path: Path) -> Iterator[bytes]:
    """The lines of a file, not parsed; one that is far too long comes in pieces."""
    try:
        with fsio.open_plain(path) as raw, fsio.guard(path, "read"):
            fsio.check_size(path, os.fstat(raw.fileno()).st_size, _MOST_BYTES)
            file = io.BufferedReader(raw, _BUFFER)
            while text := file.readline(_LONGEST_LINE):
                yield text
    except FileNotFoundError:
        return


def _line(text: bytes) -> dict[str, Any] | None:
    """One line, parsed; None if it is damaged."""
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    valid = isinstance(line, dict) and type(line.get("step")) is int and 0 <= line["step"] < _LAST_STEP
    return line if valid else None


def _add(line: dict[str, Any], train: dict[int, float], val: dict[int, float]) -> None:
    for key, points in (("loss", train), ("val_loss", val)):
        value = line.get(key)
        if isinstance(value, float | int) and not isinstance(value, bool) and abs(value) < _LARGEST:
            points[line["step"]] = float(value)


def _curves(train: dict[int, float], val: dict[int, float]) -> Curves:
    return Curves(*(tuple(Point(*p) for p in sorted(points.items())) for points in (train, val)))


def _quantile(values: Sequence[float]) -> float:
    ordered = sorted(values)
    return ordered[math.ceil(_SHOWN * len(ordered)) - 1]
