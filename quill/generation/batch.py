"""Rows of different lengths, decoded side by side: a row may join or leave between any two tokens.

Each row has a slot, which is one row of a cache that is shared by all. A row that is alone is decoded as
`Generator.stream` does, bit for bit, over a view of its slot; several take their next step in one call of the
model, whose results are the same up to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quill.generation.cuda import Recorder
from quill.generation.decoding import Decoder
from quill.model.gpt import GPT
from quill.model.kv_cache import KVCache

# Slots beyond the rows in use cost time in every step, copying a row only once.
_FULL_ENOUGH = 0.75


class BatchRow:
    """One sequence in a slot.

    Args:
        model: In eval mode, such as `cpu.for_decoding` returns.
        slot: Number of the slot.
        view: The cache of the slot.
    """

    def __init__(self, model: GPT, slot: int, view: KVCache) -> None:
        self.model, self.slot = model, slot
        self._view = view
        self._decoder = Decoder(model, cache=view)

    @property
    def length(self) -> int:
        """Tokens in the window."""
        return self._decoder.length

    def read(self, idx: Tensor) -> Tensor:
        """Read tokens, (1, T), in this row alone; return the logits of the next one, (1, V)."""
        self._view.rewind(self._decoder.length)
        return self._decoder.feed(idx)

    def note(self, token: Tensor) -> None:
        """Record a token, (1, 1), whose keys and values are in the slot already."""
        self._decoder.note(token)

    def move(self, slot: int, view: KVCache) -> None:
        """Continue in another slot, which contains the same keys and values."""
        self.slot, self._view = slot, view
        self._decoder.use(view)

    def follow(self, other: BatchRow) -> None:
        """Take over what another row has read; its keys and values are in this row's slot already."""
        self._decoder = other._decoder.sharing(self._view)


class Batch:
    """The slots of one model.

    Args:
        model: The model that takes the steps of several rows.
        slots: The most rows at once.

    Attributes:
        rows: The row in each slot, or None.
    """

    def __init__(self, model: GPT, slots: int) -> None:
        self.model = model
        self._cache = model.new_cache(slots)
        self._recorder = Recorder(model, self._cache)
        self.rows: list[BatchRow | None] = [None] * slots
        # Memory that was never written may contain NaN, which no mask keeps out of a product.
        self._unwritten = set(range(slots))

    def __len__(self) -> int:
        return sum(row is not None for row in self.rows)

    @property
    def is_full(self) -> bool:
        """Whether there is no free slot."""
        return None not in self.rows

    @torch.inference_mode()
    def join(self, model: GPT, like: BatchRow | None = None) -> BatchRow:
        """Take a free slot.

        Args:
            model: The model that decodes the row while it is alone.
            like: A row that has read what the new one would.
        """
        slot = self.rows.index(None)
        self._clear(slot)
        row = BatchRow(model, slot, self._cache.row(slot))
        if like is not None:
            self._cache.copy_row(like.slot, slot, like.length)
            row.follow(like)
        self.rows[slot] = row
        return row

    @torch.inference_mode()
    def leave(self, row: BatchRow, *, damaged: bool = False) -> None:
        """Free the slot of a row.

        Args:
            row: The row.
            damaged: Whether its keys and values may contain NaN.
        """
        self.rows[row.slot] = None
        if damaged:
            self._unwritten.add(row.slot)
            self._clear(row.slot)
        used = [r for r in self.rows if r is not None]
        if used and len(used) < _FULL_ENOUGH * (used[-1].slot + 1):
            last, hole = used[-1], self.rows.index(None)
            self._cache.copy_row(last.slot, hole, last.length)
            self.rows[last.slot], self.rows[hole] = None, last
            last.move(hole, self._cache.row(hole))

    @torch.inference_mode()
    def step(self, rows: Sequence[BatchRow], tokens: Tensor) -> Tensor:
        """Read one token in each of some rows.

        Args:
            rows: Rows of this batch, B of them.
            tokens: Their tokens, (B, 1).

        Returns:
            Logits of the next tokens, (B, V).
        """
        if len(rows) == 1:
            return rows[0].read(tokens)
        size = self.model.shape.block_size
        logits: list[Tensor | None] = [None] * len(rows)
        for i, row in enumerate(rows):
            if row.length == size:
                # Its window moves, and what remains of it is read again.
                logits[i] = row.read(tokens[i : i + 1])
        together = [i for i, found in enumerate(logits) if found is None]
        if together:
            found = self._together([rows[i] for i in together], tokens[together])
            for i, one in zip(together, torch.split(found, 1), strict=True):
                rows[i].note(tokens[i : i + 1])
                logits[i] = one
        return torch.cat([x for x in logits if x is not None])

    def _together(self, rows: Sequence[BatchRow], tokens: Tensor) -> Tensor:
        most = max(row.slot for row in rows) + 1
        last = self.model.shape.block_size - 1
        # Rows that wait, and free slots, take part. What is written for them is never read: a row's next
        # token overwrites it, and a full window is read again from its tokens.
        lengths = [0 if row is None else min(row.length, last) for row in self.rows[:most]]
        idx = tokens.new_zeros(most, 1)
        slots = [row.slot for row in rows]
        idx[slots] = tokens
        recorded = self._recorder.find(most, max(lengths), lambda: self._clear(*range(most)))
        if recorded is None:
            logits: Tensor = self.model(idx, self._cache.ragged(lengths), last_only=True)
        else:
            logits = recorded(idx, torch.tensor(lengths))
        return logits[slots, -1]

    def _clear(self, *slots: int) -> None:
        for slot in self._unwritten.intersection(slots):
            self._unwritten.remove(slot)
            for layer in self._cache.layers:
                layer.keys[slot].zero_()
                layer.values[slot].zero_()
