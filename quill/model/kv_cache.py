"""Keys and values of tokens already seen, so that decoding computes only new positions.

The cache is an argument of the model and has room for one context length; `quill.generation.decoding`
moves the window when it is full.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from quill.config.shape import Shape


class LayerCache:
    """One layer's keys and values, (B, K, block_size, D) each, filled up to `length`.

    Attributes:
        mask: Which keys each row's single query may see, (B, 1, 1, S); None: all of them.
    """

    mask: Tensor | None = None

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys = keys
        self.values = values
        self.length = 0

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append T positions and return all positions so far.

        Args:
            k: Keys of the new positions, (B, K, T, D).
            v: Values of the new positions, (B, K, T, D).

        Returns:
            Keys and values, (B, K, S, D) each.
        """
        start, T = self.length, k.shape[2]
        self.length = end = start + T
        # narrow takes a third of the time of indexing, which matters when T is 1.
        self.keys.narrow(2, start, T).copy_(k)
        self.values.narrow(2, start, T).copy_(v)
        return self.keys.narrow(2, 0, end), self.values.narrow(2, 0, end)

    def observe(self, q: Tensor, scale: float | None) -> None:
        """Called after `extend` with the queries, (B, H, T, D), and the scale; a cache may record them."""

    def repeat(self, rows: int) -> LayerCache:
        """Copy a single sequence's cache to each of several rows."""
        size = (rows, *self.keys.shape[1:])
        twin = LayerCache(self.keys.new_empty(size), self.values.new_empty(size))
        twin.extend(self.keys.narrow(2, 0, self.length), self.values.narrow(2, 0, self.length))
        return twin


