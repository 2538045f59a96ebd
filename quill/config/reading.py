"""Read and validate configs; an error names the setting, its value and the rule.

Order of precedence: override (a flag), environment, file, default.
"""

from __future__ import annotations

import difflib
import os
import re
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from quill import shipped, strictjson
from quill.config import flat
from quill.config.settings import SCHEMA_VERSION, SECTIONS, RunConfig, Section, TrainConfig
from quill.errors import InputError, NotFoundError, QuillError, newer, shorten

S = TypeVar("S", bound=Section)

# A config has a few kilobytes, unless it names the files of a data source, as many as fit on a command line.
_MOST_BYTES = 4 << 20
# Several times those that there are; each one too many takes a kilobyte to refuse.
_MOST_SETTINGS = 1000
_NOT_IN_NAMES = re.compile(r"[^a-z0-9._-]+")


def load(path: Path, overrides: Mapping[str, Any] | None = None) -> RunConfig:
    """Read a run's config from a JSON file.

    Args:
        path: The file: quill's sections, or the flat form of older projects. If there is no such file, the
            name of a config that comes with quill. A config without a name gets that of its file, and none
            if it came through a pipe.
        overrides: Values by dotted path, such as {"train.batch_size": 8}; they win over the file.

    Raises:
        InputError: The file is not strict JSON or too large, or a setting is unknown or invalid.
        NotFoundError: There is no such file or config.
    """
    path = _find(path)
    document = strictjson.read(path, most=_MOST_BYTES)
    config = parse(document, overrides, origin=str(path), folder=path.parent)
    # A pipe is named after its descriptor.
    unnamed = not config.name and path.is_file()
    return config.model_copy(update={"name": path.stem.lower()}) if unnamed else config


def _find(path: Path) -> Path:
    """Find a config by its path or, if it is a bare name without a file, among the shipped ones."""
    if path.exists() or len(path.parts) != 1 or path.suffix:
        return path
    known = shipped.configs()
    if path.name not in known:
        raise NotFoundError(
            f"no config file '{path}'",
            why=f"the configs that come with quill are {', '.join(known)}" if known else "",
            close=difflib.get_close_matches(path.name, known, 3),
        )
    return known[path.name]


def parse(
    document: Any,
    overrides: Mapping[str, Any] | None = None,
    *,
    origin: str = "config",
    folder: Path | None = None,
    error: type[QuillError] = InputError,
) -> RunConfig:
    """Validate a config that is already a JSON value.

    Overrides win over the environment, which wins over the document. They are merged before validation, so
    all three obey the same rules.

    Args:
        document: The JSON value.
        overrides: Values by dotted path.
        origin: Where the document came from, for messages.
        folder: Folder that relative paths of a flat config start from.
        error: What to raise if validation fails.
    """
    if not isinstance(document, dict):
        raise error(f"'{origin}' is not a config", why="a config is a JSON object of sections")
    found = sum(len(v) if isinstance(v, dict) else 1 for v in document.values())
    if found > _MOST_SETTINGS:
        why = f"a config has at most {_MOST_SETTINGS:,}"
        raise error(f"'{origin}' has {found:,} settings", why=why, hint="quill config table")
    if flat.is_flat(document):
        document = flat.to_sections(document, folder)
    merged = {k: dict(v) if k in SECTIONS and isinstance(v, dict) else v for k, v in document.items()}
    outside = environment()
    given = {**outside, **(overrides or {})}
    for path, value in given.items():
        section, _, field = path.rpartition(".")
        target = merged.setdefault(section, {}) if section else merged
        if isinstance(target, dict):
            target[field] = value
    origins = {path: variable(path) for path in outside} | dict.fromkeys(overrides or {}, "the arguments")
    return check(RunConfig, merged, origin=origin, origins=origins, error=error)


def check(
    model: type[S],
    value: Any,
    *,
    origin: str,
    origins: Mapping[str, str] | None = None,
    error: type[QuillError] = InputError,
) -> S:
    """Validate settings, reporting the first invalid one in quill's own words.

    Args:
        model: The section to validate against.
        value: The settings, nested as in a config file.
        origin: Where they came from, for messages.
        origins: Where single settings came from, by dotted path, if elsewhere.
        error: What to raise if validation fails.

    Raises:
        InputError: A setting is unknown or invalid, or a newer quill wrote the config.
    """
    version = value.get("schema_version") if model is RunConfig and isinstance(value, dict) else None
    if type(version) is int and version > SCHEMA_VERSION:
        raise newer(shorten(origin), version, SCHEMA_VERSION)
    try:
        return model.model_validate(value)
    except ValidationError as e:
        errors = e.errors(include_url=False)
        path = ".".join(str(part) for part in errors[0]["loc"][:2])
        what, why, hint = _explain(model, errors[0], (origins or {}).get(path, origin))
        others = len({x["loc"][:2] for x in errors}) - 1
        if others > 0:
            why += f" ({others} more invalid setting{'s' if others > 1 else ''})"
        raise error(what, why=why, hint=hint) from None


def name_after(source: str | list[str]) -> str:
    """A model's name from its text: "Moby Dick.txt" gives moby-dick.

    Raises:
        InputError: No name follows from it.
    """
    if isinstance(source, str) and source != "-" and not set("*?[") & set(source):
        path = Path(source)
        stem = path.name
        if path.is_file():
            compressed = Path(stem).suffix in (".gz", ".zst", ".xz", ".bz2")
            stem = Path(Path(stem).stem if compressed else stem).stem
        cleaned = _NOT_IN_NAMES.sub("-", stem.lower()).strip("-._")[:64]
        if cleaned:
            return cleaned
    raise InputError("the model has no name", why="it cannot be derived from the data", hint="name=my-model")


