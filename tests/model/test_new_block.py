"""A block that quill does not ship: one folder, and it trains, samples, saves and loads."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent

import pytest
import torch

import quill.model.blocks
from quill import discovery
from quill.config import reading
from quill.config.settings import ModelConfig
from quill.errors import InputError
from quill.model.gpt import GPT

FACTS = """
from quill.config.blocks import BlockFacts

FACTS = BlockFacts(
    summary="GPT-J",
    positions="rotary",
    defaults={"activation": "relu6", "norm_eps": 1e-4, "rope_theta": 500.0},
    activations=("relu6",),
    settings=frozenset({"bias", "rope_theta"}),
    refusal=lambda settings: "heads must be even in number" if settings["n_head"] % 2 else None,
)
"""

BLOCK = '''
from torch import nn

from quill.model.attention import attend


def norm(shape):
    return nn.LayerNorm(shape.n_embd, eps=shape.norm_eps, bias=shape.bias)


class Block(nn.Module):
    """x + attention(norm(x)) + mlp(norm(x))."""

    def __init__(self, shape):
        super().__init__()
        self.n_head = shape.n_head
        self.ln = norm(shape)
        self.qkv = nn.Linear(shape.n_embd, 3 * shape.n_head * shape.head_size, bias=shape.bias)
        self.out = nn.Linear(shape.n_head * shape.head_size, shape.n_embd, bias=shape.bias)
        self.up = nn.Linear(shape.n_embd, shape.mlp_size, bias=shape.bias)
        self.down = nn.Linear(shape.mlp_size, shape.n_embd, bias=shape.bias)

    def forward(self, x, rope, cache=None):
        B, T, _ = x.shape
        y = self.ln(x)
        q, k, v = self.qkv(y).view(B, T, 3, self.n_head, -1).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = attend(rope(q), rope(k), v, cache).transpose(1, 2).reshape(B, T, -1)
        return x + self.out(mixed) + self.down(nn.functional.relu6(self.up(y)))

    def writers(self):
        return {"attention": self.out, "mlp": self.down}

    def init_weights(self, n_layer, generator):
        for p in self.parameters():
            nn.init.ones_(p) if p.dim() < 2 else p.normal_(0.0, 0.02, generator=generator)
'''


@pytest.fixture(autouse=True)
def parallel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Install a block named "parallel" in a temporary folder."""
    folder = tmp_path / "blocks" / "parallel"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text(dedent(FACTS))
    (folder / "block.py").write_text(dedent(BLOCK))
    path = [*quill.model.blocks.__path__, str(folder.parent)]
    monkeypatch.setattr(quill.model.blocks, "__path__", path)
    discovery.names.cache_clear()
    yield
    discovery.names.cache_clear()
    for name in [n for n in sys.modules if n.startswith("quill.model.blocks.parallel")]:
        del sys.modules[name]
    vars(quill.model.blocks).pop("parallel", None)


def test_it_trains_samples_saves_and_loads(
    tmp_path: Path, tiny_text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from quill.cli.app import main

    monkeypatch.setenv("QUILL_REGISTRY", str(tmp_path / "weights"))
    (tmp_path / "tide.txt").write_text(tiny_text)
    settings = {"n-layer": 2, "n-head": 2, "n-embd": 16, "block-size": 16, "batch-size": 8, "max-iters": 30}
    settings |= {"warmup-iters": 2, "eval-interval": 10}
    fixed = ["--device=cpu", "--dtype=float32", "--compile=off", "--block=parallel"]
    flags = [*fixed, *(f"--{name}={value}" for name, value in settings.items())]
    assert main(["prepare", str(tmp_path / "tide.txt"), "--name", "tide", "-q"]) == 0
    assert main(["train", "--data", "tide", "--name", "toy", *flags, "-q"]) == 0
    assert capsys.readouterr().out.split()[-1] == "toy:v1"
    assert main(["sample", "toy", "3 bells", "--max-new-tokens", "10", "--seed", "1"]) == 0
    assert capsys.readouterr().out.startswith("3 bells")

    loaded = quill.load("toy", registry=tmp_path / "weights")
    assert {"h.1.qkv.weight", "h.1.down.weight"} <= set(loaded.model.state_dict())
    explained = quill.explain(loaded, "3 bells")
    expected = loaded.model.predict(torch.tensor([explained.ids]))[0]
    torch.testing.assert_close(explained.trace.logits, expected, rtol=0, atol=1e-5)
    assert explained.to_dict()["model"]["family"] == "GPT-J"
    figures = quill.evaluate("toy", tiny_text, registry=tmp_path / "weights")
    assert figures.loss < math.log(loaded.tokenizer.vocab_size) - 0.1


def test_its_facts_decide_what_settings_it_takes() -> None:
    shape = ModelConfig(block="parallel", n_embd=64).shape(10)
    assert (shape.activation, shape.norm_eps, shape.rope_theta, shape.mlp_size) == ("relu6", 1e-4, 500.0, 256)
    assert ModelConfig(block="parallel", bias=True, rope_theta=7.0).rope_theta == 7.0
    refused = [
        ({"activation": "gelu"}, "no activation 'gelu'"),
        ({"attention_scale": 0.1}, "does not support 'model.attention_scale'"),
        ({"n_kv_head": 2}, "does not support 'model.n_kv_head'"),
        ({"n_head": 1}, "heads must be even in number"),
    ]
    for settings, why in refused:
        with pytest.raises(InputError) as caught:
            reading.parse({"model": {"block": "parallel", **settings}})
        assert why in caught.value.why


def test_its_cached_logits_equal_the_full_forward() -> None:
    model = GPT(ModelConfig(block="parallel", n_embd=32, block_size=16).shape(29))
    idx = torch.randint(0, 29, (2, 12))
    cache = model.new_cache(2)
    with torch.inference_mode():
        chunks = torch.cat([model(chunk, cache) for chunk in idx.split((5, 3, 1, 3), 1)], 1)
    torch.testing.assert_close(chunks, model.predict(idx), rtol=0, atol=1e-5)
