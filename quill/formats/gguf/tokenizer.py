"""Tokenizers in a GGUF file, both directions.

llama.cpp's "gpt2" is byte-level BPE: each byte has a printable character of its own, tokens are spelt in
those, merges join them, and `tokenizer.ggml.pre` names the pattern by which text is split before. A
vocabulary of characters is one too: the merges join the bytes of each character, none joins two characters,
and no pattern splits inside of one, so its ids are those of quill for any text. (Its "rwkv" would hold
characters as they are, but never ends on a byte that begins a known character and goes on as none.)
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from quill.errors import InputError
from quill.formats import byte_level
from quill.formats.byte_level import spell
from quill.formats.gguf.file import Value
from quill.tokenizers import base

if TYPE_CHECKING:
    from quill.formats.gguf.file import File
    from quill.tokenizers.base import Tokenizer

KIND = "quill.tokenizer.kind"
_PATTERN = "quill.tokenizer.pattern"
END = "<|endoftext|>"
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5

# How text is split, by llama.cpp's name for it.
_SPLITS = {
    "gpt-2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "llama-bpe": (
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
        r"|\s*[\r\n]|\s+(?!\S)|\s+"
    ),
    "qwen2": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
}
# What else goes by the same pattern.
_SAME = {"llama3": "llama-bpe", "llama-v3": "llama-bpe", "dbrx": "llama-bpe", "smaug-bpe": "llama-bpe"}
# Of GPT-2's ordinary tokens as the format spells them, with line ends between.
_GPT2_SHA256 = "3a1f1c010d179f036be1992bc14b861e326341438633869c694dc4dccfe153d3"
_GPT2_SPECIALS = {END: 50256}
_PUBLISHED = {"gpt2": "gpt-2", "cl100k_base": "llama-bpe"}
_REMARKS = {
    "cl100k_base": "a text that ends in white space with a line end in it gets one token more there in "
    "llama.cpp, where the pattern has no exception for the end of the text",
}


class Tokens(NamedTuple):
    """A tokenizer as the format has it.

    Attributes:
        metadata: Its keys.
        added: Ids that quill's has not, at the end: each needs a row in the embedding.
        notes: What a person should know of it.
    """

    metadata: dict[str, Value]
    added: int
    notes: tuple[str, ...]


def refusal(tokenizer: Tokenizer) -> str | None:
    """Why llama.cpp cannot have a tokenizer, as a clause; None where it can."""
    if tokenizer.kind == "char" or tokenizer.kind in _PUBLISHED:
        return None
    if tokenizer.kind == "bpe":
        pattern = tokenizer.to_dict()["pattern"]
        return None if pattern in _SPLITS.values() else f"llama.cpp does not split text by {pattern!r}"
    if tokenizer.kind == "o200k_base":
        return "llama.cpp splits words with letters beyond ASCII otherwise than o200k_base, into other tokens"
    return f"llama.cpp has nothing like the {tokenizer.kind} tokenizer"


def write(tokenizer: Tokenizer) -> Tokens:
    """A tokenizer's metadata.

    Args:
        tokenizer: One that `refusal` lets pass.

    Raises:
        InputError: Two of its tokens are spelt alike.
    """
    if tokenizer.kind == "char":
        # Any pattern will do; with this one llama.cpp does not tidy spaces away when it turns ids into text.
        pre, pattern, specials = "qwen2", "", {}
        plain = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
        merges = _merges_of_characters(plain)
    else:
        stored = tokenizer.to_dict()
        pattern, specials = stored["pattern"], stored["specials"]
        plain = [base64.b64decode(token) for token in stored["ranks"].split()]
        pre = _PUBLISHED.get(tokenizer.kind) or next(k for k, v in _SPLITS.items() if v == pattern)
        merges = [pair for pair in byte_level.merges(plain) if pair]
    texts = [spell(token) for token in plain]
    texts += [f"[UNUSED{i}]" for i in range(len(plain), tokenizer.vocab_size)]
    types = [_NORMAL] * len(plain) + [_UNUSED] * (len(texts) - len(plain))
    for name, i in specials.items():
        texts[i], types[i] = name, _CONTROL
    never = [i for i, kind in enumerate(types) if kind == _UNUSED]
    notes = [_REMARKS[tokenizer.kind]] if tokenizer.kind in _REMARKS else []
    end, added = tokenizer.eot_id, 0
    if end is None:
        # Without one llama.cpp takes id 11, an ordinary token, and stops at it.
        end, added = len(texts), 1
        texts, types, never = [*texts, END], [*types, _CONTROL], [*never, end]
        notes.append(
            f"llama.cpp needs a token that ends texts: {END} was added, which is never the likeliest"
        )
    if len(set(texts)) < len(texts):
        raise InputError("the tokenizer does not fit gguf", why="two of its tokens are spelt alike")
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
    """The tokenizer of a file.

    Raises:
        CorruptError: Its keys contradict each other.
        InputError: It is one that quill has not.
    """
    if "tokenizer.ggml.model" not in file:
        raise _foreign("the file holds no tokenizer")
    model = file.get("tokenizer.ggml.model", str)
    if model != "gpt2":
        raise _foreign(f"its tokenizer is of the kind {model!a}, quill has byte-level BPE and characters")
    texts = file.get("tokenizer.ggml.tokens", list)
    types = file.get("tokenizer.ggml.token_type", tuple, (_NORMAL,) * len(texts))
    if len(types) != len(texts):
        raise file.damaged(f"it has {len(texts):,} tokens and the types of {len(types):,}")
    if len(set(texts)) < len(texts):
        raise file.damaged("a token is there twice")
    end = file.get("tokenizer.ggml.eos_token_id", int, -1)
    specials = {t: i for i, t in enumerate(texts) if types[i] in (_CONTROL, _USER_DEFINED)}
    if 0 <= end < len(texts) and texts[end] == END:
        specials[END] = end
    plain = _plain(texts, types, set(specials.values()))
    kind = file.get(KIND, str, _published(file, texts, specials))
    data: dict[str, Any] = {"schema": base.SCHEMA_VERSION, "kind": kind}
    if kind == "char":
        try:
            data["vocabulary"] = "".join(token.decode() for token in plain)
        except UnicodeDecodeError:
            raise file.damaged("a token of its characters is none") from None
        if len(data["vocabulary"]) != len(plain):
            raise file.damaged("a token of its characters is more than one")
    elif kind == "bpe" or kind in _PUBLISHED:
        _in_order(texts, plain, file.get("tokenizer.ggml.merges", list), file)
        ranks = " ".join(base64.b64encode(token).decode() for token in plain)
        data |= {"pattern": _split_of(file, kind), "specials": specials, "ranks": ranks}
    else:
        raise file.damaged(f"{KIND} is {kind!a}")
    return base.read(data, origin=str(file.path))


def _plain(texts: Sequence[str], types: Sequence[int], specials: set[int]) -> list[bytes]:
    """The bytes of the ordinary tokens, which are the first ids."""
    ordinary = [i for i, kind in enumerate(types) if kind == _NORMAL and i not in specials]
    if ordinary != list(range(len(ordinary))):
        raise _foreign("its ordinary tokens are not its first ids, as those of quill are")
    try:
        return [byte_level.unspell(texts[i]) for i in ordinary]
    except KeyError as e:
        raise _foreign(f"a token has the character {e.args[0]!a}, which stands for no byte") from None


def _in_order(texts: Sequence[str], plain: Sequence[bytes], merges: Sequence[str], file: File) -> None:
    """Refuse merges in another order than the ids of what they make: quill merges by ids."""
    ids = {text: i for i, text in enumerate(texts[: len(plain)])}
    made = [ids.get(merge.replace(" ", "", 1), -1) for merge in merges]
    if -1 in made:
        raise file.damaged("a merge makes what is no token")
    if made != sorted(made):
        raise _foreign("its tokens are not numbered in the order of their merges, as those of quill are")


def _published(file: File, texts: Sequence[str], specials: Mapping[str, int]) -> str:
    """The kind of a tokenizer that another program wrote."""
    named = file.get("tokenizer.ggml.pre", str, "") == _PUBLISHED["gpt2"] and specials == _GPT2_SPECIALS
    spelt = "\n".join(texts[: _GPT2_SPECIALS[END]]).encode()
    return "gpt2" if named and hashlib.sha256(spelt).hexdigest() == _GPT2_SHA256 else "bpe"


def _split_of(file: File, kind: str) -> str:
    if _PATTERN in file:
        return str(file.get(_PATTERN, str))
    if kind == "gpt2":
        from tiktoken_ext.openai_public import r50k_pat_str  # type: ignore[import-untyped]

        # As quill's own has it, so that data prepared with one fits models with the other.
        return str(r50k_pat_str)
    pre = file.get("tokenizer.ggml.pre", str, "default")
    pattern = _SPLITS.get(_SAME.get(pre, pre))
    if pattern is None:
        raise _foreign(f"it splits text as {pre!a} does; quill knows {', '.join(_SPLITS)}")
    return pattern


def _foreign(why: str) -> InputError:
    return InputError(
        "quill has no such tokenizer", why=why, hint="name one that gives the same ids: --tokenizer"
    )


def _merges_of_characters(characters: Sequence[bytes]) -> list[tuple[bytes, bytes]]:
    """Pairs that join the bytes of each character from the left."""
    pairs = ((c[:n], c[n : n + 1]) for c in characters for n in range(1, len(c)))
    return list(dict.fromkeys(pairs))
