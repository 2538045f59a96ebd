"""Logits of the architectures that quill follows, against an implementation that is not ours."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

from quill.config.settings import ModelConfig
from quill.model.gpt import GPT

transformers = pytest.importorskip("transformers", reason="transformers, which logits are compared with")


def randomise(model: Any) -> None:
    torch.manual_seed(0)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)


def load(config: ModelConfig, weights: Iterable[tuple[str, Tensor]]) -> GPT:
    model = GPT(config.shape())
    model.load_state_dict(dict(weights))
    return model


def check_equal(ours: GPT, theirs: Any, vocab_size: int) -> None:
    idx = torch.randint(0, vocab_size, (2, ours.shape.block_size))
    with torch.inference_mode():
        wanted = theirs.eval()(idx).logits
    assert wanted.std() > 0.1
    torch.testing.assert_close(ours.predict(idx), wanted, rtol=0, atol=1e-5)


def test_gpt2_logits() -> None:
    config = transformers.GPT2Config(
        vocab_size=61, n_positions=24, n_embd=32, n_layer=3, n_head=4, bos_token_id=None, eos_token_id=None
    )
    theirs = transformers.GPT2LMHeadModel(config)
    randomise(theirs)
    ours = ModelConfig(
        block="gpt2",
        vocab_size=61,
        block_size=24,
        n_embd=32,
        n_layer=3,
        n_head=4,
        bias=True,
        activation="gelu_tanh",
    )
    # Its linear layers hold (in, out).
    turned = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    weights = (
        (name.removeprefix("transformer."), t.t() if name.endswith(turned) else t)
        for name, t in theirs.state_dict().items()
        if name != "lm_head.weight" and not name.endswith((".attn.bias", ".attn.masked_bias"))
    )
    check_equal(load(ours, weights), theirs, 61)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("n_kv_head", "head_size"), [(4, 8), (2, 10), (1, 16)])
def test_qwen3_logits(tied: bool, n_kv_head: int, head_size: int) -> None:
    config = transformers.Qwen3Config(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=n_kv_head,
        head_dim=head_size,
        max_position_embeddings=24,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=None,
    )
    theirs = transformers.Qwen3ForCausalLM(config)
    randomise(theirs)
    ours = ModelConfig(
        block="modern",
        vocab_size=61,
        block_size=24,
        n_embd=32,
        n_layer=3,
        n_head=4,
        n_kv_head=n_kv_head,
        head_size=head_size,
        mlp_size=48,
        activation="swiglu",
        tie_embeddings=tied,
        norm_eps=config.rms_norm_eps,
        rope_theta=config.rope_parameters["rope_theta"],
    )
    renamed = {"model.embed_tokens": "wte", "model.norm": "ln_f", "model.layers": "h"}

    def ours_of(name: str) -> str:
        for old, new in renamed.items():
            if name.startswith(old):
                return new + name.removeprefix(old)
        return name

    weights = (
        (ours_of(name), t)
        for name, t in theirs.state_dict().items()
        if not (tied and name.startswith("lm_head"))
    )
    check_equal(load(ours, weights), theirs, 61)
