"""Tokenizers in a GGUF file, both directions.

llama.cpp's "gpt2" is byte-level BPE: tokens are spelled in GPT-2's letters for bytes, merges join them, and
`tokenizer.ggml.pre` names the pattern that splits text first. A vocabulary of characters is one too: the
merges join the bytes of each character, none joins two characters, and no pattern splits inside one, so its
ids are quill's for any text. (Its "rwkv" could store characters as they are, but never returns on a byte that
begins a known character and continues as an unknown one.)
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from quill.errors import InputError, shorten
from quill.formats.gguf.file import Value
from quill.formats.tokenizer_json import byte_level, fields
from quill.formats.tokenizer_json.bpe import installed_gpt2_split
from quill.formats.tokenizer_json.byte_level import spell
from quill.tokenizers import _patterns, base
from quill.tokenizers._ranks import END_OF_TEXT, rank_ids

if TYPE_CHECKING:
    from quill.formats.gguf.file import File
    from quill.tokenizers.base import Tokenizer

KIND = "quill.tokenizer.kind"
_PATTERN = "quill.tokenizer.pattern"
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5

# llama.cpp's name for each split. Of several patterns that split alike, the first is read.
_SPLITS = {
    _patterns.GPT2: "gpt-2",
    _patterns.GPT2_POSSESSIVE: "gpt-2",
    _patterns.QUILL: "llama-bpe",
    _patterns.LLAMA3: "llama-bpe",
    _patterns.QWEN2: "qwen2",
}
# Its other names for the same split.
_SAME = {"llama3": "llama-bpe", "llama-v3": "llama-bpe", "dbrx": "llama-bpe", "smaug-bpe": "llama-bpe"}
# Of GPT-2's ordinary tokens as the format spells them, one a line.
_GPT2_SHA256 = "3a1f1c010d179f036be1992bc14b861e326341438633869c694dc4dccfe153d3"
_GPT2_SPECIALS = {END_OF_TEXT: 50256}
_PUBLISHED = {"gpt2": "gpt-2", "cl100k_base": "llama-bpe"}
_NOTES = {
    "cl100k_base": "a text that ends in white space with a newline in it may get one more token in "
    "llama.cpp, whose pattern has no exception for the end of a text",
}


class Tokens(NamedTuple):
    """A tokenizer as the format stores it.

    Attributes:
        metadata: Its keys.
        added: The number of ids added at the end: each needs a row in the embedding.
        notes: What the user should know about it.
    """

    metadata: dict[str, Value]
    added: int
    notes: tuple[str, ...]


def refusal(tokenizer: Tokenizer) -> str | None:
    """Why llama.cpp cannot use a tokenizer, as a clause; None if it can."""
    if tokenizer.kind == "char" or tokenizer.kind in _PUBLISHED:
        return None
    if tokenizer.kind == "bpe":
        stored = tokenizer.to_dict()
        pattern = stored["pattern"]
        if pair := _overlapping(stored.get("added", ())):
            return f"its tokens {pair} can overlap in a text, and llama.cpp looks for the longest first"
        return None if pattern in _SPLITS else f"llama.cpp has no split by the pattern {shorten(pattern, 60)}"
    if tokenizer.kind == "o200k_base":
        return "llama.cpp splits words with letters beyond ASCII differently from o200k_base"
    return f"llama.cpp has no equivalent of the {tokenizer.kind} tokenizer"


def write(tokenizer: Tokenizer) -> Tokens:
    """Make a tokenizer's metadata.

    Args:
        tokenizer: One that `refusal` accepts.

    Raises:
        InputError: Two of its tokens are spelled alike.
    """
    if tokenizer.kind == "char":
        # Any pattern will do; with this one llama.cpp does not remove spaces when it turns ids into text.
        pre, pattern, specials, added_names = "qwen2", "", {}, {}
        plain = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
        merges = _merges_of_characters(plain)
    else:
        stored = tokenizer.to_dict()
        pattern, specials, added_names = stored["pattern"], stored["specials"], stored.get("added", {})
        plain = [base64.b64decode(token) for token in stored["ranks"].split()]
        pre = _PUBLISHED.get(tokenizer.kind) or _SPLITS[pattern]
        merges = [pair for pair in byte_level.merges(plain) if pair]
    texts = [f"[UNUSED{i}]" for i in range(tokenizer.vocab_size)]
    types = [_UNUSED] * len(texts)
    ids = rank_ids(len(plain), [*specials.values(), *added_names.values()])
    for i, token in zip(ids, plain, strict=True):
        texts[i], types[i] = spell(token), _NORMAL
    for names, kind in ((specials, _CONTROL), (added_names, _USER_DEFINED)):
        for name, i in names.items():
            texts[i], types[i] = name, kind
    never = [i for i, kind in enumerate(types) if kind == _UNUSED]
    notes = [_NOTES[tokenizer.kind]] if tokenizer.kind in _NOTES else []
    end, added = tokenizer.eot_id, 0
    if end is None:
        # Without one llama.cpp takes id 11, an ordinary token, and stops there.
        end, added = len(texts), 1
        texts, types, never = [*texts, END_OF_TEXT], [*types, _CONTROL], [*never, end]
        notes.append(
            f"llama.cpp needs an end-of-text token: {END_OF_TEXT} was added, and is never the likeliest"
        )
    if len(set(texts)) < len(texts):
        raise InputError("gguf cannot store the tokenizer", why="two of its tokens are spelled alike")
    metadata = {
        "tokenizer.ggml.model": Value("string", "gpt2"),
        "tokenizer.ggml.pre": Value("string", pre),
        "tokenizer.ggml.tokens": Value("strings", texts),
        "tokenizer.ggml.token_type": Value("int32s", types),
        "tokenizer.ggml.merges": Value("strings", [f"{spell(a)} {spell(b)}" for a, b in merges]),
        "tokenizer.ggml.bos_token_id": Value("uint32", end),
        "tokenizer.ggml.eos_token_id": Value("uint32", end),
        "tokenizer.ggml.add_bos_token": Value("bool", False),
        "tokenizer.ggml.add_eos_token": Value("bool", False),
        KIND: Value("string", tokenizer.kind),
    }
    if never:
        metadata["tokenizer.ggml.suppress_tokens"] = Value("int32s", never)
    if pattern:
        metadata[_PATTERN] = Value("string", pattern)
    return Tokens(metadata, added, tuple(notes))


def read(file: File) -> Tokenizer:
    """Read a file's tokenizer.

    Raises:
        CorruptError: Its keys contradict each other.
        InputError: quill does not support it.
    """
    if "tokenizer.ggml.model" not in file:
        raise _unsupported("the file has none")
    model = file.get("tokenizer.ggml.model", str)
    if model != "gpt2":
        raise _unsupported(f"its type is {shorten(model)}; quill has byte-level BPE (gpt2)")
    texts = file.get("tokenizer.ggml.tokens", list)
    types = file.get("tokenizer.ggml.token_type", tuple, (_NORMAL,) * len(texts))
    if len(types) != len(texts):
        raise file.damaged(f"it has {len(texts):,} tokens and {len(types):,} token types")
    if len(set(texts)) < len(texts):
        raise file.damaged("a token occurs twice")
    end = file.get("tokenizer.ggml.eos_token_id", int, -1)
    specials = {t: i for i, t in enumerate(texts) if types[i] == _CONTROL}
    added = {t: i for i, t in enumerate(texts) if types[i] == _USER_DEFINED and t != END_OF_TEXT}
    at = texts.index(END_OF_TEXT) if END_OF_TEXT in texts else -1
    if at >= 0 and (at == end or types[at] == _USER_DEFINED):
        specials[END_OF_TEXT] = at
    if pair := _overlapping(added):
        raise _unsupported(f"its tokens {pair} can overlap in a text")
    fields.check_added(added, str(file.path))
    plain = _plain(texts, types, {*specials.values(), *added.values()})
    kind = file.get(KIND, str, _published(file, texts, specials, added))
    data: dict[str, Any] = {"schema": base.SCHEMA_VERSION, "kind": kind}
    if kind == "char":
        if added or set(specials) - {END_OF_TEXT} or specials.get(END_OF_TEXT, len(plain)) < len(plain):
            raise file.damaged("its char tokenizer has tokens that are not characters")
        try:
            data["vocabulary"] = "".join(token.decode() for token in plain)
        except UnicodeDecodeError:
            raise file.damaged("a token of its char tokenizer is not a character") from None
        if len(data["vocabulary"]) != len(plain):
            raise file.damaged("a token of its char tokenizer is not one character")
    elif kind == "bpe" or kind in _PUBLISHED:
        _in_order(plain, file.get("tokenizer.ggml.merges", list), file)
        ranks = " ".join(base64.b64encode(token).decode() for token in plain)
        data |= {"pattern": _split_of(file, kind), "specials": specials, "ranks": ranks}
        if added:
            data["added"] = added
    else:
        raise file.damaged(f"{KIND} is {shorten(kind)}")
    return base.read(data, origin=str(file.path))


def _overlapping(added: Iterable[str]) -> str:
    """Two added tokens of which one can end within the other in a text; empty if there are none.

    llama.cpp looks for the longest name everywhere first, quill for the first name in the text.
    """
    names = sorted(added)
    for i, a in enumerate(names):
        for b in names[:i]:
            if any(a.endswith(b[:n]) or b.endswith(a[:n]) for n in range(1, min(len(a), len(b)))):
                return f"{shorten(b)} and {shorten(a)}"
    return ""


def _plain(texts: Sequence[str], types: Sequence[int], named: set[int]) -> list[bytes]:
    """The bytes of the ordinary tokens, whose ids are the smallest that no named token has."""
    ordinary = [i for i, kind in enumerate(types) if kind == _NORMAL and i not in named]
    if ordinary != list(rank_ids(len(ordinary), named)):
        raise _unsupported("there are unused ids before its ordinary tokens")
    try:
        return [byte_level.unspell(texts[i]) for i in ordinary]
    except KeyError as e:
        raise _unsupported(f"a token has the character {e.args[0]!a}, which stands for no byte") from None


def _in_order(plain: Sequence[bytes], merges: Sequence[str], file: File) -> None:
    """Refuse merges that are not in the order of their tokens' ids, by which quill merges."""
    ids = {spell(token): i for i, token in enumerate(plain)}
    made = [ids.get(merge.replace(" ", "", 1), -1) for merge in merges]
    if -1 in made:
        raise file.damaged("a merge makes no token")
    if made != sorted(made):
        raise _unsupported("its merges are not in the order of their tokens' ids, by which quill merges")


