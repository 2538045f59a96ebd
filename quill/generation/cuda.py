"""Steps of one token as a CUDA graph, which the device runs without waiting for Python.

A small model's step is a hundred short operations, each of which Python takes longer to start than the
device takes to run. Recorded once, they are started together. A graph has fixed sizes and addresses, so it
attends to a fixed number of positions behind a mask; there is one for each power of two.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor

from quill.model.gpt import GPT
from quill.model.kv_cache import KVCache

# Steps after which recording pays off; it takes as long as a few dozen of them.
_WORTHWHILE = 16
# The fewest positions that a step attends to.
_FEWEST = 128


def records(device: torch.device) -> bool:
    """Whether steps on a device can be recorded."""
    return device.type == "cuda"


class Recorder:
    """Records the steps that are taken again and again.

    Args:
        model: In eval mode.
        cache: Where keys and values are; its memory must stay.
    """

    def __init__(self, model: GPT, cache: KVCache) -> None:
        self._model, self._cache = model, cache
        self._taken: Counter[int] = Counter()
        self._recorded: dict[tuple[int, int], Recorded] = {}

    def find(self, rows: int, length: int, wipe: Callable[[], None]) -> Recorded | None:
        """The step of the first rows; None if it is not worth recording, or not yet.

        Args:
            rows: Number of rows, B.
            length: Tokens in the longest row.
            wipe: Called before a recording, to set memory of the cache that was never written to zero.
        """
        if not records(self._model.wte.weight.device):
            return None
        span = _FEWEST
        while span <= length:
            span *= 2
        key = rows, min(span, self._model.shape.block_size)
        if key not in self._recorded:
            self._taken[rows] += 1
            if self._taken[rows] <= _WORTHWHILE:
                return None
            wipe()
            self._recorded[key] = Recorded(self._model, self._cache, *key)
        return self._recorded[key]


class Recorded:
    """A model's step of one token for each row of a cache.

    Args:
        model: In eval mode.
        cache: Where keys and values are; its memory must stay. What it has not written may be anything but
            NaN, which no mask keeps out of a product.
        rows: The first rows of the cache that take the step, B.
        span: Positions of the cache that are attended to, more than there are tokens in any row.
    """

    @torch.inference_mode()
    def __init__(self, model: GPT, cache: KVCache, rows: int, span: int) -> None:
        self._model = model
        device = model.wte.weight.device
        self._idx = torch.zeros(rows, 1, dtype=torch.int64, device=device)
        self._positions = torch.zeros(rows, dtype=torch.int64, device=device)
        self._cache, self._span = cache, span
        # N-gram counts are looked up in tables of any size.
        self._network = model.network()
        self._step: Callable[[], Tensor] | None = None

    @torch.inference_mode()
    def __call__(self, idx: Tensor, lengths: int | Tensor) -> Tensor:
        """Read one token in each row; the caller counts it.

        Args:
            idx: Token ids, (B, 1).
            lengths: Tokens in the cache, of all rows or of each, (B).

        Returns:
            Logits of the next tokens, (B, 1, V).
        """
        self._idx.copy_(idx)
        if isinstance(lengths, int):
            self._positions.fill_(lengths)
        else:
            self._positions.copy_(lengths, non_blocking=True)
        if self._step is None:
            self._step = record(self._forward)
        logits = self._step()
        K = self._model.shape.ngram
        # Of what the graph writes, the next step writes over the logits.
        return self._model.mix(logits, self._at().last_tokens(1, K)) if K else logits.clone()

    def _at(self) -> KVCache:
        return self._cache.at(self._positions, self._span)

    def _forward(self) -> Tensor:
        logits: Tensor = self._network(self._idx, self._at(), last_only=True)
        return logits


def record(step: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Record a step; it is run several times, so it must not count.

    Args:
        step: Operations on tensors whose addresses and sizes stay.

    Returns:
        Runs it again, and returns the same tensor each time.
    """
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        # Libraries allocate when they are first used, which a recording does not allow.
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # Other threads may be using the device.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        result = step()

    def again() -> Tensor:
        graph.replay()
        return result

    return again
