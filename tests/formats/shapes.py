"""The shapes that formats are tried with, each different from its family's default in its own way."""

from __future__ import annotations

from typing import Any

# What differs from a family's default, by a name that a test can show.
SHAPES: dict[str, dict[str, Any]] = {
    "gpt2": {"block": "gpt2", "bias": True},
    "nanogpt": {"block": "gpt2", "bias": False},
    "openai": {"block": "gpt2", "bias": True, "activation": "gelu_tanh"},
    "quillgpt": {
        "block": "gpt2", "bias": True, "qkv_bias": False, "activation": "relu", "tie_embeddings": False,
        "head_bias": True, "n_embd": 32, "n_head": 3, "head_size": 10, "n_kv_head": 3,
    },
    "modern": {"block": "modern", "n_kv_head": 1, "head_size": 16},
    "untied": {"block": "modern", "tie_embeddings": False, "rope_theta": 1e6},
    "relu2": {"block": "modern", "activation": "relu2"},
    "bigram": {"n_layer": 0},
}  # fmt: skip
