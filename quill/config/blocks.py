"""What each transformer block declares about itself, without torch.

A block is a package in `quill/model/blocks`: its `__init__.py` declares FACTS, its `block.py` the module.
Settings ask the facts, so that adding a block edits no other file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

from quill import discovery

PACKAGE = "model.blocks"


def _accept(settings: Mapping[str, Any]) -> str | None:
    return None


@dataclass(frozen=True, kw_only=True)
class BlockFacts:
    """The settings a block takes.

    Attributes:
        summary: The models it covers, for help.
        positions: "learned": a table added to the embeddings; "rotary": rotations of queries and keys.
        defaults: Values of settings left unset; `activation` and `norm_eps` are required.
        activations: Accepted values of `activation`.
        gated: Those of them that add a gate matrix to the MLP.
        settings: What it uses of bias, qkv_bias, head_bias, attention_scale, n_kv_head and rope_theta.
        refusal: Why it cannot have these model settings, given by name, or None.
    """

    summary: str
    positions: Literal["learned", "rotary"]
    defaults: Mapping[str, Any]
    activations: tuple[str, ...]
    gated: tuple[str, ...] = ()
    settings: frozenset[str] = frozenset()
    refusal: Callable[[Mapping[str, Any]], str | None] = _accept

    def mlp_size(self, n_embd: int, activation: str) -> int:
        """Default hidden width of the MLP.

        A gated MLP has three matrices instead of two, so it gets 8/3 n_embd instead of 4 n_embd, rounded
        up to a multiple of 32.
        """
        return -(-(8 * n_embd // 3) // 32) * 32 if activation in self.gated else 4 * n_embd


def facts(block: str) -> BlockFacts:
    """What a block declares.

    Raises:
        InputError: No such block.
    """
    return cast(BlockFacts, discovery.load(PACKAGE, block).FACTS)


def all_facts() -> dict[str, BlockFacts]:
    """The facts of every block, by name."""
    return {name: facts(name) for name in discovery.names(PACKAGE)}


def activations() -> tuple[str, ...]:
    """Every activation that some block has, sorted."""
    return tuple(sorted({a for f in all_facts().values() for a in f.activations}))


def summaries() -> str:
    """Every block with the models it covers, for help."""
    return ", ".join(f"{name} ({f.summary})" for name, f in all_facts().items())


def defaults(setting: str) -> str:
    """Each block's default of a setting, for help."""
    return ", ".join(f"{f.defaults[setting]} for {name}" for name, f in all_facts().items())


def users(setting: str) -> str:
    """The blocks that use an optional setting, for help and messages."""
    return ", ".join(name for name, f in all_facts().items() if setting in f.settings)
