"""The GPT-2 block: pre-LayerNorm, learned positions, fused query/key/value.

Covers GPT-2 (Radford et al. 2019), nanoGPT (biases optional) and QuillGPT (ReLU, no biases on query,
key and value, any head_size). Tensor names are GPT-2's.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quill.config.shape import Shape
from quill.model.attention import attend
from quill.model.dropout import dropout
from quill.model.kv_cache import LayerCache
from quill.model.rope import Rope


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _relu2(x: Tensor) -> Tensor:
    return F.relu(x).square()


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": _gelu_tanh,
    "relu": F.relu,
    "relu2": _relu2,
}


def norm(shape: Shape) -> nn.Module:
    """The norm over the residual stream."""
    return nn.LayerNorm(shape.n_embd, eps=shape.norm_eps, bias=shape.bias)


class Attention(nn.Module):
    """Multi-head causal self-attention."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.n_head, self.head_size = shape.n_head, shape.head_size
        self.scale, self.dropout = shape.attention_scale, shape.dropout
        inner = self.n_head * self.head_size
        self.c_attn = nn.Linear(shape.n_embd, 3 * inner, bias=shape.qkv_bias)
        self.c_proj = nn.Linear(inner, shape.n_embd, bias=shape.bias)

    def forward(self, x: Tensor, cache: LayerCache | None) -> Tensor:
        """Mix each position with those before it; (B, T, C) to (B, T, C)."""
        B, T, _ = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, self.head_size)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, H, T, D) each
        y = attend(q, k, v, cache, dropout=self.dropout if self.training else 0.0, scale=self.scale)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, -1))  # type: ignore[no-any-return]


class MLP(nn.Module):
    """Two layers with a pointwise nonlinearity between."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.c_fc = nn.Linear(shape.n_embd, shape.mlp_size, bias=shape.bias)
        self.c_proj = nn.Linear(shape.mlp_size, shape.n_embd, bias=shape.bias)
        self.activation = _ACTIVATIONS[shape.activation]

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) to (B, T, C)."""
        return self.c_proj(self.activation(self.c_fc(x)))  # type: ignore[no-any-return]


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.ln_1 = norm(shape)
        self.attn = Attention(shape)
        self.ln_2 = norm(shape)
        self.mlp = MLP(shape)
        self.dropout = shape.dropout

    def forward(self, x: Tensor, rope: Rope | None = None, cache: LayerCache | None = None) -> Tensor:
        """One layer.

        Args:
            x: Activations, (B, T, C).
            rope: Unused: positions were added to the embeddings.
            cache: This layer's keys and values so far; extended in place.

        Returns:
            Same shape as x.
        """
        p = self.dropout if self.training else 0.0
        y = self.attn(self.ln_1(x), cache)
        x = x + dropout(y, p)
        y = self.mlp(self.ln_2(x))
        return x + dropout(y, p)

    def writers(self) -> dict[str, nn.Linear]:
        """The layers whose outputs are added to x: from the heads side by side, and from the hidden units."""
        return {"attention": self.attn.c_proj, "mlp": self.mlp.c_proj}

    @torch.no_grad()
    def init_weights(self, n_layer: int, generator: torch.Generator) -> None:
        """GPT-2's initialisation: N(0, 0.02), residual projections scaled by (2 n_layer) ** -0.5.

        Source: Radford et al. 2019, section 2.3.
        """
        for name, p in self.named_parameters():
            if p.dim() < 2:
                nn.init.zeros_(p) if name.endswith("bias") else nn.init.ones_(p)
            else:
                std = 0.02 / math.sqrt(2 * n_layer) if name.endswith("c_proj.weight") else 0.02
                p.normal_(0.0, std, generator=generator)