def environment() -> dict[str, Any]:
    """Settings from QUILL_<SETTING> environment variables, by dotted path.

    Only those that depend on the computer: device, dtype and compile.
    """
    found = {
        path: os.environ.get(variable(path)) for path in ("train.device", "train.dtype", "train.compile")
    }
    return {path: value for path, value in found.items() if value}


def variable(path: str) -> str:
    """The environment variable of a setting: QUILL_DEVICE for train.device."""
    return f"QUILL_{path.rpartition('.')[2].upper()}"


def device(given: str | None = None) -> str:
    """The device that was given, else that of QUILL_DEVICE, else "auto".

    Raises:
        InputError: It cannot be the name of a device.
    """
    wanted = given or environment().get("train.device") or "auto"
    origin = "the arguments" if given else variable("train.device")
    return check(TrainConfig, {"device": wanted}, origin=origin).device


def _explain(model: type[Section], err: Any, origin: str) -> tuple[str, str, str]:
    """What is wrong, why, and what to do, for one of pydantic's errors."""
    unknown = err["type"] == "extra_forbidden"
    # The keys a user wrote are kept, whatever they are called; the names of union arms are not theirs.
    written = {0, len(err["loc"]) - 1} if unknown else {0}
    loc = [str(part) for i, part in enumerate(err["loc"]) if i in written or not _is_union_arm(part)]
    path = ".".join(loc)
    if unknown:
        close = _closest(loc, model)
        return (
            f"unknown setting {shorten(path, 120)} in {origin}",
            f"did you mean '{close}'?" if close else "no setting has that name",
            "quill config table",
        )
    if not path:
        what = f"{origin} is invalid"
    elif isinstance(err["input"], dict):
        what = f"section '{path}' in {origin} is invalid"
    else:
        what = f"'{path}' = {shorten(err['input'], 60)} in {origin} is invalid"
    field = _field(model, loc)
    return what, _rule(err), err.get("ctx", {}).get("hint", "quill config table" if field else "")


_KINDS = {
    "bool_type": "true or false",
    "dict_type": "a section of settings",
    "finite_number": "finite",
    "float_type": "a number",
    "int_type": "an integer",
    "list_type": "a list",
    "model_type": "a section of settings",
    "string_type": "a string",
}
_BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}


def _rule(err: Any) -> str:
    """The rule that a value breaks."""
    kind = err["type"]
    if kind in _KINDS:
        return f"it must be {_KINDS[kind]}"
    if kind == "literal_error":
        return f"choose {err['ctx']['expected'].replace(chr(39), '').replace(' or ', ', ')}"
    bounds = [(key, limit) for key in _BOUNDS if (limit := err.get("ctx", {}).get(key)) is not None]
    if bounds:
        return "it must be " + " and ".join(f"{_BOUNDS[key]} {limit:,}" for key, limit in bounds)
    message = str(err["msg"]).removeprefix("Value error, ")
    return message[:1].lower() + message[1:]


def _is_union_arm(part: object) -> bool:
    """Pydantic adds the arm of a union to an error's path."""
    return isinstance(part, str) and (
        part in ("int", "str", "float", "bool", "none")
        or part.startswith(("list[", "constrained-", "function-", "literal["))
    )


def _closest(loc: list[str], model: type[Section]) -> str | None:
    """The dotted path of the setting that was probably meant."""
    if model is RunConfig:
        names = {f"{section}.{f}": f for section, cls in SECTIONS.items() for f in cls.model_fields}
        if len(loc) == 1:
            names |= {name: name for name in (*SECTIONS, "name", "schema_version")}
    else:
        names = {f: f for f in model.model_fields}
    written = loc[-1].replace("-", "_")
    ratios = {p: difflib.SequenceMatcher(None, f, written).ratio() for p, f in names.items()}
    best = max(ratios, key=lambda p: ratios[p])
    return best if ratios[best] > 0.6 else None


def _field(model: type[Section], loc: list[str]) -> FieldInfo | None:
    """The setting that an error is about; None for a whole section."""
    owner: type[Section] = model
    for part in loc[:-1]:
        owner = SECTIONS.get(part, owner)
    return owner.model_fields.get(loc[-1]) if loc else None


def plain_type(annotation: Any) -> tuple[Any, bool]:
    """The simple type under a field's annotation, and whether None is accepted.

    `int | None` gives (int, True), `Literal["a", "b"]` the Literal and False, `str | list[str]`
    (list[str], False).
    """
    if typing.get_origin(annotation) is typing.Annotated:
        return plain_type(typing.get_args(annotation)[0])
    arms = union_arms(annotation)
    if len(arms) == 1:
        return annotation, False
    rest = [a for a in arms if a is not type(None)]
    inner = next((a for a in rest if typing.get_origin(a) is list), rest[0])
    return plain_type(inner)[0], len(rest) < len(arms)


def union_arms(annotation: Any) -> tuple[Any, ...]:
    """The alternatives of a union; an annotation that is not a union is its own only one."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return typing.get_args(annotation)
    return (annotation,)
