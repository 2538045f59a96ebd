"""Loss curves as text, for terminals, pipes and model cards.

A curve is drawn in braille patterns (Unicode 15, chapter 21.1), 2 x 4 dots per character, so 80 columns
show some 150 steps. Where braille cannot be displayed, it is drawn in ASCII marks, one per character.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import groupby
from textwrap import wrap
from typing import Literal

from quill.evaluation.curves import Curves, Point, span

Role = Literal["", "train", "val", "best"]
Paint = Callable[[str, Role], str]

_NARROWEST = 20
# The bit of each dot of a braille pattern, by row and column.
_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
_BRAILLE = 0x2800


def draw(
    found: Curves,
    width: int = 72,
    *,
    height: int | None = None,
    last: int = 0,
    plain: bool = False,
    paint: Paint = lambda text, role: text,
) -> str:
    """Draw both curves as text, with their axes and the best step.

    Args:
        found: The curves.
        width: Number of columns, at least 20.
        height: Number of rows between the axes (default: a fifth of the columns, from 7 to 15).
        last: Step at the right end of the axis, if the curves end before it.
        plain: Whether to draw in ASCII.
        paint: Colours text that belongs to a curve.

    Returns:
        Lines that each end in a newline; empty if there are no losses.
    """
    if not found:
        return ""
    width = max(width, _NARROWEST)
    smooth = found.smooth()
    low, high = span(smooth, found.val)
    height = height or min(max(width // 5, 7), 15)
    labels = _ticks(low, high, height // 2)
    gutter = max(map(len, labels.values()))
    last = max(last, *(p.step for p in (*found.train, *found.val)))
    plot = _Plot(width - gutter - 1, height, (low, high), last)
    plot.line(smooth, 1 if plain else 2, 1 if plain else 4)
    plot.marks(found)
    rows: dict[int, str] = {}
    for value, label in labels.items():
        rows.setdefault(plot.row(value), label)
    tick, wall, corner, dash, down = "+|+-+" if plain else "┤│└─┬"
    lines = ["loss, nats per token" if width >= 40 else "loss"]
    for r in range(height):
        label = rows.get(r, "")
        cells = groupby(plot.cells(r, plain), key=lambda cell: cell[1])
        drawn = [("".join(c for c, _ in group), role) for role, group in cells]
        text = "".join(paint(t, role) if role else t for t, role in drawn)
        lines.append((label.rjust(gutter) + (tick if label else wall) + text).rstrip())
    axis, numbers = plot.steps(dash, down)
    lines += [" " * gutter + corner + axis, (" " * gutter + numbers).rstrip()]
    lines.append((" " * (gutter + 1) + "step".center(plot.columns)).rstrip())
    return "\n".join([*lines, *_legend(found, smooth, high, width, plain, paint)]) + "\n"


class _Plot:
    """The area between the axes, in characters.

    Args:
        columns: Width of the area.
        rows: Height of the area.
        span: Losses at its bottom and top.
        last: The step at its right end; the left end is 0.
    """

    def __init__(self, columns: int, rows: int, span: tuple[float, float], last: int) -> None:
        self.columns, self.rows, self.span, self.last = columns, rows, span, max(last, 1)
        self._dots = [[0] * columns for _ in range(rows)]
        self._marks: dict[tuple[int, int], tuple[str, Role]] = {}

    def row(self, loss: float, parts: int = 1) -> int:
        """The row of a loss from the top, counted in fractions of a character; may lie outside the plot."""
        low, high = self.span
        inside = parts * self.rows - (loss >= low)
        return min(math.floor((high - loss) / (high - low) * parts * self.rows), inside)

    def column(self, step: float, parts: int = 1) -> int:
        """The column of a step, counted in fractions of a character."""
        return min(int(step / self.last * parts * self.columns), parts * self.columns - 1)

    def line(self, points: Sequence[Point], across: int, down: int) -> None:
        """Draw a line through points; those in the same column of dots are averaged.

        Args:
            points: The points, sorted by step.
            across: Columns of dots per character, 1 or 2.
            down: Rows of dots per character, 1 or 4.
        """
        if not points:
            return
        grouped = groupby(points, key=lambda p: self.column(p.step, across))
        bins = [(x, [p.loss for p in group]) for x, group in grouped]
        means = [(x, math.fsum(losses) / len(losses)) for x, losses in bins]
        before = None
        for (x, loss), following in zip(means, [*means[1:], None], strict=True):
            gap = following[0] - x if following else 1
            for i in range(gap):
                slope = (following[1] - loss) / gap if following else 0.0
                y = self.row(loss + i * slope, down)
                # A fall of several dots within one column becomes a vertical line.
                top, bottom = sorted((y, y if before is None else before + (y > before) - (y < before)))
                for dot in range(max(top, 0), min(bottom, down * self.rows - 1) + 1):
                    bit = _DOTS[dot % down][(x + i) % across]
                    self._dots[dot // down][(x + i) // across] |= bit
                before = y

    def marks(self, found: Curves) -> None:
        """Mark the best validation loss, and as many others as stay distinguishable."""
        seen = -2
        for point in found.val:
            x, y = self.column(point.step), self.row(point.loss)
            if x >= seen + 2 and 0 <= y < self.rows:
                self._marks[y, x] = ("o", "val")
                seen = x
        if found.best:
            x, y = self.column(found.best.step), self.row(found.best.loss)
            for next_to in (x - 1, x + 1):
                self._marks.pop((y, next_to), None)
            self._marks[y, x] = ("*", "best")

    def cells(self, row: int, plain: bool) -> list[tuple[str, Role]]:
        """The characters of a row, each with its role."""
        cells: list[tuple[str, Role]] = []
        for x, bits in enumerate(self._dots[row]):
            drawn = "." if plain else chr(_BRAILLE + bits)
            cells.append(self._marks.get((row, x)) or ((drawn, "train") if bits else (" ", "")))
        return cells

    def steps(self, dash: str, down: str) -> tuple[str, str]:
        """The axis of steps and the numbers below it, which start one column further left."""
        for most in range(max(self.columns // 6, 2), 0, -1):
            ticks = _ticks(0, self.last, most, whole=True)
            axis, numbers = [dash] * self.columns, ""
            for value, label in ticks.items():
                x = self.column(value)
                axis[x] = down
                start = min(max(x + 1 - len(label) // 2, 0), self.columns + 1 - len(label))
                if numbers and start < len(numbers) + 2:
                    break
                numbers = numbers.ljust(start) + label
            else:
                return "".join(axis), numbers
        return dash * self.columns, f"0 to {self.last:,}"


def _legend(
    found: Curves,
    smooth: Sequence[Point],
    high: float,
    width: int,
    plain: bool,
    paint: Paint,
) -> list[str]:
    """Explain the marks in the plot, one entry each, wrapped to the width."""
    best = found.best
    entries: list[tuple[str, Role, str]] = []
    if smooth:
        mark = "." if plain else "⠒"
        how = ", smoothed" if smooth is not found.train else ""
        entries.append((mark, "train", f"training{how}: {_loss(smooth[-1])} at step {smooth[-1].step:,}"))
    if found.val:
        last = found.val[-1]
        entries.append(("o", "val", f"validation: {_loss(last)} at step {last.step:,}"))
    if best:
        entries.append(("*", "best", f"best: {_loss(best)} at step {best.step:,}"))
    beyond = sum(p.loss > high for p in (*smooth, *found.val))
    if beyond:
        losses = f"{beyond:,} losses" if beyond > 1 else "1 loss"
        entries.append((" ", "", f"{losses} above {high:.4g} not drawn"))
    lines = []
    for mark, role, text in entries:
        first, *rest = wrap(text, width, initial_indent="  ", subsequent_indent="  ")
        lines += [(paint(mark, role) if role else mark) + first[1:].rstrip(), *(r.rstrip() for r in rest)]
    return lines


def _ticks(low: float, high: float, most: int, *, whole: bool = False) -> dict[float, str]:
    """Choose round numbers within a range, at most `most` but at least one, with their labels."""
    power = math.floor(math.log10((high - low) / max(most, 1))) - 1
    if whole:
        power = max(power, 0)
    for exponent in range(power, power + 4):
        for factor in (1, 2, 5):
            step = factor * 10.0**exponent
            first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
            if last - first + 1 <= most:
                digits = max(0, -exponent)
                values = [i * step for i in range(first, last + 1)] or [high]
                return {v: _number(v, digits) for v in values}
    return {low: _number(low, 0)}


def _loss(point: Point) -> str:
    return f"{point.loss:.4f}" if 1e-3 <= abs(point.loss) < 1e6 else f"{point.loss:.4g}"


def _number(value: float, digits: int) -> str:
    return f"{value:,.{digits}f}" if digits <= 6 and abs(value) < 1e9 else f"{value:.3g}"
