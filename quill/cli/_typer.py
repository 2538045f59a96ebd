"""Typer as quill uses it: plain help in groups, plain arguments read without pydantic."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from typer.core import TyperCommand, TyperGroup

# Where commands stand in the help: the face of quill, then the rest.
PANELS = ("Commands", "More commands")


class _Grouped:
    """Plain help in the groups that help on a terminal has; plain arguments read without pydantic."""

    def get_params(self, ctx: Any) -> list[Any]:
        """The parameters, each read by `_Plain` where Typer has a place for that."""
        params: list[Any] = super().get_params(ctx)  # type: ignore[misc]
        for param in params:
            if getattr(param, "_runtime_param", None) is None:
                param._runtime_param = _Plain()
        return params

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write each group of parameters under its title."""
        panels: dict[str, list[tuple[str, str]]] = {"Arguments": [], "Options": []}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is None:
                continue
            name, text = record
            title = "Options"
            if param.param_type_name == "argument":
                # Its Python type tells a reader nothing that its name does not.
                name, title = name.partition(" <")[0], "Arguments"
            panels.setdefault(param.rich_help_panel or title, []).append((name, text))
        for title, records in panels.items():
            if records:
                with formatter.section(title):
                    formatter.write_dl(records)


class Command(_Grouped, TyperCommand):
    """A command, read and explained in quill's way."""


class _Plain:
    """Stands in for Typer's conversion of an argument where that only hands text through.

    Typer builds a pydantic adapter for every argument, also for those not given, and `quill list` would
    spend most of its time on that. An attribute that another Typer does not look at costs only time.
    """

    def coerce(self, value: Any, param: Any, ctx: Any) -> Any:
        """The value as the command gets it; what is not plain text is left to Typer."""
        many = param.multiple or param.nargs == -1
        if value is None:
            return () if many else None
        kind = param.type_descriptor.annotation
        for plain in (str, Path):
            if kind is plain:
                return plain(value)
            if kind == list[plain]:  # type: ignore[valid-type]
                return tuple(plain(v) for v in value)
        choices = param.type_descriptor.choices
        if choices and value in choices:
            return value
        param._runtime_param = None
        adapter = param.get_runtime_param()
        return adapter.coerce(value, param=param, ctx=ctx)


class Group(_Grouped, TyperGroup):
    """The commands, whose plain help is in groups."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the parameters, then each group of commands."""
        super().format_options(ctx, formatter)
        panels: dict[str, list[tuple[str, str]]] = {}
        for name in self.list_commands(ctx):
            found = self.commands[name]
            panel = getattr(found, "rich_help_panel", None) or PANELS[0]
            panels.setdefault(panel, []).append((name, found.get_short_help_str(formatter.width)))
        for title in sorted(panels):
            with formatter.section(title):
                formatter.write_dl(panels[title])
