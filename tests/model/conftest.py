"""Models of a few thousand parameters with weights large enough that every part of them shows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from quill.config.settings import ModelConfig
from quill.model.gpt import GPT

MakeModel = Callable[..., GPT]


@pytest.fixture
def make_model() -> MakeModel:
    """`make_model(block="gpt2", n_layer=1)`: a tiny model in eval mode, its weights drawn anew."""

    def make(seed: int = 0, **settings: Any) -> GPT:
        shape = {"n_layer": 2, "n_head": 4, "n_embd": 32, "block_size": 16, "vocab_size": 29}
        model = GPT(ModelConfig(**{**shape, **settings}).shape())
        torch.manual_seed(seed)
        for p in model.parameters():
            # The published initialisations start some of them at 0 or 1, where mistakes do not show.
            torch.nn.init.normal_(p, std=0.3)
        return model.eval()

    return make
