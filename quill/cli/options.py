"""What every command has in common, and the flags that are made from settings.

A setting is declared once, as a pydantic field; its flag takes name, type, default, help and group from
there. A command's function declares only its own parameters:

    @command({"": SampleConfig}, examples="quill sample shakespeare")
    def sample(session: Session, reference: Annotated[str, Argument(...)]) -> None: ...
"""

from __future__ import annotations

import inspect
import re
import sys
import typing
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from quill.cli import _help
from quill.cli._completion import completing, datasets, models
from quill.cli._help import COMMON, OPTIONS
from quill.cli.output import Form, Output, canvas_of

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

    from quill.config.settings import Section
    from quill.registry.store import Registry

_DEVICES = ("auto", "cpu", "cuda", "mps")
Json = Annotated[bool, Option("--json", help="Print JSON.", rich_help_panel=COMMON)]
Quiet = Annotated[
    bool,
    Option("--quiet", "-q", help="Print only names and references, and no progress.", rich_help_panel=COMMON),
]
Verbose = Annotated[
    bool, Option("--verbose", "-v", help="Print more detail to stderr.", rich_help_panel=COMMON)
]
RegistryFlag = Annotated[
    Path | None,
    Option(
        "--registry",
        metavar="DIR",
        help="Registry of models (default: the one that quill list prints).",
        rich_help_panel=COMMON,
    ),
]
Debug = Annotated[
    bool, Option("--debug", help="Show the traceback of internal errors.", rich_help_panel=COMMON)
]
_COMMON: Mapping[str, tuple[Any, Any]] = {
    "json": (Json, False),
    "quiet": (Quiet, False),
    "verbose": (Verbose, False),
    "registry": (RegistryFlag, None),
    "debug": (Debug, False),
}
HelpAll = Annotated[
    bool,
    Option(
        "--help-all",
        help="Show every option, by group.",
        is_eager=True,
        expose_value=False,
        callback=lambda ctx, wanted: _print_whole_help(ctx, wanted),
        rich_help_panel=COMMON,
    ),
]


def _device(purpose: str) -> Any:
    return Option(
        "--device",
        metavar="DEVICE",
        help=f"{purpose}: auto, cpu, cuda, cuda:N or mps (default: auto).",
        autocompletion=completing(*_DEVICES),
    )


def reference(text: str) -> Any:
    """The argument that names a model or an unfinished run with weights; `text` is its help."""
    return Argument(metavar="REF", help=text, autocompletion=models(drafts="weights"))


Device = Annotated[str | None, _device("Device to compute on")]
VerifyDevice = Annotated[str | None, _device("Device that --verify runs quill's own model on")]

_WHOLE = re.compile(r"[+-]?[0-9]+")
# float() alone would also take spaces, underscores and the digits of every script.
_REAL = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?|[+-]?(?:nan|inf|infinity)", re.I)


@dataclass(frozen=True)
class Session:
    """One call of a command.

    Attributes:
        output: The sink.
        registry_flag: Value of `--registry`.
        overrides: Settings given as flags, by dotted path; raw values, not validated yet.
    """

    output: Output
    registry_flag: Path | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)

    def registry(self) -> Registry:
        """The registry to use; it need not exist yet."""
        from quill.registry.store import Registry, locate

        where = locate(self.registry_flag)
        self.output.detail(f"registry: {where.root} ({where.why})")
        return Registry(where.root, where.why, where.shipped)

    def datasets(self) -> Path:
        """The folder of prepared datasets: QUILL_DATA, or next to the registry."""
        from quill.data.store import locate

        return locate(self.registry().root)

    def device(self, flag: str | None = None) -> str:
        """The device to put a model on: the flag's, that of QUILL_DEVICE, or the fastest. Imports torch.

        Raises:
            InputError: There is no device of that name anywhere.
            ResourceError: This system does not have it.
        """
        from quill.config import reading

        wanted = reading.device(flag)
        from quill.training.device import find_device

        return find_device(wanted)


