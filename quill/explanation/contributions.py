"""How much each part of a model raises the logit of a token.

The logits are an affine map of the residual stream once the last norm's scale is frozen at what it is for
this prompt, and the stream is a sum of what the parts have added. So each logit is a sum over the parts.
Source: Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits".

Legend: T tokens, C n_embd, H n_head, N tokens asked for, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quill.errors import InputError
from quill.explanation.trace import Trace
from quill.model.gpt import GPT


@dataclass(frozen=True, eq=False)
class Contributions:
    """Shares of logits, each relative to the mean over the vocabulary, which no probability depends on.

    Attributes:
        embedding: (N).
        positions: (N); None if positions add nothing.
        attention: By layer, (L, N).
        heads: By layer and head, without the biases of attention, (L, H, N).
        mlp: By layer, (L, N).
        constant: From the biases of the last norm and the head, (N).
    """

    embedding: Tensor
    positions: Tensor | None
    attention: Tensor
    heads: Tensor
    mlp: Tensor
    constant: Tensor

    def total(self) -> Tensor:
        """The logits relative to their mean, (N)."""
        total = self.embedding + self.attention.sum(0) + self.mlp.sum(0) + self.constant
        return total if self.positions is None else total + self.positions


@torch.inference_mode()
def contributions(model: GPT, trace: Trace, tokens: list[int], vocab_size: int) -> Contributions:
    """Split the logits of the last position.

    Args:
        model: A model with layers.
        trace: Of a prompt.
        tokens: Token ids, N of them.
        vocab_size: Number of tokens that can be drawn; logits beyond are padding.

    Raises:
        InputError: The model's last norm is neither a LayerNorm nor an RMSNorm.
    """
    device, dtype = model.wte.weight.device, model.wte.weight.dtype
    zero = torch.zeros(trace.embedding.shape[-1], device=device, dtype=dtype)
    scaled = _frozen(model.ln_f, trace.layers[-1].after[-1].to(device, dtype))

    def relative(normed: Tensor) -> Tensor:
        logits = model.unembed(normed)[..., :vocab_size].float()
        return (logits[..., tokens] - logits.mean(-1, keepdim=True)).cpu()

    offset = relative(zero)

    def share(x: Tensor) -> Tensor:
        return relative(scaled(x.to(device, dtype))) - offset

    return Contributions(
        share(trace.embedding[-1]),
        None if trace.positions is None else share(trace.positions[-1]),
        torch.stack([share(layer.attention[-1]) for layer in trace.layers]),
        torch.stack([share(layer.by_head[:, -1]) for layer in trace.layers]),
        torch.stack([share(layer.mlp[-1]) for layer in trace.layers]),
        offset if (bias := getattr(model.ln_f, "bias", None)) is None else relative(bias),
    )


def _frozen(norm: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    """A norm without its bias as the linear map that it is for x."""
    if isinstance(norm, nn.LayerNorm):
        scale = (x.var(unbiased=False) + norm.eps).rsqrt() * norm.weight
        return lambda part: (part - part.mean(-1, keepdim=True)) * scale
    if isinstance(norm, nn.RMSNorm):
        eps = torch.finfo(x.dtype).eps if norm.eps is None else norm.eps
        scale = (x.square().mean() + eps).rsqrt() * norm.weight
        return lambda part: part * scale
    raise InputError(
        f"models with the norm {type(norm).__name__} cannot be explained",
        why="the share of a part in a logit is known for LayerNorm and RMSNorm",
    )
