"""A model fed token by token, over a cache and a window that slides.

A cache is exact only while nothing leaves the window: learned positions shift when it moves, and in every
layer but the first the keys of the tokens that remain have seen those that left. So a full window moves by
a stride: the remaining tokens are read again from position 0, and decoding continues on the cache until it
is full again. At every step the logits are those of the uncached model over the tokens of the window.

No token waits for all of them to be read again: they are known before the window is full, so they are read
into a second cache, a few at a time, while the first one fills.
"""

from __future__ import annotations

import copy
from typing import cast

import torch
from torch import Tensor

from quill.generation import cuda
from quill.model.gpt import GPT
from quill.model.kv_cache import KVCache

# How far the window moves, as a fraction of the context length; the context never gets shorter than the
# rest. For a context of 256 characters, reading the rest again took half of the time at 1/8, a quarter at
# 1/4 and an eighth at 1/2; the loss on Shakespeare was the same within 0.002 at each.
STRIDE = 0.5

# Tokens of the next window that are read at a time. Reading 32 takes as long as three single tokens; reading
# fewer at a time takes longer in total.
AHEAD = 32
# Tokens between two such parts. They are read late, because many texts end before the window is full.
_SPACING = 8


class Decoder:
    """Reads tokens and returns logits of the next one, over the last tokens that fit the context.

    Args:
        model: In eval mode, such as `cpu.for_decoding` returns.
        rows: Number of sequences side by side, B.
        stride: Tokens that leave a full window at once; half the context length if None.
        cache: Memory for the keys and values; new if None.

    Attributes:
        length: Tokens in the window.
    """

    def __init__(
        self, model: GPT, rows: int = 1, stride: int | None = None, cache: KVCache | None = None
    ) -> None:
        size = model.shape.block_size
        if stride is None:
            stride = int(size * STRIDE)
        self.model = model
        self._kept = max(1, size - max(1, stride))
        self._cache = model.new_cache(rows) if cache is None else cache
        self._read: list[Tensor] = []
        self._ahead: KVCache | None = None
        self._recorder = cuda.Recorder(model, self._cache)
        self.length = 0

    @property
    def window(self) -> Tensor:
        """The tokens that the last logits come from, (B, length)."""
        return torch.cat(self._read, 1)

    @torch.inference_mode()
    def feed(self, idx: Tensor) -> Tensor:
        """Read tokens.

        Args:
            idx: Token ids, (B, T), T at least 1.

        Returns:
            Logits of the token after the last, (B, V).
        """
        if self.length + idx.shape[1] > self.model.shape.block_size:
            idx = self._move(idx)
        logits = self._step(idx) if idx.shape[1] == 1 else self.model(idx, self._cache, last_only=True)
        self.note(idx)
        return logits[:, -1]

    def _step(self, idx: Tensor) -> Tensor:
        """Read one token in each row."""
        recorded = self._recorder.find(len(idx), self.length, self._cache.wipe)
        if recorded is None:
            return cast(Tensor, self.model(idx, self._cache, last_only=True))
        logits = recorded(idx, self.length)
        self._cache.rewind(self.length + 1)
        return logits

    def _move(self, idx: Tensor) -> Tensor:
        """Move the window; return those of its tokens that remain to be read."""
        # A first text fills the context; later ones leave room for what follows.
        is_first = not self.length
        kept = self.model.shape.block_size if is_first else self._kept
        window = torch.cat((*self._read, idx), 1)[:, -kept:]
        self._cache.clear()
        if self._ahead is not None and idx.shape[1] == 1:
            self._cache.take(self._ahead)
        self._ahead = None
        self.length = self._cache.length
        self._read = [window[:, : self.length]]
        rest = window[:, self.length :]
        if not is_first:
            # In parts as when they are read ahead, for the same rounding on any number of threads.
            *parts, rest = torch.split(rest, AHEAD, 1)
            for part in parts:
                self.model(part, self._cache, last_only=True)
                self.note(part)
        return rest

    def _read_ahead(self) -> None:
        """Read the next part of the next window if it is due."""
        size = self.model.shape.block_size
        # The next token that does not fit makes the window start here.
        start = size + 1 - self._kept
        due = (self._kept - 1) // AHEAD - (size - self.length) // _SPACING
        done = 0 if self._ahead is None else self._ahead.length
        at = start + done
        if done >= due * AHEAD or self.length < at + AHEAD or self._kept > start or not self._cache.layers:
            return
        window = self.window
        if self._ahead is None:
            self._ahead = self.model.new_cache(len(window), self._kept)
        self.model(window[:, at : at + AHEAD], self._ahead, last_only=True)

    @torch.inference_mode()
    def fork(self, rows: int) -> Decoder:
        """A decoder of several rows, each of which has read what this single row has.

        Args:
            rows: Number of sequences, B.
        """
        twin = copy.copy(self)
        twin._read = [t.expand(rows, -1) for t in self._read]
        twin.use(self._cache.repeat(rows))
        twin._ahead = None if self._ahead is None else self._ahead.repeat(rows)
        return twin

    def note(self, idx: Tensor) -> None:
        """Record tokens, (B, T), whose keys and values are in the cache."""
        self._read.append(idx)
        self.length += idx.shape[1]
        self._read_ahead()

    def use(self, cache: KVCache) -> None:
        """Continue on another cache that contains the same keys and values."""
        self._cache = cache
        self._recorder = cuda.Recorder(self.model, cache)

    def sharing(self, cache: KVCache) -> Decoder:
        """A decoder that has read what this one has, over a copy of its keys and values."""
        twin = copy.copy(self)
        twin._read = list(self._read)
        twin.use(cache)
        twin._ahead = None if self._ahead is None else self._ahead.repeat(1)
        return twin
