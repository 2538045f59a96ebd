"""How far a model can be trusted on a text: calibration, and loss by the length of the context.

Calibration compares the probability of the likeliest token with how often that token comes next, in bins of
equal width, and sums the differences up as the expected calibration error (Guo et al. 2017,
arXiv:1706.04599). Entropy covers all tokens: a calibrated model's mean entropy equals its loss, and an
overconfident one's is lower (Braverman et al. 2020, arXiv:1906.05664).

Legend: N targets, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# As in the tables of Guo et al.
BINS = 15


@dataclass(frozen=True)
class Bin:
    """The predictions whose confidence lies in one range.

    Attributes:
        low: Lower bound of the confidence, excluded.
        high: Upper bound, included.
        tokens: Number of predictions.
        confidence: Mean probability of the likeliest token; None without predictions.
        accuracy: Share of predictions whose likeliest token came next; None without predictions.
    """

    low: float
    high: float
    tokens: int
    confidence: float | None
    accuracy: float | None


@dataclass(frozen=True)
class Calibration:
    """How well the probabilities of a model agree with what it gets right.

    Attributes:
        expected_error: Mean difference between confidence and accuracy of the bins, weighted by their tokens.
        largest_error: The largest of these differences.
        confidence: Mean probability of the likeliest token.
        accuracy: Share of predictions whose likeliest token came next.
        entropy: Mean entropy of the predictions in nats per token, to compare with the loss.
        bins: The 15 bins, by confidence.
    """

    expected_error: float
    largest_error: float
    confidence: float
    accuracy: float
    entropy: float
    bins: tuple[Bin, ...]


@dataclass(frozen=True)
class Context:
    """The targets that have a number of tokens before them in their window.

    Attributes:
        first: Fewest tokens of context.
        last: Most tokens of context.
        tokens: Number of targets.
        loss: Mean cross entropy in nats per token; None without targets.
    """

    first: int
    last: int
    tokens: int
    loss: float | None


@dataclass(frozen=True)
class Report:
    """What a model's loss on a text is made of.

    Attributes:
        calibration: Its calibration.
        context: The loss by the length of the context: 1 token, 2, 3 to 4, 5 to 8, and so on.
        losses: The same for each length, from 1 token on, in nats per token; None without targets.
    """

    calibration: Calibration
    context: tuple[Context, ...]
    losses: tuple[float | None, ...]


class Collector:
    """Sums over the targets of a text, in memory that depends on the context length alone.

    Args:
        block_size: Length of a window in tokens.
    """

    def __init__(self, block_size: int) -> None:
        self._nats = torch.zeros(block_size, dtype=torch.float64)
        self._count = torch.zeros(block_size, dtype=torch.int64)
        # Of each bin: predictions, the sum of their confidence, and how many were right.
        self._bins = torch.zeros(3, BINS, dtype=torch.float64)
        self._entropy = 0.0

    def add(self, logits: Tensor, targets: Tensor, losses: Tensor, places: Tensor) -> None:
        """Add some targets.

        Args:
            logits: The predictions, (N, V), float32.
            targets: The tokens that came next, (N,).
            losses: Their cross entropy in nats, (N,).
            places: Their positions in their windows, from 0, (N,), on the CPU.
        """
        p = logits.softmax(-1)
        confidence, likeliest = (x.cpu() for x in p.max(-1))
        self._entropy += float(torch.special.entr(p, out=p).sum(-1).cpu().sum(dtype=torch.float64))
        size = len(self._nats)
        self._nats += places.bincount(losses.cpu().double(), size)
        self._count += places.bincount(minlength=size)
        confidence = confidence.double()
        at = ((confidence * BINS).ceil().long() - 1).clamp(0, BINS - 1)
        for row, values in enumerate((torch.ones_like(confidence), confidence, likeliest == targets.cpu())):
            self._bins[row] += at.bincount(values.double(), BINS)

    def report(self) -> Report:
        """Summarize what was added, at least one target."""
        nats, count = self._nats.tolist(), self._count.tolist()
        context, first = [], 1
        while first <= len(nats):
            last = min(max(2 * (first - 1), first), len(nats))
            tokens = sum(count[first - 1 : last])
            context.append(Context(first, last, tokens, _mean(sum(nats[first - 1 : last]), tokens)))
            first = last + 1
        return Report(
            self._calibration(), tuple(context), tuple(_mean(*pair) for pair in zip(nats, count, strict=True))
        )

    def _calibration(self) -> Calibration:
        tokens, sure, right = self._bins
        total = float(tokens.sum())
        gaps = (sure - right).abs()
        bins = [
            Bin(i / BINS, (i + 1) / BINS, int(n), _mean(s, n), _mean(r, n))
            for i, (n, s, r) in enumerate(self._bins.T.tolist())
        ]
        return Calibration(
            expected_error=float(gaps.sum()) / total,
            largest_error=float((gaps / tokens.clamp(min=1)).max()),
            confidence=float(sure.sum()) / total,
            accuracy=float(right.sum()) / total,
            entropy=self._entropy / total,
            bins=tuple(bins),
        )


def _mean(total: float, count: float) -> float | None:
    return total / count if count else None
