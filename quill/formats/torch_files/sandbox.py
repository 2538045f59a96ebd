"""Untrusted pickles, read in a child process that can do nothing else; `child` describes the protocol."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from io import FileIO
from pathlib import Path
from typing import Any, Literal

from quill import fsio, strictjson
from quill.errors import CorruptError, ResourceError
from quill.formats.torch_files import child
from quill.registry.files import corrupt

WALL_SECONDS = 120
_HEAD_BYTES = 512
# Packages whose objects training scripts often leave in their checkpoints.
_CARELESS = ("numpy", "torch", "pathlib", "collections", "datetime")
# With weights_only, torch runs no code from the file either.
_WEIGHTS = 'import sys, torch; torch.save(torch.load(sys.argv[1], "cpu", weights_only=True), sys.argv[2])'
# What a Python outside the system's own folders needs to find its libraries.
_KEPT_ENVIRONMENT = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT")


def open_file(path: Path) -> FileIO:
    """Open a file that the user named; a link is followed, a device or FIFO refused.

    Raises:
        FileNotFoundError: It does not exist; what that means only the caller knows.
        CorruptError: It is not a plain file.
        ResourceError: It cannot be read.
    """
    return fsio.open_plain(Path(os.path.realpath(path)))


def read_plain(path: Path) -> Any:
    """Read a pickle of dicts, lists, strings and integers, such as nanoGPT's meta.pkl.

    Raises:
        FileNotFoundError: It does not exist; what that means only the caller knows.
        CorruptError: It contains something else, or is too large to be a vocabulary.
        ResourceError: It cannot be read.
    """
    with open_file(path) as file:
        start = head(file, path)
        if not start.startswith(b"\x80"):
            raise corrupt(path, start, os.fstat(file.fileno()).st_size, "it is not a pickle")
        return decode(ask(file, "plain", path)["value"])


def head(file: FileIO, path: Path) -> bytes:
    """The first bytes of a file, which show what it is."""
    with fsio.guard(path, "read"):
        return file.read(_HEAD_BYTES) or b""


def ask(file: FileIO, kind: Literal["torch", "plain"], path: Path) -> dict[str, Any]:
    """Let a child process read a file.

    Returns:
        Its answer, which is as untrusted as the file.

    Raises:
        CorruptError: It refused the file, or broke on it.
        ResourceError: It could not be started.
    """
    # Isolated and without site packages, so that it can import the standard library alone.
    command = [sys.executable, "-I", "-S", "-B", child.__file__, kind]
    environment = {k: v for k in _KEPT_ENVIRONMENT if (v := os.environ.get(k))}
    unsafe = f"'{path}' is not safe to read"
    try:
        done = subprocess.run(
            command,
            stdin=file,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            timeout=WALL_SECONDS,
        )
    except subprocess.TimeoutExpired:
        raise CorruptError(unsafe, why=f"reading it takes more than {WALL_SECONDS} seconds") from None
    except OSError as e:
        raise _no_process(path, e.strerror or str(e)) from None
    if not done.stdout.startswith(child.READY):
        raise _no_process(path, f"it exited with code {done.returncode} before reading")
    if done.returncode:
        why = "it took too much time or memory" if done.returncode < 0 else "it made the reader fail"
        raise CorruptError(unsafe, why=f"{why} (exit code {done.returncode})")
    origin = f"the reader of {path}"
    answer = strictjson.parse(done.stdout[len(child.READY) :], origin=origin, error=CorruptError)
    if "unsafe" in answer:
        raise CorruptError(unsafe, why=answer["unsafe"])
    if "damaged" in answer:
        raise damaged(path, answer["damaged"])
    if "foreign" in answer:
        raise _foreign(path, answer["foreign"])
    return dict(answer)


def decode(value: Any, make_tensor: Callable[..., Any] | None = None) -> Any:
    """Turn the value of an answer into Python's own.

    Args:
        value: As `child` encodes it.
        make_tensor: Makes a tensor of its dtype, key, numel, offset, shape and stride.
    """
    if isinstance(value, list):
        return [decode(v, make_tensor) for v in value]
    if not isinstance(value, dict):
        return value
    if make_tensor and "tensor" in value:
        return make_tensor(*value["tensor"])
    return {k: decode(v, make_tensor) for k, v in value["map"]}


def resave(path: Path) -> str:
    """The command that saves the weights of a file again, next to it; it runs no code from the file."""
    target = path.with_name(f"{path.stem}-plain{path.suffix}")
    return shlex.join(["python", "-c", _WEIGHTS, str(path), str(target)])


def damaged(path: Path, why: str) -> CorruptError:
    """The refusal of a file that is not as it was written."""
    return CorruptError(f"'{path}' is damaged", why=why, hint="get the file again from its source")


def _foreign(path: Path, name: str) -> CorruptError:
    """The refusal of a file that needs code to be read: malicious, or saved carelessly."""
    why, hint = f"it refers to {name}, and quill runs no code from a file", ""
    if name.partition(".")[0] in _CARELESS:
        # No command loads it here: a malicious file may name a harmless object first.
        hint = "in the program that wrote it, save the weights alone: torch.save(model.state_dict(), path)"
    return CorruptError(f"'{path}' is not safe to read", why=why, hint=hint)


def _no_process(path: Path, why: str) -> ResourceError:
    return ResourceError(f"cannot read '{path}'", why=f"the child process that reads it cannot start: {why}")