class KVCache:
    """The caches of all layers.

    Args:
        shape: Shape of the model.
        batch_size: Number of sequences side by side, B.
        device: Device of the model.
        dtype: Type of its activations.
        length: The most tokens; the context length if None.

    Attributes:
        positions: The position of each row's next token where rows differ in length, (B); None: all rows are
            as long as the cache.
    """

    positions: Tensor | None = None

    def __init__(
        self,
        shape: Shape,
        batch_size: int,
        device: torch.device,
        dtype: torch.dtype,
        length: int | None = None,
    ) -> None:
        size = (batch_size, shape.n_kv_head, length or shape.block_size, shape.head_size)
        self.layers = [
            LayerCache(
                torch.empty(size, device=device, dtype=dtype), torch.empty(size, device=device, dtype=dtype)
            )
            for _ in range(shape.n_layer)
        ]
        # The tokens themselves, where n-gram counts are looked up.
        self._ids = (
            torch.empty((batch_size, size[2]), device=device, dtype=torch.int64) if shape.ngram else None
        )
        self.length = 0

    def remember(self, idx: Tensor) -> None:
        """Append tokens, (B, T), before the layers append their keys and values."""
        if self._ids is None:
            return
        if self.positions is None:
            self._ids.narrow(1, self.length, idx.shape[1]).copy_(idx)
        else:
            self._ids[torch.arange(len(idx), device=idx.device), self.positions] = idx[:, 0]

    def last_tokens(self, n_tokens: int, count: int) -> Tensor:
        """Of each of the last n tokens the ones up to it, (B, n_tokens, count); -1 before the first.

        Args:
            n_tokens: Positions to return.
            count: Tokens of each, itself included.
        """
        ids = self._ids
        assert ids is not None
        if self.positions is None:
            start, first = self.length - n_tokens, max(0, self.length - n_tokens - count)
            return last_tokens(ids[:, first : self.length], count)[:, start - first :]
        back = torch.arange(1 - count, 1, device=ids.device)
        at = self.positions[:, None] + back  # (B, count)
        found = ids[: len(at)].gather(1, at.clamp_min(0))
        return found.masked_fill(at < 0, -1)[:, None]

    def advance(self, n_tokens: int) -> None:
        """Count tokens that every layer has appended."""
        self.length += n_tokens

    def clear(self) -> None:
        """Empty the cache and keep its memory."""
        self.length = 0
        for layer in self.layers:
            layer.length = 0

    def wipe(self) -> None:
        """Set what is not filled to zero: memory that was never written may contain NaN."""
        for layer in self.layers:
            layer.keys[:, :, self.length :].zero_()
            layer.values[:, :, self.length :].zero_()

    def repeat(self, rows: int) -> KVCache:
        """Copy a single sequence's cache to each of several rows, to decode them side by side."""
        twin = copy.copy(self)
        twin.layers = [layer.repeat(rows) for layer in self.layers]
        twin._ids = None if self._ids is None else self._ids.repeat(rows, 1)
        return twin

    def row(self, row: int) -> KVCache:
        """A cache of one sequence that shares the memory of one row of this one."""
        twin = copy.copy(self)
        twin.layers = [
            LayerCache(layer.keys.narrow(0, row, 1), layer.values.narrow(0, row, 1)) for layer in self.layers
        ]
        twin._ids = None if self._ids is None else self._ids.narrow(0, row, 1)
        twin.clear()
        return twin

    def rewind(self, length: int) -> None:
        """Say how many positions are filled, after they were written through another view of the memory."""
        self.length = length
        for layer in self.layers:
            layer.length = length

    def take(self, other: KVCache) -> None:
        """Replace the content by a copy of another cache of as many sequences."""
        for mine, theirs in zip(self.layers, other.layers, strict=True):
            mine.keys.narrow(2, 0, other.length).copy_(theirs.keys.narrow(2, 0, other.length))
            mine.values.narrow(2, 0, other.length).copy_(theirs.values.narrow(2, 0, other.length))
        if self._ids is not None and other._ids is not None:
            self._ids[:, : other.length] = other._ids[:, : other.length]
        self.rewind(other.length)

    def copy_row(self, source: int, target: int, length: int) -> None:
        """Copy the first positions of one row to another."""
        for layer in self.layers:
            for tensor in (layer.keys, layer.values):
                tensor[target].narrow(1, 0, length).copy_(tensor[source].narrow(1, 0, length))
        if self._ids is not None:
            self._ids[target, :length] = self._ids[source, :length]

    def ragged(self, lengths: Sequence[int]) -> KVCache:
        """The first rows of this cache for one step, in which each appends one token after its own length.

        Args:
            lengths: Tokens in the cache of each of the first rows.
        """
        device = self.layers[0].keys.device if self.layers else None
        longest = max(lengths) + 1
        is_even = min(lengths) == longest - 1
        return self._of_rows(torch.tensor(lengths, device=device), longest, masked=not is_even)

    def at(self, positions: Tensor, span: int) -> KVCache:
        """As `ragged`, for lengths that are on the device and may change.

        Args:
            positions: Tokens in the cache of each of the first rows, (B).
            span: Positions that are attended to, more than any length.
        """
        return self._of_rows(positions, span, masked=True)

    def _of_rows(self, positions: Tensor, longest: int, *, masked: bool) -> KVCache:
        device = positions.device
        mask = None
        if masked:
            mask = (torch.arange(longest, device=device) <= positions[:, None])[:, None, None]
        twin = copy.copy(self)
        twin.positions = positions
        rows = torch.arange(len(positions), device=device)
        twin.layers = [RaggedLayer(layer, rows, positions, longest, mask) for layer in self.layers]
        return twin


class RaggedLayer(LayerCache):
    """The first rows of a layer's cache, each of which appends one position after its own length.

    Args:
        layer: The cache.
        rows: 0 to B - 1, (B).
        positions: Each row's length, (B).
        longest: The longest row after this step, S.
        mask: Which of the S keys each row has, (B, 1, 1, S); None if all.
    """

    def __init__(
        self, layer: LayerCache, rows: Tensor, positions: Tensor, longest: int, mask: Tensor | None
    ) -> None:
        super().__init__(layer.keys, layer.values)
        self._rows, self._positions, self.length, self.mask = rows, positions, longest, mask

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append one position to each row and return all of them, (B, K, S, D) each."""
        # The indexed dimensions come first: (B, K, D).
        self.keys[self._rows, :, self._positions] = k[:, :, 0]
        self.values[self._rows, :, self._positions] = v[:, :, 0]
        n = len(self._rows)
        return self.keys[:n].narrow(2, 0, self.length), self.values[:n].narrow(2, 0, self.length)


def last_tokens(idx: Tensor, count: int) -> Tensor:
    """Of each position the tokens up to it.

    Args:
        idx: Token ids, (B, T).
        count: Tokens of each, itself included.

    Returns:
        (B, T, count); -1 before the first.
    """
    before = idx.new_full((len(idx), count - 1), -1)
    return torch.cat([before, idx], 1).unfold(1, count, 1)
