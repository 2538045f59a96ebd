"""Which input tokens a training pass hides from the model: a function of the seed, the step and the pass.

The random numbers are those of the same counter-based generator as the batches', at counters that batches
never reach. They do not depend on the device.

Legend: B batch, T context length.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# The highest word of the counter; batches count upwards from 0.
_DROPPED, _MASKED = 1, 2


Pass = tuple[int, int, int]
"""The run's seed, the number of the optimizer step, and the index of the forward pass within it."""


def dropped(probability: float, shape: tuple[int, int], number: Pass) -> Tensor:
    """Hide each token with the same probability.

    Args:
        probability: Of hiding a token.
        shape: (B, T).
        number: The forward pass.

    Returns:
        True where a token is hidden, (B, T), on the CPU.
    """
    return torch.from_numpy(_uniform(_DROPPED, shape, number) < probability)


def masked(most: float, shape: tuple[int, int], number: Pass) -> Tensor:
    """Hide tokens with a probability that each sequence draws uniformly from 0 to `most`.

    Source: masked-input regularization, arXiv:2606.06888. Other arguments and result as for `dropped`.
    """
    rows, length = shape
    uniform = _uniform(_MASKED, (rows, length + 1), number)
    return torch.from_numpy(uniform[:, 1:] < most * uniform[:, :1])


def _uniform(stream: int, shape: tuple[int, int], number: Pass) -> NDArray[np.float64]:
    """Draw numbers from [0, 1)."""
    seed, step, micro = number
    key, counter = np.array([seed, step], np.uint64), np.array([0, 0, micro, stream], np.uint64)
    raw = np.random.Philox(key=key, counter=counter).random_raw(shape)
    return np.asarray((raw >> np.uint64(11)) * 2.0**-53)
