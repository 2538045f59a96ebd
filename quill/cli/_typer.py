"""Typer's commands with quill's help, which validate only the arguments that were given."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from typer.core import TyperCommand, TyperGroup

from quill.cli import _help
from quill.cli.output import canvas_of

_TRUTH = {
    "true": True,
    "yes": True,
    "on": True,
    "1": True,
    "false": False,
    "no": False,
    "off": False,
    "0": False,
}
_ASSIGNED = re.compile(r"(--[A-Za-z][\w-]*)=(\w+)")


class _Quill:
    """What commands and groups share."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """The words after the command in its usage line."""
        command: Any = self
        arguments = [_help.usage(p) for p in command.get_params(ctx) if p.param_type_name == "argument"]
        return ["[OPTIONS]", *arguments, *(["COMMAND [ARGS]..."] if hasattr(command, "commands") else [])]

    def get_help(self, ctx: Any) -> str:
        """The help screen."""
        return _help.render(self, ctx, canvas_of(sys.stdout))


class Command(_Quill, TyperCommand):
    """A command."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the arguments; Typer builds a pydantic validator only for those that were given."""
        if ctx.resilient_parsing:
            return super().parse_args(ctx, args)
        parser = self.make_parser(ctx)
        given, rest, _ = parser.parse_args(args=list(self._spelled(ctx, args)))
        params = self.get_params(ctx)
        for param in sorted(params, key=lambda p: not p.is_eager):
            value = given.get(param.name)
            if isinstance(value, str) and (read := _plain(param)):
                ctx.params[param.name] = read(value)
            elif param.required or value not in (None, ()):
                param.handle_parse_result(ctx, given, rest)
            elif param.expose_value:
                ctx.params[param.name] = param.get_default(ctx)
        if rest:
            ctx.fail(f"Got unexpected extra argument(s) ({' '.join(rest)})")
        ctx.args = rest
        return rest

    def _spelled(self, ctx: Any, args: list[str]) -> Iterator[str]:
        """Spell `--flag=False`, as nanoGPT's users type it, in the way of a switch: `--no-flag`."""
        switches = {o: p for p in self.get_params(ctx) if _help.is_switch(p) for o in p.opts}
        ended = False
        for word in args:
            ended = ended or word == "--"
            found = None if ended else _ASSIGNED.fullmatch(word)
            switch = switches.get(found[1].replace("_", "-")) if found else None
            if found is None or switch is None or (on := _TRUTH.get(found[2].lower())) is None:
                yield word
            elif on:
                yield switch.opts[0]
            elif switch.secondary_opts:
                yield switch.secondary_opts[0]


def _plain(param: Any) -> Callable[[str], Any] | None:
    """What reads the text of a parameter that takes any; Typer would load pydantic for it."""
    kind = param.type_descriptor.annotation
    return kind if kind in (str, Path) and param.callback is None and param.expose_value else None


class Group(_Quill, TyperGroup):
    """A group of commands."""
