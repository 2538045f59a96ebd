"""One id per character: the text's code points in order, as in nanoGPT's shakespeare_char."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any, ClassVar, Literal, Self

from quill.errors import CorruptError, InputError, shorten
from quill.tokenizers import base

# Marks characters without an id where ids fit in a byte.
_NONE = 255


class CharTokenizer(base.Tokenizer):
    """A tokenizer whose tokens are characters.

    Args:
        vocabulary: The characters, distinct, in the order of their ids.
    """

    learns: ClassVar[Literal["nothing", "characters", "text"]] = "characters"

    def __init__(self, vocabulary: Sequence[str]) -> None:
        self._characters = list(vocabulary)
        self._ids = {c: i for i, c in enumerate(self._characters)}

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        *,
        vocab_size: int | None = None,
        vocabulary: Sequence[str] | None = None,
    ) -> Self:
        """Take the distinct characters of the text, sorted by code point, or those given."""
        if vocab_size is not None:
            raise InputError(
                f"vocab_size {vocab_size} does not apply to the char tokenizer",
                why="it has one id for each distinct character of the text",
                hint="set data.tokenizer=bpe",
            )
        seen: set[str] = set()
        for text in texts:
            seen.update(text)
        if vocabulary is None:
            vocabulary = sorted(seen)
        fault = _fault(vocabulary)
        if fault:
            raise InputError("the vocabulary is not a list of characters", why=fault)
        unlisted = sorted(seen.difference(vocabulary))
        if unlisted:
            raise base.unknown_characters(
                unlisted,
                f"the text has them, but not the given vocabulary of {len(vocabulary)}",
                "add them to data.vocabulary",
            )
        return cls(vocabulary)

    @property
    def vocab_size(self) -> int:
        """Number of distinct characters."""
        return len(self._characters)

    def encode(self, text: str, *, unknown: base.Unknown = "error") -> list[int]:
        """Encode text, one id per character."""
        ids = self._ids
        if unknown == "skip":
            return [ids[c] for c in text if c in ids]
        try:
            return [ids[c] for c in text]
        except KeyError:
            raise self._unknown(text) from None

    def encode_array(self, text: str) -> base.Ids:
        """Encode text in bulk through a lookup table."""
        import numpy as np

        if text.isascii() and self._ascii is not None:
            found = text.encode().translate(self._ascii)
            if _NONE in found:
                raise self._unknown(text)
            return np.frombuffer(found, np.uint8).astype(self.dtype)
        points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
        ids = self._table.take(points)
        if len(ids) and int(ids.max()) == self.vocab_size:
            raise self._unknown(text)
        return ids if ids.dtype == self.dtype else ids.astype(self.dtype)

    def decode(self, ids: Iterable[int]) -> str:
        """Decode ids, one character each."""
        characters, n = self._characters, len(self._characters)
        ids = list(ids)
        for token in ids:
            if not 0 <= token < n:
                raise base.no_such_token(token, n)
        return "".join([characters[i] for i in ids])

    def covers(self, text: str) -> bool:
        """Whether the vocabulary has every character."""
        return self._ids.keys() >= set(text)

    def token_bytes(self, token: int) -> bytes:
        """Return the UTF-8 bytes of one character."""
        if not 0 <= token < len(self._characters):
            raise base.no_such_token(token, len(self._characters))
        return self._characters[token].encode()

    @classmethod
    def boundary(cls, text: str) -> int:
        """Return the end: any position will do."""
        return len(text)

    def to_dict(self) -> dict[str, Any]:
        """Return the characters as one string, in the order of their ids."""
        return {"schema": 1, "kind": self.kind, "vocabulary": "".join(self._characters)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Make the tokenizer of that string of characters."""
        vocabulary = base.take(data, "vocabulary", str)
        fault = _fault(vocabulary)
        if fault:
            raise CorruptError(fault)
        return cls(vocabulary)

    @cached_property
    def _ascii(self) -> bytes | None:
        """Ids by ASCII code, as bytes.translate takes them; None if an id does not fit."""
        ids = {ord(c): i for c, i in self._ids.items() if c.isascii()}
        if any(i >= _NONE for i in ids.values()):
            return None
        return bytes(ids.get(code, _NONE) for code in range(256))

    @cached_property
    def _table(self) -> base.Ids:
        """Ids by code point; vocab_size where there is none."""
        import numpy as np

        dtype = np.dtype(np.uint16 if self.vocab_size < 65536 else np.uint32)
        table = np.full(0x110000, self.vocab_size, dtype)
        table[[ord(c) for c in self._characters]] = np.arange(self.vocab_size, dtype=dtype)
        return table

    def _unknown(self, text: str) -> InputError:
        known = "".join(self._characters)
        return base.unknown_characters(
            (c for c in dict.fromkeys(text) if c not in self._ids),
            f"the vocabulary has these {len(known)}: {shorten(known)}",
        )


def _fault(vocabulary: Sequence[str]) -> str:
    """Return what is wrong with a vocabulary; empty if nothing is."""
    if not vocabulary or any(len(c) != 1 for c in vocabulary):
        return "every entry has to be one character, and there has to be one"
    if len(set(vocabulary)) != len(vocabulary):
        return "a character has two ids"
    if any("\ud800" <= c <= "\udfff" for c in vocabulary):
        return "a lone surrogate is not a character"
    return ""
