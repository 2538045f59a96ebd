"""Models in a GGUF file, both directions over one table of names.

llama.cpp's architectures: "gpt2" is the gpt2 block with tanh-approximated GELU and every bias; "mpt", with
learned positions and without ALiBi, is the same with biases optional and with a divisor after the
nonlinearity; "qwen3" is the modern block with swiglu. Others are held exactly by what these have:

- ReLU is GELU of a large multiple, divided by it: beyond a few units GELU is the identity or nothing, so
  with 2^16 it is off by less than 3e-6. The factors are powers of two, on weights, norms and "mpt"'s divisor.
- ReLU squared is ReLU(x) x, which is swiglu with the same weights twice where SiLU is taken of a large
  multiple: with 2^10 it is off by less than 5e-7.
- Heads of any width, a bias on the output head, and tables of bigrams: see `plain_gpt2`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from quill.errors import CorruptError, InputError
from quill.formats import plain_gpt2
from quill.formats.gguf.file import Stored, Value
from quill.formats.gguf.tensor_types import TYPES

if TYPE_CHECKING:
    from torch import Tensor

    from quill.config.settings import ModelConfig
    from quill.formats.gguf.file import File

ACTIVATION, BIAS, QKV_BIAS = "quill.activation", "quill.bias", "quill.qkv_bias"

# The file's name of each tensor, less ".weight" or ".bias", and quill's; {} is the layer.
_GPT2 = {
    "token_embd": "wte", "position_embd": "wpe", "blk.{}.attn_norm": "h.{}.ln_1",
    "blk.{}.attn_qkv": "h.{}.attn.c_attn", "blk.{}.attn_output": "h.{}.attn.c_proj",
    "blk.{}.ffn_norm": "h.{}.ln_2", "blk.{}.ffn_up": "h.{}.mlp.c_fc", "blk.{}.ffn_down": "h.{}.mlp.c_proj",
    "output_norm": "ln_f", "output": "lm_head",
}  # fmt: skip
_QWEN3 = {
    "token_embd": "wte", "blk.{}.attn_norm": "h.{}.input_layernorm", "blk.{}.attn_q": "h.{}.self_attn.q_proj",
    "blk.{}.attn_k": "h.{}.self_attn.k_proj", "blk.{}.attn_v": "h.{}.self_attn.v_proj",
    "blk.{}.attn_q_norm": "h.{}.self_attn.q_norm", "blk.{}.attn_k_norm": "h.{}.self_attn.k_norm",
    "blk.{}.attn_output": "h.{}.self_attn.o_proj", "blk.{}.ffn_norm": "h.{}.post_attention_layernorm",
    "blk.{}.ffn_gate": "h.{}.mlp.gate_proj", "blk.{}.ffn_up": "h.{}.mlp.up_proj",
    "blk.{}.ffn_down": "h.{}.mlp.down_proj", "output_norm": "ln_f", "output": "lm_head",
}  # fmt: skip
_BLOCKS = {"gpt2": ("gpt2", _GPT2), "mpt": ("gpt2", _GPT2), "qwen3": ("modern", _QWEN3)}
_UNBIASED = {"token_embd", "position_embd", "output"}
_DIVISOR = "blk.{}.ffn.act.scales"

# What tensors are multiplied with on their way out, by the end of quill's name. Half of ReLU's factor is on
# the norm, as neither a weight nor what it meets may leave float16's range.
_RELU = {"ln_2.weight": 2.0**8, "ln_2.bias": 2.0**8, "mlp.c_fc.weight": 2.0**8, "mlp.c_fc.bias": 2.0**16}
_RELU_DIVISOR = 2.0**16
_RELU2 = {
    "post_attention_layernorm.weight": 2.0**-3,
    "mlp.up_proj.weight": 2.0**-3,
    "mlp.down_proj.weight": 2.0**-4,
}
_RELU2_GATE = 2.0**13


def architecture(config: ModelConfig) -> str:
    """Llama.cpp's name for what a model is that `fitted` gives."""
    if config.block == "modern":
        return "qwen3"
    return "mpt" if config.activation == "relu" else "gpt2"


