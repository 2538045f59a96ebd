"""Which servers of a user run on this computer: each leaves a note in the user's cache folder.

A note is a claim, and no more: it counts while the process that wrote it is alive, if it is the user's own,
and if its address is this computer's. What the server there has is asked of the server.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from quill import fsio
from quill.errors import QuillError
from quill.registry import locks, manifest

_FOLDER = "servers"
_SUFFIX = ".json"
_LOCAL = re.compile(r"http://(localhost|127(\.[0-9]{1,3}){3}|\[::1\]):[0-9]{1,5}")


@contextmanager
def announced(root: Path, address: str) -> Iterator[None]:
    """Leave a note while a server runs, as far as that is possible.

    Args:
        root: The registry that it serves.
        address: Its URL; one that is not this computer's own leaves no note.
    """
    place = None
    if _LOCAL.fullmatch(address):
        with suppress(OSError, QuillError):
            place = _write({**locks.me(), "address": address, "registry": os.path.realpath(root)})
    try:
        yield
    finally:
        if place is not None:
            with suppress(QuillError):
                fsio.remove_file(place)


def addresses(root: Path) -> list[str]:
    """The URLs of this user's servers of a registry, the latest first."""
    wanted = os.path.realpath(root)
    found = [
        (str(note.get("started")), str(note["address"]))
        for _, note in _notes()
        if note.get("registry") == wanted
        and _LOCAL.fullmatch(str(note.get("address")))
        and locks.is_alive(note)
    ]
    return [address for _, address in sorted(found, reverse=True)]


def _write(note: dict[str, Any]) -> Path | None:
    """Write a note, and remove those that servers left which were killed."""
    folder = _folder()
    if folder is None:
        return None
    for place, other in _notes():
        if other.get("host") == note["host"] and not locks.is_alive(other):
            with suppress(QuillError):
                fsio.remove_file(place)
    fsio.make_dir(folder)
    place = folder / f"{os.getpid()}-{os.urandom(4).hex()}{_SUFFIX}"
    fsio.write_json(place, note, durable=False)
    return place


def _notes() -> Iterator[tuple[Path, dict[str, Any]]]:
    """The user's own notes, of servers dead or alive; what is not a note is passed over."""
    folder = _folder()
    for place in sorted(folder.glob(f"*{_SUFFIX}")) if folder is not None else ():
        with suppress(OSError, QuillError):
            if _is_ours(place):
                yield place, manifest.read_object(place)


def _is_ours(place: Path) -> bool:
    return os.name != "posix" or place.stat(follow_symlinks=False).st_uid == os.geteuid()


def _folder() -> Path | None:
    """Where the notes are; None for a user without a home folder."""
    from platformdirs import user_cache_path

    with suppress(RuntimeError):
        cache = user_cache_path("quill", appauthor=False)
        return cache / _FOLDER if cache.is_absolute() else None
    return None
