from __future__ import annotations

import math

import pytest
import torch

from quill import discovery
from quill.config.settings import ModelConfig
from quill.model.gpt import GPT, loss

BLOCKS = discovery.names("model.blocks")


def wide(block: str, **settings: object) -> GPT:
    shape = {"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 64, "vocab_size": 65}
    return GPT(ModelConfig(block=block, **{**shape, **settings}).shape())


@pytest.mark.parametrize("block", BLOCKS)
def test_a_fresh_model_is_close_to_guessing(block: str) -> None:
    model = wide(block)
    idx = torch.randint(0, 65, (4, 65))
    assert loss(model.predict(idx[:, :-1]), idx[:, 1:]).item() == pytest.approx(math.log(65), abs=0.2)


@pytest.mark.parametrize("block", BLOCKS)
def test_the_seed_decides_the_weights(block: str) -> None:
    shape = wide(block).shape
    a, b, c = GPT(shape, seed=1), GPT(shape, seed=1), GPT(shape, seed=2)
    torch.manual_seed(5)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.wte.weight, c.wte.weight)


def test_gpt2_is_normal_with_smaller_residual_projections() -> None:
    model = wide("gpt2", bias=True, tie_embeddings=False, head_bias=True)
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert not p.any(), name
        elif p.dim() == 1:
            assert (p == 1).all(), name
        else:
            wanted = 0.02 / math.sqrt(2 * 4) if "c_proj" in name else 0.02
            assert p.std().item() == pytest.approx(wanted, rel=0.05), name
            assert abs(p.mean().item()) < 0.1 * wanted, name


def test_modern_starts_as_the_identity() -> None:
    model = wide("modern")
    x = torch.randn(2, 8, 128)
    for block in model.h:
        assert torch.equal(block(x, model.rotations().span(0, 8)), x)
    for name, p in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            assert not p.any(), name
        elif p.dim() == 1:
            assert (p == 1).all(), name
        elif name == "wte.weight":
            assert p.std().item() == pytest.approx(0.02, rel=0.05)
        else:
            assert p.var().item() == pytest.approx(1 / p.shape[1], rel=0.05), name


def test_a_bigram_table_is_standard_normal() -> None:
    table = wide("gpt2", n_layer=0).wte.weight
    assert table.mean().item() == pytest.approx(0, abs=0.1)
    assert table.std().item() == pytest.approx(1, rel=0.1)
