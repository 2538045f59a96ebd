"""quill's tokenizers as the `tokenizer.json` of the tokenizers library, with the same ids for any text.

Special tokens become added tokens. The library finds their names in text unless it is told not to
(`encode_special_tokens`; `split_special_tokens` in transformers); to quill a name in text is text.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from quill.errors import CorruptError, shorten
from quill.formats.tokenizer_json import bpe, char, fields, word
from quill.tokenizers.word import UNKNOWN

if TYPE_CHECKING:
    from quill.tokenizers.base import Tokenizer


def refusal(tokenizer: Tokenizer) -> str | None:
    """Why the tokenizers library cannot represent a tokenizer, as a clause; None if it can."""
    stored = tokenizer.to_dict()
    if "ranks" in stored:
        return bpe.refusal(stored)
    if tokenizer.kind == "word":
        return f"its vocabulary has the word {UNKNOWN!r}" if UNKNOWN in stored["words"] else None
    if tokenizer.kind != "char":
        return f"the tokenizers library has no equivalent of the {tokenizer.kind} tokenizer"
    return None


def write(tokenizer: Tokenizer) -> dict[str, Any]:
    """Make a tokenizer's tokenizer.json.

    Args:
        tokenizer: One that `refusal` accepts.
    """
    stored = tokenizer.to_dict()
    if "ranks" in stored:
        own = bpe.write(stored)
    else:
        own = char.write(stored) if tokenizer.kind == "char" else word.write(stored)
    plain: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
    }
    return {**plain, **own}


def settings(tokenizer: Tokenizer, context: int) -> dict[str, Any]:
    """Make the tokenizer_config.json that belongs to the tokenizer.json of `write`.

    Args:
        tokenizer: One that `refusal` accepts.
        context: The model's context length, in tokens.
    """
    made: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "add_prefix_space": False,
        "model_max_length": context,
        # Without this the name of a special token in a text would become that token; to quill it is text.
        "split_special_tokens": True,
    }
    if tokenizer.eot_id is not None:
        end = tokenizer.token_bytes(tokenizer.eot_id).decode()
        made |= {"bos_token": end, "eos_token": end, "pad_token": end}
    elif tokenizer.kind == "word":
        made["pad_token"] = UNKNOWN
    elif tokenizer.kind == "char":
        made["pad_token"] = char.padding(tokenizer.to_dict()["vocabulary"])
    return made


def read(document: Any, origin: str) -> tuple[Tokenizer, tuple[str, ...]]:
    """Read a tokenizer.json.

    Args:
        document: Its content.
        origin: Its name, for messages.

    Returns:
        The tokenizer, and notes on what quill leaves out of it.

    Raises:
        CorruptError: It is not a tokenizer.json, or contradicts itself.
        InputError: quill does not support the tokenizer.
    """
    model = document.get("model") if isinstance(document, dict) else None
    if not isinstance(model, dict):
        raise CorruptError(f"'{origin}' is not a tokenizer", why="it has no object 'model'")
    # The library's first versions did not name the type of a BPE model.
    kind = model.get("type", "BPE")
    if kind not in ("BPE", "WordLevel"):
        why = f"its model is {shorten(kind)}; quill has character, word and byte-level BPE tokenizers"
        raise fields.unsupported(origin, why)
    vocabulary = fields.vocabulary(model.get("vocab"), origin)
    if kind == "WordLevel":
        tokenizer = char.read(document, vocabulary, origin)
        document = char.without_normalizer(document, vocabulary)
    elif isinstance(model.get("unk_token"), str) and not model.get("merges"):
        tokenizer = word.read(document, vocabulary, origin)
    else:
        tokenizer = bpe.read(document, vocabulary, origin)
    return tokenizer, _notes(document, origin)


def _notes(document: Mapping[str, Any], origin: str) -> tuple[str, ...]:
    """What quill leaves out, where that is harmless enough."""
    notes = []
    for step in fields.steps(document.get("normalizer"), "normalizers"):
        if step.get("type") != "NFC":
            raise fields.unsupported(origin, f"its normalizer is {shorten(step.get('type'))}; quill has none")
        notes.append("its tokenizer normalizes text to NFC first; quill encodes text as it is")
    processors = fields.steps(document.get("post_processor"), "processors")
    if any(step.get("type") != "ByteLevel" for step in processors):
        notes.append("its tokenizer adds special tokens around a text; quill adds none")
    return tuple(notes)
