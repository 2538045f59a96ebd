"""quill's tokenizers as `tokenizer.json` of the tokenizers library, and back, with the same ids for any text.

Special tokens are added tokens there. That library finds their names in a text unless it is told otherwise
(`encode_special_tokens`; `split_special_tokens` to transformers); to quill they are text.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from quill.errors import CorruptError
from quill.formats.tokenizer_json import bpe, char, fields, word
from quill.tokenizers.word import UNKNOWN

if TYPE_CHECKING:
    from quill.tokenizers.base import Tokenizer


def refusal(tokenizer: Tokenizer) -> str | None:
    """Why the tokenizers library cannot have a tokenizer, as a clause; None where it can."""
    stored = tokenizer.to_dict()
    if "ranks" in stored:
        return bpe.refusal(stored)
    if tokenizer.kind == "word":
        return f"its vocabulary holds the word {UNKNOWN!r}" if UNKNOWN in stored["words"] else None
    if tokenizer.kind != "char":
        return f"the tokenizers library has nothing like the {tokenizer.kind} tokenizer"
    return None


def write(tokenizer: Tokenizer) -> dict[str, Any]:
    """A tokenizer's tokenizer.json.

    Args:
        tokenizer: One that `refusal` lets pass.
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
    """What tokenizer_config.json says beside the tokenizer.json that `write` makes.

    Args:
        tokenizer: Any that `refusal` lets pass.
        context: The model's, in tokens.
    """
    made: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "add_prefix_space": False,
        "model_max_length": context,
        # Without this a special token written out in a text would be that token; to quill it is text.
        "split_special_tokens": True,
    }
    if tokenizer.eot_id is not None:
        end = tokenizer.token_bytes(tokenizer.eot_id).decode()
        made |= {"bos_token": end, "eos_token": end, "pad_token": end}
    return made


def read(document: Any, origin: str) -> tuple[Tokenizer, tuple[str, ...]]:
    """The tokenizer of a tokenizer.json.

    Args:
        document: What it holds.
        origin: Its name, for messages.

    Returns:
        The tokenizer, and what a person should know of the translation.

    Raises:
        CorruptError: It is no tokenizer.json, or contradicts itself.
        InputError: quill has no such tokenizer.
    """
    model = document.get("model") if isinstance(document, dict) else None
    if not isinstance(model, dict):
        raise CorruptError(f"'{origin}' is no tokenizer", why="it has no object 'model'")
    vocabulary = model.get("vocab")
    # Files of the library's first versions do not say that their models are BPE.
    kind = model.get("type", "BPE")
    if kind not in ("BPE", "WordLevel"):
        why = f"its model is {ascii(kind)[:60]}; quill has characters, words and byte-level BPE"
        raise fields.foreign(origin, why)
    vocabulary, notes = fields.vocabulary(vocabulary, origin), _remarks(document, origin)
    if kind == "WordLevel":
        return char.read(document, vocabulary, origin), notes
    if isinstance(model.get("unk_token"), str) and not model.get("merges"):
        return word.read(document, vocabulary, origin), notes
    return bpe.read(document, vocabulary, origin), notes


def _remarks(document: Mapping[str, Any], origin: str) -> tuple[str, ...]:
    """What of a tokenizer quill leaves out, where it may be left out."""
    notes = []
    for step in fields.steps(document.get("normalizer"), "normalizers"):
        if step.get("type") != "NFC":
            why = f"it changes text by {ascii(step.get('type'))[:60]} first, which quill does not"
            raise fields.foreign(origin, why)
        notes.append("its tokenizer composes characters first (Unicode's NFC), quill's takes text as it is")
    if any(
        step.get("type") != "ByteLevel" for step in fields.steps(document.get("post_processor"), "processors")
    ):
        notes.append("its tokenizer puts special tokens around a text, quill's does not")
    return tuple(notes)
