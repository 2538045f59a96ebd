"""Facts of the modern block."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quill.config.blocks import BlockFacts


def _refusal(settings: Mapping[str, Any]) -> str | None:
    width = settings["head_size"]
    if width and width % 2:
        return f"rotary positions require an even 'model.head_size', not {width}"
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
