"""A stream of text into arrays of ids, in order, with a bounded stretch of it in memory at any time."""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np

from quill.data.sources import Block, Text
from quill.tokenizers.base import Tokenizer

if TYPE_CHECKING:
    from quill.tokenizers.base import Ids

# Characters that one thread encodes at a time: enough to be worth handing over, little enough to hold
# several, and small enough for a processor's cache.
UNIT = 1 << 18
# A text with no place to cut is cut here all the same.
LONGEST = 1 << 20

# Stretches to encode one by one; None is where one document ends and the next begins.
Unit = list[str | None]


class Reading:
    """A second reading of a surveyed text, dealt out in two parts and hashed on the way.

    Args:
        text: The text.
        at: Characters of the first part.
        stage: What the reading is for.
    """

    def __init__(self, text: Text, at: int, stage: str) -> None:
        self._blocks = text.blocks(stage)
        self._left = at
        self._rest: Block | None = None
        self._digest = hashlib.sha256()
        self.bytes = [0, 0]

    @property
    def sha256(self) -> str:
        """Of all that was dealt out so far."""
        return self._digest.hexdigest()

    def first(self) -> Iterator[Block]:
        """The first part."""
        while self._left > 0 and (block := next(self._blocks, None)) is not None:
            length = sum(map(len, block)) + len(block) - 1
            if length > self._left:
                block, self._rest = _cut(block, self._left)
            self._left -= min(length, self._left)
            self._note(block, 0)
            yield block

    def second(self) -> Iterator[Block]:
        """What is left; to be asked for once the first part is through."""
        if self._rest is not None:
            self._note(self._rest, 1)
            yield self._rest
        for block in self._blocks:
            self._note(block, 1)
            yield block

    def _note(self, block: Block, part: int) -> None:
        data = block.utf8()
        self._digest.update(data)
        self.bytes[part] += len(data)


def units(
    blocks: Iterable[Block], boundary: Callable[[str], int], *, joined: bool, size: int = UNIT
) -> Iterator[Unit]:
    """Cut a stream where its ids do not notice.

    Args:
        blocks: The stream.
        boundary: Where a stretch may be cut, as Tokenizer.boundary tells.
        joined: Whether documents are joined by a newline; if not, None stands between them.
        size: Characters in a unit, about.
    """
    unit: Unit = []
    length = 0
    carry = ""  # The end of a document so far, not yet known to be safe to cut.
    for block in blocks:
        for i, piece in enumerate([block.joined()] if joined else block):
            if i:
                unit += [carry, None] if carry else [None]
                length += len(carry) + 1
                carry = ""
            carry += piece
            at = 0
            while len(carry) - at > size:
                end = at + (boundary(carry[at : at + size]) or _far_boundary(carry, at, boundary))
                if end == at:
                    break
                yield [*unit, carry[at:end]]
                unit, length, at = [], 0, end
            carry = carry[at:]
            if length >= size:
                yield unit
                unit, length = [], 0
    if carry:
        unit.append(carry)
    if unit:
        yield unit


def encode(
    blocks: Iterable[Block], tokenizer: Tokenizer, *, workers: int | None = None, size: int = UNIT
) -> Iterator[Ids]:
    """Encode a stream on several threads, in order.

    Args:
        blocks: The stream; documents are joined by the tokenizer's eot_id, or a newline if it has none.
        tokenizer: Does the encoding; one that leaves Python for it gains from threads.
        workers: Threads; unset: as many as this process may use processors.
        size: Characters that a thread takes at a time, about.

    Yields:
        Ids, little-endian, in the tokenizer's dtype; never an empty array.
    """
    eot = tokenizer.eot_id
    dtype = tokenizer.dtype.newbyteorder("<")
    between = np.array([] if eot is None else [eot], dtype)

    def one(unit: Unit) -> Ids:
        parts = [between if part is None else tokenizer.encode_array(part) for part in unit]
        whole = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return whole.astype(dtype, copy=False)

    n = workers or processors()
    waiting: deque[Future[Ids]] = deque()
    with ThreadPoolExecutor(n, thread_name_prefix="encode") as pool:
        try:
            for unit in units(blocks, tokenizer.boundary, joined=eot is None, size=size):
                waiting.append(pool.submit(one, unit))
                if len(waiting) > 2 * n and len(ids := waiting.popleft().result()):
                    yield ids
            while waiting:
                if len(ids := waiting.popleft().result()):
                    yield ids
        finally:
            for future in waiting:
                future.cancel()


def processors() -> int:
    """Processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _far_boundary(text: str, at: int, boundary: Callable[[str], int]) -> int:
    """Where to cut a text that has no boundary within one unit; 0 to wait for more of it."""
    if len(text) - at < LONGEST:
        return 0
    return boundary(text[at : at + LONGEST]) or LONGEST


def _cut(block: Block, at: int) -> tuple[Block, Block]:
    """A block in two; between its pieces stands one character."""
    for i, piece in enumerate(block):
        if at <= len(piece):
            return Block([*block[:i], piece[:at]]), Block([piece[at:], *block[i + 1 :]])
        at -= len(piece) + 1
    raise AssertionError("a cut beyond the block")
