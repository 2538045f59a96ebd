"""Keys and values of tokens already seen, so that decoding computes only new positions.

The cache is an argument of the model and has room for one context length; `quill.generation.decoding`
moves the window when it is full.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from quill.config.shape import Shape


class LayerCache:
    """One layer's keys and values, (B, K, block_size, D) each, filled up to `length`."""

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

    def repeat(self, rows: int) -> LayerCache:
        """Copy a single sequence's cache to each of several rows."""
        twin = LayerCache(self.keys.repeat(rows, 1, 1, 1), self.values.repeat(rows, 1, 1, 1))
        twin.length = self.length
        return twin


class KVCache:
    """The caches of all layers.

    Args:
        shape: Shape of the model.
        batch_size: Number of sequences side by side, B.
        device: Device of the model.
        dtype: Type of its activations.
    """

    def __init__(self, shape: Shape, batch_size: int, device: torch.device, dtype: torch.dtype) -> None:
        size = (batch_size, shape.n_kv_head, shape.block_size, shape.head_size)
        self.block_size = shape.block_size
        self.layers = [
            LayerCache(
                torch.empty(size, device=device, dtype=dtype), torch.empty(size, device=device, dtype=dtype)
            )
            for _ in range(shape.n_layer)
        ]
        self.length = 0

    def advance(self, n_tokens: int) -> None:
        """Count tokens that every layer has appended."""
        self.length += n_tokens

    def clear(self) -> None:
        """Empty the cache and keep its memory."""
        self.length = 0
        for layer in self.layers:
            layer.length = 0

    def repeat(self, rows: int) -> KVCache:
        """Copy a single sequence's cache to each of several rows, to decode them side by side."""
        twin = copy.copy(self)
        twin.layers = [layer.repeat(rows) for layer in self.layers]
        return twin
