"""Any model of the gpt2 family as one that GPT-2's own shape holds, computing the same logits.

GPT-2 has heads that are n_embd / n_head wide, scores divided by the root of that, every bias but none on the
output head. What deviates is rewritten exactly, up to rounding:

- A head narrower than n_embd / n_head gets channels of zeros; a factor on the queries makes up for the
  divisor of the scores, and for an attention scale of the model's own.
- Where heads do not fit, or the output head has a bias, the residual stream gets further channels that stay
  at zero. Only LayerNorms read it, and they take its mean away: so everything that writes to it may be
  centred over the channels first, and then the wider norm sees mean zero as well and a variance smaller by
  C / C', for which its gain and its epsilon make up.
- A bias of the output head rides on such a channel: the last norm's gain is 0 there and its shift 1, so the
  channel is 1 at every position, and the head's column for it is the bias.
- A table of bigrams is a layer of zeros between embeddings that are unit vectors, which the last norm gives
  back as they are, and a head that is the table.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from quill.config.settings import ModelConfig

if TYPE_CHECKING:
    from torch import Tensor

# What reads the stream through a norm, and the norms' shifts.
_READERS = (
    "c_attn.weight", "c_fc.weight", "lm_head.weight", "ln_1.bias", "ln_2.bias", "ln_f.bias",
)  # fmt: skip
# The unit vectors of more tokens than this take more memory than anybody's bigrams are worth.
MOST_BIGRAMS = 4096


def rewrite(
    config: ModelConfig, weights: Mapping[str, Tensor], multiple: int = 1
) -> tuple[ModelConfig, dict[str, Tensor], tuple[str, ...]]:
    """Rewrite a model.

    Args:
        config: A gpt2 model, or one without layers; vocab_size is set.
        weights: By quill's names; not changed.
        multiple: What a new width shall be a multiple of.

    Returns:
        The shape and weights of an equal model with every bias, a head without one, and heads that are
        n_embd / n_head wide with scores divided by the root of that; and what was done, a sentence each.
        Tensors that need no change are those given.
    """
    if config.n_layer == 0:
        return _bigrams(config, weights)
    H, D, C = config.n_head, config.head_size or 0, config.n_embd
    width = max(C + config.head_bias, H * D)
    step = math.lcm(H, multiple) if width % H or width != C else H
    width = -(-width // step) * step
    notes = []
    made = dict(weights)
    if width != C:
        made = _widened(config, made, width)
        notes.append(
            f"{width - C} channels were added to the {C} of the residual stream, which is centred now: "
            + (f"the head's bias is on one, {H} heads of {width // H} fill them" if config.head_bias
               else f"{H} heads of {width // H} fill them")
        )  # fmt: skip
    scale = (config.attention_scale or D**-0.5) * (width // H) ** 0.5
    if width // H != D:
        made = _padded_heads(config, made, width // H)
        notes.append(f"heads of {D} were padded with zeros to {width // H}")
    if abs(scale - 1) > 1e-9:
        made = _scaled_queries(config, made, width, scale)
        if config.attention_scale is not None:
            notes.append("the attention scale is in the queries' weights")
    plain = {
        **config.model_dump(),
        "n_embd": width,
        "head_size": width // H,
        "bias": True,
        "qkv_bias": True,
        "head_bias": False,
        "attention_scale": None,
        "tie_embeddings": config.tie_embeddings and "lm_head.weight" not in made,
        "norm_eps": (config.norm_eps or 1e-5) * (C / width),
    }
    return ModelConfig(**plain), _with_biases(made), tuple(notes)


def _widened(config: ModelConfig, weights: Mapping[str, Tensor], width: int) -> dict[str, Tensor]:
    """Centre what writes to the residual stream and give it channels that are always zero."""
    import torch

    C = config.n_embd
    more = width - C
    made: dict[str, Tensor] = {}
    for name, value in weights.items():
        if name.endswith(("ln_1.weight", "ln_2.weight", "ln_f.weight")):
            value = torch.cat([value * (C / width) ** 0.5, value.new_zeros(more)])
        elif name.endswith(("wte.weight", "wpe.weight")):
            value = torch.nn.functional.pad(_centred(value, 1), (0, more))
        elif name.endswith("c_proj.weight"):
            value = torch.nn.functional.pad(_centred(value, 0), (0, 0, 0, more))
        elif name.endswith("c_proj.bias"):
            value = torch.nn.functional.pad(_centred(value, 0), (0, more))
        elif name.endswith(_READERS):
            value = torch.nn.functional.pad(value, (0, more))
        made[name] = value
    if config.tie_embeddings:
        # The head reads what the last norm gives, not the stream, so its rows must stay as they were.
        made["lm_head.weight"] = torch.nn.functional.pad(weights["wte.weight"], (0, more))
    if config.head_bias:
        made["lm_head.weight"][:, C] = made.pop("lm_head.bias")
        shift = made.get("ln_f.bias", torch.zeros(width))
        shift[C] = 1.0
        made["ln_f.bias"] = shift
    return made


def _padded_heads(config: ModelConfig, weights: Mapping[str, Tensor], size: int) -> dict[str, Tensor]:
    """Give every head channels of zeros, so that it is `size` wide."""
    from torch.nn.functional import pad

    H, D = config.n_head, config.head_size or 0
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


def _scaled_queries(
    config: ModelConfig, weights: Mapping[str, Tensor], width: int, scale: float
) -> dict[str, Tensor]:
    made = dict(weights)
    for name, value in weights.items():
        if ".c_attn." in name:
            made[name] = value.clone()
            made[name][:width] *= scale
    return made


def _with_biases(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Add the biases that are not there, as zeros."""
    made: dict[str, Tensor] = {}
    for name, value in weights.items():
        made[name] = value
        bias = name.removesuffix("weight") + "bias"
        if name.endswith("weight") and not name.startswith(("wte", "wpe", "lm_head")) and bias not in weights:
            made[bias] = value.new_zeros(len(value))
    return made


def _bigrams(
    config: ModelConfig, weights: Mapping[str, Tensor]
) -> tuple[ModelConfig, dict[str, Tensor], tuple[str, ...]]:
    import torch

    table = weights["wte.weight"]
    V = len(table)
    # Of one token alone there is no variance to norm; a second channel gives it some.
    C = max(V, 2)
    eps = 1e-5
    variance = (1 - 1 / C) / C
    plain = ModelConfig(
        block="gpt2", n_layer=1, n_head=1, n_embd=C, mlp_size=1, block_size=config.block_size, vocab_size=V,
        bias=True, activation="relu", tie_embeddings=False, norm_eps=eps, dropout=config.dropout,
    )  # fmt: skip
    made: dict[str, Tensor] = {
        "wte.weight": torch.eye(V, C),
        "wpe.weight": torch.zeros(config.block_size, C),
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
    made |= {f"h.0.{name}": torch.zeros(shape) for name, shape in zeros.items()}
    note = "the table of bigrams is the output head; embeddings are unit vectors, the one layer is zeros"
    return plain, made, (note,)


def _centred(value: Tensor, dim: int) -> Tensor:
    """Less its mean, taken in float64 so that what is left sums to zero as nearly as it can."""
    exact = value.double()
    return (exact - exact.mean(dim, keepdim=True)).to(value.dtype)
