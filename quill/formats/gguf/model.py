"""Models in a GGUF file, both directions over one table for each of llama.cpp's architectures.

"gpt2" is the gpt2 block with tanh-approximated GELU and every bias. "mpt", with learned positions and without
ALiBi, is the same with optional biases and with a divisor after the activation. "qwen3" is the modern block
with swiglu. They also represent, exactly up to rounding:

- ReLU: GELU of a large multiple, divided by it. Beyond a few units GELU is the identity or zero, so with a
  factor of 2^16 it is off by less than 3e-6. The factors are powers of two, on weights, norms and the divisor
  of "mpt".
- ReLU squared: ReLU(x) x, which is swiglu with the same weights twice if SiLU gets a large multiple. With
  2^10 it is off by less than 5e-7.
- Heads of any width, a bias on the output head, and bigram tables: see `plain_gpt2`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from quill.errors import InputError, shorten
from quill.formats import plain_gpt2
from quill.formats.base import LazyTensors
from quill.formats.gguf.file import Kind, Stored, Value
from quill.formats.gguf.tensor_types import TYPES

if TYPE_CHECKING:
    from torch import Tensor

    from quill.config.shape import Shape
    from quill.formats.gguf.file import File

ACTIVATION, BIAS, QKV_BIAS = "quill.activation", "quill.bias", "quill.qkv_bias"


class Key(NamedTuple):
    """A field of a shape in the metadata: its type, its name, and its value if a file leaves it out."""

    kind: Kind
    field: str
    default: Callable[[Mapping[str, Any]], Any] = lambda shape: None


class Architecture(NamedTuple):
    """One of llama.cpp's architectures.

    Attributes:
        block: The block that it computes.
        activations: Those of the block's activations that it computes or `fitted` represents.
        tensors: quill's names by the file's, without ".weight" or ".bias"; {} is the layer.
        biased: Whether it has biases.
        keys: Fields of a shape by the file's keys, without the architecture.
    """

    block: str
    activations: tuple[str, ...]
    tensors: Mapping[str, str]
    biased: bool
    keys: Mapping[str, Key]


_SIZES = {
    "context_length": Key("uint32", "block_size"), "embedding_length": Key("uint32", "n_embd"),
    "block_count": Key("uint32", "n_layer"), "feed_forward_length": Key("uint32", "mlp_size"),
    "attention.head_count": Key("uint32", "n_head"),
}  # fmt: skip
_GPT2 = Architecture(
    block="gpt2",
    activations=("gelu", "gelu_tanh"),
    tensors={
        "token_embd": "wte", "position_embd": "wpe", "blk.{}.attn_norm": "h.{}.ln_1",
        "blk.{}.attn_qkv": "h.{}.attn.c_attn", "blk.{}.attn_output": "h.{}.attn.c_proj",
        "blk.{}.ffn_norm": "h.{}.ln_2", "blk.{}.ffn_up": "h.{}.mlp.c_fc",
        "blk.{}.ffn_down": "h.{}.mlp.c_proj", "output_norm": "ln_f", "output": "lm_head",
    },
    biased=True,
    keys={**_SIZES, "attention.layer_norm_epsilon": Key("float32", "norm_eps")},
)  # fmt: skip
_QWEN3 = Architecture(
    block="modern",
    activations=("swiglu", "relu2"),
    tensors={
        "token_embd": "wte", "blk.{}.attn_norm": "h.{}.input_layernorm",
        "blk.{}.attn_q": "h.{}.self_attn.q_proj", "blk.{}.attn_k": "h.{}.self_attn.k_proj",
        "blk.{}.attn_v": "h.{}.self_attn.v_proj", "blk.{}.attn_q_norm": "h.{}.self_attn.q_norm",
        "blk.{}.attn_k_norm": "h.{}.self_attn.k_norm", "blk.{}.attn_output": "h.{}.self_attn.o_proj",
        "blk.{}.ffn_norm": "h.{}.post_attention_layernorm", "blk.{}.ffn_gate": "h.{}.mlp.gate_proj",
        "blk.{}.ffn_up": "h.{}.mlp.up_proj", "blk.{}.ffn_down": "h.{}.mlp.down_proj",
        "output_norm": "ln_f", "output": "lm_head",
    },
    biased=False,
    keys={
        **_SIZES,
        "attention.head_count_kv": Key("uint32", "n_kv_head", lambda shape: shape["n_head"]),
        "attention.key_length": Key(
            "uint32", "head_size", lambda shape: shape["n_embd"] // (shape["n_head"] or 1)
        ),
        "attention.layer_norm_rms_epsilon": Key("float32", "norm_eps"),
        "rope.freq_base": Key("float32", "rope_theta", lambda shape: 10000.0),
    },
)  # fmt: skip
_ARCHITECTURES = {"gpt2": _GPT2, "mpt": _GPT2._replace(activations=("relu",)), "qwen3": _QWEN3}
_UNBIASED = {"token_embd", "position_embd", "output"}
_DIVISOR = "blk.{}.ffn.act.scales"
# Values of further keys for scaled rotary positions that change nothing.
_NEUTRAL_ROTATIONS = {"attn_factor": (1.0,), "yarn_ext_factor": (0.0, -1.0), "yarn_attn_factor": (1.0, -1.0)}
_FREQUENCIES = "rope_freqs.weight"

# Factors of tensors in the file, by the end of quill's name. Half of ReLU's factor is on the norm, so that
# neither a weight nor its input leaves float16's range.
_FACTORS = {
    "relu": {"ln_2.weight": 2.0**8, "ln_2.bias": 2.0**8, "mlp.c_fc.weight": 2.0**8, "mlp.c_fc.bias": 2.0**16},
    "relu2": {
        "post_attention_layernorm.weight": 2.0**-3,
        "mlp.up_proj.weight": 2.0**-3,
        "mlp.down_proj.weight": 2.0**-4,
    },
}
_RELU_DIVISOR = 2.0**16
_RELU2_GATE = 2.0**13


def architecture(shape: Shape) -> str:
    """llama.cpp's name for the architecture of a shape that `fitted` returns."""
    return next(
        name
        for name, known in _ARCHITECTURES.items()
        if known.block == shape.block and shape.activation in known.activations
    )


