"""Settings as keyword arguments of the Python API, for type checkers and for `help`.

The TypedDicts repeat names and types of the settings' fields, because a type checker cannot derive them; a
test keeps them equal. Defaults and meanings are in the fields alone.
"""

from __future__ import annotations

import inspect
import keyword
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypedDict, TypeVar

from quill.config.settings import Section

F = TypeVar("F", bound=Callable[..., Any])


class SampleSettings(TypedDict, total=False):
    """The fields of SampleConfig."""

    max_new_tokens: int
    temperature: float
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float
    num_samples: int
    seed: int | None
    stop: list[str]


class TextSettings(TypedDict, total=False):
    """The fields of DataConfig but its source."""

    tokenizer: str | None
    vocab_size: int | None
    vocabulary: list[str] | None
    val_fraction: float
    text_field: str
    encoding: str
    unknown: Literal["add", "skip", "error"] | None


class RunSettings(TextSettings, total=False):
    """The fields of DataConfig, ModelConfig and TrainConfig."""

    data: str | list[str]
    block: str
    n_layer: int
    n_head: int
    n_kv_head: int | None
    n_embd: int
    head_size: int | None
    mlp_size: int | None
    block_size: int
    model_vocab_size: int | None
    activation: str | None
    dropout: float
    bias: bool
    qkv_bias: bool | None
    head_bias: bool
    tie_embeddings: bool
    attention_scale: float | None
    rope_theta: float
    norm_eps: float | None
    batch_size: int
    gradient_accumulation_steps: int
    max_iters: int
    optimizer: Literal["adamw", "muon"]
    learning_rate: float
    muon_learning_rate: float
    min_lr: float
    schedule: Literal["cosine", "linear", "constant"]
    warmup_iters: int
    lr_decay_iters: int | None
    weight_decay: float
    beta1: float
    beta2: float
    muon_momentum: float
    grad_clip: float
    eval_interval: int
    eval_iters: int | None
    log_interval: int
    patience: int | None
    keep_states: int
    weights_dtype: Literal["float32", "bfloat16", "float16"]
    init_from: str | None
    seed: int
    device: str
    dtype: Literal["auto", "float32", "bfloat16", "float16"]
    compile: Literal["auto", "on", "off"]


def paths(sections: Mapping[str, type[Section]]) -> dict[str, str]:
    """The dotted path of each setting, by its keyword: the name of its flag, with underscores.

    Args:
        sections: Sections by the prefix of their paths; "" for paths without one.
    """
    found: dict[str, str] = {}
    for prefix, section in sections.items():
        for name, field in section.model_fields.items():
            extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
            word = str(extra.get("flag", name)).replace("-", "_")
            found[name if keyword.iskeyword(word) else word] = f"{prefix}.{name}" if prefix else name
    return found


def documented(
    sections: Mapping[str, type[Section]], *, without: frozenset[str] = frozenset()
) -> Callable[[F], F]:
    """Show a function's settings in its signature, with types and defaults, in place of `**settings`.

    Args:
        sections: As for `paths`.
        without: Dotted paths that the function takes in another way.
    """

    def decorate(function: F) -> F:
        shown = inspect.signature(function)
        fields = {
            f"{prefix}.{name}" if prefix else name: field
            for prefix, section in sections.items()
            for name, field in section.model_fields.items()
        }
        parameters = [p for p in shown.parameters.values() if p.kind is not p.VAR_KEYWORD]
        parameters += [
            inspect.Parameter(
                word,
                inspect.Parameter.KEYWORD_ONLY,
                default=fields[path].default,
                annotation=fields[path].annotation,
            )
            for word, path in paths(sections).items()
            if path not in without
        ]
        function.__signature__ = shown.replace(parameters=parameters)  # type: ignore[attr-defined]
        return function

    return decorate
