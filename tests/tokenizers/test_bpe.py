"""The learnt byte-pair tokenizer: its size, its learning, its limits."""

from __future__ import annotations

import sys

import pytest

from quill.errors import InputError
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


def test_learning_does_not_depend_on_the_pieces() -> None:
    lines = TEXT.splitlines(keepends=True)
    assert (
        BpeTokenizer.train(lines, vocab_size=300).fingerprint
        == BpeTokenizer.train([TEXT], vocab_size=300).fingerprint
    )


@pytest.mark.parametrize("size", [2, 255, 256, 1 << 24])
def test_f21_a_size_without_room_for_the_bytes_is_refused(size: int) -> None:
    with pytest.raises(InputError, match=f"vocab_size {size}") as e:
        BpeTokenizer.train([TEXT], vocab_size=size)
    assert "257" in e.value.why


def test_f21_a_size_out_of_reach_gives_what_there_is() -> None:
    tokenizer = BpeTokenizer.train(["abab"], vocab_size=100_000)
    assert 257 < tokenizer.vocab_size < 300
    assert tokenizer.decode(tokenizer.encode("abab, anything")) == "abab, anything"


def test_f19_learning_gets_through_endless_runs() -> None:
    blank = " " * (20 * LONGEST_BLANK) + "x"
    tokenizer = BpeTokenizer.train([blank, "a" * 1_000_000, TEXT], vocab_size=300)
    assert tokenizer.decode(tokenizer.encode(blank)) == blank


def test_an_error_of_the_text_comes_through_learning() -> None:
    def texts():
        yield TEXT
        raise InputError("the text is none")

    with pytest.raises(InputError, match="the text is none"):
        BpeTokenizer.train(texts(), vocab_size=300)


def test_without_rustbpe_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rustbpe", None)
    with pytest.raises(InputError) as e:
        BpeTokenizer.train([TEXT], vocab_size=300)
    assert e.value.hint == "pip install 'quill-gpt[bpe]'"
