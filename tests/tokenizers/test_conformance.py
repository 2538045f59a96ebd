"""The laws of all tokenizers, tested for each one that discovery finds."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quill import discovery, strictjson
from quill.errors import CorruptError, InputError
from quill.tokenizers import base

# The tokenizer of a test never changes, so examples may share it.
law = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

SENTENCE = "The old man was thin and gaunt, with deep wrinkles"
EDGES = st.text(alphabet=" \n\r\t.,;'’-_/!aZé19日。、😀\u0301\u00a0\u3000\u200b", max_size=40)


def known(tokenizer: base.Tokenizer, text: str) -> bool:
    """Return whether a tokenizer knows each character of a text."""
    try:
        return all(tokenizer.decode(tokenizer.encode(c)) == c for c in set(text))
    except InputError:
        return False


def refusal(encode: Callable[[str], object], text: str) -> str | None:
    """Return the error of encoding a text, or None."""
    try:
        encode(text)
    except InputError as e:
        return e.what
    return None


@law
@given(text=st.one_of(st.text(max_size=80), EDGES))
def test_text_of_known_characters_round_trips(tokenizer: base.Tokenizer, text: str) -> None:
    if known(tokenizer, text):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_training_text_round_trips(tokenizer: base.Tokenizer, training_text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(training_text)) == training_text


@pytest.mark.parametrize("text", ["", "a", " ", "\n", "😀", "👨‍👩‍👧‍👦", SENTENCE])
def test_short_texts_round_trip(tokenizer: base.Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


@law
@given(text=st.one_of(st.text(max_size=80), EDGES), filler=st.sampled_from([SENTENCE, "a", " ", "b \n"]))
def test_f69_the_tail_of_a_text_has_the_ids_of_the_whole(
    tokenizer: base.Tokenizer, text: str, filler: str
) -> None:
    for whole in (text, filler * 50 + text, text + filler * 50, filler * 9 + text + filler * 9):
        for unknown in ("error", "skip"):
            try:
                ids = tokenizer.encode(whole, unknown=unknown)
            except InputError as e:
                assert refusal(lambda t: tokenizer.encode_tail(t, 2), whole) == e.what
                continue
            for count in (1, 2, 7):
                tail = tokenizer.encode_tail(whole, count, unknown=unknown)
                assert len(tail) >= min(count, len(ids))
                assert tail == ids[len(ids) - len(tail) :]


def test_f69_of_a_long_prompt_little_is_encoded(
    tokenizer: base.Tokenizer, training_text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = training_text * (500_000 // len(training_text))
    encode, encoded = type(tokenizer).encode, []

    def counted(self: base.Tokenizer, text: str, **options: base.Unknown) -> list[int]:
        encoded.append(len(text))
        return encode(self, text, **options)

    monkeypatch.setattr(type(tokenizer), "encode", counted)
    assert len(tokenizer.encode_tail(prompt, 129)) >= 129
    assert sum(encoded) < 20_000


@law
@given(text=st.one_of(st.text(max_size=80), EDGES))
def test_bulk_encoding_gives_the_same_ids(tokenizer: base.Tokenizer, text: str) -> None:
    if (refused := refusal(tokenizer.encode, text)) is not None:
        assert refusal(tokenizer.encode_array, text) == refused
        return
    ids, array = tokenizer.encode(text), tokenizer.encode_array(text)
    assert array.dtype == tokenizer.dtype == (np.uint16 if tokenizer.vocab_size <= 65536 else np.uint32)
    assert array.tolist() == ids
    assert all(0 <= i < tokenizer.vocab_size for i in ids)


@pytest.mark.parametrize(
    "text",
    [
        lambda n: ("x" + " " * n) * 4,
        lambda n: ("x" + "\n" * n) * 4,
        lambda n: ("x" + " \n\t\n  \t" * (n // 7)) * 4,
        lambda n: ("x" + " " * 1000) * (n // 1000),
        lambda n: "a" * n,
        lambda n: "abcdefghijklmno" * (n // 15),
        lambda n: SENTENCE * (n // len(SENTENCE)),
    ],
)
def test_f19_encoding_takes_linear_time(tokenizer: base.Tokenizer, text: Callable[[int], str]) -> None:
    def seconds(n: int) -> float:
        times = []
        for encode in (tokenizer.encode, tokenizer.encode_array):
            start = time.process_time()
            encode(text(n))
            times.append(time.process_time() - start)
        return max(times)

    try:
        once = min(seconds(15_000) for _ in range(2))
    except InputError:
        pytest.skip("it does not know these characters")
    # Quadratic time would be sixteen times as long, and over a second.
    assert min(seconds(60_000) for _ in range(2)) < 8 * once + 0.05


def test_the_json_form_round_trips(tokenizer: base.Tokenizer, training_text: str, tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_text(strictjson.dumps(tokenizer.to_dict()), encoding="utf-8")
    for again in (base.read(tokenizer.to_dict()), base.read(file.read_bytes()), base.read(file)):
        assert type(again) is type(tokenizer)
        assert again.fingerprint == tokenizer.fingerprint
        assert again.vocab_size == tokenizer.vocab_size
        assert again.eot_id == tokenizer.eot_id
        assert again.encode(training_text) == tokenizer.encode(training_text)
        assert again.decode(range(0, again.vocab_size, 97)) == tokenizer.decode(
            range(0, again.vocab_size, 97)
        )


def test_the_kind_is_the_name_of_the_file(tokenizer: base.Tokenizer) -> None:
    assert tokenizer.to_dict()["kind"] == tokenizer.kind
    assert base.load(tokenizer.kind) is type(tokenizer)
    assert tokenizer.kind in discovery.names("tokenizers")


def test_another_vocabulary_has_another_fingerprint(tokenizer: base.Tokenizer) -> None:
    other = base.load("char").train(["something else entirely"])
    assert other.fingerprint != tokenizer.fingerprint


@law
@given(data=st.data())
def test_f25_streamed_text_is_the_decoded_text(tokenizer: base.Tokenizer, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30))
    stream = base.StreamDecoder(tokenizer)
    texts = [stream.feed(i) for i in ids] + [stream.flush()]
    assert "".join(texts) == tokenizer.decode(ids)


def test_f25_streaming_never_splits_a_character(tokenizer: base.Tokenizer) -> None:
    text = "é 你好 😀 👨‍👩‍👧‍👦 🇫🇮"
    stream = base.StreamDecoder(tokenizer)
    texts = [stream.feed(i) for i in tokenizer.encode(text)]
    assert "".join(texts) == text
    assert stream.flush() == ""
    assert not any("\ufffd" in each for each in texts)


def test_an_incomplete_character_is_flushed_at_the_end(tokenizer: base.Tokenizer) -> None:
    ids = tokenizer.encode("😀")
    if len(ids) < 2:
        return
    stream = base.StreamDecoder(tokenizer)
    assert stream.feed(ids[0]) == ""
    assert stream.flush() == "\ufffd"
    assert stream.feed(tokenizer.encode("a")[0]) == "a"


def test_f20_special_tokens_in_text_are_plain_text(tokenizer: base.Tokenizer) -> None:
    text = "one<|endoftext|>two <unk> three"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.eot_id not in ids
    assert tokenizer.encode_array(text).tolist() == ids
    if tokenizer.eot_id is not None:
        assert tokenizer.token_bytes(tokenizer.eot_id).decode() == "<|endoftext|>"


@law
@given(text=st.one_of(st.text(max_size=60), EDGES, EDGES.map(lambda s: SENTENCE + s + SENTENCE)))
def test_cutting_at_a_boundary_changes_no_id(tokenizer: base.Tokenizer, text: str) -> None:
    cut = tokenizer.boundary(text)
    assert 0 <= cut <= len(text)
    try:
        whole = tokenizer.encode(text)
    except InputError:
        return
    assert tokenizer.encode(text[:cut]) + tokenizer.encode(text[cut:]) == whole


@pytest.mark.parametrize("text", [SENTENCE, "1 2 3\n4 5 6\n7", "你好，世界。日本語のテキスト、とても"])
def test_ordinary_text_has_boundaries(tokenizer: base.Tokenizer, text: str) -> None:
    assert tokenizer.boundary(text) > len(text) // 3


@pytest.mark.parametrize("token", [-1, 10**9])
def test_an_id_outside_the_vocabulary_is_refused(tokenizer: base.Tokenizer, token: int) -> None:
    for attempt in (
        tokenizer.token_bytes,
        lambda i: tokenizer.decode([i]),
        base.StreamDecoder(tokenizer).feed,
    ):
        with pytest.raises(InputError, match=str(token)):
            attempt(token)
    with pytest.raises(InputError):
        tokenizer.token_bytes(tokenizer.vocab_size)


def test_f17_lone_surrogates_are_named_or_skipped(tokenizer: base.Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode("a\ud800b", unknown="skip")) == "ab"
    refused = refusal(tokenizer.encode, "a\ud800")
    assert refusal(tokenizer.encode_array, "a\ud800") == refused
    if refused is None:
        assert tokenizer.encode("\ud800") == tokenizer.encode("\ud801") != []
    else:
        assert "U+D800" in refused


def test_f4_damaged_json_is_corrupt(tokenizer: base.Tokenizer) -> None:
    sound = tokenizer.to_dict()
    for key in sound:
        with pytest.raises(CorruptError):
            base.read({k: v for k, v in sound.items() if k != key})
        for value in (None, 0, -1, "", "\ud800", "!", [], {}, [1], ["a", "a"], {"a": "b"}, True, 1.5):
            try:
                again = base.read({**sound, key: value})
            except CorruptError:
                continue
            # What is accepted is another vocabulary, and a working one.
            assert again.fingerprint != tokenizer.fingerprint
            again.decode(range(again.vocab_size))


def test_f12_a_newer_schema_needs_a_newer_quill(tokenizer: base.Tokenizer) -> None:
    with pytest.raises(InputError, match="schema 2") as e:
        base.read({**tokenizer.to_dict(), "schema": 2})
    assert "upgrade" in e.value.hint


@pytest.mark.parametrize("raw", [b"", b"[]", b"{", b"\x80", b'{"schema": 1, "kind": "nonesuch"}', b"null"])
def test_f12_other_documents_are_refused(raw: bytes) -> None:
    with pytest.raises(CorruptError):
        base.read(raw)
