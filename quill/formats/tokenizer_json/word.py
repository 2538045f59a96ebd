"""quill's word tokenizer as a BPE model of the tokenizers library, and back.

The model has no merges and looks up whole words first, as quill does: a known word is one token, any other is
spelled in characters, and an unknown character is `<unk>`. The split lists the characters that Python takes
for letters and white space.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from quill.formats.tokenizer_json import fields
from quill.tokenizers import base
from quill.tokenizers.word import UNKNOWN

if TYPE_CHECKING:
    from quill.tokenizers.base import Tokenizer

_LONGEST_CLASS = 1 << 17


def write(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Make the model, the split and the decoder of a word tokenizer.

    Args:
        stored: The tokenizer's JSON form.
    """
    tokens = [UNKNOWN, *stored["characters"], *stored["words"]]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    own = {"unk_token": UNKNOWN, "ignore_merges": True, "vocab": vocabulary, "merges": []}
    return {
        "pre_tokenizer": fields.split_step(_word_split()),
        "decoder": {"type": "Fuse"},
        "model": {**fields.BPE_DEFAULTS, **own},
    }


def read(document: Mapping[str, Any], vocabulary: Mapping[str, int], origin: str) -> Tokenizer:
    """Read a BPE model that looks up whole words and merges nothing as a word tokenizer.

    Raises:
        InputError: It splits text into other words.
    """
    model = document["model"]
    steps = fields.steps(document.get("pre_tokenizer"), "pretokenizers")
    tokens = fields.by_id(vocabulary, origin)
    n = next((i for i, token in enumerate(tokens) if i and len(token) != 1), len(tokens))
    characters, words = tokens[1:n], tokens[n:]
    if document.get("added_tokens") or model["unk_token"] != tokens[0] or model.get("fuse_unk"):
        raise fields.unsupported(origin, "its unknown token is not its first, or it has special tokens")
    if not model.get("ignore_merges"):
        raise fields.unsupported(origin, "it has words that it never makes")
    if any(len(word) < 2 for word in words):
        raise fields.unsupported(origin, "its single characters are not before its words")
    if len(steps) != 1 or not _splits_words(fields.split_pattern(steps[0]) or "", characters):
        raise fields.unsupported(origin, "it splits text into words by another pattern than quill")
    data = {"schema": 1, "kind": "word", "characters": "".join(characters), "words": words}
    return base.read(data, origin=origin)


def _is_letter(character: str) -> bool:
    """Whether Python's `\\w` matches it."""
    return character.isalnum() or character == "_"


@cache
def _word_split() -> str:
    """The split of quill's word tokenizer, with every character that Python takes for a letter or a space."""
    characters = [chr(point) for point in range(sys.maxunicode + 1)]
    letters, blanks = filter(_is_letter, characters), filter(str.isspace, characters)
    return _words_of(fields.character_class(letters), fields.character_class(blanks))


def _words_of(letters: str, blanks: str) -> str:
    return f"[{letters}]+(?:['’][{letters}]+)*|[{blanks}]+|[^{letters}{blanks}]+"


def _splits_words(pattern: str, characters: Sequence[str]) -> bool:
    """Whether a pattern splits text of these characters as quill does; each Python knows other letters."""
    if pattern == _word_split():
        return True
    letters, between, _ = pattern.removeprefix("[").partition("]+(?:['’][")
    blanks = pattern.rpartition("|[^")[2].removesuffix("]+").removeprefix(letters)
    if not between or max(len(letters), len(blanks)) > _LONGEST_CLASS:
        return False
    if pattern != _words_of(letters, blanks):
        return False
    try:
        letter, blank = re.compile(f"[{letters}]"), re.compile(f"[{blanks}]")
    except re.error:
        return False
    return all(
        bool(letter.fullmatch(c)) == _is_letter(c) and bool(blank.fullmatch(c)) == c.isspace()
        for c in characters
    )
