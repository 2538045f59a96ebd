"""What the Python API shows: tables for notebooks, and the progress of a run."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from importlib import import_module
from typing import Any

from quill.registry.folder import Folder
from quill.training import events, log
from quill.units import count, size


class Models(list[Folder]):
    """Versions of models; a notebook shows them as a table."""

    def _repr_html_(self) -> str:
        return table(("model", "parameters", "size", "val loss", "state"), map(_row, self))


class Facts(dict[str, Any]):
    """What is known of one model, by name; a notebook shows it as a table."""

    def _repr_html_(self) -> str:
        return table(("fact", "value"), [(k, v) for k, v in self.items() if v is not None and k != "config"])


@dataclass(frozen=True)
class Comparison:
    """Two models side by side; a notebook shows them as a table.

    Attributes:
        references: The models.
        figures: Both values of each figure; None for what is not known.
        settings: Both values of each setting that differs, by dotted path.
    """

    references: tuple[str, str]
    figures: dict[str, tuple[Any, Any]]
    settings: dict[str, tuple[Any, Any]]

    def _repr_html_(self) -> str:
        rows = [(name, *values) for name, values in (self.figures | self.settings).items()]
        return table(("", *self.references), rows)


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Write an HTML table, escaping every cell.

    None is an empty cell, a number has six digits, and of a nested record the names of records in it.
    """
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(_cell(cell))}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Mapping):
        return ", ".join(k if isinstance(v, Mapping) else f"{k} {v}" for k, v in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return "" if value is None else str(value)


def is_notebook() -> bool:
    """Whether the program runs in a Jupyter kernel."""
    return "ipykernel" in sys.modules


class Progress:
    """Observer that shows a run: a line for each event, and in a notebook that has tqdm a bar for the steps.

    It writes to stderr; in a notebook, which shows that as an alarm, to stdout.
    """

    def __init__(self) -> None:
        self._bar: Any = None
        self._make_bar = _bar_class() if is_notebook() else None
        self._stream = sys.stdout if is_notebook() else sys.stderr

    def __call__(self, event: events.Event) -> None:
        """Show one event."""
        if isinstance(event, events.Stepped):
            if self._bar is not None:
                self._bar.set_postfix(loss=f"{event.loss:.4f}", refresh=False)
                self._bar.update(event.step - self._bar.n)
            return
        if isinstance(event, events.Started) and self._make_bar is not None:
            self._bar = self._make_bar(
                total=event.max_iters, initial=event.step, unit="step", file=self._stream
            )
        elif isinstance(event, events.Finished):
            self.close()
            event = replace(event, next=f'quill.load("{event.reference}")')
        if isinstance(event, events.Saved):
            return
        if self._bar is not None:
            # A bar in text makes room for the line.
            self._bar.write(log.describe(event), file=self._stream)
        else:
            self._stream.write(log.describe(event) + "\n")

    def close(self) -> None:
        """Leave the bar as it is."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _bar_class() -> Callable[..., Any] | None:
    with warnings.catch_warnings():
        # Without ipywidgets tqdm warns, and draws its bar in text.
        warnings.simplefilter("ignore")
        try:
            bar: Callable[..., Any] = import_module("tqdm.auto").tqdm
        except ImportError:
            return None
    return bar


def _row(version: Folder) -> tuple[str, ...]:
    loss = version.facts["best_val_loss"]
    shown = "" if loss is None else f"{loss:.4f}"
    return version.reference, count(version.facts["parameters"]), size(version.size), shown, version.state
