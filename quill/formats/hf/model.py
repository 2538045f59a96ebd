"""Models in transformers, both directions over one table for each of its classes.

- The gpt2 block is GPT2LMHeadModel, rewritten by `plain_gpt2` if it does not have that class's shape. Its
  linear layers are stored as (in, out).
- The modern block with swiglu is Qwen3ForCausalLM, tensor for tensor. ReLU squared without a gate is the same
  class with ReLU and the same weights as gate and as value: relu(Wx) Wx = relu(Wx)^2.
- The modern block with another activation and no gate is ApertusForCausalLM with that activation (Project
  Apertus 2025, arXiv:2509.14233), which differs from Qwen3 in its MLP alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from quill.config import reading
from quill.config.settings import ModelConfig
from quill.errors import CorruptError, InputError, shorten
from quill.formats import plain_gpt2
from quill.formats.base import LazyTensors
from quill.tokenizers import _patterns

if TYPE_CHECKING:
    from torch import Tensor

    from quill.config.shape import Shape


class Kind(NamedTuple):
    """A class of transformers.

    Attributes:
        block: The block that it computes.
        causal: The class's name.
        bare: The name of the same class without its head.
        names: quill's beginnings of names by the class's; the rest of a name is the same.
        inner: quill's parts of names within a layer by the class's, where they differ.
        activations: quill's activations by the class's. The first of several is written.
        split: How its tokenizers split text, which vocab.json and merges.txt leave out.
    """

    block: str
    causal: str
    bare: str
    names: Mapping[str, str]
    inner: Mapping[str, str]
    activations: Mapping[str, str]
    split: str


_PLAIN = {
    "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh",
    "relu": "relu", "relu2": "relu2",
}  # fmt: skip
_QWEN3_NAMES = {
    "model.embed_tokens.": "wte.",
    "model.layers.": "h.",
    "model.norm.": "ln_f.",
    "lm_head.": "lm_head.",
}
_KINDS = {
    "gpt2": Kind(
        block="gpt2", causal="GPT2LMHeadModel", bare="GPT2Model",
        names={"lm_head.": "lm_head.", "transformer.": ""}, inner={},
        activations={"gelu": "gelu", "gelu_new": "gelu_tanh", **_PLAIN}, split=_patterns.GPT2,
    ),
    # With ReLU the only gate that quill has is the value itself; `read` checks that it is.
    "qwen3": Kind(
        block="modern", causal="Qwen3ForCausalLM", bare="Qwen3Model",
        names=_QWEN3_NAMES, inner={}, activations={"silu": "swiglu", "relu": "relu2"},
        split=_patterns.QWEN2,
    ),
    "apertus": Kind(
        block="modern", causal="ApertusForCausalLM", bare="ApertusModel", names=_QWEN3_NAMES,
        inner={
            "attention_layernorm": "input_layernorm", "feedforward_layernorm": "post_attention_layernorm"
        },
        activations=_PLAIN, split=_patterns.QWEN2,
    ),
}  # fmt: skip
# Buffers in old files: the causal mask, and the value that stands for minus infinity in it.
_MASKS = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")
_TRANSPOSED = re.compile(r"h\.\d+\.(attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)\.weight")


def refusal(shape: Shape) -> str | None:
    """Why no class of transformers computes a model, as a clause; None if one does."""
    if shape.n_layer == 0:
        most = plain_gpt2.MOST_BIGRAMS
        return f"a bigram table can have {most:,} tokens at most" if shape.vocab_size > most else None
    if _kind(shape) is None:
        return f"transformers has no class for the {shape.block} block with {shape.activation}"
    return None


def write(
    shape: Shape, weights: Mapping[str, Tensor]
) -> tuple[dict[str, Any], Mapping[str, Tensor], tuple[str, ...]]:
    """Convert a model to transformers.

    Args:
        shape: One that `refusal` accepts.
        weights: By quill's names.

    Returns:
        The settings in config.json, the tensors by transformers' names, each made when it is looked up, and
        notes on what was rewritten.
    """
    kind = "gpt2" if shape.n_layer == 0 else _kind(shape)
    assert kind is not None
    notes: tuple[str, ...] = ()
    names = {_theirs(name, kind): name for name in weights}
    if kind == "gpt2":
        shape, plain, notes = plain_gpt2.rewrite(shape, weights)
        weights = LazyTensors.of(plain, lambda n, t: t.t() if _TRANSPOSED.fullmatch(n) else t)
        names = {_theirs(name, kind): name for name in weights}
        settings = _gpt2_settings(shape)
    else:
        settings = _modern_settings(shape, kind)
        if kind == "apertus":
            notes = (f"a plain MLP with {shape.activation} is Apertus's, which requires transformers 4.56",)
        elif shape.activation == "relu2":
            names |= {_theirs(n.replace("up_proj", "gate_proj"), kind): n for n in weights if "up_proj" in n}
            notes = ("ReLU squared is written as ReLU times itself, with the MLP's first matrix twice",)
    made = {theirs: partial(weights.__getitem__, ours) for theirs, ours in names.items()}
    return settings, LazyTensors(made), notes


def read(
    stated: Mapping[str, Any], tensors: Mapping[str, Tensor], origin: str
) -> tuple[ModelConfig, LazyTensors, tuple[str, ...]]:
    """Convert a model from transformers.

    Args:
        stated: The content of config.json.
        tensors: By the names in the files.
        origin: The config's name, for messages.

    Returns:
        The settings, the tensors by quill's names, and notes on what was found.

    Raises:
        CorruptError: The config is damaged, or contradicts the tensors.
        InputError: quill does not support the model.
    """
    kind = _stated_kind(stated, origin)
    settings = _read_gpt2(stated, origin) if kind == "gpt2" else _read_modern(stated, kind, origin)
    names = {_ours(name, kind): name for name in tensors}
    if len(names) < len(tensors):
        raise CorruptError("the weights are damaged", why="a tensor occurs under two names")
    notes: tuple[str, ...] = ()
    if settings["tie_embeddings"] is True:
        settings["tie_embeddings"], notes = _tie(names, tensors)
    config = reading.check(ModelConfig, settings, origin=origin, error=CorruptError)
    if not 0 < config.n_layer <= len(names):
        why = f"it states {config.n_layer:,} layers, and there are {len(names):,} tensors"
        raise CorruptError(f"'{origin}' does not fit the weights", why=why)
    if kind == "gpt2":
        names = {ours: theirs for ours, theirs in names.items() if not _MASKS.fullmatch(ours)}
    if kind == "qwen3" and config.activation == "relu2":
        names = _without_gates(names, tensors, origin)
    transposed = kind == "gpt2"
    weights = LazyTensors(
        {ours: partial(_tensor, tensors, theirs, transposed and bool(_TRANSPOSED.fullmatch(ours)))
         for ours, theirs in names.items()}
    )  # fmt: skip
    return config, weights, notes


def _tie(names: dict[str, str], tensors: Mapping[str, Tensor]) -> tuple[bool, tuple[str, ...]]:
    """Keep one matrix of a model whose config ties head and embedding, unless the files store two.

    Like transformers since version 5, quill takes a stored head that differs for the model's own.

    Args:
        names: Names in the files by quill's; changed.
        tensors: By the names in the files.

    Returns:
        Whether head and embedding are tied, and notes.
    """
    head, embedding = names.get("lm_head.weight"), names.get("wte.weight")
    if head is None:
        return True, ()
    if embedding is None:
        names["wte.weight"] = names.pop("lm_head.weight")
        return True, ()
    if _equal(tensors[head], tensors[embedding]):
        del names["lm_head.weight"]
        return True, ()
    return False, ("its config ties the output head to the embedding, but it has another head: it is untied",)


def _equal(a: Tensor, b: Tensor) -> bool:
    import torch

    return torch.equal(a, b) if a.dtype == b.dtype else torch.equal(a.float(), b.float())


def split_pattern(stated: Mapping[str, Any], origin: str) -> str:
    """How the tokenizers of a model's class split text.

    Args:
        stated: The content of config.json.
        origin: Its name, for messages.
    """
    return _KINDS[_stated_kind(stated, origin)].split


def _tensor(tensors: Mapping[str, Tensor], name: str, transposed: bool) -> Tensor:
    value = tensors[name]
    return value.t() if transposed and value.dim() == 2 else value


def _kind(shape: Shape) -> str | None:
    """The first class that computes a shape."""
    return next(
        (
            n
            for n, k in _KINDS.items()
            if k.block == shape.block and shape.activation in k.activations.values()
        ),
        None,
    )


def _gpt2_settings(shape: Shape) -> dict[str, Any]:
    return {
        "architectures": [_KINDS["gpt2"].causal],
        "model_type": "gpt2",
        "vocab_size": shape.vocab_size,
        "n_positions": shape.block_size,
        "n_ctx": shape.block_size,
        "n_embd": shape.n_embd,
        "n_layer": shape.n_layer,
        "n_head": shape.n_head,
        "n_inner": shape.mlp_size,
        "activation_function": _activation_name("gpt2", shape),
        "layer_norm_epsilon": shape.norm_eps,
        "resid_pdrop": shape.dropout,
        "embd_pdrop": shape.dropout,
        "attn_pdrop": shape.dropout,
        "scale_attn_weights": True,
        "tie_word_embeddings": shape.tie_embeddings,
        "use_cache": True,
    }


def _modern_settings(shape: Shape, kind: str) -> dict[str, Any]:
    own: dict[str, Any] = {}
    if kind == "qwen3":
        own = {"use_sliding_window": False, "sliding_window": None, "max_window_layers": shape.n_layer}
    return {
        "architectures": [_KINDS[kind].causal],
        "model_type": kind,
        "vocab_size": shape.vocab_size,
        "max_position_embeddings": shape.block_size,
        "hidden_size": shape.n_embd,
        "intermediate_size": shape.mlp_size,
        "num_hidden_layers": shape.n_layer,
        "num_attention_heads": shape.n_head,
        "num_key_value_heads": shape.n_kv_head,
        "head_dim": shape.head_size,
        "hidden_act": _activation_name(kind, shape),
        "rms_norm_eps": shape.norm_eps,
        # Before version 5 transformers read the base period from the top level.
        "rope_theta": shape.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_theta},
        "rope_scaling": None,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": shape.tie_embeddings,
        "use_cache": True,
        **own,
    }


def _stated_kind(stated: Mapping[str, Any], origin: str) -> str:
    classes, kind = stated.get("architectures"), stated.get("model_type")
    named = classes[0] if isinstance(classes, list) and classes else None
    found = next((n for n, k in _KINDS.items() if named in (k.causal, k.bare)), "")
    if named is None:
        found = str(kind)
    if found not in _KINDS or kind not in (None, found):
        known = ", ".join(k.causal for k in _KINDS.values())
        raise _unsupported(
            origin, f"it is {shorten(named if named is not None else kind)}; quill has {known}"
        )
    return found


def _read_gpt2(stated: Mapping[str, Any], origin: str) -> dict[str, Any]:
    _require(
        stated, origin, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False, pruned_heads={}
    )
    rates = [stated.get(key, 0.1) for key in ("resid_pdrop", "embd_pdrop", "attn_pdrop")]
    return {
        "block": _KINDS["gpt2"].block,
        "n_layer": _need(stated, origin, "n_layer", "num_hidden_layers"),
        "n_head": _need(stated, origin, "n_head", "num_attention_heads"),
        "n_embd": _need(stated, origin, "n_embd", "hidden_size"),
        "mlp_size": stated.get("n_inner"),
        "block_size": _need(stated, origin, "n_positions", "max_position_embeddings", "n_ctx"),
        "vocab_size": _need(stated, origin, "vocab_size"),
        "activation": _activation(stated, "gpt2", "activation_function", "gelu_new", origin),
        "bias": True,
        "tie_embeddings": _or(stated, "tie_word_embeddings", True),
        "attention_scale": None if stated.get("scale_attn_weights", True) else 1.0,
        "norm_eps": stated.get("layer_norm_epsilon", 1e-5),
        "dropout": rates[0] if rates.count(rates[0]) == len(rates) else 0.0,
    }


def _read_modern(stated: Mapping[str, Any], kind: str, origin: str) -> dict[str, Any]:
    _require(stated, origin, attention_bias=False, use_sliding_window=False, partial_rotary_factor=1.0)
    layers = stated.get("layer_types")
    if layers is not None and (not isinstance(layers, list) or set(map(str, layers)) != {"full_attention"}):
        raise _unsupported(origin, "some of its layers do not attend to the whole context")
    n_head = _need(stated, origin, "num_attention_heads")
    # What a missing setting means differs between the classes.
    defaults: dict[str, Any] = {
        "qwen3": {"hidden_act": "silu", "rms_norm_eps": 1e-6, "head_dim": 128, "num_key_value_heads": 32},
        "apertus": {"hidden_act": "xielu", "rms_norm_eps": 1e-5, "num_key_value_heads": n_head},
    }[kind]
    return {
        "block": _KINDS[kind].block,
        "n_layer": _need(stated, origin, "num_hidden_layers"),
        "n_head": n_head,
        "n_kv_head": _or(stated, "num_key_value_heads", defaults["num_key_value_heads"], null=n_head),
        "n_embd": _need(stated, origin, "hidden_size"),
        "head_size": _or(stated, "head_dim", defaults.get("head_dim")),
        "mlp_size": _need(stated, origin, "intermediate_size"),
        "block_size": _need(stated, origin, "max_position_embeddings"),
        "vocab_size": _need(stated, origin, "vocab_size"),
        "activation": _activation(stated, kind, "hidden_act", defaults["hidden_act"], origin),
        "tie_embeddings": _or(stated, "tie_word_embeddings", False),
        "rope_theta": _rope_theta(stated, kind, origin),
        "norm_eps": _or(stated, "rms_norm_eps", defaults["rms_norm_eps"]),
    }


def _rope_theta(stated: Mapping[str, Any], kind: str, origin: str) -> Any:
    """The base period of the rotary positions, which must be neither scaled nor stated twice differently."""
    found = []
    for key in ("rope_parameters", "rope_scaling"):
        rope = stated.get(key) or {}
        if not isinstance(rope, dict):
            raise CorruptError(f"'{origin}' is damaged", why=f"its {key} is {shorten(rope)}")
        if any(isinstance(value, dict) for value in rope.values()):
            raise _unsupported(origin, f"its {key} differ between layers")
        type_ = rope.get("rope_type", rope.get("type", "default"))
        if type_ != "default" or rope.get("partial_rotary_factor") not in (None, 1.0):
            shown = shorten({k: v for k, v in rope.items() if k != "rope_theta"})
            raise _unsupported(origin, f"its rotary positions are scaled: {key} is {shown}")
        if rope:
            found.append(rope.get("rope_theta", stated.get("rope_theta", 10000.0)))
    if kind == "apertus" and not found:
        raise _unsupported(origin, "its rotary positions are scaled as in Llama 3, Apertus's default")
    if stated.get("rope_theta") is not None:
        found.append(stated["rope_theta"])
    if any(theta != found[0] for theta in found):
        raise _unsupported(origin, f"it states several rope_theta: {', '.join(map(shorten, found))}")
    return found[0] if found else 10000.0


def _or(stated: Mapping[str, Any], key: str, default: Any, null: Any = None) -> Any:
    """A setting, its default if it is missing, and `null` if it is null and null has a meaning.

    A null without a meaning stays one, and is refused for its type.
    """
    value = stated.get(key, default)
    return null if value is None else value


def _require(stated: Mapping[str, Any], origin: str, **plain: Any) -> None:
    """Refuse settings that change what is computed."""
    for key, value in {**plain, "quantization_config": None}.items():
        if stated.get(key, value) not in (value, None):
            raise _unsupported(origin, f"its {key} is {shorten(stated[key])}, which quill does not have")


def _activation(stated: Mapping[str, Any], kind: str, key: str, default: str, origin: str) -> str:
    named, known = stated.get(key, default), _KINDS[kind].activations
    if not isinstance(named, str) or named not in known:
        raise _unsupported(origin, f"its {key} is {shorten(named)}; quill has {', '.join(known)}")
    return known[named]


def _activation_name(kind: str, shape: Shape) -> str:
    return next(name for name, ours in _KINDS[kind].activations.items() if ours == shape.activation)


def _need(stated: Mapping[str, Any], origin: str, *keys: str) -> Any:
    found = next((stated[key] for key in keys if stated.get(key) is not None), None)
    if found is None:
        raise CorruptError(f"'{origin}' is incomplete", why=f"it has no '{keys[0]}'")
    return found


def _theirs(name: str, kind: str) -> str:
    for theirs, ours in _KINDS[kind].inner.items():
        name = name.replace(ours, theirs)
    begin, end = next((t, o) for t, o in _KINDS[kind].names.items() if name.startswith(o))
    return begin + name.removeprefix(end)


def _ours(name: str, kind: str) -> str:
    """quill's name of a tensor. A name that quill does not have stays, and is refused later."""
    for theirs, ours in _KINDS[kind].inner.items():
        name = name.replace(theirs, ours)
    for begin, end in _KINDS[kind].names.items():
        # A model without its head is saved without the prefix.
        for start in (begin, begin.removeprefix("model.")):
            if start and name.startswith(start):
                return end + name.removeprefix(start)
    return name


def _without_gates(names: Mapping[str, str], tensors: Mapping[str, Tensor], origin: str) -> dict[str, str]:
    """Drop gates that equal the values, after checking each."""
    import torch

    kept = {}
    for ours, theirs in names.items():
        if "gate_proj" not in ours:
            kept[ours] = theirs
            continue
        up = names.get(ours.replace("gate_proj", "up_proj"))
        gate, value = tensors[theirs], tensors.get(up or "")
        if value is None or value.dtype != gate.dtype or not torch.equal(gate, value):
            raise _unsupported(origin, "its MLP is ReLU with a gate; quill has gates with silu only")
    return kept


def _unsupported(origin: str, why: str) -> InputError:
    return InputError(f"quill does not support the model in '{origin}'", why=why)
