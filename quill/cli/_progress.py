"""A progress bar on a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn


@contextmanager
def bar(
    stream: TextIO | None, unit: Callable[[float], str]
) -> Iterator[tuple[Callable[[str, float, float | None], None], Callable[[], None]]]:
    """Draw a progress bar from the first report to the end of the work.

    Args:
        stream: A terminal.
        unit: Formats an amount.

    Yields:
        A function that reports the stage, how much of it is done, and the total if it is known; and one that
        removes the bar until the next report, so that a line can be printed.
    """
    console = Console(file=stream, markup=False, highlight=False, emoji=False)
    amount = TextColumn("{task.fields[amount]}", justify="right")
    share = (TaskProgressColumn(), amount, TimeRemainingColumn())
    columns = (TextColumn("{task.description}"), BarColumn(None), *share)
    drawn = Progress(*columns, console=console, transient=True, expand=True)
    task = drawn.add_task("", total=None, amount="")
    at = ""

    def report(stage: str, done: float, total: float | None) -> None:
        nonlocal at
        drawn.start()
        if stage != at:
            # Each stage has its own speed.
            drawn.reset(task, description=stage, total=total)
            at = stage
        amount = f"{unit(done)} of {unit(total)}" if total else unit(done)
        drawn.update(task, completed=done, total=total, amount=amount)

    try:
        yield report, drawn.stop
    finally:
        drawn.stop()
