"""From logits to the next token: pure functions of logits, and the draw.

Legend: B rows (samples side by side), V vocabulary. A filter takes logits (B, V) and returns logits (B, V)
with -inf for excluded tokens; at least one token always remains. They apply in the usual order: repetition
penalty, temperature, top-k, top-p, min-p. Logits are float64 here, so that no temperature makes a finite
float32 overflow and the tail of a large vocabulary keeps its probability.
"""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from quill.config.settings import SampleConfig
from quill.errors import DivergedError

# Likeliest tokens that top-p tries before it sorts the whole vocabulary.
_NUCLEUS = 256

# Random numbers made at once for each row.
_AHEAD = 64


def penalize_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Make tokens already in the text less likely.

    Source: Keskar et al. 2019, arXiv:1909.05858, section 4.1; a negative logit is multiplied, so that
    a penalty above 1 lowers every one.

    Args:
        logits: (B, V).
        seen: Whether each token is in the text, (B, V).
        penalty: Above 1 lowers, below 1 raises; above 0, however small.
    """
    # Dividing any float32 by this, and then by the least temperature, fits in float64.
    penalty = max(penalty, 1e-60)
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def apply_temperature(logits: Tensor, temperature: float) -> Tensor:
    """Sharpen (below 1) or flatten (above 1) the distribution.

    Args:
        logits: (B, V).
        temperature: Above 0, however small.
    """
    # Dividing any float32 by this fits in float64, and only exact ties are left long before.
    return logits / max(temperature, 1e-200)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Keep the k largest logits of each row; exactly k, even if several are equal.

    Args:
        logits: (B, V).
        k: At least 1; V or more keeps all.
    """
    if k >= logits.shape[-1]:
        return logits
    values, ids = logits.topk(k)
    return torch.full_like(logits, -math.inf).scatter_(-1, ids, values)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Keep the fewest of the likeliest tokens whose probabilities add up to p.

    Source: Holtzman et al. 2019, arXiv:1904.09751, section 3.1.

    Args:
        logits: (B, V).
        p: Above 0; 1 keeps all.
    """
    if p >= 1:
        return logits
    total = logits.logsumexp(-1, keepdim=True)
    # Sorting a large vocabulary takes 20 times as long as finding the few tokens that usually suffice.
    values, ids = logits.topk(min(_NUCLEUS, logits.shape[-1]))
    probabilities = (values - total).exp_()
    if values.shape != logits.shape and bool((probabilities.sum(-1) < p).any()):
        values, ids = logits.sort(descending=True, stable=True)
        probabilities = (values - total).exp_()
    # The sum before a token decides, so the first token always remains.
    before = probabilities.cumsum(-1) - probabilities
    # Sums of equal probabilities may fall short of p by rounding, which must not let another token in.
    kept = values.masked_fill_(before >= p * (1 - 1e-12), -math.inf)
    return torch.full_like(logits, -math.inf).scatter_(-1, ids, kept)


def keep_min_p(logits: Tensor, p: float) -> Tensor:
    """Exclude tokens less than p times as likely as the likeliest.

    Source: Nguyen et al. 2024, arXiv:2407.01082.

    Args:
        logits: (B, V).
        p: From 0, which keeps all, to 1, which keeps the likeliest alone.
    """
    if p <= 0:
        return logits
    return logits.masked_fill(logits < logits.amax(-1, keepdim=True) + math.log(p), -math.inf)


def restrict(logits: Tensor, config: SampleConfig) -> Tensor:
    """Apply the temperature and every filter that is set, in order.

    Args:
        logits: (B, V).
        config: Its temperature is not 0.
    """
    logits = apply_temperature(logits, config.temperature)
    if config.top_k is not None:
        logits = keep_top_k(logits, config.top_k)
    if config.top_p is not None:
        logits = keep_top_p(logits, config.top_p)
    if config.min_p is not None:
        logits = keep_min_p(logits, config.min_p)
    return logits


def probabilities(logits: Tensor, config: SampleConfig) -> Tensor:
    """The distribution that the next token is drawn from, (B, V).

    Args:
        logits: (B, V).
        config: Temperature and filters; the repetition penalty is not applied.
    """
    if config.temperature == 0 or config.top_k == 1:
        return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
    return restrict(logits, config).softmax(-1)


def draw(logits: Tensor, uniform: Tensor) -> Tensor:
    """Draw one token for each row, by inverting the cumulative distribution.

    Args:
        logits: (B, V), -inf for excluded tokens.
        uniform: Random numbers in [0, 1), (B, 1).

    Returns:
        Token ids, (B, 1).
    """
    cumulative = logits.softmax(-1).cumsum_(-1)
    # Rounding may leave the last sum a little off 1. The first sum above the number decides, so a token
    # of probability 0 is never drawn.
    return torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)


def check_finite(logits: Tensor) -> None:
    """Refuse to sample from the logits of broken weights.

    Args:
        logits: The model's, (B, V).

    Raises:
        DivergedError: A logit is NaN or infinite.
    """
    # A sum is NaN or infinite if a term is, and no sum of float32 numbers overflows float64.
    if not math.isfinite(logits.sum()):
        raise DivergedError(
            "the model's logits contain NaN or infinity",
            why="its weights do too, or are so large that numbers overflow",
            hint="quill list --all-versions",
        )


class Sampler:
    """Draws the next token of each row.

    Row i has its own random numbers, a function of (seed, i) alone, so a sample depends neither on the
    number of samples nor on the device.

    Args:
        config: How to sample.
        rows: The numbers of these samples, B of them.
        prompt: Token ids that count as repeated, (1, T) or (B, T).
        vocab_size: Number of tokens that can be drawn, V; logits beyond are padding.

    Attributes:
        device: Where tokens are drawn.
    """

    def __init__(self, config: SampleConfig, rows: Sequence[int], prompt: Tensor, vocab_size: int) -> None:
        self.config = config
        self.vocab_size = vocab_size
        self._numbers = [
            random.Random() if config.seed is None else random.Random(f"{config.seed}/{row}") for row in rows
        ]
        self._uniform: deque[Tensor] = deque()
        # MPS has no float64.
        self.device = torch.device("cpu") if prompt.device.type == "mps" else prompt.device
        self._seen: Tensor | None = None
        if config.repetition_penalty != 1:
            self._seen = torch.zeros(len(rows), vocab_size, dtype=torch.bool, device=self.device)
            self._seen.scatter_(1, prompt.to(self.device).expand(len(rows), -1), True)

    def __call__(self, logits: Tensor) -> Tensor:
        """Draw.

        Args:
            logits: The model's, (B, V or more).

        Returns:
            Token ids, (B, 1).

        Raises:
            DivergedError: A logit is NaN or infinite.
        """
        model_device = logits.device
        logits = logits[:, : self.vocab_size].to(self.device, torch.float64)
        check_finite(logits)
        config = self.config
        if self._seen is not None:
            logits = penalize_repetition(logits, self._seen, config.repetition_penalty)
        if config.temperature == 0 or config.top_k == 1:
            chosen = logits.argmax(-1, keepdim=True)
        else:
            chosen = draw(restrict(logits, config), self.next_uniform())
        if self._seen is not None:
            self._seen.scatter_(1, chosen, True)
        return chosen.to(model_device)

    @property
    def alike(self) -> tuple[object, ...] | None:
        """What samplers must have in common to draw together; None if this one must draw alone."""
        c = self.config
        if self._seen is not None or len(self._numbers) != 1:
            return None
        if c.temperature == 0 or c.top_k == 1:
            return (0.0,)
        return (c.temperature, c.top_k, c.top_p, c.min_p)

    def next_uniform(self) -> Tensor:
        """One random number for each row, (B, 1)."""
        if not self._uniform:
            # Made ahead: turning Python numbers into a tensor takes longer than drawing with it.
            numbers = [[n.random() for _ in range(_AHEAD)] for n in self._numbers]
            ahead = torch.tensor(numbers, dtype=torch.float64, device=self.device)
            self._uniform.extend(ahead[:, i : i + 1] for i in range(_AHEAD))
        return self._uniform.popleft()


def draw_together(samplers: Sequence[Sampler], logits: Tensor) -> Tensor:
    """Draw the next token of several samplers of one row each, those with equal settings at once.

    Args:
        samplers: One for each row.
        logits: The model's, (B, V or more), finite.

    Returns:
        Token ids, (B, 1).
    """
    if len(samplers) == 1:
        return samplers[0](logits)
    groups: dict[object, list[int]] = {}
    for i, sampler in enumerate(samplers):
        key = sampler.alike
        groups.setdefault(i if key is None else key, []).append(i)
    chosen = torch.empty(len(samplers), 1, dtype=torch.int64, device=logits.device)
    for rows in groups.values():
        first = samplers[rows[0]]
        if len(rows) == 1:
            chosen[rows] = first(logits[rows])
            continue
        some = logits[rows, : first.vocab_size].to(first.device, torch.float64)
        if first.alike == (0.0,):
            drawn = some.argmax(-1, keepdim=True)
        else:
            uniform = torch.cat([samplers[i].next_uniform() for i in rows])
            drawn = draw(restrict(some, first.config), uniform)
        chosen[rows] = drawn.to(logits.device)
    return chosen
