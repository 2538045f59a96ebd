"""Facts of the modern block."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quill.config.blocks import BlockFacts

if TYPE_CHECKING:
    from quill.config.settings import ModelConfig


def _refusal(config: ModelConfig) -> str | None:
    if config.head_size and config.head_size % 2:
        return f"rotary positions require an even 'model.head_size', not {config.head_size}"
    return None


FACTS = BlockFacts(
    summary="Qwen3",
    positions="rotary",
    defaults={"activation": "swiglu", "norm_eps": 1e-6},
    activations=("swiglu", "relu2", "relu", "gelu", "gelu_tanh"),
    gated=("swiglu",),
    settings=frozenset({"n_kv_head", "rope_theta"}),
    refusal=_refusal,
)
