"""The learning rate schedule: linear warmup, then a decay to min_lr.

Cosine: Loshchilov and Hutter 2017, arXiv:1608.03983, as in nanoGPT.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

from quill.config.settings import TrainConfig

# Warmup takes at most this share of a run that a time limit shortens.
_WARMUP_SHARE = 0.2


def rate(step: int, config: TrainConfig, *, horizon: int | None = None, first: int = 0) -> float:
    """The learning rate of a step as a share of its peak.

    Args:
        step: Steps already done.
        config: Training settings.
        horizon: The step at which time will be up, if that is before max_iters; the schedule is compressed
            to end there.
        first: The step at which a lengthened run began again with a fresh optimizer; it warms up from there.

    Returns:
        A factor for the peak rates of both optimizers; between min_lr / learning_rate and 1 after warmup.
    """
    warmup, end = config.warmup_iters, config.lr_decay_iters or config.max_iters
    if horizon is not None and horizon < config.max_iters:
        end = end * horizon // max(config.max_iters, 1)
        warmup = min(warmup, int(_WARMUP_SHARE * horizon))
    rise = min(1.0, (step - first + 1) / (warmup + 1)) if first else 1.0
    if step < warmup:
        return rise * (step + 1) / (warmup + 1)
    return rise * _decayed(step, warmup, end, config)


def _decayed(step: int, warmup: int, end: int, config: TrainConfig) -> float:
    if config.schedule == "constant":
        return 1.0
    floor = config.min_lr / config.learning_rate if config.learning_rate else 0.0
    if step >= end or end <= warmup:
        return floor
    done = (step - warmup) / (end - warmup)
    fall = 0.5 * (1.0 + math.cos(math.pi * done)) if config.schedule == "cosine" else 1.0 - done
    return floor + (1.0 - floor) * fall


@dataclass
class Budget:
    """The time of one call of `train`, and how many steps fit into it.

    The pace is measured over all steps of the call, evaluations and saves included.

    Attributes:
        seconds: The time limit.
        clock: The monotonic time at which the call began.
        reserve: Seconds kept back for the final evaluation and for publishing.
    """

    seconds: float
    clock: float
    reserve: float
    _begun: tuple[int, float] | None = None

    def evaluated(self, seconds: float) -> None:
        """Keep back twice the time of an evaluation, but no more than a tenth of all."""
        self.reserve = min(0.1 * self.seconds, max(self.reserve, 2 * seconds))

    def stepped(self, step: int) -> None:
        """Start measuring the pace after the call's first step, which is slower than the others."""
        if self._begun is None:
            self._begun = step, time.monotonic()

    @property
    def left(self) -> float:
        """Seconds left for steps; not above 0 when time is up."""
        return self.clock + self.seconds - self.reserve - time.monotonic()

    def horizon(self, step: int) -> int | None:
        """The step at which time will be up at the pace so far; None before the second step."""
        if self._begun is None or step <= self._begun[0]:
            return None
        first, begun = self._begun
        pace = (time.monotonic() - begun) / (step - first)
        return step + max(0, int(self.left / max(pace, 1e-9)))
