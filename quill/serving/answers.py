"""What the routes answer, for the OpenAPI document; tests compare the answers, which the server does not."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel

Finish = Literal["stop", "length"]


class Usage(BaseModel):
    """How many tokens were read and generated."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Scores(BaseModel):
    """The log probabilities of a sample's tokens, in lists of equal length."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]
    top_token_ids: list[dict[str, int] | None] | None = None


class CompletionChoice(BaseModel):
    """One sample, or what is new in one."""

    index: int
    text: str
    logprobs: Scores | None
    finish_reason: Finish | None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None


class Head(BaseModel):
    """What every answer with text begins with."""

    id: str
    created: int
    model: str
    system_fingerprint: str


class Completion(Head):
    """The answer of /v1/completions, and each event of its streams."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]
    usage: Usage | None = None


class Likely(BaseModel):
    """A token and its log probability."""

    token: str
    bytes: list[int]
    logprob: float | None


class Scored(Likely):
    """A token of a sample."""

    top_logprobs: list[Likely]


class ChatScores(BaseModel):
    """The log probabilities of a sample's tokens."""

    content: list[Scored]


class Spoken(BaseModel):
    """A message of the model."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(BaseModel):
    """One sample."""

    index: int
    message: Spoken
    logprobs: ChatScores | None
    finish_reason: Finish | None


class ChatCompletion(Head):
    """The answer of /v1/chat/completions."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: Usage


class Delta(BaseModel):
    """What is new in a message."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatDelta(BaseModel):
    """What is new in one sample."""

    index: int
    delta: Delta
    logprobs: ChatScores | None
    finish_reason: Finish | None


class ChatChunk(Head):
    """An event of a stream of /v1/chat/completions."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChatDelta]
    usage: Usage | None = None


class ModelFacts(BaseModel):
    """What only quill says of a model."""

    reference: str
    digest: str | None
    parameters: int | None
    block: str | None
    layers: int | None
    val_loss: float | None
    loaded: bool


class Model(BaseModel):
    """A model."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: Literal["quill"]
    max_model_len: int | None
    quill: ModelFacts


class Models(BaseModel):
    """The models."""

    object: Literal["list"]
    data: list[Model]


class Tokens(BaseModel):
    """The answer of /tokenize."""

    tokens: list[int]
    count: int
    skipped: int
    max_model_len: int | None = None


class Text(BaseModel):
    """The answer of /detokenize."""

    prompt: str


class TokenizerInfo(BaseModel):
    """The answer of /tokenizer_info."""

    tokenizer_class: str
    vocab_size: int
    model_max_length: int
    bos_token: str | None
    eos_token: str | None
    pad_token: None
    chat_template: None


class Generated(BaseModel):
    """The answer of /generate."""

    prompt: str
    response: str


class State(BaseModel):
    """The answer of /health and /ready."""

    status: Literal["ok", "ready"]


class Greeting(BaseModel):
    """The answer of / to programs."""

    message: str
    version: str


class ErrorFacts(BaseModel):
    """What is wrong with a request."""

    message: str
    type: str
    param: str | None
    code: str | None


class Error(BaseModel):
    """The answer to a request that is refused."""

    error: ErrorFacts
