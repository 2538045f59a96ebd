"""The shape of a model with nothing left open: what a GPT is built from."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Every size and choice that decides a model's tensors and arithmetic.

    Made by `ModelConfig.shape`, which explains the settings; here each of them has a value.
    """

    block: str
    n_layer: int
    n_head: int
    n_kv_head: int
    n_embd: int
    head_size: int
    mlp_size: int
    block_size: int
    vocab_size: int
    activation: str
    dropout: float
    bias: bool
    qkv_bias: bool
    head_bias: bool
    tie_embeddings: bool
    attention_scale: float
    rope_theta: float
    norm_eps: float
    ngram: int = 0
