"""What a person sees of a run: something that moves on a terminal, plain lines elsewhere.

Observers of the trainer's events, and nothing more: a run without them is the same run.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from itertools import pairwise
from typing import TYPE_CHECKING

from quill.cli.output import LINE_INTERVAL, Output
from quill.training import events, log
from quill.units import count, duration

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.live import Live as Panel

SCHEMA = "quill.train/1"
_BARS = "▁▂▃▄▅▆▇█"
_KEPT_LOSSES = 512
_FRAMES_PER_SECOND = 8


@contextmanager
def watch(output: Output) -> Iterator[events.Observer]:
    """An observer that shows a run in the form that its output calls for."""
    lines = Lines(output)
    if not output.live:
        yield lines
        return
    with Live(output, lines) as live:
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
        elif isinstance(event, events.Saved):
            self._output.detail(describe(event))
        else:
            self._output.say(describe(event))


class Live:
    """A panel that moves with the run, under the lines that stay.

    Args:
        output: Its stderr is a terminal.
        lines: What says the lines that stay.
    """

    def __init__(self, output: Output, lines: Lines) -> None:
        self._output, self._lines = output, lines
        self._panel: Panel | None = None
        self._losses: deque[float] = deque(maxlen=_KEPT_LOSSES)
        self._best: events.Evaluated | None = None
        self._drawn = float("-inf")
        self._pace = Pace()

    def __enter__(self) -> Live:
        return self

    def __exit__(self, *failure: object) -> None:
        self._lift()

    def __call__(self, event: events.Event) -> None:
        if isinstance(event, events.Stepped):
            self._losses.append(event.loss)
            self._output.event(SCHEMA, {"event": "stepped", **asdict(event)})
            left = self._pace.left(event)
            if self._output.clock() - self._drawn >= 1 / _FRAMES_PER_SECOND:
                self._drawn = self._output.clock()
                self._show(event, left)
            return
        if isinstance(event, events.Evaluated) and event.best:
            self._best = event
        self._lift()
        self._lines(event)

    def _show(self, event: events.Stepped, left: float | None) -> None:
        if self._panel is None:
            from rich.console import Console
            from rich.live import Live as Panel

            console = Console(file=self._output.err, markup=False, highlight=False, emoji=False)
            # Without a thread of its own: nothing to stop when a signal ends the run.
            self._panel = Panel(console=console, auto_refresh=False, transient=True)
            self._panel.start()
        self._panel.update(self._draw(event, left, self._panel.console.width), refresh=True)

    def _lift(self) -> None:
        """Take the panel away, so that a line can stay; a panel shown again would erase that line."""
        if self._panel is not None:
            self._panel.stop()
            self._panel = None

    def _draw(self, event: events.Stepped, left: float | None, width: int) -> RenderableType:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.text import Text

        best = f"best val {self._best.best_val_loss:.4f} at {self._best.best_step:,}" if self._best else ""
        facts = [
            f"step {event.step:,}/{event.max_iters:,}",
            f"loss {event.loss:.4f}",
            f"rate {event.learning_rate:.2e}",
            f"{count(event.tokens_per_second)} tokens/s",
            f"ETA {duration(left)}" if left is not None else "",
            best,
        ]
        return Group(
            Text("  ".join(f for f in facts if f)),
            Text(sparkline(self._losses, min(60, width)), style="cyan"),
            ProgressBar(total=max(1, event.max_iters), completed=event.step, width=min(60, width)),
        )


class Pace:
    """How long a run still takes, from the steps since this process began."""

    def __init__(self) -> None:
        self._first: events.Stepped | None = None

    def left(self, event: events.Stepped) -> float | None:
        """Seconds to the last step, or None while nothing can be told."""
        if self._first is None or event.step <= self._first.step:
            self._first = event
            return None
        pace = (event.seconds - self._first.seconds) / (event.step - self._first.step)
        return pace * (event.max_iters - event.step)


def describe(event: events.Event) -> str:
    """An event in one plain line; empty for what needs none."""
    if isinstance(event, events.Stepped):
        return (
            f"step {event.step:,}/{event.max_iters:,}: loss {event.loss:.4f}, "
            f"rate {event.learning_rate:.2e}, {count(event.tokens_per_second)} tokens/s, "
            f"{duration(event.seconds)}"
        )
    return log.describe(event)


def sparkline(values: Sequence[float], width: int) -> str:
    """A series as one line of bars, the highest value the tallest.

    Args:
        values: In their order; what is not finite is left out.
        width: Characters at the most; more values are averaged together.
    """
    finite = [v for v in values if abs(v) != float("inf") and v == v]
    if not finite or width < 1:
        return ""
    n = min(width, len(finite))
    cuts = [i * len(finite) // n for i in range(n + 1)]
    means = [sum(finite[a:b]) / (b - a) for a, b in pairwise(cuts)]
    low, high = min(means), max(means)
    span = (high - low) or 1.0
    return "".join(_BARS[round((m - low) / span * (len(_BARS) - 1))] for m in means)
