"""The one sink: results go to stdout, everything else to stderr.

A result has three forms: text for people, one JSON document (`--json`), and bare references (`--quiet`).
Control characters from files and models are escaped before a terminal sees them.
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

from quill.cli import _tables
from quill.cli._tables import Canvas, Column, Row
from quill.errors import QuillError, cut
from quill.units import duration

Form = Literal["human", "json", "quiet"]
# Reports progress: the stage, how much of it is done, and the total if it is known.
Report = Callable[[str, float, float | None], None]
# Seconds between progress lines where no bar can be drawn.
LINE_INTERVAL = 30.0

# Hints that begin so are commands to copy.
_COMMANDS = ("quill ", "pip ", "cp ")
# Quoted text is indented by this much.
_QUOTED = "    "
# C0 and C1 controls, and the marks that reorder or split a line on screen.
_CONTROLS = r"\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff"
_UNSAFE = re.compile(f"[{_CONTROLS}]")
_UNSAFE_IN_LINE = re.compile(f"[{_CONTROLS}\\n\\t]")


class Output:
    """What a command prints.

    Args:
        form: How results are printed.
        verbose: Whether to print details.
        out: Stream of the result (default: the current stdout).
        err: Stream of everything else (default: the current stderr).
        env: Environment; it may ask for colour, for none, or for no progress bars.
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
        self._hide_bar: Callable[[], None] | None = None

    @property
    def terminal(self) -> bool:
        """Whether stdout is a terminal."""
        return is_terminal(self._out)

    @property
    def live(self) -> bool:
        """Whether stderr can show a progress bar: a terminal, and not a CI log."""
        if self.form == "quiet" or not is_terminal(self._err) or (self.form == "json" and self.terminal):
            return False
        return self.env.get("TERM") != "dumb" and not self.env.get("CI")

    @property
    def err(self) -> TextIO | None:
        """The stream of progress."""
        return self._err

    def show(
        self,
        schema: str,
        rows: Row | Sequence[Row],
        columns: Sequence[Column] = (),
        *,
        key: str,
        within: str = "",
        quiet: Sequence[str] | None = None,
        **facts: Any,
    ) -> None:
        """Print a result in the form that was asked for, each form derived from the same rows.

        One row is printed as a record, and without columns as its key alone. Several are a table.

        Args:
            schema: Names the JSON document's layout, such as "quill.list/1".
            rows: JSON values by field name.
            columns: What people see of a row.
            key: Field that `--quiet` prints, a line for each row.
            within: Field of the JSON document that several rows go into.
            quiet: What `--quiet` prints instead of the keys.
            facts: More fields of the document.
        """
        record = rows if isinstance(rows, Mapping) else None
        listed: Sequence[Row] = [record] if record is not None else list(rows)  # type: ignore[arg-type]
        if self.form == "json":
            document = {**facts, **record} if record is not None else {**facts, within: listed}
            self.document({"schema": schema, **document})
        elif self.form == "quiet" or not columns:
            keys = quiet if quiet is not None and self.form == "quiet" else [str(row[key]) for row in listed]
            self.write("".join(f"{safe_line(line)}\n" for line in keys))
        elif record is not None:
            self.draw(_tables.fields(record, columns, self.canvas, safe_line))
        elif listed:
            self.draw(_tables.table(listed, columns, self.canvas, safe_line))

    def section(self, title: str, rows: Sequence[Row], columns: Sequence[Column]) -> None:
        """Print another table below the result, for people only."""
        if self.form == "human":
            heading = "\n".join(self.canvas.paint(safe_line(line), "head") for line in title.split("\n"))
            self.draw(f"\n{heading}\n\n{_tables.table(rows, columns, self.canvas, safe_line)}")

    @property
    def canvas(self) -> Canvas:
        """How wide stdout is, and whether it takes colour."""
        return canvas_of(self._out, self.env)

    def event(self, schema: str, document: Mapping[str, Any]) -> None:
        """Print one line of a stream of JSON documents; nothing in the other forms."""
        if self.form == "json":
            self.write(_json({"schema": schema, **document}) + "\n")

    def stream(self, text: str) -> None:
        """Print generated text at once: raw in a pipe, without control characters on a terminal."""
        self.draw(_UNSAFE.sub("", text) if self.terminal else text)

    def document(self, value: Any) -> None:
        """Print one JSON document for people and programs."""
        self.write(_json(value, indent=2) + "\n")

    def write(self, text: str) -> None:
        """Print plain text; control characters are escaped."""
        self.draw(safe(text))

    def draw(self, text: str) -> None:
        """Write text that is safe already and may be coloured, and flush: a closed pipe is noticed now."""
        if self._out is not None and text:
            self._out.write(text)
            self._out.flush()

    def say(self, message: str) -> None:
        """Print a remark, unless `--quiet`."""
        if self.form != "quiet":
            self._tell(cut(message))

    def detail(self, message: str) -> None:
        """Print what only `-v` asks for."""
        if self.verbose:
            self._tell(cut(message))

    def warn(self, message: str) -> None:
        """Say something to know before relying on the result."""
        self._tell(f"{self.style('warning:', 'warn')} {safe(cut(message))}", raw=True)

    def fail(self, error: QuillError) -> None:
        """Explain an error in three lines: what, why, and what to do next."""
        canvas = canvas_of(self._err, self.env)
        lines: list[str] = []
        for label, style, text in (
            ("error: ", "bad", error.what),
            ("  why: ", "dim", error.why),
            ("  try: ", "dim", error.hint),
        ):
            if text:
                # A command is left to the terminal to fold, so that it can be copied.
                fold = canvas.width is not None and not text.startswith(_COMMANDS)
                width = (canvas.width or 0) - len(label)
                first, *rest = _tables.wrap(safe_line(text), width) if fold else [safe_line(text)]
                lines += [canvas.paint(label, style) + first, *(" " * len(label) + line for line in rest)]
        self._tell("\n".join(lines), raw=True)

    def note(self, what: str, command: str) -> None:
        """Say that a command ended early on request, and how to resume it."""
        self._tell(self._folded(safe_line(what)) + f"\nresume: {safe_line(command)}", raw=True)

    def ask(self, question: str) -> None:
        """Print a question, after which the answer is typed; an empty one ends the line."""
        if self._err is not None:
            self._err.write(f"{safe_line(question)} " if question else "\n")
            self._err.flush()

    def style(self, text: str, style: str, *, stdout: bool = False) -> str:
        """Colour a text, if its stream takes colour."""
        return canvas_of(self._out if stdout else self._err, self.env).paint(text, style)

    @contextmanager
    def progress(self, unit: Callable[[float], str] = "{:,.0f}".format) -> Iterator[Report]:
        """Show the progress that is reported to the function this yields.

        A bar on a terminal; elsewhere a line every 30 seconds, so that short work prints nothing.

        Args:
            unit: Formats an amount.
        """
        if self.form == "quiet":
            yield lambda stage, done, total: None
        elif self.live:
            from quill.cli._progress import bar

            with bar(self._err, unit) as (report, self._hide_bar):
                yield lambda stage, done, total: report(safe_line(stage), done, total)
            self._hide_bar = None
        else:
            yield self._lines(unit)

    def _lines(self, unit: Callable[[float], str]) -> Report:
        last = self.clock()
        since, at, before = last, "", 0.0  # When this stage was last seen, and how far it was.

        def report(stage: str, done: float, total: float | None) -> None:
            nonlocal last, since, at, before
            now = self.clock()
            if stage != at:
                since, at, before = now, stage, done
            if now - last >= LINE_INTERVAL:
                share = left = ""
                if total:
                    share = f", {done / total:.0%} of {unit(total)}"
                    if done > before:
                        left = f", {duration((total - done) * (now - since) / (done - before))} left"
                self.say(f"{stage}: {unit(done)}{share}{left}")
                last = since = now
                before = done

        return report

    def _tell(self, message: str, *, raw: bool = False) -> None:
        # A run may outlive its terminal: losing stderr must not stop it.
        if self._err is not None:
            with suppress(OSError, ValueError):
                if self._hide_bar is not None:
                    self._hide_bar()
                self._err.write((message if raw else self._folded(safe(message))) + "\n")
                self._err.flush()

    def _folded(self, text: str) -> str:
        """Fold prose at words on a terminal; lines with a command stay whole, so that it can be copied."""
        width = canvas_of(self._err, self.env).width
        if width is None:
            return text
        folded: list[str] = []
        for line in text.split("\n"):
            indent = _QUOTED if line.startswith(_QUOTED) else ""
            if _COMMANDS[0] in line or (line.startswith(" ") and not indent):
                folded.append(line)
            else:
                lines = _tables.wrap(line.removeprefix(indent), width - len(indent))
                folded += [indent + part for part in lines]
        return "\n".join(folded)


def safe(text: str) -> str:
    """Escape control characters, except for line breaks and tabs."""
    return _UNSAFE.sub(_escape, text)


def safe_line(text: str) -> str:
    """Escape control characters, line breaks and tabs included."""
    return text if text.isprintable() else _UNSAFE_IN_LINE.sub(_escape, text)


def canvas_of(stream: TextIO | None, env: Mapping[str, str] = os.environ) -> Canvas:
    """How wide a stream is, and whether it takes colour."""
    width = get_terminal_size().columns if is_terminal(stream) else None
    return Canvas(width, takes_colour(stream, env))


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
    try:
        text = json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False)
    except ValueError:
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
