"""Every failure quill expects, as one tree: what happened, why, and what to do next.

The command line turns each into three short lines on stderr and the exit code declared here;
a library caller catches the class. Nothing of quill is imported below.
"""

from __future__ import annotations

from collections.abc import Sequence


class QuillError(Exception):
    """A failure quill understands and can explain.

    Args:
        what: What went wrong, with the offending value quoted.
        why: The rule that was broken, or what exists instead.
        hint: The next thing to do, a command that runs where there is one.
    """

    exit_code = 1

    def __init__(self, what: str, *, why: str = "", hint: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.why = why
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.what}: {self.why}" if self.why else self.what


class InputError(QuillError):
    """Wrong usage, configuration or input."""

    exit_code = 2


class NotFoundError(QuillError):
    """No such model, dataset or file.

    Args:
        close: What exists and may have been meant, best first; the hint is made of it where there is none.
    """

    exit_code = 3

    def __init__(self, what: str, *, why: str = "", hint: str = "", close: Sequence[str] = ()) -> None:
        super().__init__(what, why=why, hint=hint)
        self.close = tuple(close)


class RefusedError(QuillError):
    """It exists already, or a threshold was not met."""

    exit_code = 4


class CorruptError(QuillError):
    """A file is damaged, or is not safe to read."""

    exit_code = 5


class DivergedError(QuillError):
    """Numbers stopped being finite, in training or in a model's weights."""

    exit_code = 6


class ResourceError(QuillError):
    """The disk, the memory, a permission or the network is in the way."""

    exit_code = 7


class LockedError(QuillError):
    """Another process holds it; try later."""

    exit_code = 75


class InterruptedRun(QuillError):
    """A signal ended a run that was saved first.

    Args:
        signum: The signal's number; the exit code is 128 plus it.
    """

    def __init__(self, what: str, *, signum: int, why: str = "", hint: str = "") -> None:
        super().__init__(what, why=why, hint=hint)
        self.signum = signum
        self.exit_code = 128 + signum
