"""Facts of the gpt2 block."""

from __future__ import annotations

from quill.config.blocks import BlockFacts

FACTS = BlockFacts(
    summary="GPT-2, nanoGPT, QuillGPT",
    positions="learned",
    defaults={"activation": "gelu", "norm_eps": 1e-5},
    activations=("gelu", "gelu_tanh", "relu", "relu2"),
    settings=frozenset({"bias", "qkv_bias", "head_bias", "attention_scale"}),
)
