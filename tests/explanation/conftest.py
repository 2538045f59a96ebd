"""Tiny models with a tokenizer, their weights large enough that every part shows."""

from __future__ import annotations

import string
from collections.abc import Callable
from typing import Any

import pytest
import torch

from quill.config.settings import ModelConfig
from quill.generation.generator import Generator
from quill.model.gpt import GPT
from quill.tokenizers.char import CharTokenizer

CHARACTERS = "\n </>" + string.ascii_lowercase[:24]

MakeGenerator = Callable[..., Generator]


@pytest.fixture(scope="session")
def make_generator() -> MakeGenerator:
    """`make_generator(block="gpt2", n_layer=1)`: a tiny model over small letters."""

    def make(**settings: Any) -> Generator:
        shape = {"n_layer": 2, "n_head": 4, "n_embd": 32, "block_size": 16}
        model = GPT(ModelConfig(**{**shape, **settings}).shape(len(CHARACTERS)))
        generator = torch.Generator().manual_seed(0)
        for p in model.parameters():
            p.data.normal_(0.0, 0.3, generator=generator)
        return Generator(model, CharTokenizer.train([CHARACTERS]), name="tiny:v1")

    return make
