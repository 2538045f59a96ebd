"""The help screens: one layout for a terminal and a pipe, with colour on the terminal."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from quill.cli._tables import Canvas, wrap

# Where help wraps, however wide the terminal is.
_WIDEST = 100
# The widest flag that still has its help on the same line.
_WIDEST_TERM = 30
# On a narrower screen, help goes under its flag.
_NARROW = 60

_DEFAULT = re.compile(r"(?P<text>.*); defaults to (?P<default>.+?)(?P<note> \([^()]*\))?", re.DOTALL)

# Where the manual is on the web.
MANUAL = "https://github.com/quill-gpt/quill/blob/main/quill/docs"
OPTIONS, COMMON = "Options", "Common options"
# Groups of commands: those of the usual journey, and the rest.
PANELS = ("Commands", "More commands")


# A title and its rows.
_Section = tuple[str, list[tuple[str, str]]]


def render(command: Any, context: Any, canvas: Canvas, *, whole: bool = False) -> str:
    """Write the help of a command or of a group of commands.

    Args:
        command: A Typer command.
        context: Its context.
        canvas: Where it is shown; 80 columns in a pipe.
        whole: Include the options that only `--help-all` shows.
    """
    width = min(canvas.width or 80, _WIDEST)
    usage = " ".join(["Usage:", context.command_path, *command.collect_usage_pieces(context)])
    lines = _indented(usage, width, first="", rest=" " * len("Usage: "))
    paragraphs = re.split(r"\n{2,}", inspect.cleandoc(command.help or "").partition("\f")[0])
    for paragraph in filter(None, paragraphs):
        lines += ["", *wrap(" ".join(paragraph.split()), width)]
    params = command.get_params(context)
    face = () if whole else getattr(command.callback, "face", ())
    if face:
        params = _face(params, face)
    sections = [*_params(params, by_group=not face), *_commands(command, context)]
    terms = [len(term) for _, rows in sections for term, _ in rows if len(term) <= _WIDEST_TERM]
    column = max(terms, default=0)
    for title, rows in sections:
        lines += ["", canvas.paint(f"{title}:", "head")]
        for term, text in rows:
            lines += _row(term, text, column, width, canvas)
    if face:
        lines += ["", *wrap("Every other setting is a flag too; --help-all lists them by group.", width)]
    if command.epilog:
        lines += ["", canvas.paint("Examples:", "head")]
        lines += [f"  {line}" for line in inspect.cleandoc(command.epilog).splitlines()]
    if topic := getattr(command.callback, "topic", ""):
        lines += ["", canvas.paint("Manual:", "head"), f"  quill help {topic}", f"  {MANUAL}/{topic}.md"]
    return "\n".join(line.rstrip() for line in lines)


def flags(param: Any) -> str:
    """An option as its help shows it: "-n, --num-samples INT", "--stream/--no-stream"."""
    short = [o for o in param.opts if not o.startswith("--")]
    long = [o for o in param.opts if o.startswith("--")]
    names = ", ".join([*short, "/".join([*long[:1], *param.secondary_opts[:1]])])
    return names if is_switch(param) else f"{names} {param.metavar or 'TEXT'}"


def is_switch(param: Any) -> bool:
    """Whether an option takes no value."""
    return bool(getattr(param, "is_flag", False) or getattr(param, "count", False))


def usage(param: Any) -> str:
    """An argument as the usage line shows it: "REF", "[GLOB]", "[REF]..."."""
    name = str(param.metavar or param.name.upper())
    return (name if param.required else f"[{name}]") + ("..." if param.nargs == -1 else "")


def described(text: str, default: Any) -> str:
    """Add a default to a help text, or bring the one it names into the same form: "(default: 1)."."""
    text = text.strip().removesuffix(".")
    if found := _DEFAULT.fullmatch(text):
        text, default = f"{found['text']}{found['note'] or ''}", found["default"]
    if default is None or default is False or default in ("", [], ()) or "(default: " in text:
        return f"{text}."
    shown = f"default: {'yes' if default is True else default}"
    return f"{text[:-1]}; {shown})." if text.endswith(" only)") else f"{text} ({shown})."


def _face(params: Iterable[Any], face: Sequence[str]) -> list[Any]:
    """The arguments, the options that people use, in their order, and those that show help."""
    named = {p.name: p for p in params}
    arguments = [p for p in params if p.param_type_name == "argument"]
    return [*arguments, *(named[name] for name in (*face, "help_all", "help"))]


def _params(params: Iterable[Any], *, by_group: bool) -> list[_Section]:
    groups: dict[str, list[tuple[str, str]]] = {"Arguments": [], OPTIONS: []}
    for param in params:
        if getattr(param, "hidden", False):
            continue
        if param.param_type_name == "argument":
            groups["Arguments"].append((usage(param), described(param.help or "", param.default)))
            continue
        # A switch says itself what it is by default; one that can be turned off says so.
        default = None if is_switch(param) and not param.secondary_opts else param.default
        panel = _panel(param) if by_group or "help" in param.name else OPTIONS
        groups.setdefault(panel, []).append((flags(param), described(param.help or "", default)))
    # What every command has comes last.
    groups[COMMON] = groups.pop(COMMON, [])
    return [(title, rows) for title, rows in groups.items() if rows]


def _panel(param: Any) -> str:
    return str(getattr(param, "rich_help_panel", None) or (COMMON if "--help" in param.opts else OPTIONS))


def _commands(command: Any, context: Any) -> Iterator[_Section]:
    panels: dict[str, list[tuple[str, str]]] = {}
    for name, each in getattr(command, "commands", {}).items():
        if not each.hidden:
            panel = getattr(each, "rich_help_panel", None) or PANELS[0]
            panels.setdefault(panel, []).append((name, each.get_short_help_str(200)))
    for title in sorted(panels):
        yield title, panels[title]


def _row(term: str, text: str, column: int, width: int, canvas: Canvas) -> list[str]:
    if width < _NARROW:
        terms = [f"  {canvas.paint(line, 'busy')}" for line in wrap(term, width - 2)]
        return terms + [f"      {line}" for line in wrap(text, width - 6)]
    painted = canvas.paint(term, "busy")
    indent = column + 4
    first, *rest = wrap(text, width - indent)
    if len(term) <= column:
        lines = [f"  {painted}{' ' * (column - len(term))}  {first}"]
    else:
        lines = [f"  {painted}", " " * indent + first]
    return lines + [" " * indent + line for line in rest]


def _indented(text: str, width: int, first: str, rest: str) -> list[str]:
    lines = wrap(text, width - len(rest))
    return [(rest if i else first) + line for i, line in enumerate(lines)]
