"""The bpe tokenizer: its size, its training, its limits."""

from __future__ import annotations

import sys
import time

import pytest

from quill.errors import InputError
from quill.tokenizers import base, bpe
from quill.tokenizers._ranks import LONGEST_BLANK
from quill.tokenizers.bpe import BpeTokenizer

pytest.importorskip("rustbpe")

TEXT = "the cat and the dog and the bird, all in the garden by the sea at dawn\n" * 20


def test_the_size_counts_everything() -> None:
    tokenizer = BpeTokenizer.train([TEXT], vocab_size=270)
    assert tokenizer.vocab_size == 270
    assert tokenizer.eot_id == 269
    assert tokenizer.token_bytes(269) == b"<|endoftext|>"
    assert [tokenizer.token_bytes(i) for i in range(256)] == [bytes([b]) for b in range(256)]


def test_more_merges_make_fewer_tokens() -> None:
    lengths = [len(BpeTokenizer.train([TEXT], vocab_size=n).encode(TEXT)) for n in (257, 265, 280)]
    assert lengths[0] == len(TEXT.encode())
    assert lengths[0] > lengths[1] > lengths[2]


def test_a_frequent_word_becomes_one_token() -> None:
    tokenizer = BpeTokenizer.train([TEXT], vocab_size=300)
    assert len(tokenizer.encode(" the")) == 1


def test_training_does_not_depend_on_the_chunks() -> None:
    lines = TEXT.splitlines(keepends=True)
    assert (
        BpeTokenizer.train(lines, vocab_size=300).fingerprint
        == BpeTokenizer.train([TEXT], vocab_size=300).fingerprint
    )


@pytest.mark.parametrize("size", [2, 255, 256, 1 << 24])
def test_f21_a_size_below_the_bytes_or_above_the_limit_is_refused(size: int) -> None:
    with pytest.raises(InputError, match=f"vocab_size {size}") as e:
        BpeTokenizer.train([TEXT], vocab_size=size)
    assert "257" in e.value.why


def test_f21_an_unreachable_size_gives_a_smaller_vocabulary() -> None:
    tokenizer = BpeTokenizer.train(["abab"], vocab_size=100_000)
    assert 257 < tokenizer.vocab_size < 300
    assert tokenizer.decode(tokenizer.encode("abab, anything")) == "abab, anything"


def test_f19_training_accepts_very_long_runs() -> None:
    blank = " " * (20 * LONGEST_BLANK) + "x"
    tokenizer = BpeTokenizer.train([blank, "a" * 1_000_000, TEXT], vocab_size=300)
    assert tokenizer.decode(tokenizer.encode(blank)) == blank


@pytest.mark.parametrize("run", [" ", "\n", " \n\t\n  \t", "a"])
def test_f19_training_takes_linear_time(run: str) -> None:
    def seconds(n: int) -> float:
        start = time.process_time()
        BpeTokenizer.train([("x" + run * (n // len(run))) * 4], vocab_size=300)
        return time.process_time() - start

    once = min(seconds(15_000) for _ in range(2))
    # Quadratic time would be sixteen times as long, and over a second.
    assert min(seconds(60_000) for _ in range(2)) < 8 * once + 0.1


def test_an_error_of_the_text_is_raised_by_training() -> None:
    def texts():
        yield TEXT
        raise InputError("bad text")

    with pytest.raises(InputError, match="bad text"):
        BpeTokenizer.train(texts(), vocab_size=300)


def test_without_rustbpe_the_hint_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rustbpe", None)
    with pytest.raises(InputError) as e:
        BpeTokenizer.train([TEXT], vocab_size=300)
    assert e.value.hint == "pip install 'quill-gpt[bpe]'"


@pytest.mark.parametrize("run", [" ", " \n\t ", "\u00a0 ", "\r\n", "a", "-", "._", "\u7684"], ids=ascii)
def test_f62_learning_takes_linear_time_on_runs_of_any_kind(run: str) -> None:
    """Runs that end just short of where text is cut anyway; learned in pieces, a second for each is ample."""
    text = (run * (65_500 // len(run)) + "a b\n") * 4
    began = time.process_time()
    tokenizer = base.load("bpe").train([text], vocab_size=300)
    assert time.process_time() - began < 10
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_f62_ordinary_text_is_learned_whole() -> None:
    text = "the tide and the sea, 3 bells; " * 500 + "a" * 200 + " " * 200
    assert list(bpe._cut(text)) == [text]
    cut = list(bpe._cut("b " + "a" * 1000 + " c"))
    assert "".join(cut) == "b " + "a" * 1000 + " c"
    assert max(map(len, cut)) < 600