def _published(
    file: File, texts: Sequence[str], specials: Mapping[str, int], added: Mapping[str, int]
) -> str:
    """The kind of a tokenizer that another program wrote."""
    splits = file.get("tokenizer.ggml.pre", str, "") == _PUBLISHED["gpt2"]
    splits = splits and specials == _GPT2_SPECIALS and not added
    spelled = "\n".join(texts[: _GPT2_SPECIALS[END_OF_TEXT]]).encode()
    return "gpt2" if splits and hashlib.sha256(spelled).hexdigest() == _GPT2_SHA256 else "bpe"


def _split_of(file: File, kind: str) -> str:
    if _PATTERN in file:
        return str(file.get(_PATTERN, str))
    if kind == "gpt2":
        # As quill's own tokenizer has it, so that data prepared with one fits models with the other.
        return installed_gpt2_split()
    pre = file.get("tokenizer.ggml.pre", str, "default")
    for pattern, name in _SPLITS.items():
        if name == _SAME.get(pre, pre):
            return pattern
    known = ", ".join(dict.fromkeys(_SPLITS.values()))
    raise _unsupported(f"it splits text like {shorten(pre)}; quill knows {known}")


def _unsupported(why: str) -> InputError:
    return InputError("quill does not support the file's tokenizer", why=why, hint="tokenizer=gpt2")


def _merges_of_characters(characters: Sequence[bytes]) -> list[tuple[bytes, bytes]]:
    """The pairs that join the bytes of each character from the left."""
    pairs = ((c[:n], c[n : n + 1]) for c in characters for n in range(1, len(c)))
    return list(dict.fromkeys(pairs))
