"""Dropout whose masks are cheap to draw on a CPU.

Source: Srivastava et al. 2014, "Dropout: A Simple Way to Prevent Neural Networks from Overfitting".
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# One 64-bit draw decides four elements, with 16 bits each.
_LEVELS, _PER_DRAW = 2**16, 4


def dropout(x: Tensor, p: float) -> Tensor:
    """Zero each element with probability p and scale the others, so that the mean is kept.

    On a CPU a Bernoulli draw costs more than the arithmetic around it: torch's takes a sixth to a third of
    a training step. Sixteen bits an element take a tenth of that; p is rounded to a multiple of 2 ** -16.

    Args:
        x: Any shape.
        p: In [0, 1).

    Returns:
        Same shape and dtype as x; x itself if p is 0.
    """
    if not p:
        return x
    if x.device.type != "cpu":
        return F.dropout(x, p)
    mask: Tensor = _kept(x, p)
    return rescale(x * mask, p)


def kept(x: Tensor, p: float, generator: torch.Generator | None = None) -> Tensor:
    """A mask in the shape of x, on the CPU; each element is false with probability p."""
    draws = torch.empty(-(-x.numel() // _PER_DRAW), dtype=torch.int64)
    draws.random_(-(2**63), None, generator=generator)
    return (draws.view(torch.int16)[: x.numel()] >= _dropped(p) - _LEVELS // 2).view(x.shape)


def rescale(x: Tensor, p: float) -> Tensor:
    """Scale in place what a mask has kept."""
    return x.mul_(_LEVELS / (_LEVELS - _dropped(p)))


def _dropped(p: float) -> int:
    return min(round(p * _LEVELS), _LEVELS - 1)


# Opaque to torch.compile, which would draw each element by itself; the tag keeps it from merging draws.
@torch.library.custom_op("quill::kept", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def _kept(x: Tensor, p: float) -> Tensor:
    return kept(x, p)


@_kept.register_fake
def _(x: Tensor, p: float) -> Tensor:
    return torch.empty(x.shape, dtype=torch.bool, device=x.device)
