"""Parts of a transformer block with fewer passes over memory, for training without a compiler on a CPU.

Between matrix products a training step is bound by memory. PyTorch computes a norm or a rotation in a dozen
passes over the activations, forwards and backwards; the functions here take about half as many, and keep
16-bit activations in 16 bits. `torch.compile` fuses the plain formulas better, so it sees those.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def suits(x: Tensor) -> bool:
    """Whether these functions are the faster ones for activations like x."""
    return x.device.type == "cpu" and torch.is_grad_enabled() and not torch.compiler.is_compiling()


def linear(x: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Several projections of the same activations in one product.

    Args:
        x: (..., C).
        weights: (rows, C) each.

    Returns:
        (..., rows) each, in the order of the weights.
    """
    return torch.split(F.linear(x, torch.cat([*weights])), [len(w) for w in weights], -1)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension.

    Args:
        x: (..., C).
        weight: (C,).
        eps: Added to the mean square.

    Returns:
        Like x, in the precision of the products that follow: that of autocast, if it is on.
    """
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    normed: Tensor = _RMSNorm.apply(x, weight, eps, dtype)  # type: ignore[no-untyped-call]
    return normed


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions.

    Args:
        x: Queries or keys, (B, H, T, D).
        cos: Cosines of each position's angles, (T, D / 2).
        sin: Sines.

    Returns:
        (B, H, T, D).
    """
    rotated: Tensor = _Rotation.apply(x, cos.to(x.dtype), sin.to(x.dtype))  # type: ignore[no-untyped-call]
    return rotated


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        precise = torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=precise)
        inverse = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_().to(x.dtype)
        normed: Tensor = (x * inverse).to(dtype)
        ctx.save_for_backward(normed, inverse, weight)
        return normed * weight.to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        normed, inverse, weight = ctx.saved_tensors
        product = grad * normed
        d_weight = product.sum(list(range(grad.dim() - 1)), dtype=weight.dtype)
        w = weight.to(grad.dtype)
        along = (product @ w).unsqueeze_(-1).div_(-grad.shape[-1])
        return torch.addcmul(grad * w, normed, along).mul(inverse), d_weight, None, None


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin, torch.empty_like(x, memory_format=torch.contiguous_format))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        # Queries and keys come from projections, in which a position's heads lie side by side.
        B, H, T, D = grad.shape
        return _rotate(grad, cos, -sin, grad.new_empty(B, T, H, D).transpose(1, 2)), None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> Tensor:
    (a, b), (c, d) = x.chunk(2, -1), out.chunk(2, -1)
    torch.mul(a, cos, out=c).addcmul_(b, sin, value=-1)
    torch.mul(b, cos, out=d).addcmul_(a, sin)
    return out
