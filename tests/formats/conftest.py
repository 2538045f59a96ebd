"""What tests of formats share: small models of every family and tokenizer, published in a registry."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hints import problem
from shapes import SHAPES

from quill.checkpoint.weights import save_weights
from quill.config import reading
from quill.config.settings import RunConfig
from quill.errors import QuillError
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


# Where the hints of errors are checked.
_HINTING = tuple(
    f"quill.formats.{name}"
    for name in ("base", "importing", "nanogpt", "pt2", "quillgpt", "torch_files", "vocabulary")
)


@pytest.fixture(autouse=True)
def hints(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """The hint of every error that a test raises, each of which must be a command that runs or a sentence."""
    raised: dict[str, str] = {}
    init = QuillError.__init__

    def record(self: QuillError, what: str, *, why: str = "", hint: str = "") -> None:
        init(self, what, why=why, hint=hint)
        frame = inspect.currentframe()
        while frame and frame.f_code.co_name in ("record", "__init__"):
            frame = frame.f_back
        if hint and frame and frame.f_globals["__name__"].startswith(_HINTING):
            raised[hint] = what

    monkeypatch.setattr(QuillError, "__init__", record)
    yield raised
    monkeypatch.undo()
    wrong = {hint: why for hint in raised if (why := problem(hint))}
    assert not wrong


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
