"""quill's word tokenizer as a BPE model of the tokenizers library, and back.

The model has no merges and looks words up whole first, which is what quill's does: a known word is one token,
any other is spelt in characters, and those unknown are `<unk>`. The split writes out which characters Python
takes for letters and blanks.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from quill.formats.tokenizer_json import fields
from quill.tokenizers import base
from quill.tokenizers.word import UNKNOWN

if TYPE_CHECKING:
    from quill.tokenizers.base import Tokenizer

_LONGEST_CLASS = 1 << 17


def write(stored: Mapping[str, Any]) -> dict[str, Any]:
    """The model, the split and the decoder of a word tokenizer.

    Args:
        stored: Its JSON form.
    """
    pieces = [UNKNOWN, *stored["characters"], *stored["words"]]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    own = {"unk_token": UNKNOWN, "ignore_merges": True, "vocab": vocabulary, "merges": []}
    return {
        "pre_tokenizer": fields.split(_word_split()),
        "decoder": {"type": "Fuse"},
        "model": {**fields.PLAIN_BPE, **own},
    }


def read(document: Mapping[str, Any], vocabulary: Mapping[str, int], origin: str) -> Tokenizer:
    """A word tokenizer of a BPE model that looks pieces up whole and merges nothing.

    Raises:
        InputError: It makes other words of a text.
    """
    model = document["model"]
    steps = fields.steps(document.get("pre_tokenizer"), "pretokenizers")
    pieces = fields.in_order(vocabulary, origin)
    n = next((i for i, piece in enumerate(pieces) if i and len(piece) != 1), len(pieces))
    characters, words = pieces[1:n], pieces[n:]
    if document.get("added_tokens") or model["unk_token"] != pieces[0] or model.get("fuse_unk"):
        raise fields.foreign(origin, "its unknown token is not its first, or it has special ones")
    if not model.get("ignore_merges"):
        raise fields.foreign(origin, "it has words that it never makes")
    if any(len(word) < 2 for word in words):
        raise fields.foreign(origin, "its single characters are not before its words")
    if len(steps) != 1 or not _splits_words(fields.split_of(steps[0]) or "", characters):
        raise fields.foreign(origin, "it splits text into words otherwise than quill")
    data = {"schema": 1, "kind": "word", "characters": "".join(characters), "words": words}
    return base.read(data, origin=origin)


def _is_letter(character: str) -> bool:
    """Whether it is in Python's `\\w`."""
    return character.isalnum() or character == "_"


@cache
def _word_split() -> str:
    """The split of quill's word tokenizer, with every character that Python takes for a letter or a blank."""
    return _words_of(_class(_is_letter), _class(str.isspace))


def _words_of(letters: str, blanks: str) -> str:
    return f"[{letters}]+(?:['’][{letters}]+)*|[{blanks}]+|[^{letters}{blanks}]+"


def _class(belongs: Callable[[str], bool]) -> str:
    """The inside of a character class, in ranges."""
    found: list[str] = []
    start = None
    for point in range(sys.maxunicode + 2):
        inside = point <= sys.maxunicode and belongs(chr(point))
        if inside and start is None:
            start = point
        elif not inside and start is not None:
            last = point - 1
            found.append(_literal(start) + (f"-{_literal(last)}" if last > start else ""))
            start = None
    return "".join(found)


def _literal(point: int) -> str:
    return f"\\{chr(point)}" if chr(point) in "\\]^-[&~|" else chr(point)


def _splits_words(pattern: str, characters: Sequence[str]) -> bool:
    """Whether a pattern splits text of these characters as quill does; another Python knows other letters."""
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
