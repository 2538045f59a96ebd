"""One tokenizer of each registered kind, trained on a text with a bit of everything."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

import pytest

from quill import discovery
from quill.tokenizers import base

TEXT = (
    "The old man was thin and gaunt, with deep wrinkles in the back of his neck; he'd gone 84 days now.\n"
    "\tCafé, naïve, Straße — “quoted” … 12,345.67 €\r\n\r\n"
    "你好，世界。日本語のテキスト、とても良い。 Привет, мир! שלום ‫مرحبا‬ สวัสดี\n"
    "😀 👨‍👩‍👧‍👦 🇫🇮 a\u0301 \u00a0\u3000 <|endoftext|> <unk> `x = {'y': [1, 2]}`  \x00\x07 don't we'll\n"
) * 3


@pytest.fixture
def training_text() -> str:
    """The text that the tokenizers are trained on."""
    return TEXT


@pytest.fixture(params=discovery.names("tokenizers"))
def tokenizer(request: pytest.FixtureRequest, ranks: Path, monkeypatch: pytest.MonkeyPatch) -> base.Tokenizer:
    """Each tokenizer in turn, skipping those whose published ranks are not in the cache."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(ranks))
    for url in getattr(base.load(request.param), "urls", ()):
        if not (ranks / hashlib.sha1(url.encode()).hexdigest()).is_file():
            pytest.skip(f"the ranks of {request.param} are not in {ranks}")
    if request.param == "bpe":
        pytest.importorskip("rustbpe")
    return trained(request.param)


@cache
def trained(kind: str) -> base.Tokenizer:
    """Return the tokenizer of a kind, trained once."""
    return base.load(kind).train([TEXT])
