"""Causal attention for training on a CPU: the scores of a few heads at a time.

PyTorch's fused CPU kernel is slow backwards in 16 bits, and it refuses dropout: the scores of all heads are
then stored in float32, several times over. Here the scores of as many heads as fit the cache are computed
together, in the precision of the queries, and computed again for the backward pass.

Legend: N sequences times heads, T length, D head_size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from quill.model.dropout import Rows, growth, kept, mask_

# Scores at once; in 16 bits they take 2 MiB, the second-level cache of a core.
_SCORES = 2**20
# Beyond this length the fused kernel is faster, as it skips the scores above the diagonal.
_LONGEST = 512
# Bytes of a generator's state.
_STATE = torch.Generator().get_state().numel()


def suits(q: Tensor, dropout: float) -> bool:
    """Whether this is faster than PyTorch's own attention.

    Args:
        q: Queries, (B, H, T, D).
        dropout: Probability of dropping an attention weight.
    """
    trains = q.device.type == "cpu" and torch.is_grad_enabled() and q.requires_grad
    return trains and (dropout > 0 or (_dtype(q) != torch.float32 and q.shape[2] <= _LONGEST))


def attend(q: Tensor, k: Tensor, v: Tensor, *, dropout: float, scale: float) -> Tensor:
    """Mix the values of each position and those before it.

    Args:
        q: Queries, (B, H, T, D).
        k: Keys, (B, K, T, D), K dividing H.
        v: Values, like k.
        dropout: Probability of dropping an attention weight.
        scale: Factor on the scores.

    Returns:
        (B, H, T, D), differentiable.
    """
    shared, dtype = q.shape[1] // k.shape[1], _dtype(q)
    heads = [x.to(dtype) for x in (q, *(x.repeat_interleave(shared, 1) if shared > 1 else x for x in (k, v)))]
    q_, k_, v_ = (x.flatten(0, 1).contiguous() for x in heads)
    mixed: Tensor = _attention(q_, k_, v_, dropout, scale)[0]
    return mixed.view(*q.shape[:3], -1)


def _dtype(q: Tensor) -> torch.dtype:
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else q.dtype


# Opaque to torch.compile, which would store all scores; the tag keeps it from merging draws.
@torch.library.custom_op(
    "quill::causal_attention", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,)
)
def _attention(q: Tensor, k: Tensor, v: Tensor, dropout: float, scale: float) -> tuple[Tensor, Tensor]:
    """The mixed values, (N, T, D), and the state of the generator of the dropout masks."""
    generator = torch.Generator()
    masks: AbstractContextManager[None] = nullcontext()
    if dropout:
        generator.manual_seed(int(torch.empty(1, dtype=torch.int64).random_()))
        if (rows := Rows.current()) is not None:
            masks = rows.drawing(generator, len(q) // rows.count * q.shape[1] ** 2, shared=False)
    mixed = torch.empty_like(v)
    with masks:
        state = generator.get_state()
        for heads, p, mask in _probabilities(q, k, dropout, scale, generator):
            _product(p if mask is None else mask_(p, mask), v[heads], mixed[heads], growth(dropout))
    return mixed, state


@torch.library.custom_op("quill::causal_attention_backward", mutates_args=())
def _attention_backward(
    grad: Tensor,
    mixed: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    dropout: float,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of queries, keys and values."""
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    # The softmax subtracts the mean of its gradient under p, which is this product with or without dropout.
    mean = (grad * mixed).sum(-1, keepdim=True)
    generator = torch.Generator()
    generator.set_state(state)
    for heads, p, mask in _probabilities(q, k, dropout, scale, generator):
        dp = _product(grad[heads], v[heads].mT, torch.empty_like(p), growth(dropout))
        if mask is not None:
            mask_(dp, mask)
        scores = dp.sub_(mean[heads]).mul_(p)
        torch.bmm(scores, k[heads], out=dq[heads])
        torch.bmm(scores.mT, q[heads], out=dk[heads])
        if mask is not None:
            mask_(p, mask)
        _product(p.mT, grad[heads], dv[heads], growth(dropout))
    return dq.mul_(scale), dk.mul_(scale), dv


def _product(a: Tensor, b: Tensor, out: Tensor, factor: float) -> Tensor:
    """The matrix products times a factor, which costs nothing here."""
    return torch.baddbmm(out, a, b, beta=0, alpha=factor, out=out)


def _probabilities(
    q: Tensor, k: Tensor, dropout: float, scale: float, generator: torch.Generator
) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
    """For some heads at a time, which they are, their attention weights, and which of these are kept."""
    N, T, _ = q.shape
    future = torch.full((T, T), float("-inf"), dtype=q.dtype).triu(1)
    for start in range(0, N, max(1, _SCORES // (T * T))):
        heads = slice(start, start + max(1, _SCORES // (T * T)))
        p = torch.softmax(torch.baddbmm(future, q[heads], k[heads].mT, alpha=scale), -1)
        yield heads, p, kept(p, dropout, generator) if dropout else None


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, *ctx.numbers = inputs
    ctx.save_for_backward(output[0], q, k, v, output[1])


def _gradients(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return *_attention_backward(grad.contiguous(), *ctx.saved_tensors, *ctx.numbers), None, None


@_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, dropout: float, scale: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(v), torch.empty(_STATE, dtype=torch.uint8, device=q.device)


@_attention_backward.register_fake
def _(
    grad: Tensor,
    mixed: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    dropout: float,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


_attention.register_autograd(_gradients, setup_context=_save)
