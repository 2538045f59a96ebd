"""A logger is one file here that defines one class, which copies the figures of a run to another program.

The name of the file is the logger's registered name, and that of the extra which installs its package. A
logger knows nothing of training: it receives numbers and texts, each with a step.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, ClassVar

from quill import discovery
from quill.errors import InputError

# The project, or experiment, of all runs where the program's own variable names none.
PROJECT = "quill"


@dataclass(frozen=True)
class LoggedRun:
    """The run whose figures are logged.

    Attributes:
        id: The same whenever the run is resumed, and that of no other run.
        reference: The version it becomes, "name:vN".
        config: Its settings, nested.
        step: Steps done; figures of later steps that were logged before come again.
        resumed: Whether an earlier call has logged a part of it.
    """

    id: str
    reference: str
    config: Mapping[str, Any]
    step: int
    resumed: bool


class Logger(ABC):
    """One run in another program.

    Whatever is raised here ends the logging and not the run.

    Args:
        run: The run; figures follow.
    """

    package: ClassVar[str]

    @abstractmethod
    def __init__(self, run: LoggedRun) -> None: ...

    @property
    @abstractmethod
    def where(self) -> str:
        """Where a person finds the figures: a URL, a folder or a command."""

    @abstractmethod
    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        """Log the numbers of a step by name; a step may come twice with different names."""

    @abstractmethod
    def text(self, step: int, name: str, text: str) -> None:
        """Log a text of a step."""

    @abstractmethod
    def close(self) -> None:
        """Write what is left and end."""


def find(name: str) -> type[Logger]:
    """The logger of a registered name.

    Raises:
        InputError: There is no such logger, or its package is not installed.
    """
    module = discovery.load("loggers", name)
    for value in vars(module).values():
        if isinstance(value, type) and issubclass(value, Logger) and value.__module__ == module.__name__:
            if find_spec(value.package) is None:
                raise InputError(
                    f"the package {value.package} is not installed",
                    why=f"only logging to {name} needs it, so quill does not install it by default",
                    hint=f"pip install 'quill-gpt[{name}]'",
                )
            return value
    raise AssertionError(f"quill/loggers/{name} defines no Logger")


def flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str | int | float | bool]]:
    """The settings that are one value each, by dotted path."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        elif isinstance(value, str | int | float | bool):
            yield prefix + key, value
