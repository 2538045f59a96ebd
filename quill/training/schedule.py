"""The learning rate schedule: linear warmup, then a decay to min_lr.

Cosine: Loshchilov and Hutter 2017, arXiv:1608.03983, as in nanoGPT. Trapezoidal, or warmup-stable-decay:
Hu et al. 2024, arXiv:2404.06395; Hägele et al. 2024, arXiv:2405.18392, fall over the last 20%.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

from quill.config.settings import TrainConfig

# Warmup takes at most this share of a run that a time limit shortens.
_WARMUP_SHARE = 0.2
# Shares of a time limit kept back for publishing, and at most for all that follows the last step.
_PUBLISHING_SHARE, _ENDING_SHARE = 0.02, 0.3


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


def weight_decay(step: int, config: TrainConfig, *, horizon: int | None = None) -> float:
    """The weight decay of a step as a share of its setting; the arguments are those of `rate`."""
    if config.weight_decay_schedule == "constant":
        return 1.0
    end = config.max_iters if horizon is None else min(horizon, config.max_iters)
    done = min(1.0, step / max(end, 1))
    return 0.5 * (1.0 + math.cos(math.pi * done)) if config.weight_decay_schedule == "cosine" else 1.0 - done


def _decayed(step: int, warmup: int, end: int, config: TrainConfig) -> float:
    if config.schedule == "constant":
        return 1.0
    floor = config.min_lr / config.learning_rate if config.learning_rate else 0.0
    if step >= end or end <= warmup:
        return floor
    if config.schedule == "trapezoidal":
        warmdown = min(end - warmup, max(1, round(config.warmdown_ratio * end)))
        return floor + (1.0 - floor) * min(1.0, (end - step) / warmdown)
    done = (step - warmup) / (end - warmup)
    fall = 0.5 * (1.0 + math.cos(math.pi * done)) if config.schedule == "cosine" else 1.0 - done
    return floor + (1.0 - floor) * fall


@dataclass
class Budget:
    """The time of one call of `train`, and how many steps fit into it.

    Attributes:
        seconds: The time limit.
        clock: The monotonic time at which the call began.
        eval_interval: Steps between evaluations.
        evaluation_steps: The cost of an evaluation in steps, as estimated until one is measured.
        final_evaluations: Evaluations that follow the last step.
    """

    seconds: float
    clock: float
    eval_interval: int = 1
    evaluation_steps: float = 0.0
    final_evaluations: float = 0.0
    _steps: int = -1  # the first step of a call is slower than the others and does not count
    _step_seconds: float = 0.0
    _evaluation_seconds: float | None = None

    def stepped(self, seconds: float) -> None:
        """Note how long a step took."""
        self._steps += 1
        self._step_seconds += seconds if self._steps else 0.0

    def evaluated(self, seconds: float) -> None:
        """Note how long an evaluation took."""
        self._evaluation_seconds = seconds

    def sampled(self, seconds: float) -> None:
        """Note how long a sample between two steps took."""
        self._step_seconds += seconds

    @property
    def left(self) -> float:
        """Seconds left for steps; not above 0 when time is up."""
        ending = self.final_evaluations * self._evaluation + _PUBLISHING_SHARE * self.seconds
        return self.clock + self.seconds - min(ending, _ENDING_SHARE * self.seconds) - time.monotonic()

    def horizon(self, step: int) -> int | None:
        """The step at which time will be up at the pace so far; None before the second step."""
        if self._steps < 1:
            return None
        pace = self._pace + self._evaluation / self.eval_interval
        return step + max(0, int(self.left / max(pace, 1e-9)))

    @property
    def _pace(self) -> float:
        return self._step_seconds / self._steps if self._steps > 0 else 0.0

    @property
    def _evaluation(self) -> float:
        known = self._evaluation_seconds
        return self.evaluation_steps * self._pace if known is None else known
