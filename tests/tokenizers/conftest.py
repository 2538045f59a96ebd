"""One trained tokenizer of each kind that is registered, learnt from a text with a bit of everything."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

import pytest

from quill import discovery
from quill.tokenizers import base

LESSON = (
    "The old man was thin and gaunt, with deep wrinkles in the back of his neck; he'd gone 84 days now.\n"
    "\tCafé, naïve, Straße — “quoted” … 12,345.67 €\r\n\r\n"
    "你好，世界。日本語のテキスト、とても良い。 Привет, мир! שלום ‫مرحبا‬ สวัสดี\n"
    "😀 👨‍👩‍👧‍👦 🇫🇮 a\u0301 \u00a0\u3000 <|endoftext|> <unk> `x = {'y': [1, 2]}`  \x00\x07 don't we'll\n"
) * 3


@pytest.fixture
def lesson() -> str:
    """The text that the tokenizers have learnt."""
    return LESSON


@pytest.fixture(params=discovery.names("tokenizers"))
def tokenizer(request: pytest.FixtureRequest, ranks: Path, monkeypatch: pytest.MonkeyPatch) -> base.Tokenizer:
    """Every tokenizer in turn; those whose published ranks are not at hand are skipped."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(ranks))
    for url in getattr(base.load(request.param), "urls", ()):
        if not (ranks / hashlib.sha1(url.encode()).hexdigest()).is_file():
            pytest.skip(f"the ranks of {request.param} are not in {ranks}")
    if request.param == "bpe":
        pytest.importorskip("rustbpe")
    return trained(request.param)


@cache
def trained(kind: str) -> base.Tokenizer:
    """Learnt once, since no test changes it."""
    return base.load(kind).train([LESSON])
