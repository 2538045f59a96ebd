"""The parts of a model with their shapes and parameters, whatever its block."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from torch import nn

from quill.model.gpt import GPT

Kind = Literal["table", "embedding", "positions", "norm", "attention", "mlp", "other", "head"]
NORMS = (nn.LayerNorm, nn.RMSNorm)


@dataclass(frozen=True)
class Part:
    """A part with parameters.

    Attributes:
        name: Its module, such as "h.0.attn".
        kind: What it does.
        layer: The block that it belongs to, from 0; None outside of the blocks.
        tensors: Shapes of its tensors by name.
        parameters: Numbers in them.
    """

    name: str
    kind: Kind
    layer: int | None
    tensors: dict[str, tuple[int, ...]]
    parameters: int


def parts(model: GPT) -> list[Part]:
    """The parts in the order in which a token meets them."""
    return list(_parts(model))


def _parts(model: GPT) -> Iterator[Part]:
    outside: dict[str, Kind] = {"wpe": "positions", "ln_f": "norm", "lm_head": "head"}
    yield _part("wte", "embedding" if model.shape.n_layer else "table", None, model.wte)
    for name, module in model.named_children():
        if isinstance(module, nn.ModuleList):
            for layer, block in enumerate(module):
                for inner, child in block.named_children():
                    yield _part(f"{name}.{layer}.{inner}", _kind(block, child), layer, child)
        elif name in outside:
            yield _part(name, outside[name], None, module)


def _kind(block: nn.Module, child: nn.Module) -> Kind:
    """What a part of a block does, by what it contains."""
    writers: dict[str, nn.Linear] = block.writers()  # type: ignore[operator]
    inside = set(child.modules())
    if writers["attention"] in inside:
        return "attention"
    if writers["mlp"] in inside:
        return "mlp"
    return "norm" if isinstance(child, NORMS) else "other"


def _part(name: str, kind: Kind, layer: int | None, module: nn.Module) -> Part:
    tensors = {n: tuple(p.shape) for n, p in module.named_parameters()}
    return Part(name, kind, layer, tensors, sum(p.numel() for p in module.parameters()))
