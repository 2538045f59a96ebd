"""The one sink: results to stdout, everything else to stderr, in the form that was asked for.

A result has three forms: text for a person, one JSON document (`--json`), a bare reference
(`--quiet`). Whatever came from a file or a model is made harmless before a person's terminal sees it.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from shutil import get_terminal_size
from typing import Any, Literal, TextIO

from quill.errors import QuillError

Form = Literal["human", "json", "quiet"]
# What long work calls to say how far it is: the stage, what is done of it, and the total where known.
Report = Callable[[str, float, float | None], None]
# Where no bar can be drawn, a long wait is broken by one line as often as this, in seconds.
LINE_INTERVAL = 30.0

# C0 and C1 controls, and the marks that reorder or split a line as it is shown.
_CONTROLS = r"\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff"
_UNSAFE = re.compile(f"[{_CONTROLS}]")
_UNSAFE_IN_LINE = re.compile(f"[{_CONTROLS}\\n\\t]")


class Output:
    """Where a command's words go.

    Args:
        form: How a result is printed.
        verbose: Also say what `detail` is given.
        out: The result's stream; unset: stdout as it is now.
        err: The stream of everything else; unset: stderr as it is now.
        env: The environment, which may ask for colour, for none, or for no movement.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        form: Form = "human",
        *,
        verbose: bool = False,
        out: TextIO | None = None,
        err: TextIO | None = None,
        env: Mapping[str, str] = os.environ,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.form, self.verbose = form, verbose
        self._out: TextIO | None = out or sys.stdout
        self._err: TextIO | None = err or sys.stderr
        self.env, self.clock = env, clock

    @property
    def terminal(self) -> bool:
        """Whether a person reads stdout."""
        return is_terminal(self._out)

    @property
    def live(self) -> bool:
        """Whether stderr can hold something that moves: a terminal that a person watches."""
        if self.form == "quiet" or not is_terminal(self._err) or (self.form == "json" and self.terminal):
            return False
        return self.env.get("TERM") != "dumb" and not self.env.get("CI")

    @property
    def err(self) -> TextIO | None:
        """The stream of progress, for a display that draws by itself."""
        return self._err

    def emit(
        self, schema: str, document: Mapping[str, Any], *, human: str, quiet: str | Sequence[str]
    ) -> None:
        """Print a result in the form that was asked for.

        Args:
            schema: What the document is, such as "quill.list/1".
            document: The result as JSON values.
            human: The same for a person; safe to show.
            quiet: The bare reference, or one for each line.
        """
        if self.form == "json":
            self.write(_json({"schema": schema, **document}, indent=2) + "\n")
        elif self.form == "quiet":
            lines = [quiet] if isinstance(quiet, str) else quiet
            self.write("".join(f"{safe_line(line)}\n" for line in lines))
        else:
            self.write(human if human.endswith("\n") or not human else human + "\n")

    def event(self, schema: str, document: Mapping[str, Any]) -> None:
        """Print one line of a stream of JSON documents; nothing in the other forms."""
        if self.form == "json":
            self.write(_json({"schema": schema, **document}) + "\n")

    def stream(self, text: str) -> None:
        """Print a piece of a model's text at once: raw in a pipe, a terminal gets no control characters."""
        self.write(_UNSAFE.sub("", text) if self.terminal else text)

    def write(self, text: str) -> None:
        """Write to stdout and flush, so that a reader sees it now and a closed pipe is noticed now."""
        if self._out is not None and text:
            self._out.write(text)
            self._out.flush()

    def say(self, message: str) -> None:
        """Tell a person something in passing."""
        if self.form != "quiet":
            self._tell(message)

    def detail(self, message: str) -> None:
        """Tell what only `-v` asks for."""
        if self.verbose:
            self._tell(message)

    def warn(self, message: str) -> None:
        """Tell something that a person should know before relying on the result."""
        self._tell(f"{self.style('warning:', '33')} {safe(message)}", raw=True)

    def fail(self, error: QuillError) -> None:
        """Explain a failure in its three lines: what, why, what next."""
        lines = [f"{self.style('error:', '1;31')} {safe_line(error.what)}"]
        if error.why:
            lines.append(f"{self.style('  why:', '2')} {safe_line(error.why)}")
        if error.hint:
            lines.append(f"{self.style('  try:', '2')} {safe_line(error.hint)}")
        self._tell("\n".join(lines), raw=True)

    def style(self, text: str, code: str, *, stdout: bool = False) -> str:
        """Colour a text where its stream takes colour; `code` is an SGR parameter (ECMA-48 8.3.117)."""
        stream = self._out if stdout else self._err
        return f"\x1b[{code}m{text}\x1b[0m" if takes_colour(stream, self.env) else text

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[str] = ()) -> str:
        """Lay out rows for a person; on a terminal too narrow for them, one line for each value.

        Args:
            header: The columns' titles.
            rows: Cells; escaped here.
            right: Titles of the columns aligned to the right.
        """
        cells = [[safe_line(c) for c in row] for row in rows]
        widths = [max(map(len, column)) for column in zip(header, *cells, strict=True)]
        if self.terminal and sum(widths) + 2 * (len(widths) - 1) > get_terminal_size().columns:
            blocks = (
                "\n".join(f"{h}: {c}" for h, c in zip(header, row, strict=True) if c.strip()) for row in cells
            )
            return "\n\n".join(blocks) + "\n"

        def line(row: Sequence[str]) -> str:
            parts = (
                c.rjust(w) if h in right else c.ljust(w) for h, c, w in zip(header, row, widths, strict=True)
            )
            return "  ".join(parts).rstrip()

        head = self.style(line(header), "1", stdout=True)
        return "\n".join([head, *map(line, cells)]) + "\n"

    def fields(self, pairs: Sequence[tuple[str, str]]) -> str:
        """Lay out names and values, one pair a line; values are escaped here, empty ones left out."""
        pairs = [(k, v) for k, v in pairs if v]
        width = max((len(k) for k, _ in pairs), default=0)
        return "".join(f"{self.style(k.ljust(width), '1', stdout=True)}  {safe_line(v)}\n" for k, v in pairs)

    @contextmanager
    def progress(self, unit: Callable[[float], str] = "{:,.0f}".format) -> Iterator[Report]:
        """Show how far long work is, as (stage, done, total or None) reported to what this yields.

        A bar on a terminal; elsewhere a line every 30 seconds, so that a short run prints nothing.

        Args:
            unit: Writes a done or a total for a person.
        """
        if self.form == "quiet":
            yield lambda stage, done, total: None
        elif self.live:
            from quill.cli._progress import bar

            with bar(self._err) as report:
                yield report
        else:
            yield self._lines(unit)

    def _lines(self, unit: Callable[[float], str]) -> Report:
        last = self.clock()

        def report(stage: str, done: float, total: float | None) -> None:
            nonlocal last
            if self.clock() - last >= LINE_INTERVAL:
                last = self.clock()
                share = f", {done / total:.0%} of {unit(total)}" if total else ""
                self.say(f"{stage}: {unit(done)}{share}")

        return report

    def _tell(self, message: str, *, raw: bool = False) -> None:
        # A run outlives the terminal that it was started from: losing stderr loses words, not work.
        if self._err is not None:
            with suppress(OSError, ValueError):
                self._err.write((message if raw else safe(message)) + "\n")
                self._err.flush()


def safe(text: str) -> str:
    """Make text harmless on a terminal: control characters show as their escapes, lines stay lines."""
    return _UNSAFE.sub(_escape, text)


def safe_line(text: str) -> str:
    """As `safe`, and what would break the line or its columns is escaped too."""
    return _UNSAFE_IN_LINE.sub(_escape, text)


def is_terminal(stream: TextIO | None) -> bool:
    """Whether a stream is a terminal; a closed one is not."""
    try:
        return stream is not None and stream.isatty()
    except ValueError:
        return False


def takes_colour(stream: TextIO | None, env: Mapping[str, str]) -> bool:
    """Whether ANSI colour belongs on a stream: NO_COLOR, then FORCE_COLOR, then what the stream is."""
    if env.get("NO_COLOR"):
        return False
    if env.get("FORCE_COLOR"):
        return env["FORCE_COLOR"] != "0"
    return is_terminal(stream) and env.get("TERM") != "dumb"


def _escape(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape").decode()


def _json(value: Any, indent: int | None = None) -> str:
    text = json.dumps(_finite(value), indent=indent, ensure_ascii=False, allow_nan=False)
    return _UNSAFE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def _finite(value: Any) -> Any:
    """JSON has no infinity; a perplexity may be one."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return value