def refusal(config: ModelConfig) -> str | None:
    """Why no architecture of llama.cpp computes a model, as a clause; None where one does."""
    if config.n_layer == 0:
        too_many = (config.vocab_size or 0) > plain_gpt2.MOST_BIGRAMS
        return (
            f"a table of more than {plain_gpt2.MOST_BIGRAMS} tokens is too large there" if too_many else None
        )
    if config.block not in ("gpt2", "modern"):
        return f"llama.cpp has no block {config.block}"
    allowed = ("gelu", "gelu_tanh", "relu") if config.block == "gpt2" else ("swiglu", "relu2")
    if config.activation not in allowed:
        return (
            f"llama.cpp has no {config.block} block with {config.activation}, only with {', '.join(allowed)}"
        )
    return None


def fitted(
    config: ModelConfig, weights: Mapping[str, Tensor], dtype: str
) -> tuple[ModelConfig, Mapping[str, Tensor], tuple[str, ...]]:
    """A model as one that an architecture has, with the same logits; and what was done to it, if anything.

    Args:
        config: A shape that `refusal` lets pass.
        weights: By quill's names, float32.
        dtype: What the matrices will be kept as; rows of blocks have a multiple of 32 values.
    """
    odd = config.head_bias or config.n_head * (config.head_size or 0) != config.n_embd
    if config.n_layer == 0 or (config.block == "gpt2" and odd):
        return plain_gpt2.rewrite(config, weights, 32 if dtype == "q8_0" else 1)
    return config, weights, ()


def metadata(config: ModelConfig) -> dict[str, Value]:
    """A model's shape as the keys of its architecture, and what of it they cannot say."""
    arch = architecture(config)
    keys: dict[str, Value] = {
        "context_length": Value("uint32", config.block_size),
        "embedding_length": Value("uint32", config.n_embd),
        "block_count": Value("uint32", config.n_layer),
        "feed_forward_length": Value("uint32", config.mlp_size),
        "attention.head_count": Value("uint32", config.n_head),
    }
    if arch == "qwen3":
        keys |= {
            "attention.head_count_kv": Value("uint32", config.n_kv_head),
            "attention.key_length": Value("uint32", config.head_size),
            "attention.value_length": Value("uint32", config.head_size),
            "attention.layer_norm_rms_epsilon": Value("float32", config.norm_eps),
            "rope.freq_base": Value("float32", config.rope_theta),
        }
    else:
        keys["attention.layer_norm_epsilon"] = Value("float32", config.norm_eps)
    own = {ACTIVATION: Value("string", config.activation)}
    if config.block == "gpt2":
        own |= {BIAS: Value("bool", config.bias), QKV_BIAS: Value("bool", bool(config.qkv_bias))}
    return {f"{arch}.{key}": value for key, value in keys.items()} | own


def tensors(
    config: ModelConfig, weights: Mapping[str, Tensor], rows: int, added: int, dtype: str
) -> Iterator[Stored]:
    """A model's tensors, in the order of the file.

    Args:
        config: Its shape.
        weights: By quill's names, float32.
        rows: Tokens of its tokenizer; what the embedding has beyond them is never drawn, and left out.
        added: Tokens to add to them.
        dtype: How matrices are kept; vectors and positions are float32.
    """
    arch = architecture(config)
    for theirs, ours in _names(arch, config.n_layer):
        make: Callable[[], Tensor]
        if ours in ("wte.weight", "lm_head.weight") and ours in weights:
            shape: tuple[int, ...] = (rows + added, config.n_embd)
            make = partial(_with_rows, weights[ours], rows, added)
        elif ours in weights:
            shape = tuple(weights[ours].shape)
            make = partial(_outgoing, config, ours, weights[ours])
        elif ours.endswith("gate_proj.weight"):  # of ReLU squared
            up = weights[ours.replace("gate_proj", "up_proj")]
            shape, make = tuple(up.shape), partial(_times, up, _RELU2_GATE)
        elif ours.endswith(".bias") and arch == "gpt2":
            shape = (len(weights[ours.replace(".bias", ".weight")]),)
            make = partial(_filled, shape, 0.0)
        else:
            continue
        yield Stored(theirs, shape, _kept(theirs, shape, dtype), make)
    if arch == "mpt":
        shape = (config.mlp_size or 0,)
        for i in range(config.n_layer):
            yield Stored(_DIVISOR.format(i), shape, "float32", partial(_filled, shape, _RELU_DIVISOR))


