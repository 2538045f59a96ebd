"""The first pass over a text: its counts, its hash and its alphabet, in constant memory."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from quill.data.sources import Text

# Characters looked up at a time, few enough for a processor's cache.
_STEP = 1 << 18


@dataclass(frozen=True)
class Survey:
    """Facts about a text.

    Attributes:
        characters: Code points, including one newline between documents.
        bytes: The same in UTF-8.
        documents: Number of documents.
        sha256: Hash of the UTF-8 text with a newline between documents, in hex.
        layout: Hash of where documents begin; empty for a single one.
        alphabet: The distinct characters, sorted, if they were asked for.
        blank: Whether it is all white space.
        uniform: Whether it repeats a single character.
    """

    characters: int
    bytes: int
    documents: int
    sha256: str
    layout: str
    alphabet: str
    blank: bool
    uniform: bool


def survey(text: Text, *, alphabet: bool) -> Survey:
    """Read a text once and count what is in it.

    Args:
        text: The text.
        alphabet: Whether to collect its distinct characters.
    """
    digest, layout = hashlib.sha256(), hashlib.sha256()
    characters = n_bytes = begins = 0
    seen = _Alphabet()
    blank = uniform = True
    first = ""
    for chunk in text.chunks("reading"):
        for fragment in chunk[:-1]:
            begins += 1
            characters += len(fragment) + 1
            layout.update(characters.to_bytes(8, "little"))
        characters += len(chunk[-1])
        joined, data = chunk.joined(), chunk.utf8()
        digest.update(data)
        n_bytes += len(data)
        if alphabet:
            seen.add(joined, data)
        first = first or joined[0]
        blank = blank and joined.isspace()
        uniform = uniform and joined.count(first) == len(joined)
    return Survey(
        characters=characters,
        bytes=n_bytes,
        documents=begins + bool(characters),
        sha256=digest.hexdigest(),
        layout=layout.hexdigest() if begins else "",
        alphabet=seen.sorted(),
        blank=blank,
        uniform=uniform,
    )


class _Alphabet:
    """The distinct characters of a text.

    Nearly every chunk contains nothing new, so that case is fast: ASCII bytes already seen are deleted at
    memory speed, other code points are looked up in a table.
    """

    def __init__(self) -> None:
        self._ascii = b""
        self._seen = np.zeros(0x110000, np.bool_)

    def add(self, text: str, data: bytes) -> None:
        if text.isascii():
            new = set(data.translate(None, self._ascii))
            if new:
                self._ascii = bytes(new.union(self._ascii))
            return
        for at in range(0, len(text), _STEP):
            points = np.frombuffer(text[at : at + _STEP].encode("utf-32-le"), "<u4")
            if not self._seen.take(points, mode="wrap").all():
                self._seen[points] = True

    def sorted(self) -> str:
        codes = {*self._ascii, *map(int, np.flatnonzero(self._seen))}
        return "".join(map(chr, sorted(codes)))
