"""Config files and overrides into a checked RunConfig, with refusals that name the setting.

Order of precedence: flag, environment, file, default. Overrides are merged into the raw document
before it is checked, so a flag is held to exactly what the file is held to.
"""

from __future__ import annotations

import difflib
import os
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from quill import strictjson
from quill.config import flat as lineage
from quill.config.settings import SECTIONS, RunConfig, Section
from quill.errors import InputError, QuillError

S = TypeVar("S", bound=Section)


def load(path: Path, overrides: Mapping[str, Any] | None = None) -> RunConfig:
    """Read a run's config from a JSON file.

    Args:
        path: The file, in quill's sections or in the flat form of older projects.
        overrides: Values by dotted path, such as {"train.batch_size": 8}; they win over the file.

    Raises:
        InputError: It is not strict JSON, or a setting is unknown or out of bounds.
    """
    document = strictjson.read(path)
    config = parse(document, overrides, origin=str(path), folder=path.parent)
    return config if config.name else config.model_copy(update={"name": path.stem.lower()})


def parse(
    document: Any,
    overrides: Mapping[str, Any] | None = None,
    *,
    origin: str = "config",
    folder: Path | None = None,
    error: type[QuillError] = InputError,
) -> RunConfig:
    """Check a config that is already a JSON value.

    Args:
        document: What the JSON held.
        overrides: Values by dotted path; they win.
        origin: Where it came from, for messages.
        folder: What relative paths of a flat config are relative to.
        error: What to raise when it does not pass.
    """
    if not isinstance(document, dict):
        raise error(f"'{origin}' is not a config", why="a JSON object with sections is needed")
    if lineage.is_flat(document):
        document = lineage.to_sections(document, folder)
    merged = {k: dict(v) if k in SECTIONS and isinstance(v, dict) else v for k, v in document.items()}
    given = {**environment(), **(overrides or {})}
    for path, value in given.items():
        section, _, field = path.rpartition(".")
        target = merged.setdefault(section, {}) if section else merged
        if isinstance(target, dict):
            target[field] = value
    origins = dict.fromkeys(given, "the environment") | dict.fromkeys(overrides or {}, "the flags")
    return check(RunConfig, merged, origin=origin, origins=origins, error=error)


def check(
    model: type[S],
    value: Any,
    *,
    origin: str,
    origins: Mapping[str, str] | None = None,
    error: type[QuillError] = InputError,
) -> S:
    """Validate against a settings model, translating a refusal into quill's own words.

    Args:
        model: What the value must be.
        value: The settings, nested as in a config file.
        origin: Where they came from, for messages.
        origins: The same for single settings by dotted path, where that differs.
        error: What to raise when they do not pass.

    Raises:
        InputError: With the first offending setting's path, its value and its bounds.
    """
    try:
        return model.model_validate(value)
    except ValidationError as e:
        first = e.errors(include_url=False)[0]
        others = len({x["loc"][:2] for x in e.errors(include_url=False)}) - 1
        path = ".".join(str(p) for p in first["loc"][:2])
        what, why, hint = _explain(model, first, (origins or {}).get(path, origin))
        if others > 0:
            why += f" ({others} more setting{'s' if others > 1 else ''} refused)"
        raise error(what, why=why, hint=hint) from None


def environment() -> dict[str, Any]:
    """Settings given as QUILL_<SETTING> in the environment, by dotted path.

    Only where a machine differs from another: the device, its precision and compilation.
    """
    found = {f"train.{k}": os.environ.get(f"QUILL_{k.upper()}") for k in ("device", "dtype", "compile")}
    return {k: v for k, v in found.items() if v}


def _explain(model: type[Section], err: Any, origin: str) -> tuple[str, str, str]:
    unknown = err["type"] == "extra_forbidden"
    # What a person wrote comes first, and last where it is a key of no setting, whatever it is called.
    own = {0, len(err["loc"]) - 1} if unknown else {0}
    loc = [str(p) for i, p in enumerate(err["loc"]) if i in own or not _is_union_arm(p)]
    path = ".".join(loc)
    if unknown:
        close = _closest(loc, model)
        return (
            f"unknown setting '{path if len(path) <= 120 else path[:117] + '...'}' in {origin}",
            "no setting has that name",
            f"did you mean '{close}'?" if close else "see: quill config schema",
        )
    message = str(err["msg"]).removeprefix("Value error, ")
    given = err.get("input")
    shown = f" = {_short(given)}" if not isinstance(given, dict) else ""
    bounds = _bounds(model, loc)
    why = (
        message[:1].lower()
        + message[1:]
        + (f", {bounds}" if err["type"] == "finite_number" and bounds else "")
    )
    what = f"'{path}'{shown} in {origin} is refused" if path else f"{origin} is refused"
    return what, why, _help(model, loc)


def _is_union_arm(part: object) -> bool:
    """Pydantic names the arm of a union in an error's path; a reader of the file has not seen it."""
    return isinstance(part, str) and (
        part in ("int", "str", "float", "bool", "none")
        or part.startswith(("list[", "constrained-", "function-", "literal["))
    )


def _closest(loc: list[str], model: type[Section]) -> str | None:
    names = {
        (f"{section}.{f}" if len(loc) > 1 or model is RunConfig else f): f
        for section, cls in SECTIONS.items()
        for f in cls.model_fields
    }
    if model is not RunConfig:
        names = {f: f for f in model.model_fields}
    elif len(loc) == 1:
        names |= {s: s for s in (*SECTIONS, "name", "schema_version")}
    own = [p for p, f in names.items() if f == loc[-1]]
    if own:
        return own[0]
    ranked = sorted(
        names, key=lambda p: -difflib.SequenceMatcher(None, names[p], loc[-1].replace("-", "_")).ratio()
    )
    best = ranked[0]
    ratio = difflib.SequenceMatcher(None, names[best], loc[-1].replace("-", "_")).ratio()
    return best if ratio > 0.6 else None


def _field(model: type[Section], loc: list[str]) -> FieldInfo | None:
    owner: type[Section] = model
    for part in loc[:-1]:
        owner = SECTIONS.get(part, owner)
    return owner.model_fields.get(loc[-1]) if loc else None


def _bounds(model: type[Section], loc: list[str]) -> str:
    field = _field(model, loc)
    words = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    found = [
        f"{word} {getattr(limit, key):g}"
        for limit in (field.metadata if field else ())
        for key, word in words.items()
        if hasattr(limit, key)
    ]
    return " and ".join(found)


def _help(model: type[Section], loc: list[str]) -> str:
    field = _field(model, loc)
    if not field or not field.description:
        return "quill config schema"
    return f"quill config schema tells all; {loc[-1]} is: {field.description}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def plain_type(annotation: Any) -> tuple[Any, bool]:
    """The simple type under a field's annotation, and whether it may be unset.

    `int | None` gives (int, True); `Literal["a", "b"]` gives the Literal; `str | list[str]` gives
    (list[str], False).
    """
    if typing.get_origin(annotation) is typing.Annotated:
        return plain_type(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        arms = typing.get_args(annotation)
        rest = [a for a in arms if a is not type(None)]
        inner = next((a for a in rest if typing.get_origin(a) is list), rest[0])
        return plain_type(inner)[0], len(rest) < len(arms)
    return annotation, False
