"""Documents held out for validation by what they say, not by where they are.

A document is on the same side whatever is read before it, in whichever order, on whichever computer; when a
text grows, nothing moves from one split to the other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator

from quill.data.sources import Chunk

# Characters at the start of a document that decide. A file is read in larger pieces than this.
_DECIDING = 1 << 15


def is_held_out(document: str, share: float) -> bool:
    """Whether a document is held out; with a larger share, the same ones are and more.

    Args:
        document: Its text, or the start of it that was read at once.
        share: The fraction of documents to hold out, from 0 to 1.
    """
    start = document[:_DECIDING].encode()
    digest = hashlib.blake2b(start, digest_size=8, person=b"quill split").digest()
    return int.from_bytes(digest, "little") < share * 2**64


class Sides:
    """Follows a stream, and tells documents that are held out from the others.

    Args:
        share: The fraction of documents to hold out.
    """

    def __init__(self, share: float) -> None:
        self._share = share
        self._held_out: bool | None = None  # The document that is being read; None before the first.

    def of(self, chunk: Chunk) -> Iterator[tuple[str, bool, bool]]:
        """Return each string of the next chunk, whether a document begins, and whether it is held out."""
        for i, text in enumerate(chunk):
            begins = i > 0 or self._held_out is None
            if begins:
                self._held_out = is_held_out(text, self._share)
            yield text, begins, bool(self._held_out)


def select(chunks: Iterable[Chunk], share: float, *, held_out: bool) -> Iterator[Chunk]:
    """Leave the documents of one side in a stream.

    Args:
        chunks: The stream.
        share: The fraction of documents to hold out.
        held_out: Which side.
    """
    sides = Sides(share)
    started = False
    for chunk in chunks:
        kept = Chunk([""])
        for text, begins, side in sides.of(chunk):
            if side != held_out:
                continue
            if begins and started:
                kept.append(text)
            else:
                kept[-1] += text
            started = True
        if kept != [""]:
            yield kept