def refusal(shape: Shape) -> str | None:
    """Why no architecture of llama.cpp computes a model, as a clause; None if one does."""
    if shape.n_layer == 0:
        most = plain_gpt2.MOST_BIGRAMS
        return f"a bigram table can have {most:,} tokens at most" if shape.vocab_size > most else None
    allowed = [a for k in _ARCHITECTURES.values() if k.block == shape.block for a in k.activations]
    if not allowed:
        return f"llama.cpp has no equivalent of the {shape.block} block"
    if shape.activation not in allowed:
        which = f"the {shape.block} block with {shape.activation}"
        return f"llama.cpp has no equivalent of {which}, only with {', '.join(allowed)}"
    return None


def fitted(
    shape: Shape, weights: Mapping[str, Tensor], dtype: str
) -> tuple[Shape, Mapping[str, Tensor], tuple[str, ...]]:
    """Rewrite a model, if need be, for an architecture of llama.cpp, with the same logits.

    Args:
        shape: One that `refusal` accepts.
        weights: By quill's names, float32.
        dtype: The type of the matrices in the file; its rows must be whole quantization groups.

    Returns:
        The model, and notes on what was done.
    """
    odd = shape.head_bias or shape.n_head * shape.head_size != shape.n_embd
    if shape.n_layer == 0 or (shape.block == _GPT2.block and odd):
        return plain_gpt2.rewrite(shape, weights, TYPES[dtype].values)
    return shape, weights, ()


def metadata(shape: Shape) -> dict[str, Value]:
    """A model's shape as the keys of its architecture, and as quill's own for what they cannot say."""
    arch = architecture(shape)
    known = _ARCHITECTURES[arch]
    keys = {name: Value(key.kind, getattr(shape, key.field)) for name, key in known.keys.items()}
    if known is _QWEN3:
        keys["attention.value_length"] = Value("uint32", shape.head_size)
    own = {ACTIVATION: Value("string", shape.activation)}
    if known.biased:
        own |= {BIAS: Value("bool", shape.bias), QKV_BIAS: Value("bool", shape.qkv_bias)}
    return {f"{arch}.{key}": value for key, value in keys.items()} | own


