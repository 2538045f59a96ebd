"""The keys that clients of a server send."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping

from quill import fsio
from quill.errors import InputError, NotFoundError, ResourceError

_KEY = "QUILL_API_KEY"
_MOST_KEYS = 1 << 16


def read_keys(path: str | None, env: Mapping[str, str] = os.environ) -> list[str]:
    """Read the keys that clients send, from a file and from QUILL_API_KEY.

    Raises:
        InputError: Others may read the file, or there is no key in it.
        NotFoundError: There is no such file.
        ResourceError: It cannot be read.
    """
    keys = [env[_KEY]] if env.get(_KEY) else []
    if path is None:
        return keys
    place = fsio.expanded(path)
    try:
        with open(place, "rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            lines = file.read(_MOST_KEYS).split()
    except FileNotFoundError:
        raise NotFoundError(f"no file '{place}'", hint="check the path") from None
    except OSError as e:
        raise ResourceError(f"cannot read '{place}'", why=e.strerror or str(e)) from e
    if os.name == "posix" and mode & stat.S_IROTH:
        raise InputError(f"everyone can read '{place}'", why="it contains keys", hint=f"chmod 600 {place}")
    found = [line.decode("utf-8", "replace") for line in lines]
    if not found:
        raise InputError(f"'{place}' contains no key", why="one key is on each line")
    return [*keys, *found]
