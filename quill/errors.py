"""The errors quill raises on purpose: what happened, why, and what to do next.

An error names settings by their dotted path (`train.device=auto`) and other parameters as Python does
(`force=True`); the command line turns both into flags, prints three short lines on stderr, and exits with
the class's code.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

# A quoted value inside a message. An apostrophe has a letter before it, or a letter after it.
_QUOTED = re.compile(r"(?<!\w)'([^'\n]{81,})'(?!\w)")
# A path is only useful whole.
_LONGEST_PATH = 800
# A command of this length still has its place on a screen.
_LONGEST_HINT = 1000
# What a person still reads.
_LONGEST_SENTENCE = 1000
# A value without quotes; nothing that a person writes has as many characters without a space.
_ENDLESS = re.compile(r"\S{801,}")


class QuillError(Exception):
    """A failure that quill understands and can explain.

    Quoted values longer than 80 characters are cut, except for paths; see `cut`. So is what exceeds 1,000.

    Args:
        what: What went wrong, with the offending value quoted.
        why: The rule that was broken, or what exists instead.
        hint: What to do next: a command that runs as printed, or one sentence.
    """

    exit_code = 1

    def __init__(self, what: str, *, why: str = "", hint: str = "") -> None:
        self.what, self.why = (_end(cut(text)) for text in (what, why))
        # A command with a value cut out would not run.
        self.hint = hint if len(hint) <= _LONGEST_HINT else ""
        super().__init__(self.what)
        if hint:
            # Python and notebooks print it below the message.
            self.add_note(f"try: {hint}")

    def __str__(self) -> str:
        return f"{self.what}: {self.why}" if self.why else self.what


class InputError(QuillError):
    """Wrong usage, configuration or input."""

    exit_code = 2


class NotFoundError(QuillError):
    """No such model, dataset or file.

    Args:
        close: Existing names that may have been meant, best first. The command line makes a hint of them
            where there is none.
    """

    exit_code = 3

    def __init__(self, what: str, *, why: str = "", hint: str = "", close: Sequence[str] = ()) -> None:
        super().__init__(what, why=why, hint=hint)
        self.close = tuple(close)


class RefusedError(QuillError):
    """The target exists already, or a threshold was not met."""

    exit_code = 4


class CorruptError(QuillError):
    """A file is damaged or not safe to read."""

    exit_code = 5


class DivergedError(QuillError):
    """NaN or infinity appeared in training or in a model's weights."""

    exit_code = 6


class ResourceError(QuillError):
    """The disk, memory, a permission or the network does not allow it."""

    exit_code = 7


class LockedError(QuillError):
    """Another process holds the lock; try again later."""

    exit_code = 75


class InterruptedRun(QuillError):
    """A signal ended a run, which was saved first.

    Args:
        signum: The signal's number; the exit code is 128 plus it.
    """

    def __init__(self, what: str, *, signum: int, why: str = "", hint: str = "") -> None:
        super().__init__(what, why=why, hint=hint)
        self.signum = signum
        self.exit_code = 128 + signum


def shorten(value: Any, limit: int = 80) -> str:
    """Write a value for a message: quoted if it is text, escaped, and cut.

    Control characters, marks that reorder a line and lone surrogates are escaped.

    Args:
        value: Any value.
        limit: The most characters to return.
    """
    try:
        shown = repr(value[: limit + 1] if isinstance(value, str | bytes) else value)
    except ValueError:
        # Python refuses to write integers of more than 4,300 digits.
        return f"a number of {value.bit_length():,} bits" if isinstance(value, int) else "a huge value"
    if len(shown) <= limit:
        return shown
    end = shown[-1] if isinstance(value, str | bytes) else ""
    return f"{shown[: limit - 3 - len(end)]}...{end}"


def cut(message: str) -> str:
    """Cut the values in a message.

    Quoted values of more than 80 characters are cut, and paths and words without quotes of more than 800.
    """
    return _ENDLESS.sub(lambda found: f"{found[0][:77]}...", _QUOTED.sub(_cut, message))


def newer(what: str, schema: int, newest: int, written_by: str | None = None) -> InputError:
    """Return the error for a file that a newer quill wrote.

    Args:
        what: The file, or what it describes.
        schema: Its schema version.
        newest: The newest schema version that this quill reads.
        written_by: The version of quill that wrote it, if it is known.
    """
    return InputError(
        f"{what} needs quill >= {written_by}" if written_by else f"{what} has schema {schema}",
        why=f"a newer quill wrote it; this one reads up to schema {newest}",
        hint="pip install --upgrade quill-gpt",
    )


def _end(message: str) -> str:
    return message if len(message) <= _LONGEST_SENTENCE else f"{message[: _LONGEST_SENTENCE - 3]}..."


def _cut(found: re.Match[str]) -> str:
    value = found[1]
    limit = _LONGEST_PATH if "/" in value or "\\" in value else 78
    return found[0] if len(value) <= limit else f"'{value[: limit - 3]}...'"


def is_out_of_memory(failure: BaseException) -> bool:
    """Whether memory ran out: on the device or, as torch's CPU allocator says it, without a class."""
    if isinstance(failure, MemoryError) or type(failure).__name__ == "OutOfMemoryError":
        return True
    words = ("can't allocate memory", "not enough memory", "out of memory")
    return isinstance(failure, RuntimeError) and any(w in str(failure) for w in words)
