"""quill's char tokenizer as a WordLevel model of the tokenizers library, and back.

Text is split into single characters. The model has no unknown token, and the library raises on a character
that it does not know. So a normalizer removes such characters first, as quill does if told to skip them.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from quill.formats.tokenizer_json import fields
from quill.tokenizers import base
from quill.tokenizers.word import UNKNOWN

if TYPE_CHECKING:
    from quill.tokenizers.base import Tokenizer

# Unicode's classes of characters, those first that text can spare: symbols, marks, numbers, punctuation.
_RARE = "SMNPLCZ"
_ANY = r"[\s\S]"
# The same by others.
_ANY_TOO = (_ANY, "(?m).", r".|\n")


def write(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Make the model, the split and the decoder of a char tokenizer.

    Args:
        stored: The tokenizer's JSON form.
    """
    vocabulary = {character: i for i, character in enumerate(stored["vocabulary"])}
    return {
        "normalizer": normalizer(vocabulary),
        "pre_tokenizer": fields.split_step(_ANY),
        "decoder": {"type": "Fuse"},
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": UNKNOWN},
    }


def padding(characters: Iterable[str]) -> str:
    """The character that fills up short texts of a batch, unseen by attention.

    Without one, programs add a token, for which the model has no embedding. As transformers leaves it out of
    what it decodes without special tokens, it is one that few texts need: a symbol such as $ if there is one.
    """
    return min(characters, key=lambda c: (_RARE.index(unicodedata.category(c)[0]), -ord(c)))


def normalizer(characters: Iterable[str]) -> dict[str, Any]:
    """The normalizer that removes all other characters."""
    unknown = f"[^{fields.character_class(sorted(characters))}]"
    return {"type": "Replace", "pattern": {"Regex": unknown}, "content": ""}


def without_normalizer(document: Mapping[str, Any], characters: Iterable[str]) -> Mapping[str, Any]:
    """The document without the normalizer that `write` makes; any other stays."""
    own = document.get("normalizer") == normalizer(characters)
    return {**document, "normalizer": None} if own else document


def read(document: Mapping[str, Any], vocabulary: Mapping[str, int], origin: str) -> Tokenizer:
    """Read a WordLevel model as a char tokenizer.

    Raises:
        InputError: Its words are not characters.
    """
    steps = fields.steps(document.get("pre_tokenizer"), "pretokenizers")
    if len(steps) != 1 or fields.split_pattern(steps[0]) not in _ANY_TOO:
        raise fields.unsupported(origin, "its words are not single characters")
    if document.get("added_tokens"):
        raise fields.unsupported(origin, "it has special tokens; quill's char tokenizer has none")
    characters = fields.by_id(vocabulary, origin)
    if any(len(c) != 1 for c in characters):
        raise fields.unsupported(origin, "a token is more than one character")
    return base.read({"schema": 1, "kind": "char", "vocabulary": "".join(characters)}, origin=origin)
