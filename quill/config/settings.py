"""Every setting of a run, declared once: name, type, default, bounds and help.

Command-line flags, `--help`, the JSON Schema and the README's table are generated from these fields.
Names are those that GPT-2 and nanoGPT made standard. Free of torch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ModelWrapValidatorHandler, field_validator, model_validator
from pydantic_core import PydanticCustomError

from quill import discovery
from quill.config import blocks
from quill.config.blocks import BlockFacts
from quill.config.shape import Shape
from quill.errors import InputError, shorten

SCHEMA_VERSION = 1

# Wide enough for any model that fits in memory, narrow enough that sizes never overflow 64 bits.
_Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
_Width = Annotated[int, Field(ge=1, le=2**20)]
_Fraction = Annotated[float, Field(ge=0, le=1)]
_Rate = Annotated[float, Field(ge=0, le=100)]
_DEVICE = r"^(auto|cpu|mps|cuda(:\d+)?)$"
_Seed = Annotated[int, Field(ge=0, le=2**63 - 1)]


def setting(default: Any, help: str, *, flag: str | None = None, choices: Sequence[str] | None = None) -> Any:
    """Declare one setting.

    Args:
        default: Its value when neither the file nor a flag sets it.
        help: One sentence for `--help`, the schema and the README.
        flag: Name of its flag, where that differs from the field's.
        choices: Accepted values, where those are found by discovery instead of listed in the type.
    """
    extra: dict[str, Any] = {"flag": flag} if flag else {}
    if choices is not None:
        extra["enum"] = [*choices, None] if default is None else list(choices)
    return Field(default, description=help, json_schema_extra=extra or None)


class Section(BaseModel):
    """A group of settings: strict types, no unknown keys, finite numbers, immutable."""

    model_config = ConfigDict(
        strict=True, extra="forbid", allow_inf_nan=False, frozen=True, validate_default=True
    )

    title: ClassVar[str] = ""


class DataConfig(Section):
    """The text, and how it is split into tokens."""

    title: ClassVar[str] = "Data"

    source: str | list[str] = setting(
        "harpoon",
        "Prepared dataset, named source (harpoon, shakespeare, openwebtext), hf:OWNER/NAME, or files, "
        "folders and globs.",
        flag="data",
    )
    tokenizer: str | None = setting(
        None,
        "Tokenizer for the text; defaults to that of the prepared dataset, or char.",
        choices=discovery.names("tokenizers"),
    )
    vocab_size: Annotated[int, Field(ge=2, le=2**24)] | None = setting(
        None, "Vocabulary size of a trained bpe tokenizer, or the maximum for a word tokenizer."
    )
    vocabulary: list[str] | None = setting(
        None, "Characters of a char tokenizer in id order; defaults to the characters of the text, sorted."
    )
    unknown: Literal["add", "skip", "error"] | None = setting(
        None,
        "Characters missing from the vocabulary of the model to start from: add, skip or error; defaults "
        "to add.",
    )
    val_fraction: Annotated[float, Field(ge=0, lt=1)] = setting(
        0.1, "Fraction of the text, or of its documents, to hold out for validation."
    )
    split: Literal["end", "documents"] | None = setting(
        None,
        "What to hold out for validation: the end of the text, or documents chosen by a hash of their "
        "content; defaults to documents if there are ten to hold out.",
    )
    text_field: str = setting(
        "text", "Field of a JSON Lines record, or column of a Parquet file, that contains the text."
    )
    encoding: str = setting("utf-8", "Character encoding of the text files.")
    dedup: Literal["exact", "near"] | None = setting(
        None,
        "Drop documents that repeat an earlier one: exact (equal but for case and spaces), or near (also "
        "those that differ in a few words).",
    )

    @field_validator("tokenizer")
    @classmethod
    def _known_tokenizer(cls, value: str | None) -> str | None:
        return value if value is None else _registered("tokenizers", value)

    @field_validator("vocabulary")
    @classmethod
    def _distinct_characters(cls, value: list[str] | None) -> list[str] | None:
        if value is not None:
            if not value or any(len(c) != 1 for c in value):
                raise ValueError("must be a list of single characters")
            if len(set(value)) != len(value):
                raise ValueError("must not repeat a character")
        return value

    @field_validator("source")
    @classmethod
    def _some_source(cls, value: str | list[str]) -> str | list[str]:
        if not value or (isinstance(value, list) and "" in value):
            raise ValueError("must name at least one source, and no empty one")
        return value


class ModelConfig(Section):
    """The sizes of a GPT. Unset ones are derived from the others as soon as a config is read."""

    title: ClassVar[str] = "Model"

    block: str = setting(
        "modern", f"Transformer block: {blocks.summaries()}.", choices=discovery.names(blocks.PACKAGE)
    )
    n_layer: Annotated[int, Field(ge=0, le=2**31 - 1)] = setting(
        4, "Number of transformer blocks; 0 makes a bigram model."
    )
    n_head: Annotated[int, Field(ge=1, le=2**16)] = setting(4, "Number of attention heads per block.")
    n_kv_head: Annotated[int, Field(ge=1, le=2**16)] | None = setting(
        None,
        "Number of key and value heads, each shared by a group of query heads; defaults to n_head "
        f"({blocks.users('n_kv_head')} only).",
    )
    n_embd: _Width = setting(128, "Width of the embeddings and of the residual stream.")
    head_size: _Width | None = setting(None, "Width of one attention head; defaults to n_embd / n_head.")
    mlp_size: Annotated[int, Field(ge=1, le=2**22)] | None = setting(
        None,
        "Hidden width of the MLP; defaults to 4 n_embd, or with swiglu to 8/3 n_embd rounded up to a "
        "multiple of 32.",
    )
    block_size: Annotated[int, Field(ge=1, le=2**24)] = setting(128, "Context length in tokens.")
    vocab_size: Annotated[int, Field(ge=1, le=2**24)] | None = setting(
        None, "Rows of the embedding; defaults to the size of the tokenizer.", flag="model-vocab-size"
    )
    activation: str | None = setting(
        None,
        f"Activation of the MLP; defaults to {blocks.defaults('activation')}.",
        choices=blocks.activations(),
    )
    dropout: Annotated[float, Field(ge=0, lt=1)] = setting(
        0.0, "Probability of dropping an activation in training."
    )
    bias: bool = setting(False, f"Add biases to norms and linear layers ({blocks.users('bias')} only).")
    qkv_bias: bool | None = setting(
        None,
        "Add biases to the query, key and value projections; defaults to bias "
        f"({blocks.users('qkv_bias')} only).",
    )
    head_bias: bool = setting(
        False, f"Add a bias to the output head, if untied ({blocks.users('head_bias')} only)."
    )
    tie_embeddings: bool = setting(True, "Use the token embedding's weights for the output head.")
    attention_scale: Annotated[float, Field(gt=0, le=1e6)] | None = setting(
        None,
        "Factor on attention scores; defaults to head_size ** -0.5 "
        f"({blocks.users('attention_scale')} only).",
    )
    rope_theta: Annotated[float, Field(gt=1, le=1e9)] = setting(
        10000.0, f"Base period of the rotary positions ({blocks.users('rope_theta')} only)."
    )
    norm_eps: Annotated[float, Field(gt=0, le=1)] | None = setting(
        None, f"Epsilon of the norms; defaults to {blocks.defaults('norm_eps')}."
    )
    ngram: Annotated[int, Field(ge=0, le=16)] = setting(
        0,
        "Mix the network's prediction with counts of what followed this many tokens in the training text; "
        "0 does not.",
    )

    @field_validator("block")
    @classmethod
    def _known_block(cls, value: str) -> str:
        return _registered(blocks.PACKAGE, value)

    @model_validator(mode="wrap")
    @classmethod
    def _fill_in(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """Derive unset sizes, so that what is stored is what ran; model_fields_set stays what was given."""
        made = handler(cls._filled(data))
        if isinstance(data, dict):
            made.model_fields_set.intersection_update(k for k, v in data.items() if v is not None)
        return made

    @classmethod
    def _filled(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        data = {k: v for k, v in data.items() if v is not None}
        given = {k: f.default for k, f in cls.model_fields.items()} | data
        width, heads, block = given["n_embd"], given["n_head"], given["block"]
        if not (_positive(width) and _positive(heads)) or block not in discovery.names(blocks.PACKAGE):
            return data
        if width % heads and "head_size" not in data and given["n_layer"] != 0:
            raise _refused(
                f"'model.n_embd' = {width} is not divisible by 'model.n_head' = {heads}",
                f"set model.head_size={max(1, width // heads)}",
            )
        facts = blocks.facts(block)
        data = {
            "n_kv_head": heads,
            "head_size": max(1, width // heads),
            "qkv_bias": given["bias"],
            **facts.defaults,
            **data,
        }
        return {"mlp_size": facts.mlp_size(width, data["activation"]), **data}

    @model_validator(mode="after")
    def _fits_its_block(self) -> Self:
        facts = blocks.facts(self.block)
        if self.n_kv_head and self.n_head % self.n_kv_head:
            raise ValueError(
                f"'model.n_head' = {self.n_head} is not a multiple of 'model.n_kv_head' = {self.n_kv_head}"
            )
        if self.head_bias and self.tie_embeddings:
            raise _refused("'model.head_bias' requires an untied head", "set model.tie_embeddings=false")
        if self.activation not in facts.activations:
            raise _refused(
                f"block {self.block} has no activation {shorten(self.activation, 40)}: "
                f"choose {', '.join(facts.activations)}",
                _other_block(lambda f: self.activation in f.activations),
            )
        given = {
            "n_kv_head": self.n_kv_head != self.n_head,
            "bias": self.bias,
            "qkv_bias": bool(self.qkv_bias) and not self.bias,
            "head_bias": self.head_bias,
            "attention_scale": self.attention_scale is not None,
        }
        unsupported = {name for name, is_given in given.items() if is_given} - facts.settings
        if unsupported:
            names = ", ".join(f"'model.{name}'" for name in given if name in unsupported)
            raise _refused(
                f"block {self.block} does not support {names}",
                _other_block(lambda f: unsupported <= f.settings),
            )
        if why := facts.refusal(dict(self)):
            raise ValueError(why)
        return self

    def shape(self, vocab_size: int | None = None) -> Shape:
        """What these settings build, with nothing left unset.

        Args:
            vocab_size: Rows of the embedding where the setting is unset: the tokenizer's size.

        Raises:
            InputError: vocab_size is neither set nor given.
        """
        values = self.model_dump()
        if values["vocab_size"] is None:
            values["vocab_size"] = vocab_size
        if values["vocab_size"] is None:
            raise InputError(
                "'model.vocab_size' is unset",
                why="a model is built for the vocabulary of its tokenizer",
                hint="set model.vocab_size",
            )
        if values["attention_scale"] is None:
            values["attention_scale"] = 1 / math.sqrt(values["head_size"])
        return Shape(**values)


class TrainConfig(Section):
    """How a model is trained: batches, optimizer, schedule, evaluation, device."""

    title: ClassVar[str] = "Training"

    batch_size: _Count = setting(64, "Number of sequences per forward pass.")
    gradient_accumulation_steps: _Count = setting(
        1, "Number of forward passes whose gradients are summed for one optimizer step."
    )
    micro_batch_size: _Count | None = setting(
        None, "Maximum number of sequences of a batch to compute at once; defaults to as many as fit."
    )
    gradient_checkpointing: Literal["auto", "on", "off"] = setting(
        "auto",
        "Recompute activations for the backward pass instead of storing them; auto does if not even one "
        "sequence fits without.",
    )
    max_iters: Annotated[int, Field(ge=0, le=2**31 - 1)] = setting(
        2000, "Number of optimizer steps to train for."
    )
    optimizer: Literal["adamw", "muon"] = setting(
        "muon", "Optimizer: adamw, or muon for weight matrices and adamw for the rest."
    )
    learning_rate: _Rate = setting(3e-3, "Peak learning rate of AdamW.")
    muon_learning_rate: _Rate = setting(0.02, "Peak learning rate of Muon.")
    min_lr: _Rate = setting(0.0, "Final learning rate of AdamW; Muon's decays in proportion.")
    schedule: Literal["cosine", "linear", "trapezoidal", "constant"] = setting(
        "cosine",
        "Decay of the learning rate after warmup; trapezoidal (WSD) delays it to the end of the run.",
    )
    warmdown_ratio: Annotated[float, Field(gt=0, le=1)] = setting(
        0.2, "Fraction of the run, at its end, in which a trapezoidal schedule decays linearly."
    )
    warmup_iters: Annotated[int, Field(ge=0, le=2**31 - 1)] = setting(
        100, "Number of steps over which the learning rate rises to its peak."
    )
    lr_decay_iters: _Count | None = setting(
        None, "Step at which the learning rate reaches min_lr; defaults to max_iters."
    )
    weight_decay: _Rate = setting(0.1, "Weight decay of matrices; vectors are not decayed.")
    embedding_weight_decay: _Rate | None = setting(
        None, "Weight decay of the embeddings, and of a tied output head; defaults to weight_decay."
    )
    head_weight_decay: _Rate | None = setting(
        None, "Weight decay of the output head, if untied; defaults to weight_decay."
    )
    weight_decay_schedule: Literal["constant", "linear", "cosine"] = setting(
        "constant", "Course of the weight decay over the run: constant, or falling to 0."
    )
    cautious_weight_decay: bool = setting(
        False, "Decay only weights that the update does not move away from zero."
    )
    beta1: Annotated[float, Field(ge=0, lt=1)] = setting(
        0.9, "AdamW's decay rate for the running mean of gradients."
    )
    beta2: Annotated[float, Field(ge=0, lt=1)] = setting(
        0.99, "AdamW's decay rate for the running mean of squared gradients."
    )
    muon_momentum: Annotated[float, Field(ge=0, lt=1)] = setting(0.95, "Momentum of Muon.")
    muon_coefficients: Literal["quintic", "polar_express"] = setting(
        "quintic",
        "Polynomials that orthogonalize Muon's updates: quintic in bfloat16, as in PyTorch, or the more "
        "exact polar_express in the run's precision.",
    )
    muon_scale: Literal["original", "match_rms_adamw", "spectral"] = setting(
        "original",
        "Factor on Muon's updates: original is sqrt(max(1, out/in)), match_rms_adamw 0.2 sqrt(max(out, in)), "
        "spectral sqrt(out/in).",
    )
    grad_clip: _Rate = setting(1.0, "Maximum norm of the gradients; 0 turns clipping off.")
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = setting(
        0.0,
        "Decay rate of a moving average of the weights, published if it has the lower loss; 0 keeps none.",
    )
    calibrate: bool = setting(
        False,
        "At each evaluation, find the temperature of the logits with the lowest loss; the published weights "
        "include it.",
    )
    token_dropout: Annotated[float, Field(ge=0, lt=1)] = setting(
        0.0, "Probability of hiding an input token from the model in training."
    )
    masked_loss_weight: _Rate = setting(
        0.0, "Weight of a second loss on input with hidden tokens, which doubles the computation; 0 for none."
    )
    masked_loss_max: Annotated[float, Field(gt=0, le=1)] = setting(
        0.5, "Maximum fraction of a sequence's tokens to hide for the second loss."
    )
    teacher: list[str] = setting(
        [], "Models to learn from as well: references, or hf:REPOSITORY; their probabilities are averaged."
    )
    teacher_weight: _Fraction = setting(
        0.45, "Weight of the teachers in the objective; the text has the rest."
    )
    teacher_temperature: Annotated[float, Field(gt=0, le=100)] = setting(
        1.2, "Divisor of the logits of teachers and student when they are compared."
    )
    eval_interval: _Count = setting(
        250, "Number of steps between evaluations; a resume state is saved at each."
    )
    holdout: Annotated[float, Field(ge=0, lt=1)] = setting(
        0.0,
        "Fraction of the training split, taken from its end, to evaluate on instead of the validation split.",
    )
    eval_iters: _Count | None = setting(
        None, "Number of batches per evaluation; defaults to the whole validation split."
    )
    log_interval: _Count = setting(10, "Number of steps between lines of metrics.jsonl.")
    sample_every: _Count | None = setting(
        None, "Number of steps between short samples of the current weights; defaults to never."
    )
    patience: _Count | None = setting(
        None, "Stop after this many evaluations without a better validation loss; defaults to never."
    )
    keep_states: Annotated[int, Field(ge=2, le=1000)] = setting(2, "Number of resume states to keep.")
    weights_dtype: Literal["float32", "bfloat16", "float16"] = setting(
        "float32", "Precision of the published weights."
    )
    init_from: str | None = setting(
        None, "Model to start from: a reference, or hf:REPOSITORY from the Hugging Face Hub.", flag="from"
    )
    seed: _Seed = setting(1337, "Seed of the initial weights, the batches and dropout.")
    device: Annotated[str, Field(pattern=_DEVICE)] = setting(
        "auto", "Device to train on: auto, cpu, cuda, cuda:N or mps."
    )
    sharding: Literal["auto", "off", "full"] = setting(
        "auto",
        "Whether the processes that share a run divide weights, gradients and optimizer state (full) or each "
        "have all of them (off); auto divides what does not fit on one device.",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = setting(
        "auto", "Precision of the computation; auto picks the fastest by measuring. Weights stay float32."
    )
    deterministic: bool = setting(
        True,
        "Repeat and resume a run on CUDA bit for bit, which takes up to an eighth of its time; a CPU does so "
        "anyway.",
    )
    compile: Literal["auto", "on", "off"] = setting(
        "auto", "Compile the model with torch.compile; auto tries it in long runs and keeps it if faster."
    )

    @field_validator("device", mode="before")
    @classmethod
    def _known_device(cls, value: Any) -> Any:
        if isinstance(value, str) and not re.fullmatch(_DEVICE, value):
            raise ValueError("choose auto, cpu, cuda, cuda:N, mps")
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.min_lr > self.learning_rate:
            raise _refused(
                f"'train.min_lr' = {self.min_lr} is above 'train.learning_rate' = {self.learning_rate}",
                f"set train.min_lr={self.learning_rate / 10:g}",
            )
        if self.compile == "on" and self.gradient_checkpointing == "on":
            raise _refused(
                "'train.compile' = 'on' and 'train.gradient_checkpointing' = 'on' exclude each other",
                "set train.compile=off",
            )
        return self


class RunConfig(Section):
    """A whole run: what a config file contains, and what is stored with the trained model."""

    schema_: str | None = Field(None, alias="$schema", description="Location of this file's JSON Schema.")
    schema_version: int = Field(SCHEMA_VERSION, ge=1, description="Version of this layout.")
    name: str | None = Field(None, description="Name of the model; defaults to the name of the file.")
    data: DataConfig = Field(default_factory=DataConfig, description=f"{DataConfig.__doc__}")
    model: ModelConfig = Field(default_factory=ModelConfig, description="The sizes of the model.")
    train: TrainConfig = Field(default_factory=TrainConfig, description=f"{TrainConfig.__doc__}")

    def to_dict(self) -> dict[str, Any]:
        """The JSON object that reads back as an equal config."""
        return self.model_dump(by_alias=True, exclude={"schema_"})


class SampleConfig(Section):
    """How text is sampled from a model."""

    title: ClassVar[str] = "Sampling"

    max_new_tokens: Annotated[int, Field(ge=0, le=2**31 - 1)] = setting(
        500, "Maximum number of tokens to generate."
    )
    temperature: Annotated[float, Field(ge=0, le=1000)] = setting(
        0.8, "Divisor of the logits: lower is more predictable, 0 always picks the likeliest token."
    )
    top_k: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = setting(
        None, "Sample from the k likeliest tokens."
    )
    top_p: Annotated[float, Field(gt=0, le=1)] | None = setting(
        None, "Sample from the fewest tokens whose probabilities add up to this."
    )
    min_p: _Fraction | None = setting(
        None, "Skip tokens less likely than this fraction of the likeliest token's probability."
    )
    repetition_penalty: Annotated[float, Field(gt=0, le=1000)] = setting(
        1.0, "Penalty on tokens already in the text; above 1 makes them less likely."
    )
    num_samples: Annotated[int, Field(ge=1, le=2**20)] = setting(1, "Number of samples to generate.")
    seed: _Seed | None = setting(None, "Seed of the random numbers; defaults to a different one each time.")
    stop: list[str] = setting(
        [], "Text that ends a sample and is left out of it; give several for any of them."
    )


class ServeConfig(Section):
    """How models are served over HTTP."""

    title: ClassVar[str] = "Server"

    host: str = setting("127.0.0.1", "Address to listen on; all but this machine's own need a key file.")
    port: Annotated[int, Field(ge=0, le=65535)] = setting(8000, "Port to listen on; 0 takes a free one.")
    api_key_file: str | None = setting(
        None, "File with the keys that clients send, one a line; readable by its owner alone."
    )
    allow_host: list[str] = setting([], "Name that clients may call this server by; give several for any.")
    cors_origin: list[str] = setting(
        [],
        "Origin of a web page that may call this server, such as https://example.org; give several for any.",
    )
    open_metrics: bool = setting(False, "Show metrics without a key.")
    max_models: Annotated[int, Field(ge=1, le=1000)] = setting(4, "Most models in memory at once.")
    max_memory: Annotated[float, Field(gt=0, le=2**20)] | None = setting(
        None, "Most memory for models and their caches, in GiB; unlimited if unset."
    )
    keep_alive: Annotated[float, Field(ge=0, le=2**31)] = setting(
        300.0, "Seconds after which an unused model leaves memory."
    )
    load_wait: Annotated[float, Field(ge=0, le=3600)] = setting(
        20.0, "Seconds that a request waits for its model to load."
    )
    slots: Annotated[int, Field(ge=1, le=256)] = setting(
        32, "Most samples that a model generates side by side; fewer if memory is short."
    )
    max_queue: Annotated[int, Field(ge=0, le=100_000)] = setting(64, "Most requests that wait for a slot.")
    queue_timeout: Annotated[float, Field(gt=0, le=3600)] = setting(
        30.0, "Seconds that a request waits for a slot."
    )
    max_tokens: Annotated[int, Field(ge=1, le=2**20)] = setting(
        4096, "Most tokens that a request may ask for in each sample."
    )
    max_body: Annotated[int, Field(ge=1024, le=2**30)] = setting(2**20, "Most bytes of a request's body.")
    drain: Annotated[float, Field(ge=0, le=3600)] = setting(
        10.0, "Seconds that running requests have to end after the server was told to."
    )


SECTIONS: dict[str, type[Section]] = {"data": DataConfig, "model": ModelConfig, "train": TrainConfig}


def _registered(package: str, name: str) -> str:
    known = discovery.names(package)
    if name not in known:
        raise ValueError(f"choose {', '.join(known)}")
    return name


def _positive(value: Any) -> bool:
    return type(value) is int and 0 < value < 2**31


def _refused(why: str, hint: str) -> PydanticCustomError:
    """A refusal that comes with what to do about it."""
    return PydanticCustomError("refused", "{why}", {"why": why, "hint": hint})


def _other_block(fits: Callable[[BlockFacts], bool]) -> str:
    """The setting of a block that fits, or nothing where none does."""
    found = next((name for name, facts in blocks.all_facts().items() if fits(facts)), None)
    return f"set model.block={found}" if found else ""
