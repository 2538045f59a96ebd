"""The char tokenizer: nanoGPT's ids, and errors that name the unknown characters."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from quill.errors import InputError
from quill.tokenizers.char import CharTokenizer


def test_tiny_shakespeare_has_nanogpts_ids(shakespeare_text: str) -> None:
    tokenizer = CharTokenizer.train([shakespeare_text])
    characters = sorted(set(shakespeare_text))
    assert tokenizer.vocab_size == len(characters) == 65
    table = {c: i for i, c in enumerate(characters)}
    assert tokenizer.encode_array(shakespeare_text).tolist() == [table[c] for c in shakespeare_text]


def test_text_in_chunks_gives_the_same_tokenizer() -> None:
    chunked = CharTokenizer.train(iter(["hello ", "wörld", "", "😀"]))
    assert chunked.fingerprint == CharTokenizer.train(["hello wörld😀"]).fingerprint
    assert chunked.decode(range(chunked.vocab_size)) == "".join(sorted(set("hello wörld😀")))


def test_a_given_vocabulary_keeps_its_order() -> None:
    tokenizer = CharTokenizer.train(["abba"], vocabulary=["b", "a", "z"])
    assert tokenizer.encode("abz") == [1, 0, 2]


def test_a_given_vocabulary_must_have_the_texts_characters() -> None:
    with pytest.raises(InputError, match=r"'é' \(U\+00E9\)") as e:
        CharTokenizer.train(["abbé"], vocabulary=["b", "a"])
    assert "vocabulary" in e.value.hint


@pytest.mark.parametrize("vocabulary", [[], ["ab"], ["a", "a"], [""], ["\ud800"]])
def test_an_invalid_vocabulary_is_refused(vocabulary: list[str]) -> None:
    with pytest.raises(InputError):
        CharTokenizer.train([], vocabulary=vocabulary)


def test_a_size_is_refused() -> None:
    with pytest.raises(InputError, match="vocab_size 300"):
        CharTokenizer.train(["text"], vocab_size=300)


def test_f22_unknown_characters_are_named_each_once() -> None:
    tokenizer = CharTokenizer.train(["hello"])
    for attempt in (tokenizer.encode, tokenizer.encode_array):
        with pytest.raises(InputError) as e:
            attempt("h😀é😀\x1bo")
        assert e.value.exit_code == 2
        assert "'😀' (U+1F600), 'é' (U+00E9), '\\x1b' (U+001B)" in e.value.what
        assert e.value.what.count("1F600") == 1
        assert "\x1b" not in e.value.what
        assert e.value.hint == 'unknown="skip"'


def test_f22_a_single_unknown_character_is_singular() -> None:
    with pytest.raises(InputError, match=r"^unknown character 'X' \(U\+0058\)"):
        CharTokenizer.train(["hello"]).encode("heX")


def test_f22_unknown_characters_can_be_skipped() -> None:
    tokenizer = CharTokenizer.train(["hello"])
    assert tokenizer.decode(tokenizer.encode("h😀ello, world", unknown="skip")) == "hellool"


def test_f22_ten_thousand_unknown_characters_make_a_short_message() -> None:
    with pytest.raises(InputError) as e:
        CharTokenizer.train(["hello"]).encode("".join(map(chr, range(0x4E00, 0x7510))))
    assert len(str(e.value)) < 4000
    assert "more" in e.value.what


@pytest.mark.parametrize("size", [254, 255, 256, 300, 65535, 65536, 65537])
def test_bulk_ids_are_right_at_every_width(size: int) -> None:
    # Code points from the far end, with ASCII last, so that its ids are the largest.
    others = [chr(c) for c in range(0x10FFFF, 0xE000, -1)][: size - 2]
    tokenizer = CharTokenizer.train([], vocabulary=[*others, "a", "b"])
    assert tokenizer.vocab_size == size
    assert tokenizer.dtype == (np.uint16 if size <= 65536 else np.uint32)
    for text in ("abba", "ab" + others[0] + others[-1] + "a", ""):
        assert tokenizer.encode_array(text).tolist() == tokenizer.encode(text)
        assert tokenizer.encode_array(text).dtype == tokenizer.dtype
    for text in ("abc", "ab" + others[0] + "c", "\ue000"):
        with pytest.raises(InputError, match="unknown character"):
            tokenizer.encode_array(text)


def test_reading_and_decoding_import_no_heavy_package() -> None:
    code = (
        "import sys\n"
        "from quill.tokenizers import base\n"
        "t = base.read({'schema': 1, 'kind': 'char', 'vocabulary': 'abc'})\n"
        "assert t.decode(t.encode('cab')) == 'cab'\n"
        "base.StreamDecoder(t).feed(1)\n"
        "print([m for m in ('numpy', 'tiktoken', 'regex', 'torch', 'pydantic') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