def tensors(
    shape: Shape, weights: Mapping[str, Tensor], rows: int, added: int, dtype: str
) -> Iterator[Stored]:
    """A model's tensors, in the order of the file.

    Args:
        shape: The model's shape.
        weights: By quill's names, float32.
        rows: Tokens of its tokenizer. Further rows of the embedding are never drawn, and are left out.
        added: Tokens to add to them.
        dtype: The type of matrices; vectors and positions are float32.
    """
    from quill.model.gpt import outline

    arch = architecture(shape)
    sizes = {name: tuple(t.shape) for name, t in outline(shape).state_dict().items()}
    for theirs, ours in _names(arch, shape.n_layer):
        make: Callable[[], Tensor]
        if ours in ("wte.weight", "lm_head.weight") and ours in weights:
            size: tuple[int, ...] = (rows + added, shape.n_embd)
            make = partial(_with_rows, weights, ours, rows, added)
        elif ours in weights:
            size, make = sizes[ours], partial(_outgoing, shape, ours, weights)
        elif ours.endswith("gate_proj.weight"):  # of ReLU squared
            up = ours.replace("gate_proj", "up_proj")
            size, make = sizes[up], partial(_gate, weights, up)
        elif ours.endswith(".bias") and arch == "gpt2":
            size = sizes[ours.replace(".bias", ".weight")][:1]
            make = partial(_filled, size, 0.0)
        else:
            continue
        yield Stored(theirs, size, _stored_type(theirs, size, dtype), make)
    if arch == "mpt":
        size = (shape.mlp_size,)
        for i in range(shape.n_layer):
            yield Stored(_DIVISOR.format(i), size, "float32", partial(_filled, size, _RELU_DIVISOR))


def read(file: File) -> dict[str, Any]:
    """Read a model's shape as settings of ModelConfig; vocab_size is the rows of its embedding.

    Raises:
        CorruptError: Keys are missing or have the wrong type.
        InputError: quill does not have its architecture.
    """
    arch = file.get("general.architecture", str)
    known = _ARCHITECTURES.get(arch)
    if known is None or (arch == "mpt" and ACTIVATION not in file):
        raise _unsupported(file, f"its architecture is {shorten(arch)}; quill has gpt2 and qwen3")
    if "token_embd.weight" not in file.tensors:
        raise file.damaged("it has no tensor token_embd.weight")
    shape: dict[str, Any] = {
        "block": known.block,
        "activation": file.get(ACTIVATION, str, "gelu_tanh" if known.biased else known.activations[0]),
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
        "tie_embeddings": "output.weight" not in file.tensors,
    }
    for name, key in known.keys.items():
        value = file.get(f"{arch}.{name}", float if key.kind == "float32" else int, key.default(shape))
        shape[key.field] = _shortest(value) if key.kind == "float32" else value
    if not 0 < shape["n_layer"] <= len(file.tensors):
        raise file.damaged(f"it states {shape['n_layer']:,} layers and has {len(file.tensors):,} tensors")
    if known.biased:
        shape["bias"] = file.get(BIAS, bool, True)
        shape["qkv_bias"] = file.get(QKV_BIAS, bool, True)
    else:
        _refuse_other_rotations(file, arch, shape["head_size"])
    return shape


def weights(file: File, shape: Shape) -> LazyTensors:
    """A file's tensors by quill's names and as quill has them.

    Args:
        file: The file.
        shape: The shape that it states.

    Raises:
        CorruptError: The shape is not the architecture's, or it has no place for some tensor.
    """
    arch = file.get("general.architecture", str)
    if refusal(shape) or architecture(shape) != arch:
        raise file.damaged(f"{ACTIVATION} is {shape.activation}, which {arch} does not compute")
    names = {ours: theirs for theirs, ours in _names(arch, shape.n_layer) if theirs in file.tensors}
    known = set(names.values())
    if shape.activation == "relu2":
        names = {ours: theirs for ours, theirs in names.items() if "gate_proj" not in ours}
    if arch == "mpt":
        known |= {_DIVISOR.format(i) for i in range(shape.n_layer)}
        _refuse_other_divisors(file, shape.n_layer)
    if unknown := sorted(set(file.tensors) - known):
        raise file.damaged(f"it has the tensor {shorten(unknown[0])}, which {arch} does not have")
    for ours in [name for name in names if name.endswith(".bias") and not _has_bias(shape, name)]:
        theirs = names.pop(ours)
        if bool(file.tensor(theirs).any()):
            raise file.damaged(f"{theirs} is not zero, but the model is said to have no such bias")
    return LazyTensors(
        {ours: partial(_incoming, file, shape, ours, theirs) for ours, theirs in names.items()}
    )


def _has_bias(shape: Shape, name: str) -> bool:
    return shape.qkv_bias if name.endswith("c_attn.bias") else shape.bias


