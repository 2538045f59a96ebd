"""quill's tokenizers against the tokenizers library: the same ids for any text, and back again."""

from __future__ import annotations

import hashlib
import json
import re
from functools import cache
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quill.errors import CorruptError, InputError, QuillError
from quill.formats import tokenizer_json
from quill.formats.tokenizer_json import bpe, byte_level, fields
from quill.formats.tokenizer_json.patterns import from_oniguruma, to_oniguruma
from quill.tokenizers import _patterns, base
from quill.tokenizers.bpe import BpeTokenizer

tokenizers = pytest.importorskip("tokenizers", reason="tokenizers, which ids are compared with")

LESSON = (
    "The old man was thin and gaunt, with deep wrinkles in the back of his neck; he'd gone 84 days now.\n"
    "\tCafé, naïve, Straße — “quoted” … 12,345.67 €  2019\r\n\r\n DON'T we’ll l'été I'M\n"
    "你好，世界。日本語のテキスト、とても良い。 Привет, мир! שלום ‫مرحبا‬ สวัสดี ½ Ⅷ ٣\n"
    "😀 👨‍👩‍👧‍👦 🇫🇮 a\u0301 \u00a0\u3000\x1c\x85\n"
    "<|endoftext|> <unk> `x = {'y': [1, 2]}` _a_b 'ſ  \x00\x07 don't\n"
) * 3
SPECIAL = "one<|endoftext|>two <unk> three <|fim_prefix|>\nHemingway quixotic"
EDGES = st.text(alphabet=" \n\r\t.,;'’-_/!aZsſtldmreLVé1294Ⅷ日。😀\u0301\u00a0\u3000\x1c\x85<|>", max_size=40)
TAGS = st.lists(st.sampled_from(["<note>", "</note>", "<no", "te>", "  ", " ", "ſ", "old", "a ", ".", "9"]))
TEXTS = st.one_of(
    st.text(max_size=60), EDGES, TAGS.map("".join), EDGES.map(lambda s: "It's we'll" + s + "1234567 x  ")
)
law = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

# The kinds whose ranks may be at hand, and ranks of our own under each pattern that was published.
PUBLISHED = list(bpe._PUBLISHED)
PATTERNS = {
    "gpt2": _patterns.GPT2,
    "gpt2-possessive": _patterns.GPT2_POSSESSIVE,
    "cl100k": _patterns.CL100K,
    "o200k": _patterns.O200K,
    "llama3": _patterns.LLAMA3,
    "quill": _patterns.QUILL,
    "qwen2": _patterns.QWEN2,
}
KINDS = [
    "char",
    "word",
    "bpe",
    *PUBLISHED,
    *(f"bpe-{name}" for name in PATTERNS),
    "bpe-gaps",
    "bpe-unmade",
    "bpe-first",
    "bpe-added",
]


@cache
def learnt() -> dict[str, Any]:
    return base.load("bpe").train([LESSON], vocab_size=500).to_dict()


@cache
def trained(kind: str) -> base.Tokenizer:
    if kind == "word":
        return base.load("word").train([LESSON], vocab_size=160)
    name, _, variant = kind.partition("-")
    if not variant:
        return base.load(name).train([LESSON])
    data = learnt()
    if variant == "gaps":
        return base.read({**data, "specials": {"<|endoftext|>": 510, "<|x|>": 505}})
    if variant == "first":
        # As the tokenizers library trains them: the special tokens have the first ids.
        return base.read({**data, "specials": {"<|endoftext|>": 0, "<|pad|>": 1}})
    if variant == "added":
        added = {"<note>": 501, "</note>": 502, "<no": 503, "  ": 504, "ſ": 3, "old": 505}
        return base.read({**data, "specials": {"<|endoftext|>": 500}, "added": added})
    if variant == "unmade":
        # No merge makes these; whole pieces that they are do.
        ranks = f"{data['ranks']} SGVtaW5nd2F5 IHF1aXhvdGlj"
        return base.read({**data, "ranks": ranks, "specials": {"<|endoftext|>": len(ranks.split())}})
    return base.read({**data, "pattern": PATTERNS[variant]})


