"""One id a word and one for each stretch of spaces or signs between words.

What the vocabulary has no word for is spelt in single characters, so text made of known characters always
comes back as it was.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Literal, Self

from quill.errors import CorruptError, InputError
from quill.tokenizers import base
from quill.tokenizers._ranks import refuse_vocabulary

UNKNOWN = "<unk>"

# A word with its apostrophes, white space, or signs: every character is in one of them.
_PIECES = re.compile(r"\w+(?:['’]\w+)*|\s+|[^\w\s]+")
# Distinct words counted at a time. Beyond, those seen least are dropped, as none of them would be kept.
_MOST_COUNTED = 2_000_000


class WordTokenizer(base.Tokenizer):
    """Words and what is between them; id 0 is `<unk>`, for characters never seen.

    Args:
        characters: Single characters, distinct; their ids come first.
        words: Longer pieces, distinct; their ids follow.
    """

    learns: ClassVar[Literal["nothing", "characters", "text"]] = "text"

    def __init__(self, characters: Sequence[str], words: Sequence[str]) -> None:
        self._characters = list(characters)
        self._words = list(words)
        self._pieces = [UNKNOWN, *self._characters, *self._words]
        self._ids = {piece: i for i, piece in enumerate(self._pieces) if i}

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        *,
        vocab_size: int | None = None,
        vocabulary: Sequence[str] | None = None,
    ) -> Self:
        """All characters of the text, and the distinct words in it, the most frequent first."""
        refuse_vocabulary(cls.kind, vocabulary)
        counts: Counter[str] = Counter()
        characters: set[str] = set()
        least = 1
        for text in texts:
            characters.update(text)
            counts.update(_PIECES.findall(text))
            while len(counts) > _MOST_COUNTED:
                counts = Counter({piece: n for piece, n in counts.items() if n > least})
                least *= 2
        ranked = sorted((p for p in counts if len(p) > 1), key=lambda p: (-counts[p], p))
        if vocab_size is not None:
            room = vocab_size - 1 - len(characters)
            if room < 0:
                raise InputError(
                    f"vocab_size {vocab_size} is too small for the word tokenizer",
                    why=f"the text has {len(characters)} distinct characters, which are kept with {UNKNOWN}",
                    hint=f"--vocab-size {1 + len(characters)} or more",
                )
            ranked = ranked[:room]
        return cls(sorted(characters), ranked)

    @property
    def vocab_size(self) -> int:
        """Number of distinct words and characters, and `<unk>`."""
        return len(self._pieces)

    def encode(self, text: str, *, unknown: base.Unknown = "error") -> list[int]:
        """Text to ids; a character never seen becomes `<unk>`, or is left out."""
        get = self._ids.get
        ids: list[int] = []
        for piece in _PIECES.findall(text):
            known = get(piece)
            if known is not None:
                ids.append(known)
            elif unknown == "skip":
                ids += [i for c in piece if (i := get(c)) is not None]
            else:
                ids += [get(c, 0) for c in piece]
        return ids

    def token_bytes(self, token: int) -> bytes:
        """The UTF-8 bytes of a word."""
        if not 0 <= token < len(self._pieces):
            raise base.no_such_token(token, len(self._pieces))
        return self._pieces[token].encode()

    def to_dict(self) -> dict[str, Any]:
        """The characters as one string and the words as a list, in the order of their ids."""
        characters = "".join(self._characters)
        return {"schema": 1, "kind": self.kind, "characters": characters, "words": self._words}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """The tokenizer of those words."""
        characters, words = base.take(data, "characters", str), base.take(data, "words", list)
        if not all(isinstance(w, str) and len(w) > 1 for w in words):
            raise CorruptError("'words' holds what is no word")
        if len(set(characters)) != len(characters) or len(set(words)) != len(words):
            raise CorruptError("a word or character has two ids")
        try:
            "".join([characters, *words]).encode()
        except UnicodeEncodeError:
            raise CorruptError("a lone surrogate is not a character") from None
        return cls(list(characters), words)
