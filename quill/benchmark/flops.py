"""How many operations and bytes a token takes, counted from a model's shape.

Model FLOPs utilization (MFU) is the rate at which a program does the operations that the model needs, as a
fraction of what the device can do. Per token of training the model needs

    6 N + 12 L H Q T

operations: N multiplied weights, L layers, H heads of width Q, context length T. The forward pass is a third
of them, and what a program computes again, such as with gradient checkpointing, does not count. Source:
Chowdhery et al. 2022, "PaLM", arXiv:2204.02311, appendix B; the half of the attention that is masked counts.

Decoding is bound by memory, not by arithmetic. Model bandwidth utilization (MBU) is the rate at which the
bytes that a step must read, weights and cached keys and values, are read, as a fraction of the memory's
bandwidth. Source: Agarwal et al. 2023, "LLM Inference Performance Engineering: Best Practices", Databricks.
"""

from __future__ import annotations

from quill.config.shape import Shape
from quill.model.gpt import outline

_BYTES_OF_WEIGHT = 4


def multiplied(shape: Shape) -> int:
    """Weights that each token is multiplied with: all matrices but tables that rows are only looked up in."""
    looked_up = {"wpe.weight"} if shape.tie_embeddings else {"wpe.weight", "wte.weight"}
    if shape.n_layer == 0:
        return 0
    return sum(p.numel() for n, p in outline(shape).named_parameters() if p.dim() == 2 and n not in looked_up)


def forward(shape: Shape, context: float) -> float:
    """Operations of a forward pass per token.

    Args:
        shape: The model's.
        context: Tokens that each token attends to.
    """
    return 2 * multiplied(shape) + 4 * shape.n_layer * shape.n_head * shape.head_size * context


def training(shape: Shape) -> float:
    """Operations of a forward and a backward pass per token: the formula above."""
    return 3 * forward(shape, shape.block_size)


def bytes_read(shape: Shape, context: float, rows: int) -> float:
    """Bytes that decoding reads per token: float32 weights, shared by all rows, and the row's cache.

    Args:
        shape: The model's.
        context: Tokens in the cache.
        rows: Sequences side by side.
    """
    cached = 2 * shape.n_layer * shape.n_kv_head * shape.head_size * context
    return _BYTES_OF_WEIGHT * (multiplied(shape) / rows + cached)
