"""A progress bar on a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn


@contextmanager
def bar(stream: TextIO | None) -> Iterator[Callable[[str, float, float | None], None]]:
    """Draw a bar from the first report on, that goes when the work is done.

    Args:
        stream: A terminal.

    Yields:
        What moves it: called with the stage, what is done, and the total where it is known.
    """
    console = Console(file=stream, markup=False, highlight=False, emoji=False)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    drawn = Progress(*columns, console=console, transient=True)
    task = drawn.add_task("", total=None)
    at = ""

    def report(stage: str, done: float, total: float | None) -> None:
        nonlocal at
        drawn.start()
        if stage != at:
            # A stage of its own has a speed of its own.
            drawn.reset(task, description=stage, total=total)
            at = stage
        drawn.update(task, completed=done, total=total)

    try:
        yield report
    finally:
        drawn.stop()