@pytest.fixture(params=KINDS)
def ours(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> base.Tokenizer:
    kind = request.param
    if kind in PUBLISHED:
        ranks = request.getfixturevalue("ranks")
        monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(ranks))
        for url in base.load(kind).urls:  # type: ignore[attr-defined]
            if not (ranks / hashlib.sha1(url.encode()).hexdigest()).is_file():
                pytest.skip(f"the ranks of {kind} are not in {ranks}")
    elif kind.startswith("bpe"):
        pytest.importorskip("rustbpe")
    return trained(kind)


@cache
def written(tokenizer: base.Tokenizer) -> str:
    assert tokenizer_json.refusal(tokenizer) is None
    return json.dumps(tokenizer_json.write(tokenizer), ensure_ascii=False)


@cache
def library(tokenizer: base.Tokenizer) -> Any:
    made = tokenizers.Tokenizer.from_str(written(tokenizer))
    made.encode_special_tokens = True
    return made


def read(document: Any) -> base.Tokenizer:
    return tokenizer_json.read(document, "tokenizer.json")[0]


@law
@given(text=TEXTS)
def test_ids_are_the_same_for_any_text(ours: base.Tokenizer, text: str) -> None:
    theirs = library(ours)
    # A char tokenizer there drops the characters that are unknown to it; no other has such.
    wanted = ours.encode(text, unknown="skip" if ours.kind == "char" else "error")
    assert theirs.encode(text).ids == wanted
    assert theirs.decode(wanted, skip_special_tokens=False) == ours.decode(wanted)


def test_a_char_tokenizer_drops_unknown_characters_and_still_reads_files_that_did_not() -> None:
    ours = trained("char")
    assert library(ours).encode("the ☃ man\U0010ffff").ids == ours.encode("the  man")
    assert library(ours).encode("☃").ids == []
    document = json.loads(written(ours))
    assert read({**document, "normalizer": None}).fingerprint == ours.fingerprint
    other = {**document["normalizer"], "content": "?"}
    with pytest.raises(InputError, match="does not support"):
        read({**document, "normalizer": other})


def test_ids_are_the_same_for_what_it_learnt(ours: base.Tokenizer) -> None:
    theirs = library(ours)
    assert theirs.encode(LESSON).ids == ours.encode(LESSON)
    assert theirs.decode(ours.encode(LESSON), skip_special_tokens=False) == LESSON
    assert [theirs.id_to_token(i) is None for i in range(ours.vocab_size)] == [
        ours.token_bytes(i) == b"" for i in range(ours.vocab_size)
    ]


def test_f20_special_tokens_in_text_are_plain_text(ours: base.Tokenizer) -> None:
    if ours.kind == "char":
        return
    assert library(ours).encode(SPECIAL).ids == ours.encode(SPECIAL)
    if ours.eot_id is not None:
        assert library(ours).token_to_id("<|endoftext|>") == ours.eot_id
        assert library(ours).decode([ours.eot_id], skip_special_tokens=False) == "<|endoftext|>"
        # Told nothing, the library takes the name for the token.
        plain = tokenizers.Tokenizer.from_str(written(ours))
        assert plain.encode("<|endoftext|>").ids == [ours.eot_id]


@law
@given(data=st.data())
def test_any_ids_decode_alike(ours: base.Tokenizer, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, ours.vocab_size - 1), max_size=12))
    assert library(ours).decode(ids, skip_special_tokens=False) == ours.decode(ids)


def test_it_reads_back_as_it_was(ours: base.Tokenizer) -> None:
    document = json.loads(written(ours))
    again, notes = tokenizer_json.read(document, "tokenizer.json")
    assert again.fingerprint == ours.fingerprint
    assert notes == ()


def test_it_reads_back_from_what_the_library_saves(ours: base.Tokenizer) -> None:
    saved = tokenizers.Tokenizer.from_str(written(ours)).to_str()
    assert read(json.loads(saved)).fingerprint == ours.fingerprint


@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_merges_amount_to_ranks_in_whatever_order_these_are(data: st.DataObject) -> None:
    longer = st.text("ab c", min_size=2, max_size=6).map(str.encode)
    tokens = data.draw(st.lists(longer, unique=True, max_size=30))
    ranks = data.draw(st.permutations([bytes([b]) for b in range(256)] + tokens))
    ours = BpeTokenizer(ranks, {"<|endoftext|>": len(ranks)}, _patterns.GPT2)
    theirs = tokenizers.Tokenizer.from_str(json.dumps(tokenizer_json.write(ours)))
    text = data.draw(st.text("ab c", max_size=60))
    assert theirs.encode(text).ids == ours.encode(text)


