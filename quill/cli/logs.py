"""Print the log of a run, or follow it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from io import FileIO
from typing import Annotated

import typer
from typer import Argument, Option

from quill.cli import options
from quill.cli.options import Session
from quill.errors import InputError
from quill.registry import locks, manifest, names
from quill.registry.folder import Folder
from quill.registry.store import Registry

_SCHEMA = "quill.log/1"
# Seconds between two looks at a log that is followed.
_PAUSE = 0.25


@options.command()
def command(
    session: Session,
    reference: Annotated[str, Argument(metavar="REF", help="A model, or the run that is making it.")],
    follow: Annotated[bool, Option("--follow", "-f", help="Go on until the run ends.")] = False,
    lines: Annotated[
        int | None, Option("--lines", "-n", metavar="INT", help="Only the last lines, so many; unset: all.")
    ] = None,
) -> None:
    """Print the log of a run, or follow one that is in progress.

    A name alone means the run in progress if there is one, else the newest version. With --json each line
    is a document of its own.
    """
    if lines is not None and lines < 0:
        raise InputError(f"--lines {lines} is refused", why="it is 0 or more")
    output, registry = session.output, session.registry()

    def write(line: str) -> None:
        if output.form == "json":
            output.event(_SCHEMA, {"reference": found.reference, "line": line})
        else:
            output.stream(line + "\n")

    try:
        if follow:
            _wait_for_run(registry, reference)
        found = registry.find(reference, in_progress=True)
        with _open(found, wait=follow and found.is_running()) as file:
            log = _Log(file, write)
            log.read(last=lines)
            if follow:
                _follow(log, found)
            log.end()
        if follow and not found.is_published:
            output.say(f"nobody is at work on {found.reference}: quill show {found.reference}")
    except KeyboardInterrupt:
        # Whoever follows a log ends it that way; there is nothing to warn of.
        raise typer.Exit(130) from None


def _wait_for_run(registry: Registry, reference: str) -> None:
    """Wait for the run that a process is about to begin, as long as it prepares its data."""
    if not names.is_path(reference) and ":" not in reference:
        names.check_name(reference)
        while locks.holder(registry.root, reference) and not _is_begun(registry, reference):
            time.sleep(_PAUSE)


def _is_begun(registry: Registry, name: str) -> bool:
    draft, newest = registry.unfinished(name), registry.newest(name)
    return draft is not None and (newest is None or newest.number < draft.number)


def _follow(log: _Log, found: Folder) -> None:
    """Read on until the run has ended and everything that it wrote is read."""
    while found.is_running():
        log.read()
        time.sleep(_PAUSE)
    # What was written before the end may have come after the last reading.
    log.read()


def _open(found: Folder, *, wait: bool) -> FileIO:
    """Open a run's log; one that is just starting has none for a moment."""
    for _ in range(int(10 / _PAUSE) if wait else 0):
        if found.has(manifest.LOG):
            break
        time.sleep(_PAUSE)
    return found.open_run_log()


class _Log:
    """A log that may still grow.

    Args:
        file: Open for reading.
        write: Told each line, without its end.
    """

    def __init__(self, file: FileIO, write: Callable[[str], None]) -> None:
        self._file, self._write = file, write
        self._rest = b""

    def read(self, last: int | None = None) -> None:
        """Tell the lines that came since; a line that is not ended waits for its end.

        Args:
            last: Only so many of them, from the end; unset: all.
        """
        kept: deque[bytes] = deque(maxlen=last)
        while piece := self._file.read(1 << 16):
            *whole, self._rest = (self._rest + piece).split(b"\n")
            if last is None:
                self._tell(whole)
            else:
                kept.extend(whole)
        self._tell(kept)

    def end(self) -> None:
        """Tell what is left of a line that nobody will end."""
        if self._rest:
            self._tell([self._rest])
            self._rest = b""

    def _tell(self, lines: list[bytes] | deque[bytes]) -> None:
        for line in lines:
            self._write(line.decode("utf-8", "replace").removesuffix("\r"))
