"""Rows laid out for people: a table or a list of fields, drawn for a terminal or plain in a pipe."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from io import StringIO
from typing import Any, Literal

Row = Mapping[str, Any]
Style = Literal["", "good", "bad", "warn", "busy", "dim", "head"]
# SGR parameters (ECMA-48, 8.3.117).
SGR: Mapping[str, str] = {"good": "32", "bad": "1;31", "warn": "33", "busy": "36", "dim": "2", "head": "1"}
_RICH = {"good": "green", "bad": "bold red", "warn": "yellow", "busy": "cyan", "dim": "dim", "head": "bold"}
_GAP = 2
# What a folded column keeps.
_NARROWEST = 8


class Column:
    """A column of a table, or a line of a record.

    Args:
        title: Heading.
        text: Turns a row into the cell; empty text for what is not known.
        right: Align to the right.
        drop: On a terminal too narrow for all columns, those with the highest number are dropped first;
            0 is never dropped.
        optional: Leave the column out if all of its cells are empty.
        style: Turns a row into the cell's style.
    """

    def __init__(
        self,
        title: str,
        text: Callable[[Any], str],
        *,
        right: bool = False,
        drop: int = 0,
        optional: bool = False,
        style: Callable[[Any], Style] | None = None,
    ) -> None:
        self.title, self.text, self.right = title, text, right
        self.drop, self.optional, self.style = drop, optional, style


class Canvas:
    """Where something is drawn.

    Args:
        width: Columns of the terminal; None in a pipe, where lines have any length.
        colour: Whether ANSI colour is understood.
    """

    def __init__(self, width: int | None, colour: bool) -> None:
        self.width, self.colour = width, colour

    def paint(self, text: str, style: str) -> str:
        """Colour a text, if this takes colour."""
        return f"\x1b[{SGR[style]}m{text}\x1b[0m" if self.colour and style else text


def table(rows: Sequence[Row], columns: Sequence[Column], canvas: Canvas, safe: Callable[[str], str]) -> str:
    """Lay out rows under their columns.

    Args:
        rows: What the columns read.
        columns: In order.
        canvas: Where it is drawn; on a terminal it never gets wider than that.
        safe: Escapes a cell.
    """
    cells = [[safe(c.text(row)) for row in rows] for c in columns]
    shown = [
        (c, texts)
        for c, texts in zip(columns, cells, strict=True)
        if not c.optional or any(map(str.strip, texts))
    ]
    if canvas.width is not None:
        return _drawn(rows, _fitting(shown, canvas.width), canvas)
    widths = [max(len(c.title), *map(len, texts), 0) for c, texts in shown]

    def line(texts: Sequence[str], styles: Sequence[str]) -> str:
        parts = []
        for (column, _), text, style, width in zip(shown, texts, styles, widths, strict=True):
            space = " " * (width - len(text))
            painted = canvas.paint(text, style)
            parts.append(space + painted if column.right else painted + space)
        return (" " * _GAP).join(parts).rstrip()

    head = line([c.title for c, _ in shown], ["head"] * len(shown))
    body = [
        line([texts[i] for _, texts in shown], [c.style(row) if c.style else "" for c, _ in shown])
        for i, row in enumerate(rows)
    ]
    return "\n".join([head, *body]) + "\n"


def fields(row: Row, columns: Sequence[Column], canvas: Canvas, safe: Callable[[str], str]) -> str:
    """Lay out one record, a field a line; empty ones are left out."""
    pairs = [(c, text) for c in columns if (text := safe(c.text(row)))]
    indent = max((len(c.title) for c, _ in pairs), default=0) + _GAP
    lines = []
    for column, text in pairs:
        style = column.style(row) if column.style else ""
        name = canvas.paint(column.title.ljust(indent), "head")
        if canvas.width is None:
            lines.append(name + canvas.paint(text, style))
        elif canvas.width < indent + 2 * _NARROWEST:
            lines += [canvas.paint(column.title, "head")]
            lines += [f"  {canvas.paint(part, style)}" for part in wrap(text, canvas.width - 2)]
        else:
            first, *rest = wrap(text, canvas.width - indent)
            lines.append(name + canvas.paint(first, style))
            lines += [" " * indent + canvas.paint(part, style) for part in rest]
    return "".join(f"{line}\n" for line in lines)


def wrap(text: str, width: int) -> list[str]:
    """Break a line at spaces, a word that is too long at slashes, and a name that is too long anywhere."""
    width = max(width, 1)
    lines = [""]
    for word in text.split(" "):
        if lines[-1] and len(lines[-1]) + 1 + len(word) <= width:
            lines[-1] += f" {word}"
            continue
        if lines[-1]:
            lines.append("")
        for part in re.findall(r"[^/]*/+|[^/]+", word) if len(word) > width else [word]:
            if lines[-1] and len(lines[-1]) + len(part) > width:
                lines.append("")
            while len(part) > width:
                lines[-1:] = [part[:width], ""]
                part = part[width:]
            lines[-1] += part
    return lines


def _fitting(shown: list[tuple[Column, list[str]]], width: int) -> list[tuple[Column, list[str]]]:
    """Drop columns, in their order, until the table fits or only those that stay are left."""

    def total() -> int:
        widest = (max(len(c.title), *map(len, texts), 0) for c, texts in shown)
        return sum(widest) + _GAP * (len(shown) - 1)

    while total() > width and (droppable := [c.drop for c, _ in shown if c.drop]):
        shown = [(c, texts) for c, texts in shown if c.drop != max(droppable)]
    return shown


def _drawn(rows: Sequence[Row], shown: Sequence[tuple[Column, list[str]]], canvas: Canvas) -> str:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    drawn = Table(box=None, pad_edge=False, padding=(0, _GAP, 0, 0), header_style="bold")
    for column, _ in shown:
        drawn.add_column(column.title, justify="right" if column.right else "left", overflow="fold")
    for i, row in enumerate(rows):
        styles = [_RICH.get(c.style(row), "") if c.style else "" for c, _ in shown]
        drawn.add_row(*(Text(texts[i], style=s) for (_, texts), s in zip(shown, styles, strict=True)))
    sink = StringIO()
    console = Console(
        file=sink,
        width=canvas.width,
        force_terminal=canvas.colour,
        no_color=not canvas.colour,
        color_system="standard" if canvas.colour else None,
        legacy_windows=False,
        markup=False,
        highlight=False,
        emoji=False,
    )
    console.print(drawn)
    return "".join(f"{line.rstrip()}\n" for line in sink.getvalue().splitlines())