def read(file: File) -> dict[str, Any]:
    """A model's shape, as settings of ModelConfig; vocab_size is the rows of its embedding.

    Raises:
        CorruptError: Keys are missing or of the wrong type.
        InputError: It is no architecture of quill's.
    """
    arch = file.get("general.architecture", str)
    if arch not in _BLOCKS or (arch == "mpt" and ACTIVATION not in file):
        raise InputError(
            f"'{file.path}' is a model of the architecture {arch!a}", why="quill has gpt2 and qwen3"
        )
    if "token_embd.weight" not in file.tensors:
        raise file.damaged("it has no tensor token_embd.weight")
    block, _ = _BLOCKS[arch]
    shape: dict[str, Any] = {
        "block": block,
        "n_layer": file.get(f"{arch}.block_count", int),
        "n_head": file.get(f"{arch}.attention.head_count", int),
        "n_embd": file.get(f"{arch}.embedding_length", int),
        "mlp_size": file.get(f"{arch}.feed_forward_length", int),
        "block_size": file.get(f"{arch}.context_length", int),
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
        "tie_embeddings": "output.weight" not in file.tensors,
    }
    if not 0 < shape["n_layer"] <= len(file.tensors):
        raise file.damaged(f"it has {shape['n_layer']:,} layers and {len(file.tensors):,} tensors")
    if block == "gpt2":
        shape["activation"] = file.get(ACTIVATION, str, "gelu_tanh")
        shape["bias"] = file.get(BIAS, bool, True)
        shape["qkv_bias"] = file.get(QKV_BIAS, bool, True)
        epsilon = file.get(f"{arch}.attention.layer_norm_epsilon", float)
    else:
        shape["activation"] = file.get(ACTIVATION, str, "swiglu")
        shape["n_kv_head"] = file.get(f"{arch}.attention.head_count_kv", int, shape["n_head"])
        shape["head_size"] = file.get(
            f"{arch}.attention.key_length", int, shape["n_embd"] // (shape["n_head"] or 1)
        )
        shape["rope_theta"] = _short(file.get(f"{arch}.rope.freq_base", float, 10000.0))
        epsilon = file.get(f"{arch}.attention.layer_norm_rms_epsilon", float)
        _refuse_other_attention(file, arch, shape["head_size"])
    shape["norm_eps"] = _short(epsilon)
    return shape


