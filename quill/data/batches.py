"""Tokens into batches: which windows a step sees is a pure function of the seed and the step.

Nothing is kept between calls, so a resumed run can neither replay nor skip data, and a step split over
several forward passes or machines sees exactly the windows it would see in one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from quill.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

Tokens = NDArray[np.unsignedinteger[Any]]


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
    """One batch of windows at random places, and the same windows one token on.

    All windows of a step are drawn at once by a counter-based generator keyed by seed and step (Philox,
    Salmon et al. 2011, doi:10.1145/2063384.2063405), and dealt out in order: to ranks, within a rank to
    its forward passes, within a pass to rows.

    Args:
        tokens: One split, (n,).
        seed: The run's seed.
        step: Number of the optimizer step.
        batch_size: Windows in this batch, B.
        block_size: Length of a window in tokens, T.
        micro: Which of the step's forward passes this is.
        n_micro: Forward passes of a step.
        rank: Which process this is.
        world_size: How many processes there are.

    Returns:
        Inputs and targets, each (B, T), int64, on the CPU.
    """
    starts = _starts(len(tokens) - block_size, seed, step, batch_size * n_micro * world_size)
    first = (rank * n_micro + micro) * batch_size
    mine = starts[first : first + batch_size]
    # A memmap's own indexing goes through slow Python; a plain view of the same memory does not.
    rows = np.asarray(tokens)[mine[:, None] + np.arange(block_size + 1)]  # (B, T + 1)
    return _tensors(rows)


def windows(tokens: Tokens, *, block_size: int, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The whole split in consecutive windows, every token but the first a target exactly once.

    Args:
        tokens: One split, (n,).
        block_size: Length of a window in tokens, T.
        batch_size: Windows in a batch at the most, B.

    Yields:
        Inputs and targets, each (<= B, T), int64; a last shorter window comes alone, (1, < T).
    """
    plain = np.asarray(tokens)
    n_targets = len(plain) - 1
    n_windows = max(n_targets, 0) // block_size
    for first in range(0, n_windows, batch_size):
        last = min(first + batch_size, n_windows)
        flat = plain[first * block_size : last * block_size + 1].astype(np.int64)
        shape = (last - first, block_size)
        yield _tensor(flat[:-1].reshape(shape)), _tensor(flat[1:].reshape(shape))
    if n_windows * block_size < n_targets:
        yield _tensors(plain[None, n_windows * block_size :])


def check_length(n_tokens: int, block_size: int, split: str, *, dataset: str = "the text") -> None:
    """Refuse a split that holds not even one window and its targets.

    Args:
        n_tokens: Tokens of the split.
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
        hint = f"--block-size {n_tokens - 1}, or more text"
    else:
        hint = "more text, or another --val-fraction when preparing it"
    raise InputError(f"the {split} split of '{dataset}' has {n_tokens:,} tokens", why=why, hint=hint)


def _starts(n_places: int, seed: int, step: int, count: int) -> NDArray[np.int64]:
    key = np.array([seed, step], np.uint64)
    raw = np.random.Philox(key=key).random_raw(count)
    unit = (raw >> np.uint64(11)) * 2.0**-53
    return (unit * n_places).astype(np.int64)


def _tensors(rows: Tokens) -> tuple[Tensor, Tensor]:
    return _tensor(rows[:, :-1].astype(np.int64)), _tensor(rows[:, 1:].astype(np.int64))


def _tensor(array: NDArray[np.int64]) -> Tensor:
    import torch

    return torch.from_numpy(array)