def test_gpt2_is_known_by_its_ranks(ranks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(ranks))
    gpt2 = trained("gpt2")
    document = json.loads(written(gpt2))
    # As its own file has it: the split built in, nothing said of what is not used.
    for key in ("type", "byte_fallback", "ignore_merges"):
        del document["model"][key]
    document["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    document["post_processor"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False}
    again = read(document)
    assert (again.kind, again.fingerprint) == ("gpt2", gpt2.fingerprint)
    files = (document["model"]["vocab"], "#version: 0.2\n" + "\n".join(document["model"]["merges"]) + "\n")
    split = _patterns.GPT2
    added = fields.AddedTokens({"<|endoftext|>": 50256}, {})
    again = bpe.read_files(files[0], files[1].encode(), added, split, "vocab.json")
    assert again.fingerprint == gpt2.fingerprint


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"lstrip": True}, "lstrip"),
        ({"single_word": True}, "single_word"),
        ({"content": "a b"}, "after a letter"),
        ({"content": ""}, "after a letter"),
    ],
)
def test_w10_added_tokens_that_quill_cannot_find_alike_are_refused(changed: dict[str, Any], why: str) -> None:
    pytest.importorskip("rustbpe")
    document = json.loads(written(trained("bpe-added")))
    next(e for e in document["added_tokens"] if e["content"] == "old").update(changed)
    document["model"]["vocab"].pop("old", None)
    with pytest.raises(InputError, match="does not support") as caught:
        read(document)
    assert why in caught.value.why


def test_a_normalizer_that_composes_is_noted_and_others_are_refused() -> None:
    pytest.importorskip("rustbpe")
    document = json.loads(written(trained("bpe-qwen2")))
    again, notes = tokenizer_json.read({**document, "normalizer": {"type": "NFC"}}, "tokenizer.json")
    assert again.fingerprint == trained("bpe-qwen2").fingerprint
    assert "NFC" in notes[0]
    with pytest.raises(InputError, match="does not support") as caught:
        read({**document, "normalizer": {"type": "Lowercase"}})
    assert "Lowercase" in caught.value.why


