"""What every command has in common, and the flags that are made from settings.

A setting is declared once, as a pydantic field; here its flag is read off: name, type, default, bounds,
help and group. A command's function says only what is its own:

    @command(settings={"": SampleConfig})
    def sample(session: Session, reference: Annotated[str, Argument(...)]) -> None: ...
"""

from __future__ import annotations

import inspect
import os
import re
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from quill.cli import _flags
from quill.cli.output import Form, Output

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

    from quill.config.settings import Section
    from quill.registry.store import Registry

COMMON = "Common"

Json = Annotated[bool, Option("--json", help="Print JSON with a schema field.", rich_help_panel=COMMON)]
Quiet = Annotated[
    bool, Option("-q", "--quiet", help="Print the bare reference, and no progress.", rich_help_panel=COMMON)
]
Verbose = Annotated[bool, Option("-v", "--verbose", help="Tell more, on stderr.", rich_help_panel=COMMON)]
RegistryFlag = Annotated[
    Path | None,
    Option(
        "--registry", metavar="DIR", help="Where the models are; quill list says why.", rich_help_panel=COMMON
    ),
]
Debug = Annotated[bool, Option("--debug", help="On a bug of ours: the traceback.", rich_help_panel=COMMON)]
_COMMON: Mapping[str, tuple[Any, Any]] = {
    "json": (Json, False),
    "quiet": (Quiet, False),
    "verbose": (Verbose, False),
    "registry": (RegistryFlag, None),
    "debug": (Debug, False),
}

# Settings whose values are something that a shell can complete.
_METAVARS = {"init_from": "REF"}
_WHOLE = re.compile(r"[+-]?[0-9]+")
# float() alone would also take spaces, underscores and the digits of every script.
_REAL = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?|[+-]?(?:nan|inf|infinity)", re.I)
# Above this a bound only guards against overflow, and says nothing to a reader of the help.
_TELLING = 2**16


@dataclass(frozen=True)
class Session:
    """One call of a command: where its words go, which registry it means, which settings it was given.

    Attributes:
        output: The sink.
        registry_flag: What `--registry` gave.
        overrides: Settings given as flags, by dotted path, with raw values not yet checked.
    """

    output: Output
    registry_flag: Path | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)

    def registry(self) -> Registry:
        """The registry that is meant; it need not exist yet."""
        from quill.registry.store import Registry, locate

        where = locate(self.registry_flag)
        self.output.detail(f"registry: {where.root} ({where.why})")
        return Registry(where.root, where.why)

    def datasets(self) -> Path:
        """The folder of prepared datasets, beside the registry unless QUILL_DATA says otherwise."""
        from quill.data.store import locate

        return locate(self.registry().root)

    def device(self) -> str:
        """Where a model is put: what QUILL_DEVICE names, else the fastest there is. Imports torch."""
        from quill.training.device import find_device

        return find_device(os.environ.get("QUILL_DEVICE") or "auto")


