"""The loss curves of a run: the points in its metrics.jsonl, and a smoothed line through them."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Generic, NamedTuple, TypeVar

T = TypeVar("T")

# If losses above this quantile would take more than half of the axis, they are not drawn: a first step or
# a spike would flatten everything else.
_SHOWN = 0.97
_LARGEST = 1e30
_LAST_STEP = 2**53

_LONGEST_LINE = 1 << 24
# More losses than this show nothing more.
_MOST_POINTS = 200_000
# Lines of each kind that are returned whole.
_MOST_LINE_BYTES = 16 << 20


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


def stream(stored: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """Read the lines of a metrics.jsonl, without a last one that a crash cut off.

    Args:
        stored: Its content, in chunks of any size, as `Folder.metrics` returns it.
    """
    return (line for text in _texts(stored) if (line := _line(text)) is not None)


class _Thin(Generic[T]):
    """A long sequence in little memory: only every n-th item where all would take too much.

    Args:
        most: The size at which every second item is dropped.
        size: The size of an item.
    """

    def __init__(self, most: int, size: Callable[[T], int] = lambda item: 1) -> None:
        self.items: list[T] = []
        self.stride = 1
        self._most, self._size_of = most, size
        self._size = self._seen = 0

    def takes(self) -> bool:
        """Whether the next item is one of those that stay; ask once for each."""
        self._seen += 1
        return (self._seen - 1) % self.stride == 0

    def add(self, item: T) -> None:
        """Add an item that it takes."""
        self.items.append(item)
        self._size += self._size_of(item)
        while self._size > self._most and len(self.items) > 1:
            del self.items[1::2]
            self.stride *= 2
            self._size = sum(map(self._size_of, self.items))


def read(stored: Iterable[bytes]) -> Curves:
    """Read curves in little memory: of very many losses only every n-th, and the best.

    Args:
        stored: As for `stream`.
    """
    train, val = _Thin[Point](_MOST_POINTS), _Thin[Point](_MOST_POINTS)
    best: Point | None = None
    for text in _texts(stored):
        # Most lines are training losses; those left out are not even parsed.
        is_val = b"val_loss" in text
        if (not is_val and not train.takes()) or (line := _line(text)) is None:
            continue
        if (point := _point(line, "loss")) and (not is_val or train.takes()):
            train.add(point)
        if point := _point(line, "val_loss"):
            best = point if best is None or point.loss < best.loss else best
            if val.takes():
                val.add(point)
    if best and val.stride > 1:
        val.items.append(best)
    return Curves(_by_step(train.items), _by_step(val.items))


def lines_by_kind(stored: Iterable[bytes]) -> tuple[dict[str, list[dict[str, Any]]], int]:
    """Read the lines that have a loss, a val_loss or a sample, in bounded memory.

    Args:
        stored: As for `stream`.

    Returns:
        The lines by that key, and n if only every n-th of a kind is there; 1 if all are.
    """
    kinds = {key: _Thin[bytes](_MOST_LINE_BYTES, len) for key in ("loss", "val_loss", "sample")}
    for text in _texts(stored):
        for key, kept in kinds.items():
            # Lines that are left out are not parsed.
            if f'"{key}"'.encode() in text and kept.takes():
                kept.add(text)
    found = {key: [line for line in stream(kept.items) if key in line] for key, kept in kinds.items()}
    return found, max(kept.stride for kept in kinds.values())


def _texts(stored: Iterable[bytes]) -> Iterator[bytes]:
    """Lines, not parsed; one that is far too long comes in pieces."""
    rest = b""
    for chunk in stored:
        lines = io.BytesIO(rest + chunk)
        rest = b""
        for text in lines:
            if text.endswith(b"\n") or len(text) > _LONGEST_LINE:
                yield text
            else:
                rest = text
    if rest:
        yield rest


def _line(text: bytes) -> dict[str, Any] | None:
    """One line, parsed; None if it is damaged."""
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    valid = isinstance(line, dict) and type(line.get("step")) is int and 0 <= line["step"] < _LAST_STEP
    return line if valid else None


def _point(line: dict[str, Any], key: str) -> Point | None:
    """A finite loss of a line."""
    value = line.get(key)
    if isinstance(value, float | int) and not isinstance(value, bool) and abs(value) < _LARGEST:
        return Point(line["step"], float(value))
    return None


def _by_step(points: Iterable[Point]) -> tuple[Point, ...]:
    """Points in order; the later of two for a step counts."""
    return tuple(Point(*p) for p in sorted(dict(points).items()))


def _quantile(values: Sequence[float]) -> float:
    ordered = sorted(values)
    return ordered[math.ceil(_SHOWN * len(ordered)) - 1]