def change(document: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    key, _, rest = path.partition(".")
    return {**document, key: change(document[key], rest, value) if rest else value}


@pytest.mark.parametrize(
    ("kind", "path", "value", "why"),
    [
        ("bpe", "pre_tokenizer", {"type": "Metaspace"}, "Metaspace"),
        ("bpe", "pre_tokenizer", {"type": "ByteLevel", "add_prefix_space": True}, "space before"),
        ("bpe", "pre_tokenizer", None, "byte-level"),
        ("bpe", "model.dropout", 0.1, "dropout"),
        ("bpe", "model.end_of_word_suffix", "</w>", "end_of_word"),
        ("bpe", "model.merges", [], "merges"),
        ("bpe", "model.type", "Unigram", "Unigram"),
        ("bpe", "model.vocab", {"日": 0}, "no byte"),
        ("char", "pre_tokenizer", {"type": "Whitespace"}, "characters"),
        ("char", "model.vocab", {"ab": 0}, "more than one"),
        ("char", "model.vocab", {"a": 1}, "gaps"),
        ("char", "added_tokens", [{"id": 500, "content": "<s>"}], "special"),
        ("word", "model.fuse_unk", True, "unknown"),
        ("word", "model.ignore_merges", False, "never"),
        ("word", "pre_tokenizer.pattern", {"Regex": r"\w+|\s+|[^\w\s]+"}, "splits"),
    ],
)
def test_what_quill_has_not_is_refused(kind: str, path: str, value: Any, why: str) -> None:
    if kind == "bpe":
        pytest.importorskip("rustbpe")
    with pytest.raises(InputError, match="does not support") as caught:
        read(change(json.loads(written(trained(kind))), path, value))
    assert why in caught.value.why


@pytest.mark.parametrize("pattern", [r"\w+|\W", "(a+)+$", "[[:foo:]]", "", r"(a)\1", r"(?:\w{0,5000}){5000}"])
def test_f63_a_pattern_that_is_not_known_is_never_run(pattern: str) -> None:
    pytest.importorskip("rustbpe")
    document = json.loads(written(trained("bpe-qwen2")))
    document["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = pattern
    with pytest.raises(CorruptError, match="not safe to use") as caught:
        read(document)
    assert repr(pattern) in caught.value.why and "Llama 3" in caught.value.why


def test_merges_in_another_order_than_the_ids_are_refused() -> None:
    pytest.importorskip("rustbpe")
    document = json.loads(written(trained("bpe")))
    merges = document["model"]["merges"]
    with pytest.raises(InputError, match="does not support"):
        read(change(document, "model.merges", [merges[1], merges[0], *merges[2:]]))


@pytest.mark.parametrize("kind", ["char", "word", "bpe"])
@pytest.mark.parametrize(
    "value", [None, 0, "", "x", [], {}, [[]], {"a": -1}, {"a": True}, {"a": "b"}, [["a"]], True, 1.5]
)
def test_whatever_a_file_holds_is_no_traceback(kind: str, value: Any) -> None:
    if kind == "bpe":
        pytest.importorskip("rustbpe")
    document = json.loads(written(trained(kind)))
    paths = [*document, *(f"model.{key}" for key in document["model"]), "pre_tokenizer.type"]
    for path in [*paths, "pre_tokenizer.pattern" if kind != "bpe" else "pre_tokenizer.pretokenizers"]:
        try:
            again = read(change(document, path, value))
        except QuillError as e:
            assert e.exit_code in (2, 5)
        else:
            assert again.decode(again.encode("the man")) == "the man"
    for nothing in (value, {"model": value}):
        with pytest.raises(CorruptError):
            read(nothing)


def test_words_split_by_another_python_are_read_where_it_agrees_on_their_characters() -> None:
    document = json.loads(written(trained("word")))
    pattern = document["pre_tokenizer"]["pattern"]["Regex"]
    # A letter that Unicode got after some Python, and one that the vocabulary has.
    without_rare, without_a = pattern.replace("\ua7cb-\ua7cd", "\ua7cb"), pattern.replace("a-z", "b-z")
    assert without_a != pattern
    if without_rare == pattern:
        without_rare = re.sub("𐀀-𐀋", "𐀀-𐀊", pattern)
    assert without_rare != pattern
    again = read(change(document, "pre_tokenizer.pattern.Regex", without_rare))
    assert again.fingerprint == trained("word").fingerprint
    with pytest.raises(InputError):
        read(change(document, "pre_tokenizer.pattern.Regex", without_a))


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
def test_known_patterns_translate_both_ways(pattern: str) -> None:
    there = to_oniguruma(pattern)
    assert there is not None and from_oniguruma(there) == pattern
    # To Oniguruma these mean something else.
    assert "$" not in there and not re.search(r"\d\}\+", there)


@pytest.mark.parametrize("pattern", ["", r"\w+", _patterns.GPT2 + "|x", _patterns.CL100K[1:]])
def test_unknown_patterns_are_not_translated(pattern: str) -> None:
    assert to_oniguruma(pattern) is None and from_oniguruma(pattern) is None


def test_the_patterns_of_quills_own_tokenizers_are_known(ranks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(ranks))
    pytest.importorskip("rustbpe")
    assert learnt()["pattern"] == _patterns.QUILL
    assert trained("gpt2").to_dict()["pattern"] in (_patterns.GPT2, _patterns.GPT2_POSSESSIVE)


def test_a_pattern_or_special_token_that_does_not_translate_is_refused_before_anything_is_written() -> None:
    pytest.importorskip("rustbpe")
    strange = base.read(learnt())
    strange._pattern = r"\w+|\W"
    assert r"\w" in str(tokenizer_json.refusal(strange))
    doubled = base.read({**learnt(), "specials": {"a": 499}})
    assert "'a'" in str(tokenizer_json.refusal(doubled))


def test_endless_tokens_are_refused_in_no_time() -> None:
    with pytest.raises(InputError, match="too long"):
        byte_level.merges([b"x" * 40_000])
