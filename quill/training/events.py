"""The events of a run. The terminal and the run's log are observers of them.

Durations are seconds of a monotonic clock; losses are nats per token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """Something that takes a while before the first step has begun; `seconds` since the call began."""

    name: str
    seconds: float


@dataclass(frozen=True)
class Started:
    """The first step is about to run; `step` is above 0 when the run is resumed."""

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
        """Whether an interrupted run is resumed."""
        return self.step > 0


@dataclass(frozen=True)
class Stepped:
    """An optimizer step is done; loss, rate and norm are those of this step.

    `objective` is what the step minimized, where that is not the loss alone.
    """

    step: int
    max_iters: int
    loss: float
    learning_rate: float
    grad_norm: float
    tokens_per_second: float
    seconds: float
    objective: float | None = None


@dataclass(frozen=True)
class Evaluated:
    """The validation loss was measured.

    With a moving average of the weights, `val_loss` is the lower of two: `raw_val_loss` of the weights and
    `averaged_val_loss` of their average. `averaged` is whether the average had it, and `best_averaged`
    whether the best weights so far are an average. `temperature` is the one at which the loss is lowest, if
    the run calibrates.
    """

    step: int
    val_loss: float
    best: bool
    best_val_loss: float
    best_step: int
    seconds: float
    averaged: bool = False
    best_averaged: bool = False
    raw_val_loss: float | None = None
    averaged_val_loss: float | None = None
    temperature: float | None = None


@dataclass(frozen=True)
class Sampled:
    """A short text was generated with the current weights."""

    step: int
    text: str
    seconds: float


@dataclass(frozen=True)
class Saved:
    """A resume state is on disk."""

    step: int
    path: str


@dataclass(frozen=True)
class Finished:
    """The model is published; `reason` is why the run ended, `path` its folder, `next` a command to try.

    `val_loss` is None for a run without a validation split.
    """

    reference: str
    step: int
    val_loss: float | None
    best_step: int
    seconds: float
    reason: str
    path: str = ""
    next: str = ""
    averaged: bool = False


@dataclass(frozen=True)
class Notice:
    """One sentence the user should read."""

    message: str


Event = Stage | Started | Stepped | Evaluated | Sampled | Saved | Finished | Notice
Observer = Callable[[Event], None]


def ignore(event: Event) -> None:
    """No-op observer."""
