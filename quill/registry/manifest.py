"""A version's manifest: written last, so that its presence means that everything else is there.

It lists the size and sha256 of each file, and where the model came from. Its paths are relative, so a
registry may be moved, copied and archived. It is validated here, once, when it is read.
"""

from __future__ import annotations

import os
import re
import stat
import sys
import time
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, TypedDict, cast

from quill import __version__, fsio, strictjson
from quill.errors import CorruptError, NotFoundError, shorten
from quill.registry import migrations

FILE = fsio.MANIFEST
CONFIG, WEIGHTS, TOKENIZER = REQUIRED = ("config.json", "model.safetensors", "tokenizer.json")
METRICS, CARD = "metrics.jsonl", "README.md"
# What a run keeps next to them until it is published; the log stays.
STATE, STATUS, LOG = "state", "status.json", "run.log"
# The most bytes of a file; weights are checked against their header. Metrics have those of 100 million steps.
_MOST_BYTES = 16 << 20
_MOST_BYTES_OF = {TOKENIZER: strictjson.MOST_BYTES, METRICS: 1 << 34, LOG: 1 << 30}
_SHA256 = re.compile("[0-9a-f]{64}")


class FileEntry(TypedDict):
    """What a manifest says of one file."""

    bytes: int
    sha256: str


class Source(TypedDict):
    """Another model or a foreign file: the parent, or the original of a copy."""

    reference: str | None
    digest: str | None


class Data(TypedDict):
    """The dataset that a model was trained on."""

    name: str | None
    key: str | None
    sha256: str | None
    tokens: int | None
    tokenizer: str | None
    tokenizer_sha256: str | None


class Git(TypedDict):
    """The state of the git checkout that a model was made in."""

    commit: str | None
    dirty: bool | None


class Imported(TypedDict):
    """How a model was imported."""

    format: str | None
    notes: list[str] | None


class Manifest(TypedDict):
    """A validated manifest; what it does not say is None."""

    schema: int
    reference: str | None
    created: str | None
    versions: dict[str, str | None] | None
    git: Git | None
    config_sha256: str | None
    data: Data | None
    parent: Source | None
    extends: Source | None
    teachers: list[Source] | None
    copied_from: Source | None
    imported: Imported | None
    seeds: dict[str, int] | None
    device: str | None
    instructions: str | None
    dtype: str | None
    compiled: bool | None
    micro_batch_size: int | None
    gradient_checkpointing: bool | None
    parameters: int | None
    steps: int | None
    ended: str | None
    best_step: int | None
    averaged: bool | None
    temperature: float | None
    held_out: int | None
    best_val_loss: float | None
    bits_per_byte: float | None
    seconds: float | None
    files: dict[str, FileEntry]


Fields = Mapping[str, Any]  # a type, or Fields again for an object, or [Fields] for a list of objects

_SOURCE: Fields = {"reference": str, "digest": str}
_FIELDS: Fields = {
    "reference": str,
    "created": str,
    "versions": {"quill": str, "torch": str, "python": str},
    "git": {"commit": str, "dirty": bool},
    "config_sha256": str,
    "data": {
        "name": str,
        "key": str,
        "sha256": str,
        "tokens": int,
        "tokenizer": str,
        "tokenizer_sha256": str,
    },
    "parent": _SOURCE,
    "extends": _SOURCE,
    "teachers": [_SOURCE],
    "copied_from": _SOURCE,
    "imported": {"format": str, "notes": list},
    "seeds": {"train": int},
    "device": str,
    "instructions": str,
    "dtype": str,
    "compiled": bool,
    "micro_batch_size": int,
    "gradient_checkpointing": bool,
    "parameters": int,
    "steps": int,
    "ended": str,
    "best_step": int,
    "averaged": bool,
    "temperature": float,
    "held_out": int,
    "best_val_loss": float,
    "bits_per_byte": float,
    "seconds": float,
}
UNKNOWN = cast(Manifest, {"schema": migrations.SCHEMA_VERSION, **dict.fromkeys(_FIELDS), "files": {}})


def read(folder: Path) -> Manifest:
    """Read and validate the manifest of a folder.

    Raises:
        NotFoundError: There is none: the folder is a draft, or not a version.
        CorruptError: It is not a manifest.
        InputError: It was made by a newer quill.
    """
    path = os.path.join(folder, FILE)
    try:
        document = read_object(path)
    except FileNotFoundError:
        raise NotFoundError(f"no manifest in '{folder}'", why="a published version has one") from None
    return validate(migrations.migrate(document, "manifest", origin=path), path)


