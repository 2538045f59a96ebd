"""The first pass over a text: its counts, its hash and its alphabet, in constant memory."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from quill.data.sides import Sides
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
        held_out: Number of documents that are held out by their content.
        held_out_characters: Code points in them, including one newline between two of them.
    """

    characters: int
    bytes: int
    documents: int
    sha256: str
    layout: str
    alphabet: str
    blank: bool
    uniform: bool
    held_out: int
    held_out_characters: int

    @property
    def kept_characters(self) -> int:
        """Code points in the other documents, including one newline between two of them."""
        # Where both sides have documents, one newline is between the two.
        rest = self.characters - self.held_out_characters
        return rest - 1 if 0 < self.held_out < self.documents else rest


def survey(text: Text, *, alphabet: bool, share: float) -> Survey:
    """Read a text once and count what is in it.

    Args:
        text: The text.
        alphabet: Whether to collect its distinct characters.
        share: The fraction of documents to hold out.
    """
    digest, layout = hashlib.sha256(), hashlib.sha256()
    sides = Sides(share)
    characters = n_bytes = begins = 0
    held_out = held_out_characters = 0
    seen = _Alphabet()
    blank = uniform = True
    first = ""
    for chunk in text.chunks("reading"):
        for fragment in chunk[:-1]:
            begins += 1
            characters += len(fragment) + 1
            layout.update(characters.to_bytes(8, "little"))
        characters += len(chunk[-1])
        for fragment, starts, side in sides.of(chunk):
            if side:
                held_out += starts
                held_out_characters += len(fragment)
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
        held_out=held_out,
        held_out_characters=held_out_characters + max(held_out - 1, 0),
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
