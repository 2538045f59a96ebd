"""Tokens into batches: the windows of a step are a pure function of the seed and the step.

There is no state between calls, so a resumed run can neither repeat nor skip data, and a step split over
several forward passes or processes sees exactly the windows it would see in one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from quill.data.shards import Shard
from quill.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

# Ids of one split, (n,): in memory, or in a file that is read as they are needed.
Tokens = NDArray[np.unsignedinteger[Any]] | Shard


def batch(
    tokens: Tokens,
    *,
    seed: int,
    step: int,
    batch_size: int,
    block_size: int,
    micro: int = 0,
    n_micro: int = 1,
    rank: int = 0,
    world_size: int = 1,
) -> tuple[Tensor, Tensor]:
    """Draw one batch of windows at random positions, and the same windows one token later.

    All windows of a step are drawn at once by a counter-based generator keyed by seed and step (Philox,
    Salmon et al. 2011, doi:10.1145/2063384.2063405), then divided in order: among ranks, within a rank among
    its forward passes, within a pass among rows.

    Args:
        tokens: One split, (n,).
        seed: The run's seed.
        step: Number of the optimizer step.
        batch_size: Windows in this batch, B.
        block_size: Length of a window in tokens, T.
        micro: Index of the forward pass within the step.
        n_micro: Forward passes in a step.
        rank: Index of this process.
        world_size: Number of processes.

    Returns:
        Inputs and targets, each (B, T), int64, on the CPU.
    """
    starts = _starts(len(tokens) - block_size, seed, step, batch_size * n_micro * world_size)
    first = (rank * n_micro + micro) * batch_size
    mine = starts[first : first + batch_size]
    if isinstance(tokens, Shard):
        return _tensors(tokens.rows(mine.tolist(), block_size + 1))
    return _tensors(tokens[mine[:, None] + np.arange(block_size + 1)])  # (B, T + 1)


def windows(tokens: Tokens, *, block_size: int, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Cut the whole split into consecutive windows; each token but the first is a target exactly once.

    Args:
        tokens: One split, (n,).
        block_size: Length of a window in tokens, T.
        batch_size: Most windows in a batch, B.

    Yields:
        Inputs and targets, each (<= B, T), int64; a shorter last window comes alone, (1, < T).
    """
    n_targets = len(tokens) - 1
    n_windows = max(n_targets, 0) // block_size
    for first in range(0, n_windows, batch_size):
        last = min(first + batch_size, n_windows)
        flat = tokens[first * block_size : last * block_size + 1].astype(np.int64)
        shape = (last - first, block_size)
        yield _tensor(flat[:-1].reshape(shape)), _tensor(flat[1:].reshape(shape))
    if n_windows * block_size < n_targets:
        yield _tensors(tokens[n_windows * block_size :][None])


def check_length(n_tokens: int, block_size: int, split: str, *, dataset: str = "the text") -> None:
    """Refuse a split that is too short for one window and its targets.

    Args:
        n_tokens: Tokens in the split.
        block_size: Length of a window in tokens.
        split: The split's name, for the message.
        dataset: The dataset's name, for the message.

    Raises:
        InputError: With both counts.
    """
    if n_tokens >= block_size + 1:
        return
    why = f"one window needs block_size + 1 = {block_size + 1:,} tokens"
    if n_tokens >= 3:
        hint = f"set model.block_size={n_tokens - 1}"
    else:
        hint = "prepare a longer text, or the same with another data.val_fraction"
    raise InputError(f"the {split} split of '{dataset}' has {n_tokens:,} tokens", why=why, hint=hint)


def _starts(n_positions: int, seed: int, step: int, count: int) -> NDArray[np.int64]:
    key = np.array([seed, step], np.uint64)
    raw = np.random.Philox(key=key).random_raw(count)
    uniform = (raw >> np.uint64(11)) * 2.0**-53
    return (uniform * n_positions).astype(np.int64)


def _tensors(rows: NDArray[np.unsignedinteger[Any]]) -> tuple[Tensor, Tensor]:
    return _tensor(rows[:, :-1].astype(np.int64)), _tensor(rows[:, 1:].astype(np.int64))


def _tensor(array: NDArray[np.int64]) -> Tensor:
    import torch

    return torch.from_numpy(array)