def validate(document: Mapping[str, Any], path: Path | str) -> Manifest:
    """Check what every reader of a manifest relies on.

    Args:
        document: The manifest, of the current schema.
        path: Where it was read from, for the message.

    Raises:
        CorruptError: A field has another type, or a listed file is not safe to read.
    """
    listed = document.get("files")
    if not isinstance(listed, dict) or not listed:
        raise CorruptError(f"'{path}' is damaged", why="it lists no files")
    for name, entry in listed.items():
        if not _stays_inside(name):
            raise CorruptError(f"'{path}' is not safe to read", why=f"it lists a file at {shorten(name)}")
        if not (
            isinstance(entry, dict) and fits(entry.get("bytes"), int) and _is_sha256(entry.get("sha256"))
        ):
            why = f"its entry for {shorten(name)} has no size and sha256"
            raise CorruptError(f"'{path}' is damaged", why=why)
    return cast(Manifest, complete(document, _FIELDS, path))


def facts(values: Mapping[str, Any] | None, path: Path) -> Manifest:
    """Validate what a manifest would say of a model, before it has files.

    Args:
        values: The known fields; None for none.
        path: Where they were read from, for the message.

    Raises:
        CorruptError: A field has the wrong type.
    """
    return cast(Manifest, {**UNKNOWN, **complete(values or {}, _FIELDS, path), "files": {}})


def complete(values: Mapping[str, Any], fields: Fields, path: Path | str, at: str = "") -> dict[str, Any]:
    """Check the types of an object's known fields, and make those that are missing None.

    Args:
        values: The object.
        fields: The type of each known field; Fields again for an object, [Fields] for a list of objects.
        path: Where it was read from, for the message.
        at: The dotted path of the object, for the message.

    Raises:
        CorruptError: A field has another type.
    """
    found = dict(values)
    for name, kind in fields.items():
        value = found.setdefault(name)
        # Most values are right at first sight; a list of thousands of models is read here.
        if value is None:
            continue
        if type(value) is kind:
            if kind is not int or 0 <= value < 2**63:
                continue
        elif type(value) is dict and type(kind) is dict:
            found[name] = complete(value, kind, path, f"{at}{name}.")
            continue
        inner = kind[0] if isinstance(kind, list) else kind if isinstance(kind, Mapping) else None
        objects = value if isinstance(kind, list) else [value]
        right = isinstance(objects, list) and all(isinstance(o, dict) for o in objects)
        if not (fits(value, kind) if inner is None else right):
            raise CorruptError(f"'{path}' is damaged", why=f"its '{at}{name}' is {shorten(value)}")
        if inner is not None:
            completed = [complete(o, inner, path, f"{at}{name}.") for o in objects]
            found[name] = completed if isinstance(kind, list) else completed[0]
    return found


def fits(value: Any, kind: type) -> bool:
    """Whether a value has a field's type; numbers are not negative and not beyond 64 bits."""
    if isinstance(value, bool):
        return kind is bool
    if kind is float:
        return isinstance(value, float) or fits(value, int)
    return isinstance(value, kind) and (not isinstance(value, int) or 0 <= value < 2**63)


def read_object(path: Path | str) -> dict[str, Any]:
    """Read a JSON object from one of the registry's small files, never through a link.

    Raises:
        FileNotFoundError: There is no such file; only the caller knows what that means.
        CorruptError: It is not a JSON object, or larger than any such file.
    """
    raw = fsio.read_plain(path, _MOST_BYTES)
    document = strictjson.parse(raw, origin=str(path), error=CorruptError, finite=True)
    if not isinstance(document, dict):
        raise CorruptError(f"'{path}' is damaged", why="a JSON object is needed")
    return document


def most_bytes(name: str) -> int:
    """The most bytes that one of a version's files may have to be read whole."""
    return _MOST_BYTES_OF.get(name, _MOST_BYTES)