class Weights(Mapping[str, "Tensor"]):
    """A file's tensors by quill's names and as quill has them, each made when it is asked for.

    Args:
        file: Whose.
        config: Its shape.

    Raises:
        CorruptError: The shape is none of the architecture's, or has no place for a tensor that is there.
    """

    def __init__(self, file: File, config: ModelConfig) -> None:
        arch = file.get("general.architecture", str)
        if refusal(config) or architecture(config) != arch:
            raise file.damaged(f"{ACTIVATION} is {config.activation}, which is not what {arch} computes")
        self._file, self._config = file, config
        self._names = {
            ours: theirs for theirs, ours in _names(arch, config.n_layer) if theirs in file.tensors
        }
        known = set(self._names.values())
        if config.activation == "relu2":
            self._names = {o: t for o, t in self._names.items() if "gate_proj" not in o}
        if arch == "mpt":
            known |= {_DIVISOR.format(i) for i in range(config.n_layer)}
            self._refuse_other_divisors()
        if unknown := sorted(set(file.tensors) - known):
            raise file.damaged(f"it holds {unknown[0]!a}, which {arch} has not")
        for ours in [name for name in self._names if not self._biased(name)]:
            theirs = self._names.pop(ours)
            if bool(file.tensor(theirs).any()):
                raise file.damaged(f"{theirs} is not zero, though it says it has no such bias")

    def __getitem__(self, name: str) -> Tensor:
        value = self._file.tensor(self._names[name])
        if name in ("wte.weight", "lm_head.weight"):
            # What is beyond the vocabulary was added for llama.cpp.
            return value[: self._config.vocab_size]
        return _incoming(self._config, name, value)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def _biased(self, name: str) -> bool:
        if not name.endswith(".bias") or self._config.block != "gpt2":
            return True
        return bool(self._config.qkv_bias if name.endswith("c_attn.bias") else self._config.bias)

    def _refuse_other_divisors(self) -> None:
        for i in range(self._config.n_layer):
            name = _DIVISOR.format(i)
            if name not in self._file.tensors or bool((self._file.tensor(name) != _RELU_DIVISOR).any()):
                raise CorruptError(f"'{self._file.path}' is damaged", why=f"{name} is not that of ReLU")


def _names(arch: str, n_layer: int) -> Iterator[tuple[str, str]]:
    """Their names and quill's, of everything that may be there."""
    _, table = _BLOCKS[arch]
    for theirs, ours in table.items():
        parts = ("weight",) if arch == "qwen3" or theirs in _UNBIASED else ("weight", "bias")
        for i in range(n_layer if "{}" in theirs else 1):
            yield from ((f"{theirs.format(i)}.{part}", f"{ours.format(i)}.{part}") for part in parts)


def _kept(name: str, shape: tuple[int, ...], dtype: str) -> str:
    if len(shape) < 2 or name.startswith("position_embd"):
        return "float32"
    return dtype if shape[-1] % TYPES[dtype].values == 0 else "float16"


def _factor(config: ModelConfig, name: str) -> float:
    table = {"relu": _RELU, "relu2": _RELU2}.get(config.activation or "", {})
    return next((factor for end, factor in table.items() if name.endswith(end)), 1.0)


def _outgoing(config: ModelConfig, name: str, value: Tensor) -> Tensor:
    value = _times(value, _factor(config, name))
    if config.attention_scale and ".c_attn." in name:
        # The architecture divides by the root of the head's width; what is left of the scale is the queries'.
        size = config.head_size or 1
        value = value.clone()
        value[: config.n_head * size] *= config.attention_scale * size**0.5
    return value


def _incoming(config: ModelConfig, name: str, value: Tensor) -> Tensor:
    return _times(value, 1 / _factor(config, name))


def _times(value: Tensor, factor: float) -> Tensor:
    return value if factor == 1.0 else value * factor


def _filled(shape: tuple[int, ...], value: float) -> Tensor:
    import torch

    return torch.full(shape, value)


def _with_rows(value: Tensor, rows: int, added: int) -> Tensor:
    """The first rows, and their mean for each token added: a logit that is the mean is never the largest."""
    import torch

    value = value[:rows]
    return torch.cat([value, value.mean(0, keepdim=True).expand(added, -1)]) if added else value


def _refuse_other_attention(file: File, arch: str, head_size: int) -> None:
    if file.get(f"{arch}.attention.value_length", int, head_size) != head_size:
        raise InputError(
            f"quill has no such model as '{file.path}'", why="its values are wider than its keys"
        )
    if file.get(f"{arch}.rope.dimension_count", int, head_size) != head_size:
        raise InputError(
            f"quill has no such model as '{file.path}'", why="only a part of each head is rotated"
        )
    if file.get(f"{arch}.rope.scaling.type", str, "none") != "none":
        raise InputError(f"quill has no such model as '{file.path}'", why="its rotary positions are scaled")


def _short(value: float) -> float:
    """A float32 as the decimal that it was written from: 1e-5, and not 9.999999747e-06."""
    return float(f"{value:.7g}")
