"""Models as transformers has them, both directions over one table of names.

- The gpt2 family is GPT2LMHeadModel, after `plain_gpt2` where that is not its shape already. Its linear
  layers hold (in, out), the transpose of everybody else's.
- The modern block with swiglu is Qwen3ForCausalLM, tensor for tensor. ReLU squared without a gate is the
  same class with ReLU and the same weights as gate and as value: relu(Wx) Wx = relu(Wx)^2.
- The modern block with another activation and no gate is ApertusForCausalLM with that activation (Project
  Apertus 2025, arXiv:2509.14233), whose block differs from Qwen3's in its MLP alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from quill.config import reading
from quill.config.settings import ModelConfig
from quill.errors import CorruptError, InputError
from quill.formats import plain_gpt2

if TYPE_CHECKING:
    from torch import Tensor

    from quill.formats.hf.folder import Tensors

# Beginnings of names, theirs and quill's; the rest of a name is the same.
_GPT2 = {"transformer.": "", "lm_head.": "lm_head."}
_QWEN3 = {
    "model.embed_tokens.": "wte.",
    "model.layers.": "h.",
    "model.norm.": "ln_f.",
    "lm_head.": "lm_head.",
}
_NAMES: Mapping[str, Mapping[str, str]] = {"gpt2": _GPT2, "qwen3": _QWEN3, "apertus": _QWEN3}
# What of a name differs within a layer of Apertus.
_APERTUS = {"attention_layernorm": "input_layernorm", "feedforward_layernorm": "post_attention_layernorm"}
_ARCHITECTURES = {
    "GPT2LMHeadModel": "gpt2", "GPT2Model": "gpt2", "Qwen3ForCausalLM": "qwen3", "Qwen3Model": "qwen3",
    "ApertusForCausalLM": "apertus", "ApertusModel": "apertus",
}  # fmt: skip
_CLASSES = {"gpt2": "GPT2LMHeadModel", "qwen3": "Qwen3ForCausalLM", "apertus": "ApertusForCausalLM"}
# Buffers that old files hold: the causal mask, and what stands for minus infinity in it.
_MASKS = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")
_TURNED = re.compile(r"h\.\d+\.(attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)\.weight")
# Activations by transformers' names; the first of several is written.
_GPT2_ACTIVATIONS = {
    "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh",
    "relu": "relu", "relu2": "relu2",
}  # fmt: skip
_PLAIN_ACTIVATIONS = {
    "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh",
    "relu": "relu", "relu2": "relu2",
}  # fmt: skip


def refusal(config: ModelConfig) -> str | None:
    """Why no class of transformers computes a model, as a clause; None where one does."""
    if config.n_layer == 0 and (config.vocab_size or 0) > plain_gpt2.MOST_BIGRAMS:
        most = plain_gpt2.MOST_BIGRAMS
        return (
            f"a table of bigrams is written for {most:,} tokens at most, and this has {config.vocab_size:,}"
        )
    if config.n_layer and config.block not in ("gpt2", "modern"):
        return f"transformers has no class for the block {config.block}"
    return None


def write(
    config: ModelConfig, weights: Mapping[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor], tuple[str, ...]]:
    """A model as transformers has it.

    Args:
        config: One that `refusal` lets pass.
        weights: By quill's names.

    Returns:
        What config.json says of the shape, the tensors by transformers' names, and what was rewritten.
    """
    if config.n_layer == 0 or config.block == "gpt2":
        plain, made, notes = plain_gpt2.rewrite(config, weights)
        turned = {n: t.t() if _TURNED.fullmatch(n) else t for n, t in made.items()}
        return _gpt2_config(plain), {_theirs(n, "gpt2"): t for n, t in turned.items()}, notes
    kind, notes = "qwen3", ()
    made = dict(weights)
    if config.activation == "relu2":
        gates = {n.replace("up_proj", "gate_proj"): t for n, t in weights.items() if "up_proj" in n}
        made |= gates
        notes = ("ReLU squared is written as ReLU gated by itself, so the MLP's first matrix is there twice",)
    elif config.activation != "swiglu":
        kind = "apertus"
        notes = (
            f"an MLP with {config.activation} and no gate is Apertus's: it needs transformers 4.56 or later",
        )
    return _modern_config(config, kind), {_theirs(n, kind): t for n, t in made.items()}, notes


def read(stated: Mapping[str, Any], tensors: Tensors, origin: str) -> tuple[ModelConfig, Weights]:
    """A model in quill's terms.

    Args:
        stated: What config.json holds.
        tensors: By the names in the files.
        origin: Config's name, for messages.

    Raises:
        CorruptError: The config is damaged, or contradicts the tensors.
        InputError: quill has no such model.
    """
    kind = _kind(stated, origin)
    settings = _read_gpt2(stated, origin) if kind == "gpt2" else _read_modern(stated, kind, origin)
    config = reading.check(ModelConfig, settings, origin=origin, error=CorruptError)
    names = {_ours(name, kind): name for name in tensors}
    if not 0 < config.n_layer <= len(names):
        why = f"it states {config.n_layer:,} layers, there are {len(names):,} tensors"
        raise CorruptError(f"'{origin}' does not fit the weights", why=why)
    if len(names) < len(tensors):
        raise CorruptError("the weights are damaged", why="a tensor is there under two names")
    if config.tie_embeddings:
        # Some files hold the shared matrix twice.
        names.pop("lm_head.weight", None)
    if kind == "gpt2":
        names = {ours: theirs for ours, theirs in names.items() if not _MASKS.fullmatch(ours)}
    if kind == "qwen3" and config.activation == "relu2":
        names = _without_gates(names, tensors, origin)
    return config, Weights(tensors, names, turned=kind == "gpt2")


class Weights(Mapping[str, "Tensor"]):
    """Tensors by quill's names and shaped as quill has them; each is a view, made when it is asked for.

    Args:
        tensors: By the names in the files.
        names: Those names, by quill's.
        turned: Whether linear layers hold (in, out).
    """

    def __init__(self, tensors: Mapping[str, Tensor], names: Mapping[str, str], *, turned: bool) -> None:
        self._tensors, self._names, self._turned = tensors, names, turned

    def __getitem__(self, name: str) -> Tensor:
        value = self._tensors[self._names[name]]
        if self._turned and _TURNED.fullmatch(name) and value.dim() == 2:
            return value.t()
        return value

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _gpt2_config(plain: ModelConfig) -> dict[str, Any]:
    activation = _first(_GPT2_ACTIVATIONS, plain.activation)
    return {
        "architectures": [_CLASSES["gpt2"]],
        "model_type": "gpt2",
        "vocab_size": plain.vocab_size,
        "n_positions": plain.block_size,
        "n_ctx": plain.block_size,
        "n_embd": plain.n_embd,
        "n_layer": plain.n_layer,
        "n_head": plain.n_head,
        "n_inner": plain.mlp_size,
        "activation_function": activation,
        "layer_norm_epsilon": plain.norm_eps,
        "resid_pdrop": plain.dropout,
        "embd_pdrop": plain.dropout,
        "attn_pdrop": plain.dropout,
        "scale_attn_weights": True,
        "tie_word_embeddings": plain.tie_embeddings,
        "use_cache": True,
    }


def _modern_config(config: ModelConfig, kind: str) -> dict[str, Any]:
    if kind == "apertus":
        activation, own = _first(_PLAIN_ACTIVATIONS, config.activation), {}
    else:
        activation = "relu" if config.activation == "relu2" else "silu"
        own = {"use_sliding_window": False, "sliding_window": None, "max_window_layers": config.n_layer}
    return {
        "architectures": [_CLASSES[kind]],
        "model_type": kind,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.block_size,
        "hidden_size": config.n_embd,
        "intermediate_size": config.mlp_size,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.n_kv_head,
        "head_dim": config.head_size,
        "hidden_act": activation,
        "rms_norm_eps": config.norm_eps,
        # Before its version 5 transformers read the period from the config's top level.
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "rope_scaling": None,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": config.tie_embeddings,
        "use_cache": True,
        **own,
    }


def _kind(stated: Mapping[str, Any], origin: str) -> str:
    architectures, kind = stated.get("architectures"), stated.get("model_type")
    named = architectures[0] if isinstance(architectures, list) and architectures else None
    found = str(kind) if named is None else _ARCHITECTURES.get(str(named), "")
    if found not in _NAMES or kind not in (None, found):
        shown = ascii(named if named is not None else kind)[:60]
        raise _foreign(origin, f"it is {shown}; quill has the blocks of {', '.join(_CLASSES.values())}")
    return found


def _read_gpt2(stated: Mapping[str, Any], origin: str) -> dict[str, Any]:
    _hold(stated, origin, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False, pruned_heads={})
    rates = [stated.get(key, 0.1) for key in ("resid_pdrop", "embd_pdrop", "attn_pdrop")]
    return {
        "block": "gpt2",
        "n_layer": _need(stated, origin, "n_layer", "num_hidden_layers"),
        "n_head": _need(stated, origin, "n_head", "num_attention_heads"),
        "n_embd": _need(stated, origin, "n_embd", "hidden_size"),
        "mlp_size": stated.get("n_inner"),
        "block_size": _need(stated, origin, "n_positions", "max_position_embeddings", "n_ctx"),
        "vocab_size": _need(stated, origin, "vocab_size"),
        "activation": _activation(stated, "activation_function", "gelu_new", _GPT2_ACTIVATIONS, origin),
        "bias": True,
        "tie_embeddings": stated.get("tie_word_embeddings", True),
        "attention_scale": None if stated.get("scale_attn_weights", True) else 1.0,
        "norm_eps": stated.get("layer_norm_epsilon", 1e-5),
        "dropout": rates[0] if rates.count(rates[0]) == len(rates) else 0.0,
    }


def _read_modern(stated: Mapping[str, Any], kind: str, origin: str) -> dict[str, Any]:
    _hold(stated, origin, attention_bias=False, use_sliding_window=False, partial_rotary_factor=1.0)
    layers = stated.get("layer_types")
    if layers is not None and (not isinstance(layers, list) or set(map(str, layers)) != {"full_attention"}):
        raise _foreign(origin, "not all its layers attend to the whole context")
    rope = stated.get("rope_parameters") or stated.get("rope_scaling") or {}
    if not isinstance(rope, dict) or rope.get("rope_type", rope.get("type", "default")) != "default":
        raise _foreign(origin, "its rotary positions are scaled")
    if kind == "apertus" and not rope:
        raise _foreign(origin, "its rotary positions are scaled")
    # With ReLU the only gate that quill has is the value itself; `read` looks whether it is.
    gated = {"silu": "swiglu", "relu": "relu2"}
    known, usual = (_PLAIN_ACTIVATIONS, "xielu") if kind == "apertus" else (gated, "silu")
    n_head = _need(stated, origin, "num_attention_heads")
    return {
        "block": "modern",
        "n_layer": _need(stated, origin, "num_hidden_layers"),
        "n_head": n_head,
        "n_kv_head": stated.get("num_key_value_heads", n_head),
        "n_embd": _need(stated, origin, "hidden_size"),
        "head_size": stated.get("head_dim"),
        "mlp_size": _need(stated, origin, "intermediate_size"),
        "block_size": _need(stated, origin, "max_position_embeddings"),
        "vocab_size": _need(stated, origin, "vocab_size"),
        "activation": _activation(stated, "hidden_act", usual, known, origin),
        "tie_embeddings": stated.get("tie_word_embeddings", False),
        "rope_theta": rope.get("rope_theta", stated.get("rope_theta", 10000.0)),
        "norm_eps": stated.get("rms_norm_eps", 1e-6),
    }


def _hold(stated: Mapping[str, Any], origin: str, **plain: Any) -> None:
    """Refuse settings that change what is computed."""
    for key, value in {**plain, "quantization_config": None}.items():
        if stated.get(key, value) not in (value, None):
            raise _foreign(origin, f"its {key} is {ascii(stated[key])[:60]}, quill has none")


def _activation(
    stated: Mapping[str, Any], key: str, usual: str, known: Mapping[str, str], origin: str
) -> str:
    named = stated.get(key, usual)
    if not isinstance(named, str) or named not in known:
        raise _foreign(origin, f"its {key} is {ascii(named)[:60]}; quill has {', '.join(known)}")
    return known[named]


def _need(stated: Mapping[str, Any], origin: str, *keys: str) -> Any:
    found = next((stated[key] for key in keys if stated.get(key) is not None), None)
    if found is None:
        raise CorruptError(f"'{origin}' is not whole", why=f"it has no '{keys[0]}'")
    return found


def _theirs(name: str, kind: str) -> str:
    if kind == "gpt2":
        return name if name.startswith("lm_head.") else f"transformer.{name}"
    if kind == "apertus":
        for theirs, ours in _APERTUS.items():
            name = name.replace(ours, theirs)
    begin, end = next((t, o) for t, o in _NAMES[kind].items() if name.startswith(o))
    return begin + name.removeprefix(end)


def _ours(name: str, kind: str) -> str:
    """Quill's name of a tensor; one that quill has not stays as it is, and is refused for it."""
    if kind == "apertus":
        for theirs, ours in _APERTUS.items():
            name = name.replace(theirs, ours)
    for begin, end in _NAMES[kind].items():
        # A model without its head is saved without the prefix.
        for start in (begin, begin.removeprefix("model.")):
            if start and name.startswith(start):
                return end + name.removeprefix(start)
    return name


def _without_gates(names: Mapping[str, str], tensors: Mapping[str, Tensor], origin: str) -> dict[str, str]:
    """Drop gates that are the values themselves, after a look at all of them."""
    import torch

    kept = {}
    for ours, theirs in names.items():
        if "gate_proj" not in ours:
            kept[ours] = theirs
            continue
        up = names.get(ours.replace("gate_proj", "up_proj"))
        gate, value = tensors[theirs], tensors.get(up or "")
        if value is None or value.dtype != gate.dtype or not torch.equal(gate, value):
            raise _foreign(origin, "its MLP is ReLU with a gate of its own; quill has silu with one")
    return kept


def _first(table: Mapping[str, str], activation: str | None) -> str:
    return next(theirs for theirs, ours in table.items() if ours == activation)


def _foreign(origin: str, why: str) -> InputError:
    return InputError(f"quill has no such model as '{origin}' describes", why=why)
