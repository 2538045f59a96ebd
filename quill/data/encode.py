"""A stream of text into arrays of token ids: in order, on several threads, in constant memory."""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np

from quill.data.sources import Chunk, Text
from quill.tokenizers.base import Tokenizer

if TYPE_CHECKING:
    from quill.tokenizers.base import Ids

# Characters that one thread encodes at a time: enough to be worth a hand-over, few enough to hold several
# and for a processor's cache.
TASK = 1 << 18
# A text without a boundary is cut after this many characters anyway.
LONGEST = 1 << 20

# Texts to encode one after the other; None stands between two documents.
Task = list[str | None]


class Reading:
    """A second reading of a surveyed text, split in two and hashed on the way.

    Args:
        text: The text.
        at: Characters of the first split.
        stage: What the reading is for.
    """

    def __init__(self, text: Text, at: int, stage: str) -> None:
        self._chunks = text.chunks(stage)
        self._left = at
        self._rest: Chunk | None = None
        self._digest = hashlib.sha256()
        self.bytes = [0, 0]

    @property
    def sha256(self) -> str:
        """Hash of everything read so far."""
        return self._digest.hexdigest()

    def first(self) -> Iterator[Chunk]:
        """Read the first split."""
        while self._left > 0 and (chunk := next(self._chunks, None)) is not None:
            length = sum(map(len, chunk)) + len(chunk) - 1
            if length > self._left:
                chunk, self._rest = _cut(chunk, self._left)
            self._left -= min(length, self._left)
            self._note(chunk, 0)
            yield chunk

    def second(self) -> Iterator[Chunk]:
        """Read the rest, after the first split was read to its end."""
        if self._rest is not None:
            self._note(self._rest, 1)
            yield self._rest
        for chunk in self._chunks:
            self._note(chunk, 1)
            yield chunk

    def _note(self, chunk: Chunk, split: int) -> None:
        data = chunk.utf8()
        self._digest.update(data)
        self.bytes[split] += len(data)


class Skipping:
    """Chunks without some characters.

    Args:
        chunks: The stream.
        characters: The characters to leave out.

    Attributes:
        bytes: UTF-8 bytes left out so far.
        characters: Characters left out so far.
    """

    def __init__(self, chunks: Iterable[Chunk], characters: str) -> None:
        self._chunks = chunks
        self._table = dict.fromkeys(map(ord, characters))
        self.bytes = self.characters = 0

    def __iter__(self) -> Iterator[Chunk]:
        for chunk in self._chunks:
            kept = Chunk(fragment.translate(self._table) for fragment in chunk)
            self.bytes += len(chunk.utf8()) - len(kept.utf8())
            self.characters += sum(map(len, chunk)) - sum(map(len, kept))
            yield kept


def tasks(
    chunks: Iterable[Chunk], boundary: Callable[[str], int], *, joined: bool, size: int = TASK
) -> Iterator[Task]:
    """Cut a stream into tasks whose ids, put together, are those of the whole.

    Args:
        chunks: The stream.
        boundary: Returns where a text may be cut; see Tokenizer.boundary.
        joined: Join documents by a newline; otherwise None stands between them.
        size: Approximate characters in a task.
    """
    task: Task = []
    length = 0
    carry = ""  # The end of a document so far, not yet known to be safe to cut.
    for chunk in chunks:
        for i, fragment in enumerate([chunk.joined()] if joined else chunk):
            if i:
                task += [carry, None] if carry else [None]
                length += len(carry) + 1
                carry = ""
            carry += fragment
            at = 0
            while len(carry) - at > size:
                end = at + (boundary(carry[at : at + size]) or _far_boundary(carry, at, boundary))
                if end == at:
                    break
                yield [*task, carry[at:end]]
                task, length, at = [], 0, end
            carry = carry[at:]
            if length >= size:
                yield task
                task, length = [], 0
    if carry:
        task.append(carry)
    if task:
        yield task


def encode(
    chunks: Iterable[Chunk], tokenizer: Tokenizer, *, workers: int | None = None, size: int = TASK
) -> Iterator[Ids]:
    """Encode a stream on several threads, in order.

    Args:
        chunks: The stream; documents are joined by the tokenizer's eot_id, or a newline if it has none.
        tokenizer: Encodes; threads help where it leaves Python to do so.
        workers: Threads; None: as many as processors this process may use.
        size: Approximate characters that a thread encodes at a time.

    Yields:
        Ids, little-endian, in the tokenizer's dtype; never an empty array.
    """
    eot = tokenizer.eot_id
    dtype = tokenizer.dtype.newbyteorder("<")
    between = np.array([] if eot is None else [eot], dtype)

    def run(task: Task) -> Ids:
        arrays = [between if text is None else tokenizer.encode_array(text) for text in task]
        whole = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
        return whole.astype(dtype, copy=False)

    n = workers or processors()
    waiting: deque[Future[Ids]] = deque()
    with ThreadPoolExecutor(n, thread_name_prefix="encode") as pool:
        try:
            for task in tasks(chunks, tokenizer.boundary, joined=eot is None, size=size):
                waiting.append(pool.submit(run, task))
                if len(waiting) > 2 * n and len(ids := waiting.popleft().result()):
                    yield ids
            while waiting:
                if len(ids := waiting.popleft().result()):
                    yield ids
        finally:
            for future in waiting:
                future.cancel()


def processors() -> int:
    """Return the number of processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _far_boundary(text: str, at: int, boundary: Callable[[str], int]) -> int:
    """Return where to cut a text without a boundary within one task; 0 to wait for more of it."""
    if len(text) - at < LONGEST:
        return 0
    return boundary(text[at : at + LONGEST]) or LONGEST


def _cut(chunk: Chunk, at: int) -> tuple[Chunk, Chunk]:
    """Cut a chunk in two; a newline stands between its fragments."""
    for i, fragment in enumerate(chunk):
        if at <= len(fragment):
            return Chunk([*chunk[:i], fragment[:at]]), Chunk([fragment[at:], *chunk[i + 1 :]])
        at -= len(fragment) + 1
    raise AssertionError("the cut lies beyond the chunk")
