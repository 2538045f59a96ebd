"""Tiny models, a tokenizer of bytes, and models that say exactly what a test wants to hear."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any, Literal, Self

import pytest
import torch

from quill.config.settings import ModelConfig
from quill.model.gpt import GPT
from quill.tokenizers.base import Tokenizer

MakeModel = Callable[..., GPT]


class Bytes(Tokenizer):
    """Each UTF-8 byte is a token, 256 ends a text."""

    vocab_size = 257
    eot_id = 256

    @classmethod
    def train(cls, texts: Iterable[str], **_: Any) -> Self:
        return cls()

    def encode(self, text: str, *, unknown: Literal["error", "skip"] = "error") -> list[int]:
        return list(text.encode())

    def token_bytes(self, token: int) -> bytes:
        return b"" if token == 256 else bytes([token])

    def to_dict(self) -> dict[str, Any]:
        return {}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        return cls()


@pytest.fixture
def by_bytes() -> Tokenizer:
    """A tokenizer of bytes, with a token that ends a text."""
    return Bytes()


@pytest.fixture
def make_model() -> MakeModel:
    """`make_model(block="gpt2", n_layer=1)`: a tiny model in eval mode, its weights drawn anew."""

    def make(seed: int = 0, **settings: Any) -> GPT:
        shape = {"n_layer": 2, "n_head": 4, "n_embd": 32, "block_size": 16, "vocab_size": 29}
        model = GPT(ModelConfig(**{**shape, **settings}).shape())
        torch.manual_seed(seed)
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.3)
        return model.eval()

    return make


@pytest.fixture
def reciting() -> Callable[[Sequence[int]], GPT]:
    """`reciting(ids)`: a model of bytes that goes on from the first of these distinct ids to the last."""

    def make(ids: Sequence[int]) -> GPT:
        model = GPT(ModelConfig(n_layer=0, vocab_size=257, block_size=8).shape())
        with torch.no_grad():
            model.wte.weight.zero_()
            for a, b in pairwise(ids):
                model.wte.weight[a, b] = 1000.0
        return model

    return make
