"""quill's byte-pair tokenizers as BPE models of the tokenizers library, and back.

The vocabulary is spelled in GPT-2's letters for bytes, and the merges are those that the ranks imply. If no
merge makes some token, the library is told to look up whole words first, as tiktoken always does.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from quill.errors import CorruptError, shorten
from quill.formats.tokenizer_json import byte_level, fields
from quill.formats.tokenizer_json.patterns import from_oniguruma, to_oniguruma
from quill.tokenizers import _patterns, base
from quill.tokenizers._ranks import END_OF_TEXT, rank_ids

if TYPE_CHECKING:
    from quill.tokenizers.base import Tokenizer

# The published ranks: the sha256 of their tiktoken file, the special tokens, and the patterns.
_PUBLISHED: Mapping[str, tuple[str, Mapping[str, int], tuple[str, ...]]] = {
    "gpt2": (
        "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930",
        {END_OF_TEXT: 50256},
        (_patterns.GPT2, _patterns.GPT2_POSSESSIVE),
    ),
    "cl100k_base": (
        "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7",
        {END_OF_TEXT: 100257, "<|fim_prefix|>": 100258, "<|fim_middle|>": 100259,
         "<|fim_suffix|>": 100260, "<|endofprompt|>": 100276},
        (_patterns.CL100K,),
    ),
    "o200k_base": (
        "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d",
        {END_OF_TEXT: 199999, "<|endofprompt|>": 200018},
        (_patterns.O200K,),
    ),
}  # fmt: skip
_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
# Fields of a BPE model that change ids and that quill has no equivalent of.
_UNSUPPORTED = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")


def refusal(stored: Mapping[str, Any]) -> str | None:
    """Why the library cannot represent a byte-pair tokenizer, as a clause; None if it can.

    Args:
        stored: The tokenizer's JSON form.
    """
    if to_oniguruma(stored["pattern"]) is None:
        pattern = shorten(stored["pattern"], 60)
        return f"it splits text by the pattern {pattern}, which quill cannot translate for other libraries"
    spelled = {byte_level.spell(token) for token in _ranks(stored)}
    names = [*stored["specials"], *stored.get("added", {})]
    doubled = next((name for name in names if name in spelled), None)
    return f"its special token {doubled!r} is spelled like an ordinary one" if doubled else None


def write(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Make the model, the added tokens, the split and the decoder of a byte-pair tokenizer.

    Args:
        stored: The tokenizer's JSON form, which `refusal` accepts.
    """
    ranks = _ranks(stored)
    pairs = byte_level.merges(ranks)
    ordinary = stored.get("added", {})
    added = sorted({**stored["specials"], **ordinary}.items(), key=lambda item: item[1])
    ids = rank_ids(len(ranks), [i for _, i in added])
    vocabulary = {byte_level.spell(token): i for i, token in zip(ids, ranks, strict=True)}
    if [i for _, i in added] != list(range(len(ranks), len(ranks) + len(added))):
        # The library numbers added tokens after the vocabulary, whatever their ids, unless they are in it.
        vocabulary.update(added)
    unmade = any(len(token) > 1 and pair is None for token, pair in zip(ranks, pairs, strict=True))
    merges = [" ".join(map(byte_level.spell, pair)) for pair in pairs if pair]
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {
        "added_tokens": [{"id": i, "content": n, **plain, "special": n not in ordinary} for n, i in added],
        "pre_tokenizer": _pre_tokenizer(stored),
        "decoder": {**_BYTE_LEVEL, "use_regex": True},
        "model": {**fields.BPE_DEFAULTS, "ignore_merges": unmade, "vocab": vocabulary, "merges": merges},
    }


def read(document: Mapping[str, Any], vocabulary: Mapping[str, int], origin: str) -> Tokenizer:
    """Read a BPE model as a byte-pair tokenizer.

    Raises:
        CorruptError: The document contradicts itself, or splits text by a pattern that is not known.
        InputError: quill does not support the tokenizer.
    """
    pattern = _split(document, origin)
    model = document["model"]
    if found := next((k for k in _UNSUPPORTED if model.get(k)), None):
        raise fields.unsupported(origin, f"its {found} is {shorten(model[found])}; quill's BPE has none")
    added = fields.added_tokens(document.get("added_tokens"), origin)
    merges = fields.merges(model.get("merges"), origin)
    whole_words = bool(model.get("ignore_merges"))
    return _tokenizer(vocabulary, merges, added, pattern, origin, whole_words=whole_words)


def read_files(
    vocabulary: Any, merges: bytes, added: fields.AddedTokens, pattern: str, origin: str
) -> Tokenizer:
    """Read a vocab.json and a merges.txt, which state neither the split nor the special tokens.

    Args:
        vocabulary: The content of vocab.json.
        merges: The content of merges.txt.
        added: The tokens that other files add.
        pattern: The split, as tiktoken spells it.
        origin: The name of the vocabulary's file, for messages.

    Raises:
        CorruptError: They are damaged.
        InputError: quill does not support the tokenizer.
    """
    try:
        lines = merges.decode().split("\n")
    except UnicodeDecodeError as e:
        why = f"byte {e.start} is {merges[e.start]:#04x}"
        raise CorruptError("'merges.txt' is not UTF-8", why=why) from None
    kept = [line.rstrip("\r") for line in lines[lines[0].startswith("#version") :] if line.strip()]
    pairs = fields.merges(kept, "merges.txt")
    return _tokenizer(fields.vocabulary(vocabulary, origin), pairs, added, pattern, origin)


