"""The learning rate schedule: linear warmup, then a decay to min_lr.

Cosine: Loshchilov and Hutter 2017, arXiv:1608.03983, as in nanoGPT.
"""

from __future__ import annotations

import math

from quill.config.settings import TrainConfig


def rate(step: int, config: TrainConfig) -> float:
    """The learning rate of a step as a share of its peak.

    Args:
        step: Steps already done.
        config: Training settings.

    Returns:
        A factor for the peak rates of both optimizers; between min_lr / learning_rate and 1 after warmup.
    """
    if step < config.warmup_iters:
        return (step + 1) / (config.warmup_iters + 1)
    if config.schedule == "constant":
        return 1.0
    floor = config.min_lr / config.learning_rate if config.learning_rate else 0.0
    end = config.lr_decay_iters or config.max_iters
    if step >= end or end <= config.warmup_iters:
        return floor
    done = (step - config.warmup_iters) / (end - config.warmup_iters)
    fall = 0.5 * (1.0 + math.cos(math.pi * done)) if config.schedule == "cosine" else 1.0 - done
    return floor + (1.0 - floor) * fall
