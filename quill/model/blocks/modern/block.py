"""The modern block: RMSNorm, rotary positions, normed queries and keys, grouped heads, gated MLP.

With swiglu it is the dense block of Qwen3 (Qwen team 2025, arXiv:2505.09388), tensor for tensor and
name for name. RMSNorm: Zhang and Sennrich 2019, arXiv:1910.07467. SwiGLU: Shazeer 2020,
arXiv:2002.05202. ReLU squared: So et al. 2021, arXiv:2109.08668.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quill.config.shape import Shape
from quill.model import fused
from quill.model.attention import attend
from quill.model.dropout import dropout
from quill.model.kv_cache import LayerCache
from quill.model.rope import Rope


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _relu2(x: Tensor) -> Tensor:
    return F.relu(x).square()


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "swiglu": F.silu,
    "relu2": _relu2,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": _gelu_tanh,
}


class RMSNorm(nn.RMSNorm):
    """RMSNorm in the precision of its weight; there is no fused kernel for lower ones under autocast."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__(width, eps=eps)
        self.epsilon = eps

    def forward(self, x: Tensor) -> Tensor:
        """Same shape as x."""
        if fused.suits(x):
            return fused.rms_norm(x, self.weight, self.epsilon)
        return super().forward(x.to(self.weight.dtype))


def norm(shape: Shape) -> nn.Module:
    """The norm over the residual stream."""
    return RMSNorm(shape.n_embd, eps=shape.norm_eps)


class Attention(nn.Module):
    """Grouped-query causal self-attention with rotary positions."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        n_kv_head, D = shape.n_kv_head, shape.head_size
        self.head_size = D
        self.q_proj = nn.Linear(shape.n_embd, shape.n_head * D, bias=False)
        self.k_proj = nn.Linear(shape.n_embd, n_kv_head * D, bias=False)
        self.v_proj = nn.Linear(shape.n_embd, n_kv_head * D, bias=False)
        self.o_proj = nn.Linear(shape.n_head * D, shape.n_embd, bias=False)
        self.q_norm = RMSNorm(D, eps=shape.norm_eps)
        self.k_norm = RMSNorm(D, eps=shape.norm_eps)

    def forward(self, x: Tensor, rope: Rope, cache: LayerCache | None) -> Tensor:
        """Mix each position with those before it; (B, T, C) to (B, T, C)."""
        B, T, _ = x.shape
        if fused.suits(x):
            parts = fused.linear(x, (self.q_proj.weight, self.k_proj.weight, self.v_proj.weight))
        else:
            parts = (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        q, k, v = (y.view(B, T, -1, self.head_size) for y in parts)
        q, k, v = (y.transpose(1, 2) for y in (self.q_norm(q), self.k_norm(k), v))  # (B, H or K, T, D)
        # Rotate before caching: a stored key keeps its absolute position.
        y = attend(rope(q), rope(k), v, cache)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))  # type: ignore[no-any-return]


class MLP(nn.Module):
    """Gated (swiglu) or plain (the other activations) feed-forward."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gated = shape.activation == "swiglu"
        self.activation = _ACTIVATIONS[shape.activation]
        if self.gated:
            self.gate_proj = nn.Linear(shape.n_embd, shape.mlp_size, bias=False)
        self.up_proj = nn.Linear(shape.n_embd, shape.mlp_size, bias=False)
        self.down_proj = nn.Linear(shape.mlp_size, shape.n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) to (B, T, C)."""
        if not self.gated:
            return self.down_proj(self.activation(self.up_proj(x)))  # type: ignore[no-any-return]
        if fused.suits(x):
            gate, up = fused.linear(x, (self.gate_proj.weight, self.up_proj.weight))
        else:
            gate, up = self.gate_proj(x), self.up_proj(x)
        return self.down_proj(self.activation(gate) * up)  # type: ignore[no-any-return]


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)).

    Dropout applies to what each branch adds, not to attention weights, which fused kernels never store.
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.input_layernorm = norm(shape)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = norm(shape)
        self.mlp = MLP(shape)
        self.dropout = shape.dropout

    def forward(self, x: Tensor, rope: Rope, cache: LayerCache | None = None) -> Tensor:
        """One layer.

        Args:
            x: Activations, (B, T, C).
            rope: Rotation for these T absolute positions.
            cache: This layer's keys and values so far; extended in place.

        Returns:
            Same shape as x.
        """
        p = self.dropout if self.training else 0.0
        y = self.self_attn(self.input_layernorm(x), rope, cache)
        x = x + dropout(y, p)
        y = self.mlp(self.post_attention_layernorm(x))
        return x + dropout(y, p)

    def writers(self) -> dict[str, nn.Linear]:
        """The layers whose outputs are added to x: from the heads side by side, and from the hidden units."""
        return {"attention": self.self_attn.o_proj, "mlp": self.mlp.down_proj}

    @torch.no_grad()
    def init_weights(self, n_layer: int, generator: torch.Generator) -> None:
        """Uniform of variance 1 / fan_in; projections into the residual stream start at zero.

        A block that starts as the identity lets the first steps be large (Zhang et al. 2019,
        arXiv:1901.09321, section 3).
        """
        for name, p in self.named_parameters():
            if p.dim() < 2:
                nn.init.ones_(p)
            elif name.endswith(("o_proj.weight", "down_proj.weight")):
                nn.init.zeros_(p)
            else:
                bound = (3 / p.shape[1]) ** 0.5
                p.uniform_(-bound, bound, generator=generator)
