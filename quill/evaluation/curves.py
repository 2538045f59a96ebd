"""The course of a run: the losses in its metrics.jsonl as points, smoothed for the eye, as a picture."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal, NamedTuple

from quill import fsio
from quill.errors import InputError

METRICS = "metrics.jsonl"

# Where the losses above those of this share would take more than half of the axis, they are not drawn:
# a first step or a spike would flatten all the rest.
_SHOWN = 0.97
_LARGEST = 1e30
_LAST_STEP = 2**53


class Point(NamedTuple):
    """A loss in nats per token, after so many steps."""

    step: int
    loss: float


@dataclass(frozen=True)
class Curves:
    """A run's losses by step; what is not finite is left out.

    Attributes:
        train: Of single batches.
        val: Of the validation split.
    """

    train: tuple[Point, ...]
    val: tuple[Point, ...]

    @property
    def best(self) -> Point | None:
        """The lowest validation loss, the first of equals: the weights that are kept."""
        return min(self.val, key=lambda p: p.loss, default=None)

    def __bool__(self) -> bool:
        return bool(self.train or self.val)

    def smooth(self) -> tuple[Point, ...]:
        """The training loss for the eye: a centred running mean, unless it is smooth as it is.

        The window is a 25th of the run, and narrower towards both ends, so that neither is bent.
        """
        half = len(self.train) // 50
        if not half:
            return self.train
        low, high = span(self.train)
        if self._noise() < 0.005 * (high - low):
            return self.train
        sums, fallen = [0.0], False
        for p in self.train:
            # A spike would lift all of its neighbours; the first losses are no spike.
            fallen = fallen or p.loss <= high
            sums.append(sums[-1] + (min(p.loss, high) if fallen else p.loss))
        points = []
        for i, p in enumerate(self.train):
            h = min(half, i, len(self.train) - 1 - i)
            points.append(Point(p.step, (sums[i + h + 1] - sums[i - h]) / (2 * h + 1)))
        return tuple(points)

    def _noise(self) -> float:
        """The standard deviation of single losses, from their second differences, which no trend moves."""
        a = [p.loss for p in self.train]
        bends = [abs(a[i + 1] - 2 * a[i] + a[i - 1]) for i in range(1, len(a) - 1)]
        return median(bends) / (0.6745 * math.sqrt(6)) if bends else 0.0


def span(*series: Sequence[Point]) -> tuple[float, float]:
    """The losses that an axis begins and ends with, some room between them where all are equal."""
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
    """The lines of a metrics.jsonl; one that was cut off by a crash is left out."""
    lines: list[dict[str, Any]] = []
    for text in raw.splitlines():
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(line, dict) and type(line.get("step")) is int and 0 <= line["step"] < _LAST_STEP:
            lines.append(line)
    return lines


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """As `parse`, of a file; nothing where there is none.

    Raises:
        CorruptError: It is a link or no file.
        ResourceError: It cannot be read.
    """
    try:
        with fsio.open_plain(path) as file, fsio.guard(path, "read"):
            return parse(file.readall())
    except FileNotFoundError:
        return []


def curves(lines: Iterable[dict[str, Any]]) -> Curves:
    """The points in the lines of a metrics.jsonl; of two lines for one step the later counts."""
    train: dict[int, float] = {}
    val: dict[int, float] = {}
    for line in lines:
        for key, points in (("loss", train), ("val_loss", val)):
            value = line.get(key)
            if isinstance(value, float | int) and not isinstance(value, bool) and abs(value) < _LARGEST:
                points[line["step"]] = float(value)
    return Curves(*(tuple(Point(*p) for p in sorted(points.items())) for points in (train, val)))


def picture(found: Curves, title: str, form: Literal["svg", "png"]) -> bytes:
    """Draw both curves as a file: the same bytes for the same points.

    Args:
        found: At least one point.
        title: Shown as it is, control characters as their escapes.
        form: What kind of file.

    Raises:
        InputError: matplotlib is not installed.
    """
    import io
    import logging

    # What it says of its own folders and fonts is nothing that a reader of a loss curve can act on.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    try:
        from matplotlib import rc_context  # type: ignore[import-not-found, unused-ignore]
        from matplotlib.figure import Figure  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        raise InputError(
            f"cannot draw a .{form} file",
            why="that needs the matplotlib package",
            hint="pip install 'quill-gpt[plot]'",
        ) from None
    with rc_context({"svg.hashsalt": "quill", "axes.unicode_minus": False, "font.size": 10}):
        figure = Figure(figsize=(7, 4.2), dpi=150, layout="constrained")
        axes = figure.subplots()
        low, high = span(found.train, found.val)
        smooth, best = found.smooth(), found.best
        if smooth is not found.train:
            axes.plot(*zip(*found.train, strict=True), color="#1f77b4", alpha=0.25, linewidth=0.7)
        if smooth:
            label = "training, smoothed" if smooth is not found.train else "training"
            axes.plot(*zip(*smooth, strict=True), color="#1f77b4", linewidth=1.5, label=label)
        if found.val:
            dots = "o" if len(found.val) <= 40 else ""
            axes.plot(
                *zip(*found.val, strict=True),
                color="#d95f02",
                marker=dots,
                markersize=4,
                linewidth=1.5,
                label="validation",
            )
        room = 0.05 * (high - low)
        if best:
            axes.vlines(best.step, low - room, best.loss, color="#555555", linewidth=0.8, linestyle=":")
            label = f"best: {best.loss:.4f} at step {best.step:,}"
            axes.plot(*best, "*", color="#555555", markersize=13, markeredgecolor="white", label=label)
        axes.set_xlim(0, 1.02 * max(1, *(p.step for p in (*found.train, *found.val))))
        axes.set_ylim(low - room, high + room)
        axes.set_xlabel("step")
        axes.set_ylabel("loss, nats per token")
        shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in title)
        axes.set_title(shown, parse_math=False, loc="left")
        axes.xaxis.set_major_formatter(lambda step, _: f"{step:,.0f}")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#e6e6e6", linewidth=0.7)
        axes.set_axisbelow(True)
        axes.legend(edgecolor="none")
        drawn = io.BytesIO()
        nothing = {"Date": None} if form == "svg" else {"Software": None}
        figure.savefig(drawn, format=form, metadata=nothing)
    return drawn.getvalue()


def _quantile(values: Sequence[float]) -> float:
    ordered = sorted(values)
    return ordered[math.ceil(_SHOWN * len(ordered)) - 1]
