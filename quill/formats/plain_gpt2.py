"""Any model with the gpt2 block rewritten to GPT-2's own shape, with the same logits.

GPT-2 has heads of width n_embd / n_head, scores divided by the root of that, a bias everywhere but on the
output head. Other shapes are rewritten exactly, up to rounding:

- A head narrower than n_embd / n_head gets channels of zeros. A factor on the queries makes up for the
  divisor of the scores, and for a different attention scale.
- If the heads do not fit, or the output head has a bias, the residual stream gets more channels that stay at
  zero. Only LayerNorms read the stream, and they subtract its mean. So everything that writes to it is
  centered over the channels first; the wider norm then sees a mean of zero too, and a variance smaller by
  C / C', for which its gain and its epsilon make up.
- The bias of the output head uses such a channel: the last norm's gain is 0 there and its shift 1, so the
  channel is 1 at every position, and the head's column for it is the bias.
- A bigram table becomes a layer of zeros between embeddings that are unit vectors, which the last norm
  returns unchanged, and a head that is the table.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from quill.config.settings import ModelConfig
from quill.formats.base import LazyTensors

if TYPE_CHECKING:
    from torch import Tensor

    from quill.config.shape import Shape

# Tensors that read the stream through a norm, and the norms' shifts.
_READERS = (
    "c_attn.weight", "c_fc.weight", "lm_head.weight", "ln_1.bias", "ln_2.bias", "ln_f.bias",
)  # fmt: skip
# The unit vectors of more tokens than this would take too much memory.
MOST_BIGRAMS = 4096


def rewrite(
    shape: Shape, weights: Mapping[str, Tensor], multiple: int = 1
) -> tuple[Shape, Mapping[str, Tensor], tuple[str, ...]]:
    """Rewrite a model.

    Args:
        shape: With the gpt2 block, or without layers.
        weights: By quill's names; not changed.
        multiple: A wider stream gets a multiple of this many channels.

    Returns:
        The shape and weights of an equal model with every bias, a head without one, and heads of width
        n_embd / n_head with scores divided by the root of that; and notes on what was done. Tensors that
        need no change are those given, looked up when they are.
    """
    if shape.n_layer == 0:
        return _bigrams(shape, weights)
    H, D, C = shape.n_head, shape.head_size, shape.n_embd
    width = max(C + shape.head_bias, H * D)
    step = math.lcm(H, multiple) if width % H or width != C else H
    width = -(-width // step) * step
    notes = []
    made = weights
    if width != C:
        made = _widened(shape, made, width)
        use = "the output head's bias and " if shape.head_bias else ""
        notes.append(
            f"the residual stream was centered and widened from {C} to {width} channels, "
            f"for {use}{H} heads of width {width // H}"
        )
    scale = shape.attention_scale * (width // H) ** 0.5
    if width // H != D:
        made = _padded_heads(shape, made, width // H)
        notes.append(f"heads of width {D} were padded with zeros to {width // H}")
    if abs(scale - 1) > 1e-9:
        made = _scaled_queries(made, width, scale)
        if not math.isclose(shape.attention_scale, D**-0.5):
            notes.append("the attention scale was multiplied into the queries' weights")
    plain = replace(
        shape,
        block="gpt2",
        n_embd=width,
        head_size=width // H,
        bias=True,
        qkv_bias=True,
        head_bias=False,
        attention_scale=(width // H) ** -0.5,
        tie_embeddings=shape.tie_embeddings and "lm_head.weight" not in made,
        norm_eps=shape.norm_eps * (C / width),
    )
    return plain, _with_biases(made), tuple(notes)


def _widened(shape: Shape, weights: Mapping[str, Tensor], width: int) -> dict[str, Tensor]:
    """Center everything that writes to the residual stream, and add channels that are always zero."""
    import torch

    C = shape.n_embd
    more = width - C
    made: dict[str, Tensor] = {}
    for name, value in weights.items():
        if name.endswith(("ln_1.weight", "ln_2.weight", "ln_f.weight")):
            value = torch.cat([value * (C / width) ** 0.5, value.new_zeros(more)])
        elif name.endswith(("wte.weight", "wpe.weight")):
            value = torch.nn.functional.pad(_centered(value, 1), (0, more))
        elif name.endswith("c_proj.weight"):
            value = torch.nn.functional.pad(_centered(value, 0), (0, 0, 0, more))
        elif name.endswith("c_proj.bias"):
            value = torch.nn.functional.pad(_centered(value, 0), (0, more))
        elif name.endswith(_READERS):
            value = torch.nn.functional.pad(value, (0, more))
        made[name] = value
    if shape.tie_embeddings:
        # The head reads the output of the last norm, not the stream, so its rows are not centered.
        made["lm_head.weight"] = torch.nn.functional.pad(weights["wte.weight"], (0, more))
    if shape.head_bias:
        made["lm_head.weight"][:, C] = made.pop("lm_head.bias")
        shift = made.get("ln_f.bias", torch.zeros(width))
        shift[C] = 1.0
        made["ln_f.bias"] = shift
    return made


def _padded_heads(shape: Shape, weights: Mapping[str, Tensor], size: int) -> dict[str, Tensor]:
    """Pad every head with channels of zeros to the width `size`."""
    from torch.nn.functional import pad

    H, D = shape.n_head, shape.head_size
    made = dict(weights)
    for name, value in weights.items():
        if name.endswith("c_attn.weight"):
            heads = pad(value.view(3, H, D, -1), (0, 0, 0, size - D))
            made[name] = heads.reshape(3 * H * size, -1)
        elif name.endswith("c_attn.bias"):
            made[name] = pad(value.view(3, H, D), (0, size - D)).reshape(-1)
        elif name.endswith("attn.c_proj.weight"):
            heads = pad(value.reshape(len(value), H, D), (0, size - D))
            made[name] = heads.reshape(len(value), -1)
    return made


def _scaled_queries(weights: Mapping[str, Tensor], width: int, scale: float) -> dict[str, Tensor]:
    made = dict(weights)
    for name, value in weights.items():
        if ".c_attn." in name:
            made[name] = value.clone()
            made[name][:width] *= scale
    return made


def _with_biases(weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Add missing biases as zeros."""
    made: dict[str, Callable[[], Tensor]] = {}
    for name in weights:
        made[name] = partial(weights.__getitem__, name)
        bias = name.removesuffix("weight") + "bias"
        if name.endswith("weight") and not name.startswith(("wte", "wpe", "lm_head")) and bias not in weights:
            made[bias] = partial(_zero_bias, weights, name)
    return LazyTensors(made)


