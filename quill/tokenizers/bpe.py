"""A byte-pair tokenizer trained on the text itself, which it splits as GPT-4 does."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import ClassVar, Literal, Self

from quill.errors import InputError
from quill.tokenizers import _patterns, _ranks

DEFAULT_SIZE = 4096
_SMALLEST = 256 + 1
_LARGEST = 1 << 20

# Characters of a piece of text that merges are learned from, at most.
_LONGEST_PIECE = 256
_SIGNS = re.compile(r"(?:[^\w\s]|_)+")
_KINDS = (r"\s", r"[^\W\d_]", r"(?:[^\w\s]|_)")
_RUNS = re.compile("|".join(f"{kind}{{{_LONGEST_PIECE},}}+" for kind in _KINDS))


class BpeTokenizer(_ranks.RankTokenizer):
    """Ranks learned from text: the 256 bytes, the merges, and `<|endoftext|>` as the last id."""

    learns: ClassVar[Literal["nothing", "characters", "text"]] = "text"
    # More text hardly changes the merges, but its words take ever more memory.
    learn_chars: ClassVar[int | None] = 1 << 28

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        *,
        vocab_size: int | None = None,
        vocabulary: Sequence[str] | None = None,
    ) -> Self:
        """Learn merges until there are vocab_size ids, or nothing is left to merge."""
        _ranks.refuse_vocabulary(cls.kind, vocabulary)
        size = DEFAULT_SIZE if vocab_size is None else vocab_size
        if not _SMALLEST <= size <= _LARGEST:
            raise InputError(
                f"vocab_size {size} is out of range for bpe",
                why=f"it is from {_SMALLEST} to {_LARGEST}: 256 bytes, {_ranks.END_OF_TEXT}, and the merges",
                hint=f"set data.vocab_size={DEFAULT_SIZE}",
            )
        merges = _learn(texts, size - 1)
        return cls(merges, {_ranks.END_OF_TEXT: len(merges)}, _patterns.QUILL)


def _learn(texts: Iterable[str], size: int) -> list[bytes]:
    """Return the tokens in the order of their ids, single bytes first."""
    try:
        import rustbpe  # type: ignore[import-untyped, import-not-found, unused-ignore]
    except ImportError:
        raise InputError(
            "cannot train a bpe tokenizer",
            why="it needs the rustbpe package",
            hint="pip install 'quill-gpt[bpe]'",
        ) from None

    def chunks() -> Iterator[str]:
        for text in texts:
            for chunk in _ranks.chunks(text):
                yield from _cut(chunk)

    learner = rustbpe.Tokenizer()
    try:
        # It splits as many chunks at a time on all processors, and holds them in memory.
        learner.train_from_iterator(chunks(), vocab_size=size, buffer_size=16, pattern=_patterns.QUILL)
    except BaseException as e:
        if not _ranks.is_panic(e):
            raise
        raise InputError(
            "training the bpe tokenizer failed", why=str(e), hint="set data.tokenizer=gpt2"
        ) from None
    return [bytes(token) for token, _ in sorted(learner.get_mergeable_ranks(), key=lambda pair: pair[1])]


def _cut(text: str) -> Iterator[str]:
    """Cut a text inside of pieces that are far longer than any token.

    The time to learn from a piece grows with the square of its length.
    """
    # A run that long covers a whole window of half its length, wherever it begins.
    windows = (text[i : i + _LONGEST_PIECE // 2] for i in range(0, len(text), _LONGEST_PIECE // 2))
    if not any(w.isspace() or w.isalpha() or _SIGNS.fullmatch(w) for w in windows):
        yield text
        return
    at = 0
    for run in _RUNS.finditer(text):
        for end in range(run.start() + _LONGEST_PIECE, run.end(), _LONGEST_PIECE):
            yield text[at:end]
            at = end
    yield text[at:]
