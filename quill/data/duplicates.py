"""Documents that repeat an earlier one: found in a pass over the text, and left out of every later pass.

Exact duplicates are equal but for case and white space, by a hash. Near duplicates are found by MinHash with
bands (Broder 1997; Leskovec, Rajaraman and Ullman, chapter 3), in the sizes of FineWeb (Penedo et al. 2024):
112 minima of the hashes of all runs of five words, in 14 bands of 8. Documents that agree in any band are
taken for duplicates, and the first of them stays.

A document becomes a row of 64-bit keys, on disk; two documents are duplicates if they share a key. Memory
does not grow with the text, but for one bit for each document.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from quill import fsio, strictjson
from quill.data import encode, shards, unfinished
from quill.data.named_sources import OnBytes
from quill.data.sources import Text
from quill.data.unfinished import Unfinished
from quill.errors import InputError

How = Literal["exact", "near"]
_U64 = NDArray[np.uint64]

# Words of a run, bands, and minima in a band.
_WORDS, _BANDS, _ROWS = 5, 14, 8
_MINIMA = _BANDS * _ROWS
_SEED = 1
# Part of the resumed work's name: raised when documents would get other keys.
_SCHEMA = 1
_NAME = "keys"

# Bytes of text that a thread takes at a time, and of a document that is compared at once.
_BATCH = 1 << 18
_PIECE = 1 << 19
# Bytes of a file of keys, after which a preparation that is resumed begins.
_FILE_BYTES = 1 << 26
# Keys compared at a time.
_KEYS = 1 << 23

_SPACE = b" \t\n\r\x0b\x0c"
_LETTERS = np.ones(256, np.bool_)
_LETTERS[list(_SPACE)] = False
# First bytes in UTF-8 of scripts that leave no spaces between words: each character is taken for a word.
_WIDE = 0xE3
_BASE = 0x9E3779B97F4A7C15
_MIX = np.uint64(0xD6E8FEB86659FD93)
_HALF = np.uint64(32)
# The minimum of no hashes.
_NONE = np.uint32(2**32 - 1)


@dataclass(frozen=True)
class Duplicates:
    """What is left out of a text.

    Attributes:
        bits: A bit for each document, in the order of `numpy.unpackbits(..., bitorder="little")`.
        documents: Documents of the text.
        exact: Documents that are equal to an earlier one but for case and white space.
        near: Further documents that nearly repeat an earlier one.
    """

    bits: bytes
    documents: int
    exact: int
    near: int

    def __contains__(self, number: object) -> bool:
        assert isinstance(number, int)
        return bool(self.bits[number >> 3] >> (number & 7) & 1)


@contextmanager
def found(text: Text, root: Path, how: How, workers: int | None, on_bytes: OnBytes) -> Iterator[Duplicates]:
    """Find the duplicates of a text. To the end of the context, what is known of it survives a kill.

    Args:
        text: The text; all of it is read.
        root: The data root, for the keys of its documents.
        how: exact, or near for both kinds.
        workers: Threads; None: one per processor.
        on_bytes: Called with "verifying", the bytes done, and the total, if work is resumed.

    Raises:
        InputError: The rensa package is not installed.
    """
    version = f"rensa {_minhash().ALGORITHM_VERSION}" if how == "near" else ""
    width = 1 + _BANDS if how == "near" else 1
    fsio.make_dir(root)
    with _folder(text, root, version, on_bytes) as (folder, work):
        written = _write(text, folder, work, width, workers)
        documents = sum(w.tokens for w in written) // width
        files = [folder / shards.name(_NAME, number) for number in range(len(written))]
        bits = np.zeros(-(-documents // 8), np.uint8)
        exact = _mark(bits, files, documents, width, slice(1))
        near = _mark(bits, files, documents, width, slice(1, None)) if how == "near" else 0
        yield Duplicates(bits.tobytes(), documents, exact, near)


def _minhash() -> Any:
    """Import what computes minima; its version of the algorithm is `ALGORITHM_VERSION`."""
    try:
        from rensa import RMinHash  # type: ignore[import-untyped, import-not-found, unused-ignore]
    except ImportError:
        raise InputError(
            "data.dedup=near needs the rensa package",
            why="it computes the MinHash of each document",
            hint="pip install 'quill-gpt[dedup]'",
        ) from None
    return RMinHash


@contextmanager
def _folder(
    text: Text, root: Path, version: str, on_bytes: OnBytes
) -> Iterator[tuple[Path, Unfinished | None]]:
    """Open what an interrupted preparation left of the same text, or an empty folder."""
    stamp = text.stamp()
    if stamp is None:
        with fsio.scratch(root) as folder:
            yield folder, None
        return
    made_of = ["duplicates", stamp, text.encoding, text.text_field, version, _FILE_BYTES, _SCHEMA]
    key = hashlib.sha256(strictjson.canonical(made_of)).hexdigest()
    with unfinished.resumed(root, key, on_bytes) as work:
        work.begin(version)
        yield work.folder, work


def _write(
    text: Text, folder: Path, work: Unfinished | None, width: int, workers: int | None
) -> list[shards.Written]:
    """Write the keys of all documents, but for those that are there."""
    written = work.shards(_NAME) if work else []
    supply = shards.Supply(_keys(text, sum(w.tokens for w in written) // width, width > 1, workers))
    most = _FILE_BYTES // (8 * width) * 8 * width
    while more := supply.write(folder / shards.name(_NAME, len(written)), most):
        written.append(more)
        if work:
            text.require_unchanged()
            work.note(_NAME, more, encode.Position())
    return written


class _Batch(NamedTuple):
    """Pieces of documents, in order.

    Attributes:
        begins: Whether a piece is the start of a document; other pieces continue the one before.
        data: The text of each piece in lower case, in UTF-8.
        letters: The same without white space.
        exact: Keys of the documents that end before one of these pieces begins.
    """

    begins: list[bool]
    data: list[bytes]
    letters: list[bytes]
    exact: list[int]


def _batches(text: Text) -> Iterator[_Batch]:
    """Read a text; the last batch ends with an empty document, which ends the one before."""
    batch, size, read = _Batch([], [], [], []), 0, False
    digest = hashlib.blake2b(digest_size=8)
    for chunk in text.chunks("comparing"):
        for number, fragment in enumerate(chunk):
            data = fragment.casefold().encode()
            if number:
                batch.exact.append(int.from_bytes(digest.digest(), "little"))
                digest = hashlib.blake2b(digest_size=8)
            for at in range(0, len(data) or 1, _PIECE):
                piece = data[at : at + _PIECE]
                letters = piece.translate(None, _SPACE)
                digest.update(letters)
                batch.begins.append(number > 0 and at == 0)
                batch.data.append(piece)
                batch.letters.append(letters)
                size += len(piece)
                if size >= _BATCH:
                    yield batch
                    batch, size = _Batch([], [], [], []), 0
        read = True
    if read:
        batch.exact.append(int.from_bytes(digest.digest(), "little"))
        yield _Batch([*batch.begins, True], [*batch.data, b""], [*batch.letters, b""], batch.exact)


def _keys(text: Text, first: int, near: bool, workers: int | None) -> Iterator[Any]:
    """Compute the keys of documents, from the first one on: one after the other, row by row."""
    n = workers or encode.processors()
    waiting: deque[tuple[int, _Batch, Future[NDArray[np.uint32]] | None]] = deque()
    rest = np.full((1, _MINIMA), _NONE, np.uint32)  # Of the document that the next batch continues.

    def finished() -> _U64:
        nonlocal rest
        begin, batch, job = waiting.popleft()
        keys = np.array(batch.exact, "<u8")[:, None]
        if job:
            starts = [0, *(i for i, begins in enumerate(batch.begins, 1) if begins)]
            merged = np.minimum.reduceat(np.concatenate([rest, job.result()]), starts, axis=0)
            rest = merged[-1:]
            keys = np.concatenate([keys, _bands(merged[:-1])], axis=1)
        return keys[max(0, first - begin) :].ravel()

    with ThreadPoolExecutor(n, thread_name_prefix="compare") as pool:
        begin = 0
        try:
            for batch in _batches(text):
                end = begin + len(batch.exact)
                # Work that is resumed has the keys of what ends here.
                if end >= first:
                    waiting.append((begin, batch, pool.submit(_minima, batch) if near else None))
                begin = end
                if len(waiting) > 2 * n:
                    yield finished()
            while waiting:
                yield finished()
        finally:
            for _, _, job in waiting:
                if job:
                    job.cancel()


def _minima(batch: _Batch) -> NDArray[np.uint32]:
    """Compute the minima of each piece, (pieces, 112)."""
    matrix = _minhash().digest_matrix_from_flat_token_hashes(*_runs(batch), _MINIMA, _SEED)
    return np.array(matrix.to_rows(), np.uint32)


def _runs(batch: _Batch) -> tuple[_U64, _U64]:
    """Hash all runs of five words within a piece; return the hashes, and where those of each piece begin."""
    data = np.frombuffer(b" ".join(batch.data), np.uint8)
    is_letter = _LETTERS[data]
    is_start = is_letter.copy()
    is_start[1:] &= ~is_letter[:-1] | (data[1:] >= _WIDE)
    starts = np.flatnonzero(is_start[is_letter])
    letters = np.frombuffer(b"".join(batch.letters), np.uint8)
    bounds = np.append(starts, len(letters))
    begins, ends = bounds[:-_WORDS], bounds[_WORDS:]
    # The hash of letters i to j is the sum of letter[k] * base ** (k - i), from sums up to each letter.
    sums = np.zeros(len(letters) + 1, np.uint64)
    np.cumsum(letters * _powers(_BASE)[: len(letters)], out=sums[1:])
    hashes = (sums[ends] - sums[begins]) * _powers(pow(_BASE, -1, 2**64))[begins]
    limits = np.cumsum([len(piece) for piece in batch.letters])
    piece = np.searchsorted(limits, begins, side="right")
    inside = ends <= limits[piece]
    counts = np.bincount(piece[inside], minlength=len(batch.data))
    return _mixed(hashes[inside]), np.append(0, np.cumsum(counts)).astype(np.uint64)


def _bands(minima: NDArray[np.uint32]) -> _U64:
    """Hash the bands of documents, (n, 14); 0 for documents of fewer than five words."""
    sums = (minima.reshape(-1, _BANDS, _ROWS) * _powers(_BASE)[1 : _ROWS + 1]).sum(axis=2, dtype=np.uint64)
    keys = _mixed(sums + _powers(_BASE)[:_BANDS])
    keys[(minima == _NONE).all(axis=1)] = 0
    return keys


def _mixed(values: _U64) -> _U64:
    """Spread what differs in some bits over all of them, in place."""
    values ^= values >> _HALF
    values *= _MIX
    values ^= values >> _HALF
    return values


@cache
def _powers(base: int) -> _U64:
    powers = np.full(_BATCH + _PIECE, base, np.uint64)
    powers[0] = 1
    return np.multiply.accumulate(powers, out=powers)


def _mark(bits: NDArray[np.uint8], files: Sequence[Path], documents: int, width: int, columns: slice) -> int:
    """Mark each document that shares a key with an earlier one; return how many were not marked before."""
    before = _count(bits)
    shares = -(-documents * width // _KEYS)
    for share in range(shares):
        keys, numbers = [], []
        at = 0
        for path in files:
            with fsio.guard(path, "read"):
                rows = np.fromfile(path, "<u8").reshape(-1, width)[:, columns]
            # The keys from one value to another, so many that they fit in memory.
            chosen = (rows != 0) & ((rows >> _HALF) * np.uint64(shares) >> _HALF == share)
            keys.append(rows[chosen])
            numbers.append(chosen.nonzero()[0] + at)
            at += len(rows)
        key, number = np.concatenate(keys), np.concatenate(numbers)
        order = np.argsort(key, kind="stable")
        repeated = number[order[1:]][key[order[1:]] == key[order[:-1]]]
        np.bitwise_or.at(bits, repeated >> 3, (1 << (repeated & 7)).astype(np.uint8))
    return _count(bits) - before


def _count(bits: NDArray[np.uint8]) -> int:
    return int.from_bytes(bits.tobytes(), "little").bit_count()
