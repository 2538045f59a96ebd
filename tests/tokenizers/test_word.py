"""The word tokenizer: distinct words, counted once, and nothing lost beyond the cap."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quill.errors import InputError
from quill.tokenizers import word
from quill.tokenizers.word import WordTokenizer

TEXT = "the cat and the dog and the bird; don't, the cat said.\n\nThe end"


def test_words_are_counted_once_each() -> None:
    tokenizer = WordTokenizer.train([TEXT * 50])
    tokens = ["the", "cat", "and", "dog", "bird", "don't", "said", "The", "end", ";", ",", ".", "\n\n", " "]
    longer = [t for t in tokens if len(t) > 1]
    assert tokenizer.vocab_size == 1 + len(set(TEXT)) + len(longer) + len({"endthe"})


def test_frequent_words_come_first() -> None:
    words = WordTokenizer.train([TEXT]).to_dict()["words"]
    assert words[:3] == ["the", "and", "cat"]


def test_a_word_is_one_id() -> None:
    tokenizer = WordTokenizer.train([TEXT])
    assert [tokenizer.decode([i]) for i in tokenizer.encode("the cat, don't")] == [
        "the",
        " ",
        "cat",
        ",",
        " ",
        "don't",
    ]


@pytest.mark.parametrize("size", [24, 26, 1000])
@given(text=st.text(alphabet=sorted(set(TEXT)), max_size=60))
def test_nothing_is_lost_beyond_the_cap(size: int, text: str) -> None:
    tokenizer = WordTokenizer.train([TEXT], vocab_size=size)
    assert tokenizer.vocab_size <= size
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_cap_keeps_the_most_frequent_words() -> None:
    tokenizer = WordTokenizer.train([TEXT], vocab_size=1 + len(set(TEXT)) + 2)
    assert tokenizer.to_dict()["words"] == ["the", "and"]
    assert len(tokenizer.encode("cat")) == 3


def test_f21_a_cap_below_the_characters_is_refused_with_the_minimum() -> None:
    with pytest.raises(InputError, match="vocab_size 5") as e:
        WordTokenizer.train([TEXT], vocab_size=5)
    assert str(1 + len(set(TEXT))) in e.value.hint


def test_unseen_characters_are_unknown() -> None:
    tokenizer = WordTokenizer.train([TEXT])
    assert tokenizer.decode(tokenizer.encode("the cat😀")) == "the cat<unk>"
    assert tokenizer.encode("😀") == [0]
    assert tokenizer.encode("😀", unknown="skip") == []


def test_memory_stays_bounded_over_endless_new_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(word, "_MOST_COUNTED", 100)
    texts = (f"common word{i} " for i in range(5000))
    tokenizer = WordTokenizer.train(texts)
    assert tokenizer.to_dict()["words"][0] == "common"
    assert tokenizer.vocab_size < 200


def test_a_vocabulary_of_characters_is_refused() -> None:
    with pytest.raises(InputError, match="vocabulary"):
        WordTokenizer.train([TEXT], vocabulary=["a"])