def command(
    settings: Mapping[str, type[Section]] | None = None,
    *,
    skip: Container[str] = (),
    short: Mapping[str, str] | None = None,
    face: Sequence[str] = (),
    examples: str,
    topic: str = "",
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command's function the common options and the flags of its settings.

    Args:
        settings: Sections by the prefix of their dotted paths; "" for paths without one.
        skip: Dotted paths that get no flag.
        short: Short flags by dotted path.
        face: Options that `--help` shows, in this order: parameters by name, settings by dotted path. The
            others are in `--help-all` only. Empty: `--help` shows all.
        examples: Commands for the end of the help, one a line.
        topic: Page of the manual about the command.

    Returns:
        A decorator; the function gets a Session first, then its own parameters.
    """
    flags: dict[str, tuple[str, inspect.Parameter, Callable[[Any], Any]]] = {}
    for section, model in (settings or {}).items():
        for name, info in model.model_fields.items():
            path = f"{section}.{name}" if section else name
            if path not in skip:
                parameter = path.replace(".", "__")
                panel = f"{model.title} settings" if face and model.title else OPTIONS
                made, convert = _flag(parameter, name, info, panel, (short or {}).get(path))
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
            given.pop("help_all", None)
            form: Form = "json" if shared["json"] else "quiet" if shared["quiet"] else "human"
            output = Output(form, verbose=shared["verbose"])
            body(Session(output, shared["registry"], overrides), **given)

        common = {**_COMMON, "help_all": (HelpAll, False)} if face else dict(_COMMON)
        added = [
            inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
            for n, (annotation, default) in common.items()
        ]
        parameters = [*(p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own)]
        parameters += [*(made for _, made, _ in flags.values()), *added]
        call.__name__, call.__doc__, call.__module__ = body.__name__, body.__doc__, body.__module__
        call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        call.__annotations__ = {}
        call.examples, call.topic = examples, topic  # type: ignore[attr-defined]
        call.face = [path.replace(".", "__") for path in face]  # type: ignore[attr-defined]
        return call

    return decorate


def _print_whole_help(context: typer.Context, wanted: bool) -> None:
    if wanted:
        text = _help.render(context.command, context, canvas_of(sys.stdout), whole=True)
        Output().draw(text + "\n")
        raise typer.Exit


def _flag(
    parameter: str, name: str, info: FieldInfo, panel: str, short: str | None
) -> tuple[inspect.Parameter, Callable[[Any], Any]]:
    """The parameter that Typer makes a setting's flag from, and what turns its text into a raw value."""
    from quill.cli import _flags
    from quill.config.reading import plain_type

    kind, _ = plain_type(info.annotation)
    flag = _flags.of_setting(name, info.json_schema_extra)
    annotation: Any = str | None
    metavar: str | None = "TEXT"
    declared = f"--{flag}"
    complete: Callable[..., list[str]] | None = None
    choices: Sequence[str] = ()
    if kind is bool:
        annotation, metavar, declared = bool | None, None, f"--{flag}/--no-{flag}"
    elif kind in (int, float):
        metavar = "INT" if kind is int else "NUMBER"
    elif typing.get_origin(kind) is typing.Literal:
        choices = list(map(str, typing.get_args(kind)))
    elif typing.get_origin(kind) is list:
        annotation = list[str] | None
    else:
        choices = _choices(info)
    if name == "source":
        metavar, complete = "SOURCE", datasets
    elif name in ("init_from", "teacher"):
        metavar, complete = "REF", models()
    elif name == "device":
        metavar, complete = "DEVICE", completing(*_DEVICES)
    if choices:
        metavar, complete = "|".join(choices), completing(*choices)
    spelled = (declared, short) if short else (declared,)
    option = Option(
        *spelled,
        metavar=metavar,
        help=_help.described(info.description or "", info.default),
        rich_help_panel=panel,
        autocompletion=complete,
    )
    made = inspect.Parameter(
        parameter, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[annotation, option]
    )
    return made, converter(info)


def converter(info: FieldInfo) -> Callable[[Any], Any]:
    """What turns the words that were typed for a setting into its raw value: a text, or a list of texts."""
    from quill.config.reading import plain_type, union_arms

    kind, optional = plain_type(info.annotation)
    if kind is bool:
        return bool
    if kind in (int, float):
        return _number(kind, optional)
    if typing.get_origin(kind) is typing.Literal and {"on", "off"} <= set(map(str, typing.get_args(kind))):
        return _switch
    if typing.get_origin(kind) is list:
        return _one_or_many if str in union_arms(info.annotation) else list
    return _text(optional)


def _choices(info: FieldInfo) -> list[str]:
    """The values that discovery found for a setting; empty for other settings."""
    extra = info.json_schema_extra
    found = extra.get("enum") if isinstance(extra, dict) else None
    return [str(choice) for choice in found if choice is not None] if isinstance(found, list) else []


def _one_or_many(values: list[str]) -> str | list[str]:
    return values[0] if len(values) == 1 else list(values)


def _switch(text: str) -> str:
    """Read the spellings of yes and no for a setting that is on, off or something else."""
    return {"true": "on", "yes": "on", "1": "on", "false": "off", "no": "off", "0": "off"}.get(
        text.lower(), text
    )


def _text(optional: bool) -> Callable[[str], str | None]:
    return lambda text: None if optional and text == "none" else text


def _number(kind: type, optional: bool) -> Callable[[str], Any]:
    """Turn text into a raw number; anything else stays text, for the setting's validation to refuse."""

    def convert(text: str) -> Any:
        if optional and text == "none":
            return None
        if _WHOLE.fullmatch(text) and len(text) < 400:
            return int(text)
        return float(text) if kind is float and _REAL.fullmatch(text) else text

    return convert
