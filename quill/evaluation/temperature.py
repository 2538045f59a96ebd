"""The temperature at which a model's probabilities fit a text best.

A network that has seen its text often is too sure of itself. Dividing its logits by one number, chosen on
text that it has not learned from, leaves its ranking of the tokens alone and mends most of that (Guo et al.
2017, arXiv:1706.04599).

Legend: N targets, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from quill.model.gpt import GPT

# The temperatures at which the loss is measured. Between them it is a parabola of their logarithm.
_RATIO = 1.1
_TRIED = (*(0.7 * _RATIO**i for i in range(12)), 1.0)


@dataclass(frozen=True)
class Fitted:
    """A temperature and the loss at it.

    Attributes:
        loss: Mean cross entropy in nats per token.
        temperature: Divisor of the network's logits.
    """

    loss: float
    temperature: float


class Fit:
    """The loss of a text's targets at several temperatures from 0.7 to 2."""

    def __init__(self) -> None:
        self._nats = [0.0] * len(_TRIED)
        self._count = 0

    def add(self, model: GPT, logits: Tensor, near: Tensor | None, targets: Tensor) -> None:
        """Add some targets.

        Args:
            model: The model, which mixes in its n-gram counts.
            logits: What the network predicts, (N, V).
            near: What the counts are asked about, (N, ngram); None for a model without.
            targets: The tokens that came next, (N,).
        """
        for i, temperature in enumerate(_TRIED):
            scaled = logits / temperature
            mixed = scaled if near is None else model.mix(scaled, near)
            losses = F.cross_entropy(mixed.float(), targets, reduction="none")
            self._nats[i] += float(losses.cpu().sum(dtype=torch.float64))
        self._count += len(targets)

    def best(self) -> Fitted:
        """The best temperature for what was added, at least one target; 1 if nothing is better."""
        *losses, unscaled = (nats / self._count for nats in self._nats)
        at = min(range(len(losses)), key=losses.__getitem__)
        best = Fitted(losses[at], _TRIED[at])
        if 0 < at < len(losses) - 1:
            before, lowest, after = losses[at - 1 : at + 2]
            bend = before - 2 * lowest + after
            if bend > 0:
                shift = 0.5 * (before - after) / bend
                fitted = lowest - 0.25 * (before - after) * shift
                best = Fitted(fitted, _TRIED[at] * math.pow(_RATIO, shift))
        return best if best.loss < unscaled else Fitted(unscaled, 1.0)
