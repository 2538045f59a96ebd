"""What tests of formats share: small models of every family and tokenizer, published in a registry."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from shapes import SHAPES

from quill.checkpoint.weights import save_weights
from quill.config import reading
from quill.config.settings import RunConfig
from quill.model.gpt import GPT
from quill.registry.store import Registry
from quill.tokenizers import base
from quill.tokenizers.char import CharTokenizer
from quill.tokenizers.word import WordTokenizer

if TYPE_CHECKING:
    from quill.registry.version import Version
    from quill.tokenizers.base import Tokenizer

TEXT = "".join(
    f"The {i} seas are {'calm' if i % 3 else 'rough'}, said old Ahab; ünd Ælfrid laughed 😀.\n"
    for i in range(40)
)

Publish = Callable[..., "Version"]


@pytest.fixture(scope="session")
def tokenizers() -> dict[str, Tokenizer]:
    """A tokenizer of every kind that needs nothing from outside."""
    found: dict[str, Tokenizer] = {
        "char": CharTokenizer.train([TEXT]),
        "word": WordTokenizer.train([TEXT], vocab_size=90),
    }
    if importlib.util.find_spec("rustbpe"):
        found["bpe"] = base.load("bpe").train([TEXT], vocab_size=300)
    return found


@pytest.fixture
def publish(tmp_path: Path, tokenizers: dict[str, Tokenizer]) -> Publish:
    """Publish a random model: `publish("gpt2", "char", name="x", n_layer=1)`."""
    registry = Registry(tmp_path / "weights")

    def make(shape: str = "gpt2", tokenizer: str = "char", *, name: str = "made", **model: Any) -> Version:
        chosen = tokenizers[tokenizer]
        settings = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 24, **SHAPES[shape], **model}
        settings.setdefault("vocab_size", chosen.vocab_size)
        config = reading.check(RunConfig, {"name": name, "model": settings}, origin="the tests")
        network = GPT(config.model.shape(), seed=7)
        generator = torch.Generator().manual_seed(8)
        with torch.no_grad():
            for p in network.parameters():
                # Biases and norms too, and large enough that a wrong one shows.
                p.add_(torch.randn(p.shape, generator=generator) * 0.1)
        draft = registry.begin(name)
        draft.write_json("config.json", config.to_dict())
        draft.write_json("tokenizer.json", chosen.to_dict())
        draft.write_file("model.safetensors", lambda path: save_weights(path, network))
        return draft.publish(parameters=sum(p.numel() for p in network.parameters()))

    return make