def command(
    settings: Mapping[str, type[Section]] | None = None,
    *,
    skip: frozenset[str] = frozenset(),
    short: Mapping[str, str] | None = None,
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command's function the common options and the flags of its settings.

    Args:
        settings: Sections by the prefix of their dotted paths; "" for paths without one.
        skip: Dotted paths that the command has a form of its own for.
        short: Second, short flags by dotted path.

    Returns:
        A decorator; the function gets a Session first and what it declared itself after that.
    """
    flags: dict[str, tuple[str, inspect.Parameter, Callable[[Any], Any]]] = {}
    for section, model in (settings or {}).items():
        for name, info in model.model_fields.items():
            path = f"{section}.{name}" if section else name
            if path not in skip:
                parameter = path.replace(".", "__")
                also = (short or {}).get(path)
                made, convert = _flag(parameter, name, info, model.title, also)
                flags[parameter] = (path, made, convert)

    def decorate(body: Callable[..., None]) -> Callable[..., None]:
        own = list(inspect.signature(body, eval_str=True).parameters.values())[1:]

        def call(**given: Any) -> None:
            shared = {name: given.pop(name) for name in _COMMON}
            overrides = {}
            for parameter, (path, _, convert) in flags.items():
                value = given.pop(parameter)
                if value is not None:
                    overrides[path] = convert(value)
            form: Form = "json" if shared["json"] else "quiet" if shared["quiet"] else "human"
            output = Output(form, verbose=shared["verbose"])
            body(Session(output, shared["registry"], overrides), **given)

        common = [
            inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
            for n, (annotation, default) in _COMMON.items()
        ]
        parameters = [*(p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own)]
        parameters += [*(made for _, made, _ in flags.values()), *common]
        call.__name__, call.__doc__, call.__module__ = body.__name__, body.__doc__, body.__module__
        call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        call.__annotations__ = {}
        return call

    return decorate


def _flag(
    parameter: str, name: str, info: FieldInfo, panel: str, short: str | None
) -> tuple[inspect.Parameter, Callable[[Any], Any]]:
    """The parameter that Typer makes a setting's flag from, and what turns its text into a raw value."""
    from quill.config.reading import plain_type, union_arms

    kind, optional = plain_type(info.annotation)
    flag = _flags.of_setting(name, info.json_schema_extra)
    annotation: Any = str | None
    metavar: str | None = _METAVARS.get(name, "TEXT")
    declared = f"--{flag}"
    convert: Callable[[Any], Any] = _text(optional)
    if kind is bool:
        annotation, metavar, declared = bool | None, None, f"--{flag}/--no-{flag}"
        convert = bool
    elif kind in (int, float):
        metavar = ("INT" if kind is int else "NUMBER") + _bounds(info)
        convert = _number(kind, optional)
    elif typing.get_origin(kind) is typing.Literal:
        metavar = "|".join(map(str, typing.get_args(kind)))
    elif typing.get_origin(kind) is list:
        annotation = list[str] | None
        convert = _one_or_many if str in union_arms(info.annotation) else list
    elif choices := _choices(info):
        metavar = "|".join(choices)
    spelled = (declared, short) if short else (declared,)
    option = Option(*spelled, metavar=metavar, help=_help(info), rich_help_panel=panel, show_default=False)
    made = inspect.Parameter(
        parameter, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[annotation, option]
    )
    return made, convert


def _help(info: FieldInfo) -> str:
    text = info.description or ""
    default = info.default
    if default is None or default == []:
        return text
    shown = ("yes" if default else "no") if isinstance(default, bool) else f"{default}"
    return f"{text} [default: {shown}]"


def _choices(info: FieldInfo) -> list[str]:
    """The values that discovery found for a setting; empty for other settings."""
    extra = info.json_schema_extra
    found = extra.get("enum") if isinstance(extra, dict) else None
    return [str(choice) for choice in found if choice is not None] if isinstance(found, list) else []


def _bounds(info: FieldInfo) -> str:
    """The bounds of a number, as they stand behind its type: ">=1", ">0 <=1"."""
    found: dict[str, float] = {}
    for constraint in _constraints(info.annotation, info.metadata):
        found |= {k: v for k in ("gt", "ge", "lt", "le") if (v := getattr(constraint, k, None)) is not None}
    signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
    return " ".join(f"{signs[k]}{v}" for k, v in found.items() if v <= _TELLING)


def _constraints(annotation: Any, metadata: list[Any]) -> list[Any]:
    """What bounds a field, wherever in its annotation it was written."""
    found = list(metadata)
    for part in typing.get_args(annotation):
        if typing.get_origin(part) is Annotated:
            found += _constraints(None, list(typing.get_args(part)[1:]))
    return [c for f in found for c in (f, *getattr(f, "metadata", ()))]


def _one_or_many(values: list[str]) -> str | list[str]:
    return values[0] if len(values) == 1 else list(values)


def _text(optional: bool) -> Callable[[str], str | None]:
    return lambda text: None if optional and text == "none" else text


def _number(kind: type, optional: bool) -> Callable[[str], Any]:
    """Text to a raw number; what is none stays text, and the setting's own check refuses it by name."""

    def convert(text: str) -> Any:
        if optional and text == "none":
            return None
        if _WHOLE.fullmatch(text) and len(text) < 400:
            return int(text)
        return float(text) if kind is float and _REAL.fullmatch(text) else text

    return convert
