"""Counts of short token sequences, and their mixture with what the network predicts.

A network takes minutes to learn which tokens follow which; counting them takes a second. The mixture is
g * n-gram + (1 - g) * network, where the gate g is computed for each position from how often its context was
seen and from how sure both are. The network is trained as without it.

Legend: N positions, K tokens of context, V vocabulary. A sequence of tokens is coded as one number in base V.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

# Where a text is too small to estimate discounts from.
_DISCOUNTS = (0.7, 0.9, 1.1)
_HIDDEN = 16


class NGram(nn.Module):
    """Interpolated, modified Kneser-Ney smoothing of counts, and the gate that mixes it with a network.

    Source: Chen and Goodman 1999, "An Empirical Study of Smoothing Techniques for Language Modeling".

    Args:
        context: Tokens before the next that are looked at, K.
        vocab_size: V.

    Attributes:
        grams: Codes of all sequences of K + 1 tokens in the training text, ascending; int64.
        counts: How often each occurs; int32.
    """

    grams: Tensor
    counts: Tensor

    def __init__(self, context: int, vocab_size: int) -> None:
        super().__init__()
        self.context, self.vocab_size = context, vocab_size
        self.register_buffer("grams", torch.empty(0, dtype=torch.int64))
        self.register_buffer("counts", torch.empty(0, dtype=torch.int32))
        # For every length whether the context was seen and how often; entropy and peak of both.
        self.gate = nn.Sequential(nn.Linear(2 * (context + 1) + 4, _HIDDEN), nn.ReLU(), nn.Linear(_HIDDEN, 1))
        self._orders: list[_Order] = []

    def init_weights(self, generator: torch.Generator) -> None:
        """Draw the gate's weights such that it is open halfway."""
        first, last = cast(nn.Linear, self.gate[0]), cast(nn.Linear, self.gate[2])
        first.weight.normal_(0.0, 0.1, generator=generator)
        for zero in (first.bias, last.weight, last.bias):
            nn.init.zeros_(zero)

    def resize(self, entries: int) -> None:
        """Make room for counts that are about to be loaded."""
        self.grams, self.counts = self.grams.new_empty(entries), self.counts.new_empty(entries)
        self._orders = []

    @torch.no_grad()
    def count(self, ids: NDArray[np.unsignedinteger[Any]]) -> None:
        """Count the sequences of a text.

        Args:
            ids: Token ids, (n,), n above K.
        """
        tokens = torch.from_numpy(ids.astype(np.int64))
        n = len(tokens) - self.context
        codes = torch.zeros(n, dtype=torch.int64)
        for i in range(self.context + 1):
            codes = codes * self.vocab_size + tokens[i : i + n]
        grams, counts = torch.unique(codes, return_counts=True)
        self.grams = grams.to(self.grams.device)
        self.counts = counts.to(self.counts.device, torch.int32)
        self._orders = []

    def why_invalid(self) -> str | None:
        """What is wrong with counts that were loaded, or None."""
        grams, counts = self.grams, self.counts
        if not len(grams):
            return "it has no n-gram counts"
        if len(counts) != len(grams) or int(counts.min()) < 1:
            return "its n-gram counts are not positive numbers, one for each sequence"
        if int(grams[0]) < 0 or int(grams[-1]) >= self.vocab_size ** (self.context + 1):
            return "its n-grams contain tokens that it does not have"
        return None if bool((grams.diff() > 0).all()) else "its n-grams are not in ascending order"

    def forward(self, logits: Tensor, near: Tensor, targets: Tensor | None = None) -> Tensor:
        """Mix the counts with a network's prediction.

        Args:
            logits: The network's, (N, V).
            near: The K tokens before each predicted one, (N, K); -1 where there is none.
            targets: The predicted tokens, (N), if the text is the one that was counted: each is left out of
                the counts once, so that the gate learns what they are worth on a text that was not.

        Returns:
            Log probabilities, (N, V), float32.
        """
        network = logits.float().log_softmax(-1)
        with torch.no_grad():
            counted, seen = self.predict(near, targets)
            known = [f(p) for p in (network, counted) for f in (_entropy, lambda p: p.amax(-1))]
            features = torch.cat([seen, torch.stack(known, 1)], 1)
        with torch.autocast(logits.device.type, enabled=False):
            z = self.gate(features)
        return torch.logaddexp(F.logsigmoid(-z) + network, F.logsigmoid(z) + counted)

    def predict(self, near: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Log probabilities from the counts alone, and how often each length of context was seen.

        Args:
            near: As for `forward`.
            targets: As for `forward`.

        Returns:
            (N, V); and (N, 2 K + 2): for contexts of 0 to K tokens whether they were seen, and the logarithm
            of how often.
        """
        orders, V = self._tables(), self.vocab_size
        found = self._find(orders, near)
        left = None if targets is None else self._leave_out(orders, near, found, targets)
        p = torch.full((len(near), V), 1 / V, device=near.device)
        flat, rows = p.view(-1), torch.arange(len(near), device=near.device)
        seen, often = [], []
        for k, (order, (row, is_seen)) in enumerate(zip(orders, found, strict=True)):
            total, mass = order.totals[row], order.masses[row]
            if left is not None:
                is_left, count = left[k]
                one = is_left.float()
                total = total - one
                mass = mass - one * (order.discount(count) - order.discount(count - one))
            is_seen = is_seen & (total > 0.5)
            total = torch.where(is_seen, total, 1.0)
            p *= torch.where(is_seen, mass / total, 1.0)[:, None]
            # Every token that followed this context, of every position that has one.
            at = rows[is_seen]
            sizes = order.sizes[row[at]]
            which = torch.repeat_interleave(at, sizes)
            skip = torch.repeat_interleave(order.starts[row[at]] - (sizes.cumsum(0) - sizes), sizes)
            entry = skip + torch.arange(len(which), device=near.device)
            flat.index_add_(0, which * V + order.tokens[entry], order.kept[entry] / total[which])
            if left is not None and targets is not None:
                less = (count - one - order.discount(count - one)) - (count - order.discount(count))
                change = torch.where(is_left & is_seen, less / total, 0.0)
                flat.index_add_(0, rows * V + targets, change)
            seen.append(is_seen.float())
            often.append(torch.where(is_seen, total.log(), 0.0))
        return p.clamp_min(1e-30).log(), torch.stack([*seen, *often], 1)

    def _find(self, orders: list[_Order], near: Tensor) -> list[tuple[Tensor, Tensor]]:
        """For each length of context its row in the tables, and whether it has one; (N) each."""
        code = torch.zeros(len(near), dtype=torch.int64, device=near.device)
        is_whole = torch.ones(len(near), dtype=torch.bool, device=near.device)
        found = []
        for k, order in enumerate(orders):
            if k:
                token = near[:, self.context - k]
                is_whole = is_whole & (token >= 0)
                code = code + token.clamp_min(0) * self.vocab_size ** (k - 1)
            row = torch.searchsorted(order.contexts, code).clamp_max(len(order.contexts) - 1)
            found.append((row, is_whole & (order.contexts[row] == code)))
        return found

    def _leave_out(
        self, orders: list[_Order], near: Tensor, found: list[tuple[Tensor, Tensor]], targets: Tensor
    ) -> list[tuple[Tensor, Tensor]]:
        """For each length whether leaving out a target lowers its count, and the count before; (N) each.

        Shorter contexts count distinct continuations: one is lost with the only occurrence of the longer
        sequence that contains it.
        """
        left: list[tuple[Tensor, Tensor]] = []
        is_lost = torch.ones(len(near), dtype=torch.bool, device=near.device)
        for k in range(self.context, -1, -1):
            order, (row, is_seen) = orders[k], found[k]
            gram = order.contexts[row] * self.vocab_size + targets
            at = torch.searchsorted(order.grams, gram).clamp_max(len(order.grams) - 1)
            count = torch.where(is_seen & (order.grams[at] == gram), order.counts[at], 0.0)
            is_left = is_lost & (count > 0)
            left.append((is_left, count))
            is_whole = near[:, self.context - k] >= 0 if k else is_seen
            is_lost = torch.where(is_whole, is_left & (count == 1), is_lost)
        return left[::-1]

    def _tables(self) -> list[_Order]:
        """The counts by length of context, made from the longest."""
        if not self._orders or self._orders[0].grams.device != self.grams.device:
            grams, counts = self.grams, self.counts.long()
            orders = []
            for k in range(self.context, -1, -1):
                orders.append(_order(grams, counts, self.vocab_size))
                grams, counts = torch.unique(grams % self.vocab_size**k, return_counts=True)
            self._orders = orders[::-1]
        return self._orders

    def _load_from_state_dict(self, *args: object, **kwargs: object) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._orders = []


class _Order(NamedTuple):
    """The counts of contexts of one length.

    Attributes:
        grams: Codes of context and next token, ascending.
        counts: Of each, float32.
        tokens: The next token of each.
        kept: Its count less the discount.
        contexts: Codes of the contexts, ascending.
        starts: The first gram of each context.
        sizes: The number of grams of each context.
        totals: The sum of its counts.
        masses: The sum of its discounts, which the shorter context shares out.
        discounts: By count: 0, 1, 2, 3 and more.
    """

    grams: Tensor
    counts: Tensor
    tokens: Tensor
    kept: Tensor
    contexts: Tensor
    starts: Tensor
    sizes: Tensor
    totals: Tensor
    masses: Tensor
    discounts: Tensor

    def discount(self, count: Tensor) -> Tensor:
        return self.discounts[count.clamp(0, 3).long()]


def _order(grams: Tensor, counts: Tensor, vocab_size: int) -> _Order:
    contexts, sizes = torch.unique_consecutive(grams // vocab_size, return_counts=True)
    owner = torch.repeat_interleave(sizes)
    discounts = torch.tensor((0.0, *_estimate(counts)), device=grams.device)
    taken = discounts[counts.clamp_max(3)]

    def total(values: Tensor) -> Tensor:
        return torch.zeros(len(contexts), device=grams.device).index_add_(0, owner, values)

    number = counts.float()
    return _Order(
        grams,
        number,
        grams % vocab_size,
        number - taken,
        contexts,
        sizes.cumsum(0) - sizes,
        sizes,
        total(number),
        total(taken),
        discounts,
    )


def _estimate(counts: Tensor) -> tuple[float, ...]:
    """Discounts of counts of 1, 2, and 3 or more, from how many there are of each."""
    n1, n2, n3, n4 = torch.bincount(counts.clamp_max(5), minlength=6)[1:5].tolist()
    if not (n1 and n2 and n3 and n4):
        return _DISCOUNTS
    y = n1 / (n1 + 2 * n2)
    found = (1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3)
    return tuple(min(max(d, 0.05), i + 0.95) for i, d in enumerate(found))


def _entropy(log_p: Tensor) -> Tensor:
    return -(log_p.exp() * log_p).sum(-1)
