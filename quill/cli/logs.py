"""Print or follow the log of a run."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from io import FileIO
from typing import Annotated

import typer
from typer import Argument, Option

from quill.cli import options
from quill.cli._completion import models
from quill.cli.options import Session
from quill.errors import InputError
from quill.registry import locks, manifest, names
from quill.registry.folder import Folder
from quill.registry.store import Registry

_SCHEMA = "quill.log/1"
# Seconds between two reads of a log that is followed.
_PAUSE = 0.25
# A longer line, as in a file of zeros, is reported in parts.
_LONGEST_LINE = 1 << 20


@options.command(
    examples="""
    quill logs shakespeare -f
    quill logs shakespeare:v2 -n 20
    """
)
def command(
    session: Session,
    reference: Annotated[
        str,
        Argument(metavar="REF", help="Model or unfinished run.", autocompletion=models(drafts=True)),
    ],
    follow: Annotated[bool, Option("--follow", "-f", help="Keep printing until the run ends.")] = False,
    lines: Annotated[
        int | None,
        Option("--lines", "-n", metavar="N", help="Show only the last N lines (default: all)."),
    ] = None,
) -> None:
    """Print or follow the log of a run.

    A name without a version means the unfinished run if there is one, else the latest version. With --json
    each line is one document.
    """
    if lines is not None and lines < 0:
        raise InputError(f"--lines {lines} is out of range", why="at least 0 is needed")
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
            output.say(f"{found.reference} is not running: quill show {found.reference}")
    except KeyboardInterrupt:
        # The usual way to stop following: not worth a warning.
        raise typer.Exit(130) from None


def _wait_for_run(registry: Registry, reference: str) -> None:
    """Wait for a run that is still preparing its data."""
    if not names.is_path(reference) and ":" not in reference:
        names.check_name(reference)
        while locks.holder(registry.root, reference) and not _is_begun(registry, reference):
            time.sleep(_PAUSE)


def _is_begun(registry: Registry, name: str) -> bool:
    draft, newest = registry.unfinished(name), registry.newest(name)
    return draft is not None and (newest is None or newest.number < draft.number)


def _follow(log: _Log, found: Folder) -> None:
    """Read until the run has ended and all of its log is read."""
    while found.is_running():
        log.read()
        time.sleep(_PAUSE)
    # The last lines may have come after the last read.
    log.read()


def _open(found: Folder, *, wait: bool) -> FileIO:
    """Open a run's log; a run that is just starting has none yet."""
    for _ in range(int(10 / _PAUSE) if wait else 0):
        if found.has(manifest.LOG):
            break
        time.sleep(_PAUSE)
    return found.open_run_log()


class _Log:
    """A log that may still grow.

    Args:
        file: Open for reading.
        write: Called with each line, without its line break.
    """

    def __init__(self, file: FileIO, write: Callable[[str], None]) -> None:
        self._file, self._write = file, write
        self._rest = b""

    def read(self, last: int | None = None) -> None:
        """Report the lines added since the last read; an incomplete line waits for its end.

        Args:
            last: Only the last lines (default: all).
        """
        kept: deque[bytes] = deque(maxlen=last)
        while chunk := self._file.read(1 << 16):
            *whole, self._rest = (self._rest + chunk).split(b"\n")
            if len(self._rest) > _LONGEST_LINE:
                whole, self._rest = [*whole, self._rest], b""
            if last is None:
                self._report(whole)
            else:
                kept.extend(whole)
        self._report(kept)

    def end(self) -> None:
        """Report an incomplete last line."""
        if self._rest:
            self._report([self._rest])
            self._rest = b""

    def _report(self, lines: list[bytes] | deque[bytes]) -> None:
        for line in lines:
            self._write(line.decode("utf-8", "replace").removesuffix("\r"))
