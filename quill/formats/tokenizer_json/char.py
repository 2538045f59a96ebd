"""quill's char tokenizer as a WordLevel model of the tokenizers library, and back.

The model stands over a split into single characters. It has no unknown token, so a character that it does not
know is refused there too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from quill.formats.tokenizer_json import fields
from quill.tokenizers import base
from quill.tokenizers.word import UNKNOWN

if TYPE_CHECKING:
    from quill.tokenizers.base import Tokenizer

_ANY = r"[\s\S]"
_ANY_TOO = (_ANY, "(?m).", r".|\n")


def write(stored: Mapping[str, Any]) -> dict[str, Any]:
    """The model, the split and the decoder of a char tokenizer.

    Args:
        stored: Its JSON form.
    """
    vocabulary = {character: i for i, character in enumerate(stored["vocabulary"])}
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": UNKNOWN}
    return {"pre_tokenizer": fields.split(_ANY), "decoder": {"type": "Fuse"}, "model": model}


def read(document: Mapping[str, Any], vocabulary: Mapping[str, int], origin: str) -> Tokenizer:
    """A char tokenizer of a WordLevel model.

    Raises:
        InputError: Its words are not characters.
    """
    steps = fields.steps(document.get("pre_tokenizer"), "pretokenizers")
    if len(steps) != 1 or fields.split_of(steps[0]) not in _ANY_TOO:
        raise fields.foreign(origin, "its words are not single characters")
    if document.get("added_tokens"):
        raise fields.foreign(origin, "it has special tokens; quill's char tokenizer has none")
    characters = fields.in_order(vocabulary, origin)
    if any(len(c) != 1 for c in characters):
        raise fields.foreign(origin, "a token is more than one character")
    return base.read({"schema": 1, "kind": "char", "vocabulary": "".join(characters)}, origin=origin)