def _tokenizer(
    vocabulary: Mapping[str, int],
    merges: Sequence[tuple[str, str]],
    added: fields.AddedTokens,
    pattern: str,
    origin: str,
    *,
    whole_words: bool = False,
) -> Tokenizer:
    """Make the tokenizer of a vocabulary, after checking that its ids imply exactly these merges."""
    named = {**added.special, **added.ordinary}
    plain = {text: i for text, i in vocabulary.items() if named.get(text) != i}
    if not plain:
        raise fields.unsupported(origin, "all its tokens are special")
    texts = sorted(plain, key=plain.__getitem__)
    if [plain[text] for text in texts] != list(rank_ids(len(plain), named.values())):
        raise fields.unsupported(origin, "its ids have gaps")
    try:
        ranks = [byte_level.unspell(text) for text in texts]
    except KeyError as e:
        why = f"a token has the character {e.args[0]!a}, which stands for no byte"
        raise fields.unsupported(origin, why) from None
    made = [pair for pair in byte_level.merges(ranks) if pair]
    if list(merges) != [(byte_level.spell(a), byte_level.spell(b)) for a, b in made]:
        why = "its merges are not in the order of their tokens' ids, by which quill merges"
        raise fields.unsupported(origin, why)
    if not whole_words and len(made) < sum(len(token) > 1 for token in ranks):
        raise fields.unsupported(origin, "it has tokens that no merge makes")
    kind, pattern = _published(ranks, added, pattern)
    data = {
        "schema": base.SCHEMA_VERSION,
        "kind": kind,
        "pattern": pattern,
        "specials": added.special,
        "ranks": " ".join(base64.b64encode(token).decode() for token in ranks),
        **({"added": added.ordinary} if added.ordinary else {}),
    }
    return base.read(data, origin=origin)


def _pre_tokenizer(stored: Mapping[str, Any]) -> dict[str, Any]:
    if stored["kind"] == "gpt2" or stored["pattern"] == _patterns.GPT2:
        # The library has this split built in.
        return {**_BYTE_LEVEL, "use_regex": True}
    theirs = to_oniguruma(stored["pattern"])
    assert theirs is not None
    steps = [fields.split_step(theirs), {**_BYTE_LEVEL, "use_regex": False}]
    return {"type": "Sequence", "pretokenizers": steps}


def _split(document: Mapping[str, Any], origin: str) -> str:
    """The pattern by which a byte-level tokenizer splits text, as tiktoken spells it."""
    steps = fields.steps(document.get("pre_tokenizer"), "pretokenizers")
    names = [step.get("type") for step in steps]
    if not steps or names[-1] != "ByteLevel" or len(steps) > 2:
        why = f"its pre-tokenizer is {shorten(names)}; quill's BPE is byte-level, after one split"
        raise fields.unsupported(origin, why)
    if steps[-1].get("add_prefix_space"):
        raise fields.unsupported(origin, "it puts a space before every text")
    built_in = steps[-1].get("use_regex", True)
    if len(steps) == 1 and built_in:
        return _patterns.GPT2
    pattern = fields.split_pattern(steps[0])
    if pattern is None or built_in:
        raise fields.unsupported(origin, "it does not split text once, by one pattern")
    ours = from_oniguruma(pattern)
    if ours is None:
        known = "that of GPT-2, GPT-4, GPT-4o, Llama 3 or Qwen"
        why = f"its pattern {shorten(pattern, 60)} is not {known}, and others may take endless time"
        raise CorruptError(f"the tokenizer in '{origin}' is not safe to use", why=why, hint="tokenizer=gpt2")
    return ours


def _ranks(stored: Mapping[str, Any]) -> list[bytes]:
    return [base64.b64decode(token) for token in stored["ranks"].split()]


def _published(ranks: Sequence[bytes], added: fields.AddedTokens, pattern: str) -> tuple[str, str]:
    """The kind of a byte-pair tokenizer, and its pattern as quill's own tokenizer of that kind has it."""
    lines = "".join(f"{base64.b64encode(token).decode()} {i}\n" for i, token in enumerate(ranks))
    digest = hashlib.sha256(lines.encode()).hexdigest()
    for kind, (sha256, theirs, patterns) in _PUBLISHED.items():
        if digest == sha256 and added == (theirs, {}) and pattern in patterns:
            return kind, installed_gpt2_split() if kind == "gpt2" else pattern
    return "bpe", pattern


def installed_gpt2_split() -> str:
    """GPT-2's pattern as the installed tiktoken spells it, and so quill's own gpt2 tokenizer."""
    from tiktoken_ext import openai_public  # type: ignore[import-untyped]

    return str(getattr(openai_public, "r50k_pat_str", _patterns.GPT2))
