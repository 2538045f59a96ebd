"""A version's manifest: written last, so that its presence means that everything else is there.

It holds what each file must be (size and sha256) and where the model came from. Paths in it are
relative, so a registry may be moved, copied and archived.
"""

from __future__ import annotations

import os
import stat
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from quill import __version__, fsio, strictjson
from quill.errors import CorruptError, NotFoundError
from quill.registry import migrations

FILE = "manifest.json"
STATE, STATUS, LOG = "state", "status.json", "run.log"
REQUIRED = ("config.json", "model.safetensors", "tokenizer.json")
_MOST_BYTES = 16 << 20
_SHA256_DIGITS = 64
_NUMBER = (int, float, type(None))
# What other code reads from a manifest without looking twice; a hand that edits one meets this instead.
_TYPES: Mapping[str, tuple[type, ...]] = {
    "reference": (str,),
    "created": (str,),
    "versions": (dict, type(None)),
    "git": (dict, type(None)),
    "data": (dict, type(None)),
    "parent": (dict, type(None)),
    "copied_from": (dict, type(None)),
    "imported": (dict, type(None)),
    "seeds": (dict, type(None)),
    "device": (str, type(None)),
    "parameters": (int, type(None)),
    "steps": (int, type(None)),
    "best_val_loss": _NUMBER,
    "bits_per_byte": _NUMBER,
    "seconds": _NUMBER,
}


def read(folder: Path) -> dict[str, Any]:
    """Read and check the manifest of a folder.

    Raises:
        NotFoundError: There is none: the folder is in progress, or not a version.
        CorruptError: It is not a manifest.
        InputError: A newer quill wrote it.
    """
    path = folder / FILE
    try:
        document = read_object(path)
    except FileNotFoundError:
        raise NotFoundError(
            f"no manifest in '{folder}'", why="a version is complete once it has one"
        ) from None
    return _checked(migrations.migrate(document, "manifest", origin=str(path)), path)


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object from one of the registry's small files, never through a link.

    Raises:
        FileNotFoundError: There is no such file; what that means only the caller knows.
        CorruptError: It holds something else, or more than any such file does.
    """
    with fsio.open_plain(path) as file, fsio.guard(path, "read"):
        raw = file.read(_MOST_BYTES + 1) or b""
    if len(raw) > _MOST_BYTES:
        raise CorruptError(f"'{path}' is damaged", why=f"it is larger than {_MOST_BYTES >> 20} MiB")
    document = strictjson.parse(raw, origin=str(path), error=CorruptError)
    if not isinstance(document, dict):
        raise CorruptError(f"'{path}' is damaged", why="a JSON object is needed")
    try:
        strictjson.canonical(document)
    except ValueError:
        raise CorruptError(f"'{path}' is damaged", why="a number in it is not finite") from None
    return document


def build(folder: Path, reference: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Make the manifest of a folder whose files are finished.

    Args:
        folder: Holds them.
        reference: The version's name and number.
        fields: What only the caller knows: data, parent, seeds, device, steps, parameters,
            best_val_loss, seconds.

    Raises:
        CorruptError: A file that every version needs is missing, or something is not a plain file.
    """
    names = sorted(files(folder))
    if missing := [n for n in REQUIRED if n not in names]:
        raise CorruptError(f"'{folder}' has no {missing[0]}", why=f"a version holds {', '.join(REQUIRED)}")
    config = strictjson.read(folder / REQUIRED[0], error=CorruptError)
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


def describe(path: Path) -> dict[str, Any]:
    """What a manifest says of one file."""
    return {"bytes": path.stat().st_size, "sha256": fsio.sha256(path)}


def files(folder: Path, prefix: str = "") -> Iterator[str]:
    """The files that belong to a version, as relative paths: not its state, status, log or leftovers."""
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
            raise CorruptError(f"'{entry.path}' is a link or a device", why="a version holds plain files")


def stamps(folder: Path) -> dict[str, tuple[int, int, int]]:
    """What tells that one of a version's files was replaced or written to: inode, size and time."""
    found = ((n, os.lstat(folder / n)) for n in files(folder))
    with fsio.guard(folder, "read"):
        return {n: (s.st_ino, s.st_size, s.st_mtime_ns) for n, s in found}


def changed(folder: Path, listed: Mapping[str, Any]) -> str | None:
    """The first listed file that is not there as a plain file of its size; nothing is read."""
    for name, entry in listed.items():
        try:
            found = os.lstat(folder / name)
        except OSError:
            return name
        if not stat.S_ISREG(found.st_mode) or found.st_size != entry["bytes"]:
            return name
    return None


def versions() -> dict[str, str | None]:
    """What this is made with; torch is asked only where it is loaded anyway."""
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


def _checked(document: dict[str, Any], path: Path) -> dict[str, Any]:
    """Hold a manifest to what every reader of it takes for granted."""
    wrong = next((k for k, t in _TYPES.items() if k in document and not _is(document[k], t)), None)
    if wrong:
        raise CorruptError(f"'{path}' is damaged", why=f"its '{wrong}' is {_short(document[wrong])}")
    listed = document.get("files")
    if not isinstance(listed, dict) or not listed:
        raise CorruptError(f"'{path}' is damaged", why="it lists no files")
    for name, entry in listed.items():
        if not _stays_inside(name):
            raise CorruptError(f"'{path}' is not safe to read", why=f"it lists a file at {_short(name)}")
        if not (
            isinstance(entry, dict) and _is(entry.get("bytes"), (int,)) and _is_sha256(entry.get("sha256"))
        ):
            raise CorruptError(
                f"'{path}' is damaged", why=f"its entry for {_short(name)} has no size and sha256"
            )
    return document


def _is(value: Any, types: tuple[type, ...]) -> bool:
    # To Python a bool is an int, to a reader of the file it is a mistake; and nothing here is negative
    # or beyond what a table can show.
    if isinstance(value, bool):
        return False
    return isinstance(value, types) and (not isinstance(value, int) or 0 <= value < 2**63)


def _is_sha256(value: Any) -> bool:
    return (
        isinstance(value, str) and len(value) == _SHA256_DIGITS and not set(value) - set("0123456789abcdef")
    )


def _stays_inside(name: str) -> bool:
    """Whether a listed path is relative and goes nowhere but down."""
    return (
        "\\" not in name
        and "\0" not in name
        and ":" not in name
        and not {"", ".", ".."} & set(name.split("/"))
    )


def _short(value: Any) -> str:
    shown = ascii(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."


def _git_state() -> dict[str, Any] | None:
    """The commit that the working directory is at, where it is in a git checkout."""
    try:
        here = Path.cwd()
    except OSError:
        return None
    if not any((p / ".git").exists() for p in (here, *here.parents)):
        return None
    commit = _git("rev-parse", "HEAD")
    changes = _git("status", "--porcelain", "--untracked-files=no")
    return (
        None
        if not commit
        else {"commit": commit.strip(), "dirty": None if changes is None else bool(changes)}
    )


def _git(*command: str) -> str | None:
    """What a git command prints, or None: a manifest is never worth failing a run for."""
    import subprocess

    # A checkout's own configuration may name programs to run; none is wanted here, nor any lock.
    plain = ("git", "--no-optional-locks", "-c", "core.fsmonitor=false", "-c", "core.hooksPath=/dev/null")
    try:
        done = subprocess.run(
            [*plain, *command], capture_output=True, text=True, timeout=10, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    return done.stdout if done.returncode == 0 else None