def _zero_bias(weights: Mapping[str, Tensor], name: str) -> Tensor:
    value = weights[name]
    return value.new_zeros(len(value))


def _bigrams(shape: Shape, weights: Mapping[str, Tensor]) -> tuple[Shape, dict[str, Tensor], tuple[str, ...]]:
    import torch

    table = weights["wte.weight"]
    V = len(table)
    # A single channel has no variance to normalize by.
    C = max(V, 2)
    eps = 1e-5
    variance = (1 - 1 / C) / C
    plain = ModelConfig(
        block="gpt2", n_layer=1, n_head=1, n_embd=C, mlp_size=1, block_size=shape.block_size, vocab_size=V,
        bias=True, activation="relu", tie_embeddings=False, norm_eps=eps, dropout=shape.dropout,
    )  # fmt: skip
    made: dict[str, Tensor] = {
        "wte.weight": torch.eye(V, C),
        "wpe.weight": torch.zeros(shape.block_size, C),
        "ln_f.weight": torch.full((C,), (variance + eps) ** 0.5),
        "ln_f.bias": torch.full((C,), 1 / C),
        "lm_head.weight": torch.nn.functional.pad(table.t(), (0, C - V)).contiguous(),
    }
    zeros = {
        "ln_1.weight": (C,), "ln_1.bias": (C,), "ln_2.weight": (C,), "ln_2.bias": (C,),
        "attn.c_attn.weight": (3 * C, C), "attn.c_attn.bias": (3 * C,),
        "attn.c_proj.weight": (C, C), "attn.c_proj.bias": (C,),
        "mlp.c_fc.weight": (1, C), "mlp.c_fc.bias": (1,),
        "mlp.c_proj.weight": (C, 1), "mlp.c_proj.bias": (C,),
    }  # fmt: skip
    made |= {f"h.0.{name}": torch.zeros(size) for name, size in zeros.items()}
    note = "the bigram table became the output head; the embeddings are unit vectors, the one layer is zeros"
    return plain.shape(), made, (note,)


def _centered(value: Tensor, dim: int) -> Tensor:
    """Subtract the mean, in float64 so that the rest sums to zero as closely as possible."""
    exact = value.double()
    return (exact - exact.mean(dim, keepdim=True)).to(value.dtype)
