"""One forward pass with everything in between.

A block takes part by `writers`, and by computing attention with `quill.model.attention.attend`. What is
recorded is checked against what the block returns, so that a block which does more is refused and not
explained wrongly.

Legend: T tokens, C n_embd, H n_head, K n_kv_head, D head_size, M hidden units, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quill.errors import InputError
from quill.model.gpt import GPT
from quill.model.kv_cache import KVCache, LayerCache

# How far recorded parts may be from what a block returns, relative to its largest number.
_TOLERANCE = 1e-3


@dataclass(frozen=True, eq=False)
class Layer:
    """What happens in one block.

    Attributes:
        before: The residual stream that the block reads, (T, C).
        products: Products of queries and keys, (H, T, T), of later keys too.
        scale: Factor on the products.
        scores: Scaled products, -inf for later keys, (H, T, T).
        weights: Their softmax: how much each token (row) reads from each other, (H, T, T).
        heads: The values that each head has mixed, (T, H, D).
        by_head: What each head adds to the residual stream, without the bias, (H, T, C).
        attention: What attention adds, (T, C).
        hidden: The hidden units of the MLP, (T, M).
        mlp: What the MLP adds, (T, C).
        after: The residual stream that the block returns, (T, C).
    """

    before: Tensor
    products: Tensor
    scale: float
    scores: Tensor
    weights: Tensor
    heads: Tensor
    by_head: Tensor
    attention: Tensor
    hidden: Tensor
    mlp: Tensor
    after: Tensor


@dataclass(frozen=True, eq=False)
class Trace:
    """A forward pass over one prompt.

    Attributes:
        embedding: The tokens' embeddings, (T, C); without layers the rows of the table, (T, V).
        positions: What the positions add to them, (T, C); None if they add nothing.
        layers: The blocks.
        logits: (T, V).
    """

    embedding: Tensor
    positions: Tensor | None
    layers: tuple[Layer, ...]
    logits: Tensor

    @property
    def stream(self) -> tuple[Tensor, ...]:
        """The residual stream before the first block and after each, (T, C) each."""
        if not self.layers:
            return (self.embedding,)
        return self.layers[0].before, *(layer.after for layer in self.layers)


class _Recorder(LayerCache):
    """A layer's cache that keeps the queries."""

    q: Tensor | None = None
    scale: float | None = None

    def observe(self, q: Tensor, scale: float | None) -> None:
        self.q, self.scale = q, scale


@torch.inference_mode()
def trace(model: GPT, idx: Tensor) -> Trace:
    """Run a model over a prompt and keep every intermediate result.

    Args:
        model: Any model; it is not changed.
        idx: Token ids, (T), at most block_size of them.

    Returns:
        The results in float32 on the CPU.

    Raises:
        InputError: The model's block does not show what happens inside.
    """
    twin = model.twin()
    cache = _recording(twin)
    seen: dict[tuple[int, str], Tensor] = {}
    if model.shape.n_layer:
        for i, block in enumerate(twin.h):
            for name, writer in _writers(block, model.shape.block).items():
                writer.register_forward_hook(_keep(seen, i, f"{name} in", f"{name} out"))
            block.register_forward_hook(_keep(seen, i, "before", "after"))
    x = twin.hidden(idx[None], cache)
    logits = twin.head(x)[0]
    embedding = twin.wte(idx)
    layers = tuple(
        _layer(twin, i, {name: t for (at, name), t in seen.items() if at == i}, cache.layers[i])
        for i in range(model.shape.n_layer)
    )
    positions = None
    if layers and twin.learned_positions:
        positions = _plain(layers[0].before - _plain(embedding))
    return Trace(_plain(embedding), positions, layers, _plain(logits))


def _recording(model: GPT) -> KVCache:
    cache = model.new_cache()
    cache.layers = [_Recorder(layer.keys, layer.values) for layer in cache.layers]
    return cache


def _writers(block: nn.Module, name: str) -> dict[str, nn.Linear]:
    declared: Callable[[], dict[str, nn.Linear]] | None = getattr(block, "writers", None)
    writers = declared() if declared is not None else {}
    if set(writers) != {"attention", "mlp"}:
        raise _refused(name, "its Block has no method 'writers' that names them")
    return writers


def _keep(seen: dict[tuple[int, str], Tensor], layer: int, given: str, made: str) -> Callable[..., None]:
    """A hook that keeps what a module is given and what it makes."""

    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        seen[layer, given], seen[layer, made] = args[0][0], output[0]

    return hook


def _layer(model: GPT, i: int, seen: dict[str, Tensor], cache: LayerCache) -> Layer:
    """What was recorded of a block, completed and checked."""
    shape, block = model.shape, model.h[i]
    if not isinstance(cache, _Recorder) or cache.q is None:
        raise _refused(shape.block, "it does not compute attention with quill.model.attention.attend")
    if missing := [n for n in ("attention in", "mlp in", "before") if n not in seen]:
        raise _refused(shape.block, f"it does not call the module of '{missing[0].removesuffix(' in')}'")
    q, T = cache.q[0], cache.q.shape[2]
    shared = shape.n_head // shape.n_kv_head
    k, v = (
        _plain(x[0].narrow(1, 0, T)).repeat_interleave(shared, 0) for x in (cache.keys, cache.values)
    )  # (H, T, D)
    scale = shape.head_size**-0.5 if cache.scale is None else cache.scale
    products = _plain(q) @ k.mT
    later = torch.ones(T, T, dtype=torch.bool).triu(1)
    scores = (products * scale).masked_fill(later, float("-inf"))
    weights = scores.softmax(-1)
    heads = (weights @ v).transpose(0, 1)  # (T, H, D)
    columns = _plain(_writers(block, shape.block)["attention"].weight)
    before, mixed, attention, hidden, mlp, after = (
        _plain(seen[n]) for n in ("before", "attention in", "attention out", "mlp in", "mlp out", "after")
    )
    if _differ(mixed, heads.flatten(1)):
        raise _refused(shape.block, "its heads do not mix values by the softmax of queries times keys")
    if _differ(after, before + attention + mlp):
        raise _refused(shape.block, "it adds more than 'attention' and 'mlp' to the residual stream")
    by_head = torch.einsum("thd,chd->htc", heads, columns.view(-1, shape.n_head, shape.head_size))
    return Layer(before, products, scale, scores, weights, heads, by_head, attention, hidden, mlp, after)


def _differ(a: Tensor, b: Tensor) -> bool:
    return a.shape != b.shape or bool((a - b).abs().max() > _TOLERANCE * (1 + b.abs().max()))


def _plain(x: Tensor) -> Tensor:
    return x.detach().to("cpu", torch.float32)


def _refused(block: str, why: str) -> InputError:
    return InputError(f"models with the block '{block}' cannot be explained", why=why)
