"""What the terminal shows of a run: a chart and a progress bar, or plain lines where nothing can move.

Observers of the run's events: a run without them is the same run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

from quill.cli._curves import draw
from quill.cli.output import LINE_INTERVAL, Output
from quill.evaluation.curves import Curves, Point
from quill.training import events, log
from quill.units import count, duration

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.live import Live as Panel

SCHEMA = "quill.train/1"
_FRAMES_PER_SECOND = 4
# More points than a wide terminal can tell apart; beyond it neighbours are averaged.
_MOST_POINTS = 1024
# Lines of a panel besides the rows of its chart: title, axis, numbers, "step", legend, facts, bar.
_AROUND_CHART = 10
_CHART_ROWS = range(5, 13)

# The losses of a run before this process took it over, by reference.
History = Callable[[str], Curves]


@contextmanager
def watch(output: Output, history: History = lambda reference: Curves((), ())) -> Iterator[events.Observer]:
    """An observer that shows a run in the form that its output calls for.

    Args:
        output: Where it is shown.
        history: The earlier losses of a run that is resumed.
    """
    lines = Lines(output)
    if not output.live:
        yield lines
        return
    with Live(output, lines, history) as live:
        yield live


class Lines:
    """One line for each evaluation, and one every 30 seconds between them; JSON has every event."""

    def __init__(self, output: Output) -> None:
        self._output = output
        self._last = output.clock()

    def __call__(self, event: events.Event) -> None:
        self._output.event(SCHEMA, {"event": type(event).__name__.lower(), **asdict(event)})
        if isinstance(event, events.Stepped):
            now = self._output.clock()
            if now - self._last >= LINE_INTERVAL:
                self._last = now
                self._output.say(describe(event))
        elif isinstance(event, events.Saved | events.Stage):
            self._output.detail(describe(event))
        else:
            self._output.say(describe(event))


class Live:
    """A panel that moves with the run, under the lines that stay.

    Args:
        output: Its stderr is a terminal.
        lines: Prints the lines that stay.
        history: The earlier losses of a run that is resumed.
    """

    def __init__(self, output: Output, lines: Lines, history: History) -> None:
        self._output, self._lines, self._history = output, lines, history
        self._panel: Panel | None = None
        self._train, self._val = Series(), Series()
        self._best: events.Evaluated | None = None
        self._drawn = float("-inf")
        self._pace = Pace()

    def __enter__(self) -> Live:
        return self

    def __exit__(self, *failure: object) -> None:
        self._lift()

    def __call__(self, event: events.Event) -> None:
        if isinstance(event, events.Stepped):
            self._train.add(event.step, event.loss)
            self._output.event(SCHEMA, {"event": "stepped", **asdict(event)})
            left = self._pace.left(event)
            if self._output.clock() - self._drawn >= 1 / _FRAMES_PER_SECOND:
                self._drawn = self._output.clock()
                self._show(event, left)
            return
        if isinstance(event, events.Started) and event.resumed:
            before = self._history(event.reference)
            for series, points in ((self._train, before.train), (self._val, before.val)):
                for point in points:
                    series.add(*point)
        if isinstance(event, events.Evaluated):
            self._val.add(event.step, event.val_loss)
            self._best = event if event.best else self._best
        self._lift()
        if isinstance(event, events.Stage):
            self._output.say(describe(event))
        elif isinstance(event, events.Finished):
            # On a terminal, where the model is and what to do next follow below a sample.
            self._output.event(SCHEMA, {"event": "finished", **asdict(event)})
            self._output.say(describe(replace(event, path="", next="")))
        else:
            self._lines(event)

    def _show(self, event: events.Stepped, left: float | None) -> None:
        if self._panel is None:
            from rich.console import Console
            from rich.live import Live as Panel

            console = Console(file=self._output.err, markup=False, highlight=False, emoji=False)
            # Without a thread: nothing to stop when a signal ends the run.
            self._panel = Panel(console=console, auto_refresh=False, transient=True)
            self._panel.start()
        size = self._panel.console.size
        self._panel.update(self._draw(event, left, size.width, size.height), refresh=True)

    def _lift(self) -> None:
        """Remove the panel, so that a line can be printed."""
        if self._panel is not None:
            self._panel.stop()
            self._panel = None

    def _draw(self, event: events.Stepped, left: float | None, columns: int, lines: int) -> RenderableType:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        best = f"best val {self._best.best_val_loss:.4f} at {self._best.best_step:,}" if self._best else ""
        facts = [
            f"step {event.step:,}/{event.max_iters:,}",
            f"loss {event.loss:.4f}",
            best,
            f"rate {event.learning_rate:.2e}",
            f"{count(event.tokens_per_second)} tokens/s",
        ]
        shown: list[RenderableType] = []
        rows = min(lines - _AROUND_CHART, _CHART_ROWS.stop - 1)
        points = Curves(self._train.points(), self._val.points())
        if points and rows in _CHART_ROWS and columns >= 40:
            chart = draw(self._output, points, columns - 1, err=True, height=rows, last=event.max_iters)
            shown.append(Text.from_ansi(chart.rstrip("\n")))
        bar = Table.grid(padding=(0, 2, 0, 0))
        total = max(1, event.max_iters)
        bar.add_row(
            ProgressBar(total=total, completed=event.step, width=max(min(30, columns - 44), 5)),
            Text(f"{event.step / total:.0%}"),
            Text(f"{duration(event.seconds)} elapsed"),
            Text(f"{duration(left)} left" if left is not None else ""),
        )
        return Group(*shown, Text("  ".join(f for f in facts if f), overflow="ellipsis", no_wrap=True), bar)


class Series:
    """The losses of a whole run in bounded memory: neighbours are averaged as it grows."""

    def __init__(self) -> None:
        self._points: list[Point] = []
        self._stride = 1
        self._open: list[Point] = []

    def add(self, step: int, loss: float) -> None:
        """Add the loss after a step; steps that are repeated replace what came after them."""
        while self._points and self._points[-1].step >= step:
            self._points.pop()
        self._open = [p for p in self._open if p.step < step]
        if loss != loss or abs(loss) == float("inf"):
            return
        self._open.append(Point(step, loss))
        if len(self._open) >= self._stride:
            self._points.append(_mean(self._open))
            self._open = []
        if len(self._points) > _MOST_POINTS:
            pairs = zip(self._points[::2], self._points[1::2], strict=False)
            self._points = [_mean(pair) for pair in pairs]
            self._stride *= 2

    def points(self) -> tuple[Point, ...]:
        """The points so far, by step."""
        return (*self._points, *([_mean(self._open)] if self._open else []))


def _mean(points: Sequence[Point]) -> Point:
    return Point(points[-1].step, sum(p.loss for p in points) / len(points))


class Pace:
    """The time that a run still takes, from the steps of this process."""

    def __init__(self) -> None:
        self._first: events.Stepped | None = None

    def left(self, event: events.Stepped) -> float | None:
        """Seconds to the last step; None until the second step."""
        if self._first is None or event.step <= self._first.step:
            self._first = event
            return None
        pace = (event.seconds - self._first.seconds) / (event.step - self._first.step)
        return pace * (event.max_iters - event.step)


def describe(event: events.Event) -> str:
    """An event in one plain line; empty for those that need none."""
    if isinstance(event, events.Stepped):
        return (
            f"step {event.step:,}/{event.max_iters:,}: loss {event.loss:.4f}, "
            f"rate {event.learning_rate:.2e}, {count(event.tokens_per_second)} tokens/s, "
            f"{duration(event.seconds)}"
        )
    return log.describe(event)
