"""The prompt of a command: from its arguments, a file, or standard input."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

from typer import Option

from quill.cli._completion import completing
from quill.cli.output import is_terminal
from quill.errors import InputError, NotFoundError, ResourceError

_STDIN = "-"
MOST_BYTES = 1 << 26

Text = Annotated[
    str | None,
    Option("--prompt", "-p", metavar="TEXT", help="Prompt text (same as PROMPT, but '-' is literal)."),
]
File = Annotated[Path | None, Option("--prompt-file", metavar="FILE", help="Read the prompt from a file.")]
Unknown = Annotated[
    Literal["error", "skip"],
    Option(
        metavar="error|skip",
        help="Refuse or drop prompt characters that are not in the vocabulary.",
        autocompletion=completing("error", "skip"),
    ),
]


def find(words: list[str], flag: str | None, file: Path | None) -> str:
    """The prompt from wherever it was given.

    Raises:
        InputError: It was given twice, or is not UTF-8.
    """
    given = [n for n, v in (("PROMPT", words), ("--prompt", flag is not None), ("--prompt-file", file)) if v]
    if len(given) > 1:
        raise InputError(f"{' and '.join(given)} are mutually exclusive", why="there is only one prompt")
    if file is not None:
        try:
            with file.open("rb") as stream:
                return decode(stream.read(MOST_BYTES + 1), str(file))
        except FileNotFoundError:
            raise NotFoundError(f"no file '{file}'", hint="check the path") from None
        except IsADirectoryError:
            raise InputError(f"'{file}' is a directory", why="a prompt is the text of a file") from None
        except OSError as e:
            raise ResourceError(f"cannot read '{file}'", why=e.strerror or str(e)) from e
    if words == [_STDIN]:
        if sys.stdin is None:
            raise InputError("standard input is closed", why="'-' reads the prompt from it")
        return decode(sys.stdin.buffer.read(MOST_BYTES + 1), "standard input")
    if not given and sys.stdin is not None and _is_piped():
        return decode(sys.stdin.buffer.read(MOST_BYTES + 1), "standard input")
    return flag if flag is not None else " ".join(words)


def _is_piped() -> bool:
    """Whether stdin is a pipe or a file: not a terminal, and not the /dev/null of a service."""
    import os
    import stat

    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (OSError, ValueError):
        return False
    return not is_terminal(sys.stdin) and (stat.S_ISFIFO(mode) or stat.S_ISREG(mode))


def decode(raw: bytes, origin: str) -> str:
    """Text from bytes that should be UTF-8.

    Args:
        raw: The bytes; too many are refused.
        origin: Where they came from, for messages.

    Raises:
        InputError: They are not UTF-8, or too many.
    """
    if len(raw) > MOST_BYTES:
        raise InputError(f"'{origin}' is too long", why=f"a prompt has at most {MOST_BYTES >> 20} MiB")
    try:
        # The "utf-8-sig" codec counts from behind the byte order mark. Line ends become newlines.
        return raw.decode().removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as e:
        raise InputError(
            f"'{origin}' is not UTF-8", why=f"byte {e.start} is {raw[e.start]:#04x}", hint="save it as UTF-8"
        ) from None
