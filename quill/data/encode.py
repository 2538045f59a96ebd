"""A stream of text into arrays of token ids: in order, on several threads, in constant memory."""

from __future__ import annotations

import hashlib
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from quill.data import sides
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
            self._digest.update(chunk.utf8())
            yield chunk

    def second(self) -> Iterator[Chunk]:
        """Read the rest, after the first split was read to its end."""
        if self._rest is not None:
            self._digest.update(self._rest.utf8())
            yield self._rest
        for chunk in self._chunks:
            self._digest.update(chunk.utf8())
            yield chunk


class ReadingByDocument:
    """The same for a text split by its documents: it is read once for each split.

    Args:
        text: The text.
        share: The fraction of documents that are held out.
        stage: What the readings are for.
    """

    def __init__(self, text: Text, share: float, stage: str) -> None:
        self._text = text
        self._share = share
        self._stage = stage
        self._found: set[str] = set()

    @property
    def sha256(self) -> str:
        """Hash of what was read; empty if two readings differ."""
        return "".join(self._found) if len(self._found) == 1 else ""

    def first(self) -> Iterator[Chunk]:
        """Read the documents that are not held out."""
        return self._read((0.0, 1 - self._share), held_out=False)

    def second(self) -> Iterator[Chunk]:
        """Read those that are."""
        return self._read((1 - self._share, 1.0), held_out=True)

    def _read(self, span: tuple[float, float], *, held_out: bool) -> Iterator[Chunk]:
        digest = hashlib.sha256()

        def hashed() -> Iterator[Chunk]:
            for chunk in self._text.chunks(self._stage, span=span):
                digest.update(chunk.utf8())
                yield chunk

        yield from sides.select(hashed(), self._share, held_out=held_out)
        self._found.add(digest.hexdigest())


class Position(NamedTuple):
    """A place between two ids of a split: in which task, and after how many of its ids."""

    task: int = 0
    ids: int = 0


_START = Position()


@dataclass
class Extent:
    """Which text of a split to encode, and how much of it is done.

    Attributes:
        first: Character of the split that the first task begins at or after.
        last: Character that every task begins before.
        start: Where to resume; the ids before it are not encoded.
        task: The task whose ids came last.
        size: How many ids that task has.
        characters: Characters of all tasks so far, those before `start` included.
        bytes: The same in UTF-8.
    """

    first: int = 0
    last: int = sys.maxsize
    start: Position = _START
    task: int = 0
    size: int = 0
    characters: int = 0
    bytes: int = 0

    def select(self, tasks: Iterable[Task]) -> Iterator[tuple[int, Task]]:
        """Count tasks, and return those to encode with their numbers."""
        at = 0
        for number, task in enumerate(tasks):
            length = sum(1 if text is None else len(text) for text in task)
            if self.first <= at < self.last:
                self.characters += length
                self.bytes += sum(1 if text is None else _utf8_length(text) for text in task)
                if number >= self.start.task:
                    yield number, task
            at += length

    def reached(self, left: int) -> Position:
        """Return the position after all ids so far but the last `left`."""
        return Position(self.task, self.size - left)


def without(chunks: Iterable[Chunk], characters: str) -> Iterator[Chunk]:
    """Leave some characters out of a stream."""
    table = dict.fromkeys(map(ord, characters))
    for chunk in chunks:
        yield Chunk(fragment.translate(table) for fragment in chunk)


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
    chunks: Iterable[Chunk],
    tokenizer: Tokenizer,
    *,
    workers: int | None = None,
    size: int = TASK,
    extent: Extent | None = None,
) -> Iterator[Ids]:
    """Encode a stream on several threads, in order.

    Args:
        chunks: The stream; documents are joined by the tokenizer's eot_id, or a newline if it has none.
        tokenizer: Encodes; threads help where it leaves Python to do so.
        workers: Threads; None: as many as processors this process may use.
        size: Approximate characters that a thread encodes at a time.
        extent: Which of the text to encode; the whole stream is read. Updated before each array.

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

    extent = extent or Extent()

    def finished() -> Ids:
        number, future = waiting.popleft()
        ids = future.result()
        extent.task, extent.size = number, len(ids)
        return ids[extent.start.ids :] if number == extent.start.task else ids

    n = workers or processors()
    waiting: deque[tuple[int, Future[Ids]]] = deque()
    with ThreadPoolExecutor(n, thread_name_prefix="encode") as pool:
        try:
            for number, task in extent.select(
                tasks(chunks, tokenizer.boundary, joined=eot is None, size=size)
            ):
                waiting.append((number, pool.submit(run, task)))
                if len(waiting) > 2 * n and len(ids := finished()):
                    yield ids
            while waiting:
                if len(ids := finished()):
                    yield ids
        finally:
            for _, future in waiting:
                future.cancel()


def processors() -> int:
    """Return the number of processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _utf8_length(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())


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
