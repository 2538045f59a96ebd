"""quill's byte-pair tokenizers as BPE models of the tokenizers library, and back.

The vocabulary is spelt in the letters that GPT-2 writes bytes in, the merges are those that the ranks amount
to. Where a token is made by no merge, pieces are looked up whole first, as tiktoken does with all.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from quill.errors import CorruptError
from quill.formats import byte_level
from quill.formats.tokenizer_json import fields
from quill.formats.tokenizer_json.patterns import UntranslatableError, from_oniguruma, to_oniguruma
from quill.tokenizers import base
from quill.tokenizers._ranks import END_OF_TEXT

if TYPE_CHECKING:
    from quill.tokenizers.base import Tokenizer

# GPT-2's split, as the library has it built in, and as tiktoken writes it.
GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_GPT2_SPLITS = (
    GPT2_SPLIT,
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
)
# Qwen's split, which a vocabulary and merges alone do not tell.
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CONTRACTED = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
# The published ranks, by the sha256 of their tiktoken file, with the special tokens and the pattern.
_PUBLISHED: Mapping[str, tuple[str, Mapping[str, int], tuple[str, ...]]] = {
    "gpt2": (
        "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930",
        {END_OF_TEXT: 50256},
        _GPT2_SPLITS,
    ),
    "cl100k_base": (
        "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7",
        {END_OF_TEXT: 100257, "<|fim_prefix|>": 100258, "<|fim_middle|>": 100259,
         "<|fim_suffix|>": 100260, "<|endofprompt|>": 100276},
        (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$"
         r"|\s*[\r\n]|\s+(?!\S)|\s",),
    ),
    "o200k_base": (
        "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d",
        {END_OF_TEXT: 199999, "<|endofprompt|>": 200018},
        (r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+" + _CONTRACTED
         + r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*" + _CONTRACTED
         + r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",),
    ),
}  # fmt: skip
_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
# What of a BPE model changes ids, beside its vocabulary and merges.
_ODD = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
# A bit of everything, to see whether a split leaves any text out.
_SAMPLE = (
    "aZ 09 é\u0301ʰ中ก \u1fbc ²Ⅷ½ _-–(]«»\"'!?&@#%*,./:;\\ $€+<=>|~ ^`¨ ©° \u20dd\u0903 \t\n\r\n \x0b\x0c\x85"
    "\u00a0\u2028\u2029\u3000 \x00\x1b\x7f\u00ad\u200d\ue000\U000e0001\U0010ffff \u0378 😀'll 'S  x"
)


def refusal(stored: Mapping[str, Any]) -> str | None:
    """Why the library cannot have a byte-pair tokenizer, as a clause; None where it can.

    Args:
        stored: Its JSON form.
    """
    try:
        to_oniguruma(stored["pattern"])
    except UntranslatableError as e:
        return f"the tokenizers library may split text otherwise by {str(e)!r} in its pattern"
    spelt = {byte_level.spell(token) for token in _ranks(stored)}
    doubled = next((name for name in stored["specials"] if name in spelt), None)
    return f"its special token {doubled!r} is spelt like an ordinary one" if doubled else None


def write(stored: Mapping[str, Any]) -> dict[str, Any]:
    """The model, the added tokens, the split and the decoder of a byte-pair tokenizer.

    Args:
        stored: Its JSON form, one that `refusal` lets pass.
    """
    ranks = _ranks(stored)
    pairs = byte_level.merges(ranks)
    vocabulary = {byte_level.spell(token): i for i, token in enumerate(ranks)}
    specials = sorted(stored["specials"].items(), key=lambda item: item[1])
    if [i for _, i in specials] != list(range(len(ranks), len(ranks) + len(specials))):
        # Added tokens are numbered on from the vocabulary, whatever id they state, unless they are in it.
        vocabulary.update(specials)
    unmade = any(len(token) > 1 and pair is None for token, pair in zip(ranks, pairs, strict=True))
    merges = [" ".join(map(byte_level.spell, pair)) for pair in pairs if pair]
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "added_tokens": [{"id": i, "content": name, **plain} for name, i in specials],
        "pre_tokenizer": _pre_tokenizer(stored["pattern"]),
        "decoder": {**_BYTE_LEVEL, "use_regex": True},
        "model": {**fields.PLAIN_BPE, "ignore_merges": unmade, "vocab": vocabulary, "merges": merges},
    }


def read(document: Mapping[str, Any], vocabulary: Mapping[str, int], origin: str) -> Tokenizer:
    """A byte-pair tokenizer of a BPE model.

    Raises:
        CorruptError: The document contradicts itself.
        InputError: quill has no such tokenizer.
    """
    pattern = _split(document, origin)
    model = document["model"]
    if odd := next((k for k in _ODD if model.get(k)), None):
        raise fields.foreign(
            origin, f"its {odd} is {ascii(model[odd])[:60]}, quill's byte-level BPE has none"
        )
    specials = fields.added(document.get("added_tokens"), origin)
    pairs = fields.pairs(model.get("merges"), origin)
    whole = bool(model.get("ignore_merges"))
    return _tokenizer(vocabulary, pairs, specials, pattern, origin, whole_pieces=whole)


def read_files(
    vocabulary: Any, merges: bytes, specials: Mapping[str, int], pattern: str, origin: str
) -> Tokenizer:
    """The tokenizer of a vocab.json and a merges.txt, which leave the split and special tokens unsaid.

    Args:
        vocabulary: What vocab.json holds.
        merges: What merges.txt holds.
        specials: Ids of special tokens.
        pattern: How text is split before, as tiktoken has it.
        origin: The name of the first, for messages.

    Raises:
        CorruptError: They are damaged.
        InputError: quill has no such tokenizer.
    """
    try:
        lines = merges.decode().split("\n")
    except UnicodeDecodeError as e:
        why = f"byte {e.start} is {merges[e.start]:#04x}"
        raise CorruptError("'merges.txt' is not UTF-8", why=why) from None
    kept = [line.rstrip("\r") for line in lines[lines[0].startswith("#version") :] if line.strip()]
    pairs = fields.pairs(kept, "merges.txt")
    return _tokenizer(fields.vocabulary(vocabulary, origin), pairs, specials, pattern, origin)


def _tokenizer(
    vocabulary: Mapping[str, int],
    pairs: Sequence[tuple[str, str]],
    specials: Mapping[str, int],
    pattern: str,
    origin: str,
    *,
    whole_pieces: bool = False,
) -> Tokenizer:
    """A tokenizer of a vocabulary and merges, once its ids are known to amount to just these merges."""
    plain = {text: i for text, i in vocabulary.items() if specials.get(text) != i}
    if not plain:
        raise fields.foreign(origin, "all its tokens are special")
    texts = fields.in_order(plain, origin)
    try:
        ranks = [byte_level.unspell(text) for text in texts]
    except KeyError as e:
        why = f"a token has the character {e.args[0]!a}, which stands for no byte"
        raise fields.foreign(origin, why) from None
    made = [pair for pair in byte_level.merges(ranks) if pair]
    if list(pairs) != [(byte_level.spell(a), byte_level.spell(b)) for a, b in made]:
        why = "its merges are not those that its ids amount to: quill merges in the order of ids"
        raise fields.foreign(origin, why)
    if not whole_pieces and len(made) < sum(len(token) > 1 for token in ranks):
        raise fields.foreign(origin, "it has tokens that none of its merges makes")
    kind, pattern = _published(ranks, specials, pattern)
    data = {
        "schema": base.SCHEMA_VERSION,
        "kind": kind,
        "pattern": pattern,
        "specials": dict(specials),
        "ranks": " ".join(base64.b64encode(token).decode() for token in ranks),
    }
    tokenizer = base.read(data, origin=origin)
    if tokenizer.decode(tokenizer.encode(_SAMPLE)) != _SAMPLE:
        raise fields.foreign(origin, "its pattern leaves some text out")
    return tokenizer


def _pre_tokenizer(pattern: str) -> dict[str, Any]:
    if pattern in _GPT2_SPLITS:
        return {**_BYTE_LEVEL, "use_regex": True}
    steps = [fields.split(to_oniguruma(pattern)), {**_BYTE_LEVEL, "use_regex": False}]
    return {"type": "Sequence", "pretokenizers": steps}


def _split(document: Mapping[str, Any], origin: str) -> str:
    """How a byte-level tokenizer splits text, as tiktoken has it."""
    steps = fields.steps(document.get("pre_tokenizer"), "pretokenizers")
    names = [step.get("type") for step in steps]
    if not steps or names[-1] != "ByteLevel" or len(steps) > 2:
        why = f"its text is prepared by {ascii(names)[:80]}; quill's BPE is byte-level, after one split"
        raise fields.foreign(origin, why)
    if steps[-1].get("add_prefix_space"):
        raise fields.foreign(origin, "it puts a space before every text")
    built_in = steps[-1].get("use_regex", True)
    if len(steps) == 1 and built_in:
        return GPT2_SPLIT
    pattern = fields.split_of(steps[0])
    if pattern is None or built_in:
        raise fields.foreign(origin, "its text is split otherwise than once, by one pattern")
    try:
        return from_oniguruma(pattern)
    except UntranslatableError as e:
        raise fields.foreign(origin, f"its pattern has {str(e)!a}, which quill may take otherwise") from None


def _ranks(stored: Mapping[str, Any]) -> list[bytes]:
    return [base64.b64decode(token) for token in stored["ranks"].split()]


def _published(ranks: Sequence[bytes], specials: Mapping[str, int], pattern: str) -> tuple[str, str]:
    """The kind of byte-pair tokenizer this is, and its pattern as that kind has it."""
    lines = "".join(f"{base64.b64encode(token).decode()} {i}\n" for i, token in enumerate(ranks))
    digest = hashlib.sha256(lines.encode()).hexdigest()
    for kind, (sha256, theirs, patterns) in _PUBLISHED.items():
        if digest == sha256 and dict(specials) == dict(theirs) and pattern in patterns:
            return kind, _installed_split() if kind == "gpt2" else pattern
    return "bpe", pattern


def _installed_split() -> str:
    """GPT-2's pattern as tiktoken writes it here: quill's own tokenizer of that name has the same."""
    from tiktoken_ext import openai_public  # type: ignore[import-untyped]

    return str(getattr(openai_public, "r50k_pat_str", GPT2_SPLIT))