def build(folder: Path, reference: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Make the manifest of a draft whose files are complete.

    Args:
        folder: The draft's folder.
        reference: The version's name and number.
        fields: Facts that only the caller knows: data, parent, seeds, device, steps, parameters,
            best_val_loss, seconds.

    Raises:
        CorruptError: A file that every version needs is missing, or something is not a plain file.
    """
    names = sorted(files(folder))
    if missing := [n for n in REQUIRED if n not in names]:
        raise CorruptError(f"'{folder}' has no {missing[0]}", why=f"a version needs {', '.join(REQUIRED)}")
    config = strictjson.read(folder / CONFIG, error=CorruptError)
    return {
        "schema": migrations.SCHEMA_VERSION,
        "reference": reference,
        "created": utc_now(),
        "versions": versions(),
        "git": _git_state(),
        "config_sha256": config_sha256(config),
        **fields,
        "files": {n: describe(folder / n) for n in names},
    }


def of_state(folder: Path, reference: str, step: int) -> dict[str, Any]:
    """Make the manifest of a resume state's folder."""
    return {
        "schema": migrations.SCHEMA_VERSION,
        "reference": reference,
        "step": step,
        "created": utc_now(),
        "files": {n: describe(folder / n) for n in sorted(files(folder))},
    }


def config_sha256(config: Any) -> str:
    """The hash of a config as a value: the same however its file is laid out."""
    import hashlib

    return hashlib.sha256(strictjson.canonical(config)).hexdigest()


def describe(path: Path) -> FileEntry:
    """Measure and hash one file."""
    return {"bytes": path.stat().st_size, "sha256": fsio.sha256(path)}


def files(folder: Path, prefix: str = "") -> Iterator[str]:
    """The files that belong to a version, as relative paths; resume states, status and log do not."""
    skip = () if prefix else (STATE, STATUS, LOG, FILE)
    with fsio.guard(folder, "read"):
        entries = list(os.scandir(folder))
    for entry in entries:
        if entry.name in skip or entry.name.startswith("."):
            continue
        if entry.is_dir(follow_symlinks=False):
            yield from files(Path(entry.path), f"{prefix}{entry.name}/")
        elif entry.is_file(follow_symlinks=False):
            yield prefix + entry.name
        else:
            raise CorruptError(
                f"'{entry.path}' is a link or a device", why="a version is made of plain files"
            )


def stamps(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Inode, size and time of each of a version's files, which change when it is replaced or written to."""
    found = ((n, os.lstat(folder / n)) for n in files(folder))
    with fsio.guard(folder, "read"):
        return {n: (s.st_ino, s.st_size, s.st_mtime_ns) for n, s in found}


def changed(folder: Path, listed: Mapping[str, FileEntry]) -> str | None:
    """The first listed file that is missing, not a plain file or of another size; nothing is read."""
    inside = os.path.join(folder, "")
    for name, entry in listed.items():
        try:
            found = os.lstat(inside + name)
        except OSError:
            return name
        if not stat.S_ISREG(found.st_mode) or found.st_size != entry["bytes"]:
            return name
    return None


def versions() -> dict[str, str | None]:
    """The versions of quill, torch and Python in use, without loading torch."""
    torch = getattr(sys.modules.get("torch"), "__version__", None)
    if torch is None:
        from importlib import metadata

        try:
            torch = metadata.version("torch")
        except metadata.PackageNotFoundError:
            torch = None
    return {
        "quill": __version__,
        "torch": None if torch is None else str(torch),
        "python": ".".join(map(str, sys.version_info[:3])),
    }


def utc_now() -> str:
    """The time in UTC, ISO 8601 to the second."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _is_sha256(value: Any) -> bool:
    return isinstance(value, str) and _SHA256.fullmatch(value) is not None


@lru_cache(maxsize=256)
def _stays_inside(name: str) -> bool:
    """Whether a listed path is relative and leads nowhere but down."""
    return (
        "\\" not in name
        and "\0" not in name
        and ":" not in name
        and not {"", ".", ".."} & set(name.split("/"))
    )


def _git_state() -> Git | None:
    """The commit that the working directory is at; None outside a git checkout."""
    try:
        here = Path.cwd()
    except OSError:
        return None
    if not any((p / ".git").exists() for p in (here, *here.parents)):
        return None
    commit = _git("rev-parse", "HEAD")
    changes = _git("status", "--porcelain", "--untracked-files=no")
    if not commit:
        return None
    return {"commit": commit.strip(), "dirty": None if changes is None else bool(changes)}


def _git(*command: str) -> str | None:
    """What a git command prints; None if it fails, which must not fail a run."""
    import subprocess

    # A checkout's own configuration may name programs to run, and git would take a lock; neither is wanted.
    plain = ("git", "--no-optional-locks", "-c", "core.fsmonitor=false", "-c", "core.hooksPath=/dev/null")
    try:
        done = subprocess.run(
            [*plain, *command], capture_output=True, text=True, timeout=10, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    return done.stdout if done.returncode == 0 else None
