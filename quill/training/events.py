"""What a run tells whoever watches it; the terminal and the log are observers of these.

The trainer itself never prints. Durations are seconds of a monotonic clock, losses nats per token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Started:
    """The first step is about to run; `step` is above 0 when an earlier run is continued."""

    reference: str
    parameters: int
    tokens_per_step: int
    device: str
    dtype: str
    compiled: bool
    step: int
    max_iters: int
    dataset: str
    train_tokens: int
    val_tokens: int

    @property
    def resumed(self) -> bool:
        """Whether an earlier run goes on."""
        return self.step > 0


@dataclass(frozen=True)
class Stepped:
    """So many optimizer steps are done; loss and rate are of the last one."""

    step: int
    max_iters: int
    loss: float
    learning_rate: float
    grad_norm: float
    tokens_per_second: float
    seconds: float


@dataclass(frozen=True)
class Evaluated:
    """The validation loss after a step."""

    step: int
    val_loss: float
    best: bool
    best_val_loss: float
    best_step: int
    seconds: float


@dataclass(frozen=True)
class Saved:
    """A resume state is on disk."""

    step: int
    path: str


@dataclass(frozen=True)
class Finished:
    """The run is over and its model published; `reason` says why it ended."""

    reference: str
    step: int
    val_loss: float
    best_step: int
    seconds: float
    reason: str


@dataclass(frozen=True)
class Notice:
    """Something a person should know, in one sentence."""

    message: str


Event = Started | Stepped | Evaluated | Saved | Finished | Notice
Observer = Callable[[Event], None]


def ignore(event: Event) -> None:
    """The observer that nobody watches."""
