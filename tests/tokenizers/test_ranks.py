"""Byte-pair tokenizers: the published ids, texts that are hard on regex engines, and no network."""

from __future__ import annotations

import hashlib
import sys
import threading
import time
from pathlib import Path

import pytest

from quill.errors import CorruptError, InputError, ResourceError
from quill.tokenizers import _ranks, base

PUBLISHED = ["cl100k_base", "gpt2", "o200k_base"]


@pytest.fixture(scope="module")
def gpt2(ranks: Path) -> base.Tokenizer:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(ranks))
        return base.load("gpt2").train([])


def test_gpt2_has_the_published_ids(gpt2: base.Tokenizer) -> None:
    assert gpt2.vocab_size == 50257
    assert gpt2.eot_id == 50256
    assert gpt2.encode("Hello, world!") == [15496, 11, 995, 0]
    assert gpt2.token_bytes(995) == b" world"


def test_gpt2_equals_tiktokens(gpt2: base.Tokenizer, ranks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tiktoken

    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(ranks))
    theirs = tiktoken.get_encoding("gpt2")
    for text in ("  leading", "naïve café 你好 😀\r\n\r\n x=1;\t", "a" * 5000, " " * 5000, "'s't" * 99):
        assert gpt2.encode(text) == theirs.encode_ordinary(text) == gpt2.encode_array(text).tolist()


def test_threads_encode_in_bulk_without_sharing(
    gpt2: base.Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A regular expression that two threads share makes both slower than one alone."""
    tokenizer = base.read(gpt2.to_dict())
    make = _ranks.RankTokenizer._make_encoding
    makers: list[threading.Thread] = []
    found: list[list[int]] = []
    texts = ("The tide came in.", "At seven.")

    def note(self: _ranks.RankTokenizer) -> object:
        makers.append(threading.current_thread())
        return make(self)

    def encode() -> None:
        found.extend(tokenizer.encode_array(text).tolist() for text in texts)

    monkeypatch.setattr(_ranks.RankTokenizer, "_make_encoding", note)
    children = [threading.Thread(target=encode) for _ in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    encode()
    assert set(makers) == {*children, threading.current_thread()} and len(makers) == 3
    assert sorted(found) == sorted([gpt2.encode(text) for text in texts] * 3)


@pytest.mark.parametrize("unit", [" ", "\n", "a", "!", "好", "<|endoftext|>"])
def test_f19_a_million_repeats_round_trip(gpt2: base.Tokenizer, unit: str) -> None:
    text = "a" + (unit * 1_000_000)[:1_000_000] + "b"
    assert gpt2.decode(gpt2.encode_array(text).tolist()) == text


def test_f19_only_very_long_white_space_is_cut() -> None:
    n = _ranks.LONGEST_BLANK
    for whole in ("", " ", "words and  spaces " * 9000, "a" * 5 * n, " " * (n - 1)):
        assert list(_ranks.chunks(whole)) == [whole]
    for run in (n, n + 1, 3 * n, 10 * n + 7):
        for text in (" " * run, "a" + " " * run + "b", "words " * 9999 + "\n" * run + "words " * 9999):
            chunks = list(_ranks.chunks(text))
            assert "".join(chunks) == text
            assert all(len(p) - len(p.rstrip()) <= n for p in chunks)


def test_f19_runs_are_cut_at_the_same_places_as_ever() -> None:
    # Ids of a prepared text depend on them.
    n = _ranks.LONGEST_BLANK
    text = "a" + " " * (2 * n + 5) + "b" + "\n" * n + "c" + "\t" * (n - 1)
    assert list(map(len, _ranks.chunks(text))) == [1 + n, n, 5 + 1 + n, 1 + n - 1]


class Panic(BaseException):
    """What a Rust library raises when it panics: not an Exception, and known by its name only."""


Panic.__name__ = "PanicException"


def test_f19_halves_are_encoded_where_the_encoder_panics() -> None:
    def limited(text: str) -> list[str]:
        if len(text) > 3000:
            raise Panic("stack overflow")
        return [text]

    text = "".join(map(chr, range(65, 65 + 20_000)))
    assert "".join(half for [half] in _ranks._guarded(limited, text)) == text


def test_f19_an_encoder_that_always_panics_is_an_input_error() -> None:
    def broken(text: str) -> list[str]:
        raise Panic("stack overflow")

    with pytest.raises(InputError, match="failed on"):
        list(_ranks._guarded(broken, "a" * 10_000))


def test_f19_an_interrupt_is_not_taken_for_a_panic() -> None:
    def interrupted(text: str) -> list[str]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(_ranks._guarded(interrupted, "a" * 10_000))


@pytest.mark.parametrize("kind", PUBLISHED)
def test_f50_without_a_network_the_hint_downloads_the_ranks(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    with pytest.raises(ResourceError) as e:
        base.load(kind).train([])
    assert e.value.exit_code == 7
    for url in base.load(kind).urls:
        assert url in e.value.why
        assert f"curl -o '{tmp_path}/{hashlib.sha1(url.encode()).hexdigest()}' {url}" in e.value.hint


def test_f50_damaged_ranks_in_the_cache_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    for url in base.load("gpt2").urls:
        (tmp_path / hashlib.sha1(url.encode()).hexdigest()).write_bytes(b"not ranks")
    with pytest.raises(ResourceError):
        base.load("gpt2").train([])


def test_f50_stored_ranks_decode_without_tiktoken(
    gpt2: base.Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = gpt2.to_dict()
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    assert base.read(stored).decode([15496, 11, 995, 0]) == "Hello, world!"


@pytest.mark.parametrize("size", [50256])
def test_another_size_is_refused(
    size: int, gpt2: base.Tokenizer, ranks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(ranks))
    with pytest.raises(InputError, match=f"vocab_size {size}"):
        base.load("gpt2").train([], vocab_size=size)
    assert base.load("gpt2").train([], vocab_size=50257).fingerprint == gpt2.fingerprint


HOSTILE = ["", "(((", "(a+)+$", "[[:foo:]]", r"(a)\1", "(?=a)", "$", r"\b|a", "a" * 100_000, "\ud800", "."]


@pytest.mark.parametrize("pattern", HOSTILE, ids=lambda pattern: ascii(pattern[:12]))
def test_f63_a_stored_pattern_that_is_not_known_is_refused_at_once(
    gpt2: base.Tokenizer, pattern: str, capfd: pytest.CaptureFixture[str]
) -> None:
    began = time.monotonic()
    with pytest.raises(CorruptError, match="pattern") as caught:
        base.read({**gpt2.to_dict(), "pattern": pattern}).encode("aaab")
    assert time.monotonic() - began < 5
    assert len(str(caught.value)) < 300
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "damage",
    [
        {"ranks": "IQ== IQ=="},
        {"ranks": "not base64!"},
        {"specials": {"<|endoftext|>": 5}},
        {"specials": {"<|endoftext|>": 1 << 40}},
        {"specials": {"one": 50256, "two": 50256}},
        {"specials": {"\ud800": 50256}},
        {"specials": {"": 50256}},
    ],
)
def test_f4_inconsistent_stored_ranks_are_corrupt(gpt2: base.Tokenizer, damage: dict[str, object]) -> None:
    with pytest.raises(CorruptError):
        base.read({**gpt2.to_dict(), **damage})


def test_f4_a_repeated_rank_is_corrupt(gpt2: base.Tokenizer) -> None:
    stored = gpt2.to_dict()
    with pytest.raises(CorruptError, match="twice"):
        base.read({**stored, "ranks": stored["ranks"] + " IQ=="})