def _refuse_other_divisors(file: File, n_layer: int) -> None:
    for name in map(_DIVISOR.format, range(n_layer)):
        if name not in file.tensors or bool((file.tensor(name) != _RELU_DIVISOR).any()):
            raise file.damaged(f"{name} is not the divisor for ReLU")


def _names(arch: str, n_layer: int) -> Iterator[tuple[str, str]]:
    """The file's names and quill's of every tensor that the architecture may have."""
    known = _ARCHITECTURES[arch]
    for theirs, ours in known.tensors.items():
        ends = ("weight", "bias") if known.biased and theirs not in _UNBIASED else ("weight",)
        for i in range(n_layer if "{}" in theirs else 1):
            yield from ((f"{theirs.format(i)}.{end}", f"{ours.format(i)}.{end}") for end in ends)


def _stored_type(name: str, size: tuple[int, ...], dtype: str) -> str:
    if len(size) < 2 or name.startswith("position_embd"):
        return "float32"
    return dtype if size[-1] % TYPES[dtype].values == 0 else "float16"


def _factor(shape: Shape, name: str) -> float:
    table = _FACTORS.get(shape.activation, {})
    return next((factor for end, factor in table.items() if name.endswith(end)), 1.0)


def _outgoing(shape: Shape, name: str, weights: Mapping[str, Tensor]) -> Tensor:
    value = _times(weights[name], _factor(shape, name))
    # The architecture divides scores by the root of the head's width; the queries get the rest of the scale.
    scale = shape.attention_scale * shape.head_size**0.5
    if ".c_attn." in name and abs(scale - 1) > 1e-9:
        value = value.clone()
        value[: shape.n_head * shape.head_size] *= scale
    return value


def _incoming(file: File, shape: Shape, ours: str, theirs: str) -> Tensor:
    value = file.tensor(theirs)
    if ours in ("wte.weight", "lm_head.weight"):
        # Rows beyond the vocabulary were added for llama.cpp.
        return value[: shape.vocab_size]
    return _times(value, 1 / _factor(shape, ours))


def _times(value: Tensor, factor: float) -> Tensor:
    return value if factor == 1.0 else value * factor


def _filled(size: tuple[int, ...], value: float) -> Tensor:
    import torch

    return torch.full(size, value)


def _gate(weights: Mapping[str, Tensor], up: str) -> Tensor:
    return _times(weights[up], _RELU2_GATE)


def _with_rows(weights: Mapping[str, Tensor], name: str, rows: int, added: int) -> Tensor:
    """The first rows, and their mean for each added token: a logit that is the mean is never the largest."""
    import torch

    value = weights[name][:rows]
    return torch.cat([value, value.mean(0, keepdim=True).expand(added, -1)]) if added else value


def _refuse_other_rotations(file: File, arch: str, head_size: int) -> None:
    if file.get(f"{arch}.attention.value_length", int, head_size) != head_size:
        raise _unsupported(file, "its values are not as wide as its keys")
    if file.get(f"{arch}.rope.dimension_count", int, head_size) != head_size:
        raise _unsupported(file, "it rotates only part of each head")
    scaling = f"{arch}.rope.scaling"
    kind = file.get(f"{scaling}.type", str, "linear")
    if kind not in ("none", "linear"):
        raise _unsupported(file, f"its rotary positions are scaled by {shorten(kind)}")
    # llama.cpp reads the older key only if the newer is missing, takes 0 for 1, and ignores both for "none".
    factor = file.get(f"{scaling}.factor", float, file.get(f"{arch}.rope.scale_linear", float, 1.0))
    if kind == "linear" and factor not in (0.0, 1.0):
        raise _unsupported(file, f"its rotary positions are scaled by {factor:g}")
    for key, neutral in _NEUTRAL_ROTATIONS.items():
        if (value := file.get(f"{scaling}.{key}", float, neutral[0])) not in neutral:
            raise _unsupported(file, f"its {key} of rotary positions is {value:g}")
    if _FREQUENCIES in file.tensors:
        raise _unsupported(file, f"{_FREQUENCIES} scales its rotary positions")


def _unsupported(file: File, why: str) -> InputError:
    return InputError(f"quill does not support the model in '{file.path}'", why=why)


def _shortest(value: float) -> float:
    """A float32 as the decimal that it was written from: 1e-5 instead of 9.999999747e-06."""
    return float(f"{value:.7g}")
