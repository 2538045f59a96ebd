"""Dropout whose masks are cheap to draw on a CPU.

Source: Srivastava et al. 2014, "Dropout: A Simple Way to Prevent Neural Networks from Overfitting".
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import Tensor

# One 64-bit draw decides four elements, with 16 bits each.
_LEVELS, _PER_DRAW = 2**16, 4
# The bits of 1 in each type of 16 bits.
_ONE = {torch.bfloat16: 0x3F80, torch.float16: 0x3C00}
# Draws at once, 2 MiB, while a generator is moved forward.
_SKIPPED = 2**18


class Rows:
    """Some of a batch's sequences, which on a CPU get the masks that the whole batch would give them.

    A generator cannot jump, so it is moved over the masks of the other sequences, once: where it stood at
    the end of these is remembered for the next ones.

    Args:
        batch_size: Sequences of the whole batch.
    """

    _current: ContextVar[Rows | None] = ContextVar("rows", default=None)

    def __init__(self, batch_size: int) -> None:
        self._batch_size = batch_size
        self._first = self._last = 0
        # By where a generator stands when a mask begins, where it stands at some of its rows.
        self._known: dict[bytes, dict[int, Tensor]] = {}

    @classmethod
    def current(cls) -> Rows | None:
        """The sequences that the running forward or backward pass sees; None if it sees all."""
        return cls._current.get()

    @property
    def count(self) -> int:
        """How many sequences these are."""
        return self._last - self._first

    @contextmanager
    def only(self, first: int, last: int) -> Iterator[None]:
        """A context for the passes over sequences first to last - 1, which follow those before them."""
        self._first, self._last = first, last
        token = self._current.set(self)
        try:
            yield
        finally:
            self._current.reset(token)

    @contextmanager
    def drawing(self, generator: torch.Generator, elements: int, *, shared: bool) -> Iterator[None]:
        """A context in which a generator stands where these sequences' elements of a mask are drawn.

        Args:
            generator: It stands where the mask of the whole batch begins.
            elements: Of the mask, for one sequence. Unless they are a multiple of 4, the masks differ from
                those of the whole batch.
            shared: Whether other masks follow; the generator is left where that of the whole batch ends.
        """
        start = generator.get_state()
        known = self._known.setdefault(hashlib.sha256(start.numpy().tobytes()).digest(), {0: start})

        def seek(row: int) -> None:
            at = max(r for r in known if r <= row)
            generator.set_state(known[at])
            for n in _chunks(row * elements // _PER_DRAW - at * elements // _PER_DRAW):
                torch.empty(n, dtype=torch.int64).random_(-(2**63), None, generator=generator)
            known[row] = generator.get_state()

        seek(self._first)
        yield
        known[self._last] = generator.get_state()
        if shared:
            seek(self._batch_size)
        for row in [r for r in known if r < self._first]:
            del known[row]


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
    mask: Tensor = _kept(x.detach(), p)
    return (x * mask).mul_(growth(p))


def kept(x: Tensor, p: float, generator: torch.Generator | None = None) -> Tensor:
    """A mask in the shape of x, of int16 on the CPU; each element is 0 with probability p, else 1."""
    draws = torch.empty(-(-x.numel() // _PER_DRAW), dtype=torch.int64)
    draws.random_(-(2**63), None, generator=generator)
    return draws.view(torch.int16)[: x.numel()].ge_(_dropped(p) - _LEVELS // 2).view(x.shape)


def mask_(x: Tensor, mask: Tensor) -> Tensor:
    """Zero in place what a mask from `kept` drops."""
    if x.dtype in _ONE:
        # A product with another type would first convert the mask, which takes four times as long.
        x.view(torch.int16).mul_(mask)
        return x
    return x.mul_(mask)


def growth(p: float) -> float:
    """What the elements that are kept are multiplied by."""
    return _LEVELS / (_LEVELS - _dropped(p))


def _chunks(total: int) -> Iterator[int]:
    while total > 0:
        yield min(total, _SKIPPED)
        total -= _SKIPPED


def _dropped(p: float) -> int:
    return min(round(p * _LEVELS), _LEVELS - 1)


# Opaque to torch.compile, which would draw each element by itself; the tag keeps it from merging draws.
@torch.library.custom_op("quill::kept", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def _kept(x: Tensor, p: float) -> Tensor:
    """`kept` as a factor of x: in its own type if that has 16 bits, else bool."""
    if (rows := Rows.current()) is None:
        mask = kept(x, p)
    else:
        with rows.drawing(torch.default_generator, x.numel() // len(x), shared=True):
            mask = kept(x, p)
    return mask.mul_(_ONE[x.dtype]).view(x.dtype) if x.dtype in _ONE else mask.bool()


@_kept.register_fake
def _(x: Tensor, p: float) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype if x.dtype in _ONE else torch.bool, device=x.device)
