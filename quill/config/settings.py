"""Every setting of a run, declared once: name, type, default, bounds, unit and help.

The command line's flags, its `--help`, the JSON Schema and the README's table are made from these
fields. Names are those that GPT-2 and nanoGPT made standard. Free of torch.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from quill import discovery

SCHEMA_VERSION = 1

# Wide enough for any model that can be held, narrow enough that sizes never overflow 64 bits.
_Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
_Width = Annotated[int, Field(ge=1, le=2**20)]
_Share = Annotated[float, Field(ge=0, le=1)]
_Rate = Annotated[float, Field(ge=0, le=100)]
_Seed = Annotated[int, Field(ge=0, le=2**63 - 1)]


def setting(default: Any, help: str, *, flag: str | None = None) -> Any:
    """Declare one setting.

    Args:
        default: Its value when neither file nor flag gives one.
        help: One line for `--help`, the schema and the README.
        flag: The flag's name, where it is not the field's.
    """
    extra = {"flag": flag} if flag else None
    return Field(default, description=help, json_schema_extra=extra)  # type: ignore[arg-type]


class Section(BaseModel):
    """A group of settings: strict types, no unknown keys, finite numbers, immutable."""

    model_config = ConfigDict(
        strict=True, extra="forbid", allow_inf_nan=False, frozen=True, validate_default=True
    )

    title: ClassVar[str] = ""


class DataConfig(Section):
    """Which text, and how it becomes tokens."""

    title: ClassVar[str] = "Data"

    source: str | list[str] = setting(
        "harpoon",
        "A prepared dataset, a named source (harpoon, shakespeare), or files, folders and globs",
        flag="data",
    )
    tokenizer: str | None = setting(
        None, "How text becomes tokens; unset: the prepared dataset's own, else char"
    )
    vocab_size: Annotated[int, Field(ge=2, le=2**24)] | None = setting(
        None, "Size of a trained bpe vocabulary, or the cap on a word vocabulary"
    )
    vocabulary: list[str] | None = setting(
        None, "The characters of a char tokenizer in the order of their ids; unset: sorted from the text"
    )
    val_fraction: Annotated[float, Field(ge=0, lt=1)] = setting(
        0.1, "Share of the text, from its end, kept for validation"
    )
    text_field: str = setting("text", "Field that holds the text in JSON lines")
    encoding: str = setting("utf-8", "Character encoding of the text files")

    @field_validator("tokenizer")
    @classmethod
    def _known_tokenizer(cls, value: str | None) -> str | None:
        return value if value is None else _registered("tokenizers", value)

    @field_validator("vocabulary")
    @classmethod
    def _distinct_characters(cls, value: list[str] | None) -> list[str] | None:
        if value is not None:
            if not value or any(len(c) != 1 for c in value):
                raise ValueError("every entry is one character, and there is at least one")
            if len(set(value)) != len(value):
                raise ValueError("a character has two ids")
        return value

    @field_validator("source")
    @classmethod
    def _some_source(cls, value: str | list[str]) -> str | list[str]:
        if not value or (isinstance(value, list) and "" in value):
            raise ValueError("it names no text")
        return value


class ModelConfig(Section):
    """The shape of a GPT. Unset sizes are filled in from the others as soon as it is read."""

    title: ClassVar[str] = "Model"

    block: str = setting("modern", "Block family: gpt2 (GPT-2, nanoGPT, QuillGPT) or modern (Qwen3)")
    n_layer: Annotated[int, Field(ge=0, le=2**31 - 1)] = setting(4, "Blocks; 0 is a bigram model")
    n_head: Annotated[int, Field(ge=1, le=2**16)] = setting(4, "Attention heads of a block")
    n_kv_head: Annotated[int, Field(ge=1, le=2**16)] | None = setting(
        None, "Heads of keys and values, shared by groups of query heads; unset: n_head (modern)"
    )
    n_embd: _Width = setting(128, "Width of the residual stream")
    head_size: _Width | None = setting(None, "Width of one head; unset: n_embd / n_head")
    mlp_size: Annotated[int, Field(ge=1, le=2**22)] | None = setting(
        None, "Hidden width of the MLP; unset: 4 n_embd, for swiglu 8/3 n_embd in steps of 32"
    )
    block_size: Annotated[int, Field(ge=1, le=2**24)] = setting(128, "Context length, in tokens")
    vocab_size: Annotated[int, Field(ge=1, le=2**24)] | None = setting(
        None, "Rows of the embedding; unset: the tokenizer's size", flag="model-vocab-size"
    )
    activation: Literal["gelu", "gelu_tanh", "relu", "relu2", "swiglu"] | None = setting(
        None, "MLP's nonlinearity; unset: gelu (gpt2), swiglu (modern)"
    )
    dropout: Annotated[float, Field(ge=0, lt=1)] = setting(0.0, "Share of activations dropped in training")
    bias: bool = setting(False, "Biases in LayerNorms and linear layers (gpt2)")
    qkv_bias: bool | None = setting(None, "Biases of query, key and value; unset: as bias (gpt2)")
    head_bias: bool = setting(False, "Bias of an untied output head (gpt2)")
    tie_embeddings: bool = setting(True, "Output head shares the token embedding's weights")
    attention_scale: Annotated[float, Field(gt=0, le=1e6)] | None = setting(
        None, "Factor on attention scores; unset: head_size ** -0.5 (gpt2)"
    )
    rope_theta: Annotated[float, Field(gt=1, le=1e9)] = setting(
        10000.0, "Base period of the rotary positions (modern)"
    )
    norm_eps: Annotated[float, Field(gt=0, le=1)] | None = setting(
        None, "Epsilon of the norms; unset: 1e-5 (gpt2), 1e-6 (modern)"
    )

    @field_validator("block")
    @classmethod
    def _known_block(cls, value: str) -> str:
        return _registered("model.blocks", value)

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, data: Any) -> Any:
        """Derive unset sizes, so that what is stored is what ran."""
        if not isinstance(data, dict):
            return data
        data = {k: v for k, v in data.items() if v is not None}
        defaults = {k: f.default for k, f in cls.model_fields.items()}
        got = {**defaults, **data}
        gpt2 = got["block"] == "gpt2"
        width, heads = got["n_embd"], got["n_head"]
        if not (_whole(width) and _whole(heads)):
            return data
        fill: dict[str, Any] = {
            "n_kv_head": heads,
            "activation": "gelu" if gpt2 else "swiglu",
            "norm_eps": 1e-5 if gpt2 else 1e-6,
            "qkv_bias": got["bias"],
        }
        if width % heads == 0:
            fill["head_size"] = width // heads
        elif "head_size" not in data and got["n_layer"] != 0:
            raise ValueError(
                f"n_embd {width} is not divisible by n_head {heads}: "
                f"set head_size (such as {max(1, width // heads)}) or another n_embd"
            )
        else:
            fill["head_size"] = max(1, width // heads)
        size = 8 * width // 3 if data.get("activation", fill["activation"]) == "swiglu" else 4 * width
        fill["mlp_size"] = -(-size // 32) * 32 if size != 4 * width else size
        return {**fill, **data}

    @model_validator(mode="after")
    def _fits_its_block(self) -> Self:
        if self.n_kv_head and self.n_head % self.n_kv_head:
            raise ValueError(f"n_head {self.n_head} is not a multiple of n_kv_head {self.n_kv_head}")
        if self.head_bias and self.tie_embeddings:
            raise ValueError("head_bias needs tie_embeddings: false")
        if self.block == "gpt2":
            if self.activation == "swiglu":
                raise ValueError(
                    "block gpt2 has no swiglu: use block modern, or gelu, gelu_tanh, relu, relu2"
                )
            if self.n_kv_head != self.n_head:
                raise ValueError("block gpt2 has as many key and value heads as n_head")
        if self.block == "modern":
            if self.bias or self.qkv_bias or self.head_bias or self.attention_scale:
                raise ValueError(
                    "block modern has no bias, qkv_bias, head_bias or attention_scale: use block gpt2"
                )
            if self.head_size and self.head_size % 2:
                raise ValueError(f"rotary positions need an even head_size, not {self.head_size}")
        return self


class TrainConfig(Section):
    """How the model is fitted: optimizer, schedule, evaluation, machine."""

    title: ClassVar[str] = "Training"

    batch_size: _Count = setting(64, "Sequences in one forward pass")
    gradient_accumulation_steps: _Count = setting(1, "Forward passes summed into one step")
    max_iters: Annotated[int, Field(ge=0, le=2**31 - 1)] = setting(2000, "Optimizer steps")
    optimizer: Literal["adamw", "muon"] = setting(
        "muon", "adamw, or muon for the matrices with adamw for the rest"
    )
    learning_rate: _Rate = setting(3e-3, "Peak rate of adamw")
    muon_learning_rate: _Rate = setting(0.02, "Peak rate of muon")
    min_lr: _Rate = setting(0.0, "Rate of adamw at the end; muon's falls in proportion")
    schedule: Literal["cosine", "linear", "constant"] = setting("cosine", "How the rate falls after warmup")
    warmup_iters: Annotated[int, Field(ge=0, le=2**31 - 1)] = setting(100, "Steps in which the rate rises")
    lr_decay_iters: _Count | None = setting(None, "Step at which the rate reaches min_lr; unset: max_iters")
    weight_decay: _Rate = setting(0.1, "Decay of matrices; vectors have none")
    beta1: Annotated[float, Field(ge=0, lt=1)] = setting(0.9, "AdamW's first momentum")
    beta2: Annotated[float, Field(ge=0, lt=1)] = setting(0.99, "AdamW's second momentum")
    muon_momentum: Annotated[float, Field(ge=0, lt=1)] = setting(0.95, "Muon's momentum")
    grad_clip: _Rate = setting(1.0, "Largest gradient norm; 0 does not clip")
    eval_interval: _Count = setting(250, "Steps between evaluations; each also saves a resume state")
    eval_iters: _Count | None = setting(
        None, "Batches of one evaluation; unset: the whole validation split, every token once"
    )
    log_interval: _Count = setting(10, "Steps between lines of metrics.jsonl")
    patience: _Count | None = setting(
        None, "Evaluations without a better validation loss before stopping; unset: never"
    )
    keep_states: Annotated[int, Field(ge=2, le=1000)] = setting(2, "Resume states kept")
    weights_dtype: Literal["float32", "bfloat16", "float16"] = setting(
        "float32", "Precision of the published weights"
    )
    init_from: str | None = setting(
        None, "A model to start from: of the registry, or hf:REPOSITORY", flag="from"
    )
    seed: _Seed = setting(1337, "Seed of weights, batches and dropout")
    device: Annotated[str, Field(pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")] = setting(
        "auto", "auto, cpu, cuda, cuda:N or mps"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = setting(
        "auto", "Precision of the arithmetic; auto measures, weights stay float32"
    )
    compile: Literal["auto", "on", "off"] = setting(
        "auto", "torch.compile; auto tries it in runs long enough to gain, and measures"
    )

    @model_validator(mode="after")
    def _rates_in_order(self) -> Self:
        if self.min_lr > self.learning_rate:
            raise ValueError(f"min_lr {self.min_lr} is above learning_rate {self.learning_rate}")
        return self


class RunConfig(Section):
    """A whole run: what a config file holds, and what is stored with the model it made."""

    schema_: str | None = Field(None, alias="$schema", description="Where the JSON Schema of this file is")
    schema_version: int = Field(SCHEMA_VERSION, description="Version of this layout")
    name: str | None = Field(None, description="The model's name; unset: the file's name")
    data: DataConfig = Field(default_factory=DataConfig, description="Which text")
    model: ModelConfig = Field(default_factory=ModelConfig, description="Which model")
    train: TrainConfig = Field(default_factory=TrainConfig, description="How it is fitted")

    @field_validator("schema_version")
    @classmethod
    def _known_schema(cls, value: int) -> int:
        if value > SCHEMA_VERSION:
            raise ValueError(f"a newer quill wrote it; this one reads up to {SCHEMA_VERSION}: upgrade quill")
        if value < 1:
            raise ValueError("versions start at 1")
        return value

    def to_dict(self) -> dict[str, Any]:
        """The JSON object that reads back as an equal config."""
        return self.model_dump(by_alias=True, exclude={"schema_"})


class SampleConfig(Section):
    """How text is drawn from a model."""

    title: ClassVar[str] = "Sampling"

    max_new_tokens: Annotated[int, Field(ge=0, le=2**31 - 1)] = setting(500, "Tokens to draw at the most")
    temperature: Annotated[float, Field(ge=0, le=1000)] = setting(
        0.8, "Divides the logits; 0 always takes the likeliest token"
    )
    top_k: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = setting(
        None, "Draw from the k likeliest tokens"
    )
    top_p: Annotated[float, Field(gt=0, le=1)] | None = setting(
        None, "Draw from the fewest tokens with this much probability"
    )
    min_p: _Share | None = setting(None, "Drop tokens below this share of the likeliest one's probability")
    repetition_penalty: Annotated[float, Field(gt=0, le=1000)] = setting(
        1.0, "Above 1 makes tokens already in the text less likely"
    )
    num_samples: Annotated[int, Field(ge=1, le=2**20)] = setting(1, "Texts to draw")
    seed: _Seed | None = setting(None, "Makes the draw repeatable; unset: a fresh one each time")
    stop: list[str] = setting([], "Texts that end a sample when they appear")


SECTIONS: dict[str, type[Section]] = {"data": DataConfig, "model": ModelConfig, "train": TrainConfig}


def _registered(package: str, name: str) -> str:
    known = discovery.names(package)
    if name not in known:
        raise ValueError(f"there is {', '.join(known)}")
    return name


def _whole(value: Any) -> bool:
    return type(value) is int and value > 0
