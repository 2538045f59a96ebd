"""Causal attention over new and cached positions, shared by all blocks.

Legend: B batch, T query length, S key length, H n_head, K n_kv_head, D head_size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from quill.model import cpu_attention
from quill.model.kv_cache import LayerCache


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache: LayerCache | None = None,
    *,
    dropout: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    """Mix the values of each position and those before it.

    Source: Vaswani et al. 2017, arXiv:1706.03762; shared keys and values: Ainslie et al. 2023,
    arXiv:2305.13245.

    Args:
        q: Queries, (B, H, T, D).
        k: Keys, (B, K, T, D), K dividing H.
        v: Values, like k.
        cache: Earlier positions' keys and values; extended in place.
        dropout: Probability of dropping an attention weight.
        scale: Factor on the scores; D ** -0.5 if None.

    Returns:
        (B, H, T, D).
    """
    if cache is not None:
        k, v = cache.extend(k, v)
        cache.observe(q, scale)
    T, S = q.shape[2], k.shape[2]
    grouped = q.shape[1] != k.shape[1]
    if T == 1 and cache is not None:
        # One query sees every key of its row, so it needs a mask only where rows differ in length.
        if q.device.type in ("cpu", "cuda"):
            return single(q, k, v, cache.mask, scale)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=cache.mask, scale=scale, enable_gqa=grouped)
    if T == S and cpu_attention.suits(q, dropout):
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        return cpu_attention.attend(q, k, v, dropout=dropout, scale=scale)
    if T == S:
        return F.scaled_dot_product_attention(
            q, k, v, dropout_p=dropout, is_causal=True, scale=scale, enable_gqa=grouped
        )
    # is_causal would align its triangle at the top left; new positions are at the bottom right.
    mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout, scale=scale, enable_gqa=grouped
    )


def single(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """As `attend` for one query in each row, without dropout.

    On a GPU two products take a half to a sixth of the time of the fused kernel, which shares out the
    queries and not the keys. On a CPU the last bits of the fused kernel depend on the number of threads with
    some processors; the products take as long with 8 rows, and 5 µs longer with one.

    Args:
        q: Queries, (B, H, 1, D).
        k: All keys, (B, K, S, D), K dividing H.
        v: Values, like k.
        mask: Which keys each row may see, (B, 1, 1, S); None: all of them.
        scale: Factor on the scores; D ** -0.5 if None.

    Returns:
        (B, H, 1, D).
    """
    B, H, _, D = q.shape
    K = k.shape[1]
    # Heads that share keys are rows of one product, (B K, H / K, S). With a beta of 0 what would be added,
    # the first argument, is not read.
    q, factor = q.reshape(B * K, H // K, D), D**-0.5 if scale is None else scale
    scores = torch.baddbmm(q.new_empty(1), q, k.flatten(0, 1).mT, beta=0, alpha=factor)
    if mask is not None:
        scores = scores.view(B, K, H // K, -1).masked_fill_(~mask, float("-inf")).flatten(0, 1)
    return torch.bmm(scores.softmax(-1), v.flatten(0, 1)).view(B, H, 1, D)
