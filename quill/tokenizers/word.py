"""One id per word, and one per run of spaces or signs between words.

Words that are not in the vocabulary are spelled in single characters, so text of known characters always
decodes to itself.
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

# A word with its apostrophes, white space, or signs: together they cover any text.
_TOKENS = re.compile(r"\w+(?:['’]\w+)*|\s+|[^\w\s]+")
# Distinct words counted at a time. Beyond that, the rarest are dropped.
_MOST_COUNTED = 2_000_000


class WordTokenizer(base.Tokenizer):
    """Words and what is between them; id 0 is `<unk>`, for unknown characters.

    Args:
        characters: Single characters, distinct; their ids come first.
        words: Longer tokens, distinct; their ids follow.
    """

    learns: ClassVar[Literal["nothing", "characters", "text"]] = "text"

    def __init__(self, characters: Sequence[str], words: Sequence[str]) -> None:
        self._characters = list(characters)
        self._words = list(words)
        self._tokens = [UNKNOWN, *self._characters, *self._words]
        self._ids = {token: i for i, token in enumerate(self._tokens) if i}

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        *,
        vocab_size: int | None = None,
        vocabulary: Sequence[str] | None = None,
    ) -> Self:
        """Take all characters of the text and its distinct words, the most frequent first."""
        refuse_vocabulary(cls.kind, vocabulary)
        counts: Counter[str] = Counter()
        characters: set[str] = set()
        least = 1
        for text in texts:
            characters.update(text)
            counts.update(_TOKENS.findall(text))
            while len(counts) > _MOST_COUNTED:
                counts = Counter({token: n for token, n in counts.items() if n > least})
                least *= 2
        ranked = sorted((t for t in counts if len(t) > 1), key=lambda t: (-counts[t], t))
        if vocab_size is not None:
            room = vocab_size - 1 - len(characters)
            if room < 0:
                raise InputError(
                    f"vocab_size {vocab_size} is too small for the word tokenizer",
                    why=f"it includes {UNKNOWN} and the {len(characters)} distinct characters of the text",
                    hint=f"set data.vocab_size={1 + len(characters)}",
                )
            ranked = ranked[:room]
        return cls(sorted(characters), ranked)

    @property
    def vocab_size(self) -> int:
        """Number of words and characters, and `<unk>`."""
        return len(self._tokens)

    def encode(self, text: str, *, unknown: base.Unknown = "error") -> list[int]:
        """Encode text; an unknown character becomes `<unk>`, or is skipped."""
        get = self._ids.get
        ids: list[int] = []
        for token in _TOKENS.findall(text):
            known = get(token)
            if known is not None:
                ids.append(known)
            elif unknown == "skip":
                ids += [i for c in token if (i := get(c)) is not None]
            else:
                ids += [get(c, 0) for c in token]
        return ids

    def covers(self, text: str) -> bool:
        """Always: an unknown character is `<unk>`."""
        return True

    def token_bytes(self, token: int) -> bytes:
        """Return the UTF-8 bytes of a word."""
        if not 0 <= token < len(self._tokens):
            raise base.no_such_token(token, len(self._tokens))
        return self._tokens[token].encode()

    def to_dict(self) -> dict[str, Any]:
        """Return the characters as one string and the words as a list, in the order of their ids."""
        characters = "".join(self._characters)
        return {"schema": 1, "kind": self.kind, "characters": characters, "words": self._words}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Make the tokenizer of those words."""
        characters, words = base.take(data, "characters", str), base.take(data, "words", list)
        if not all(isinstance(w, str) and len(w) > 1 for w in words):
            raise CorruptError("'words' has an entry that is not a word")
        if len(set(characters)) != len(characters) or len(set(words)) != len(words):
            raise CorruptError("a word or character has two ids")
        try:
            "".join([characters, *words]).encode()
        except UnicodeEncodeError:
            raise CorruptError("a lone surrogate is not a character") from None
        return cls(list(characters), words)
