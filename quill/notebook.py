"""What the Python API shows: tables for notebooks, and the progress of a run."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
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
    """Write an HTML table, escaping every cell; None is an empty cell."""
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape('' if cell is None else str(cell))}</td>" for cell in row) + "</tr>"
        for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def is_notebook() -> bool:
    """Whether the program runs in a Jupyter kernel."""
    return "ipykernel" in sys.modules


class Progress:
    """Observer that shows a run: a bar in a notebook that has tqdm, and a line for each other event."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._make_bar = _bar_class() if is_notebook() else None

    def __call__(self, event: events.Event) -> None:
        """Show one event."""
        if isinstance(event, events.Stepped):
            if self._bar is not None:
                self._bar.set_postfix(loss=f"{event.loss:.4f}", refresh=False)
                self._bar.update(event.step - self._bar.n)
            return
        if isinstance(event, events.Started) and self._make_bar is not None:
            self._bar = self._make_bar(total=event.max_iters, initial=event.step, unit="step")
        elif isinstance(event, events.Finished):
            self.close()
        if not isinstance(event, events.Saved):
            sys.stderr.write(log.describe(event) + "\n")

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
