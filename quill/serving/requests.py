"""The bodies of requests: every field declared once, with its bounds.

Clients differ in what they send, so null means that a field is not given, and unknown fields are ignored.
Everything is bounded here, before anything is computed or allocated.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import CoreSchema

from quill.config.settings import SampleConfig
from quill.errors import shorten
from quill.serving.errors import ApiError, invalid

# The most samples of one request: prompts times n.
MOST_ROWS = 128
_MOST_N = 16
_MOST_LOGPROBS = 20
_MOST_BIASES = 300
_NULL = {"type": "null"}


def _whole(value: Any) -> Any:
    # JavaScript has one kind of number.
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _flag(value: Any) -> Any:
    return {True: 1, False: None}[value] if isinstance(value, bool) else _whole(value)


_WHOLE = BeforeValidator(_whole)
# Bounds come first: behind a validator they would not be in the schema.
_Size = Annotated[int, Field(ge=0, le=2**31 - 1), _WHOLE]
_Likeliest = Annotated[int, Field(ge=0, le=_MOST_LOGPROBS)]
_Stop = Annotated[str, Field(min_length=1, max_length=256)]
_Stops = Annotated[list[_Stop], Field(max_length=16, fail_fast=True)]
_Id = Annotated[int, Field(ge=0, lt=2**31), _WHOLE]
# A list of errors that is as long as the body would take seconds to write.
_Ids = Annotated[list[_Id], Field(max_length=2**20, fail_fast=True)]
_Prompts = Annotated[list[_Ids], Field(fail_fast=True)]
_Text = Annotated[str, Field(max_length=2**24)]
_Texts = Annotated[list[_Text], Field(fail_fast=True)]


class Request(BaseModel):
    """The body of a request."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False, frozen=True)

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        """Every field that may be left out may be null."""
        made = handler(core_schema)
        schema = handler.resolve_ref_schema(made)
        for name in schema["properties"].keys() - set(schema.get("required", ())):
            field = schema["properties"][name]
            kept = {k: field.pop(k) for k in ("title", "description", "default") if k in field}
            forms = field.pop("anyOf", None) or [field]
            schema["properties"][name] = {"anyOf": [f for f in forms if f != _NULL] + [_NULL], **kept}
        return made

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, value: Any) -> Any:
        return {k: v for k, v in value.items() if v is not None} if isinstance(value, Mapping) else value


class StreamOptions(Request):
    """What a stream contains besides text."""

    include_usage: bool = Field(False, description="Send the usage in a last chunk.")
    continuous_usage_stats: bool = Field(False, description="Send the usage in every chunk.")


class Drawing(Request):
    """A model, and how its next token is drawn."""

    model: str | None = Field(None, max_length=300, description="Name, name:vN or name:ALIAS of a model.")
    temperature: float = Field(1.0, ge=0, le=1000, description="0 always picks the likeliest token.")
    top_p: float = Field(1.0, ge=0, le=1, description="As in `quill sample`; 0 is greedy.")
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1), _WHOLE] | None = Field(
        None, description="0 and -1 keep every token."
    )
    min_p: float | None = Field(None, ge=0, le=1, description="As in `quill sample`.")
    repetition_penalty: float = Field(1.0, gt=0, le=1000, description="As in `quill sample`.")

    def drawing(self) -> dict[str, Any]:
        """These as settings of `quill sample`."""
        return {
            "temperature": 0.0 if self.top_p == 0 else float(self.temperature),
            "top_k": self.top_k if self.top_k and self.top_k > 0 else None,
            "top_p": float(self.top_p) if 0 < self.top_p < 1 else None,
            "min_p": self.min_p,
            "repetition_penalty": float(self.repetition_penalty),
        }


class Sampling(Drawing):
    """What completions and chats have in common."""

    default_tokens: ClassVar[int] = 16

    n: Annotated[int, Field(ge=1, le=_MOST_N), _WHOLE] = Field(1, description="Samples for each prompt.")
    presence_penalty: float = Field(0.0, ge=-2, le=2, description="Only 0 is supported.")
    frequency_penalty: float = Field(0.0, ge=-2, le=2, description="Only 0 is supported.")
    logit_bias: dict[str, float] = Field({}, max_length=_MOST_BIASES, description="Only {} is supported.")
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1), _WHOLE] | None = Field(
        None, description="The same seed gives the same samples, up to rounding."
    )
    stop: Annotated[_Stops, BeforeValidator(_listed, _Stop | _Stops)] = Field(
        [], description="Text or texts that end a sample, and are not part of it."
    )
    stream: bool = Field(False, description="Send chunks as they are generated.")
    stream_options: StreamOptions = StreamOptions.model_validate({})
    ignore_eos: bool = Field(False, description="Continue after an end-of-text token.")

    @field_validator("logit_bias", mode="before")
    @classmethod
    def _few(cls, value: Any) -> Any:
        if isinstance(value, dict) and len(value) > _MOST_BIASES:
            raise invalid(f"logit_bias has more than {_MOST_BIASES} entries", "logit_bias")
        return value

    @model_validator(mode="after")
    def _supported(self) -> Self:
        for name in ("presence_penalty", "frequency_penalty", "logit_bias"):
            if getattr(self, name):
                raise invalid(f"{name} is not supported", name, "unsupported_parameter")
        return self

    def config(self, max_tokens: int) -> SampleConfig:
        """The settings of the samples."""
        return SampleConfig(
            **self.drawing(),
            max_new_tokens=max_tokens,
            # OpenAI has negative seeds too.
            seed=None if self.seed is None else self.seed % 2**63,
            stop=list(self.stop),
        )


class CompletionRequest(Sampling):
    """The body of /v1/completions."""

    prompt: _Text | _Texts | _Ids | _Prompts = Field(
        "", description="Text, texts, token ids, or lists of token ids."
    )
    max_tokens: _Size = Field(
        16, description="Most tokens to generate; 0 with echo and logprobs scores the prompt."
    )
    best_of: Annotated[int, Field(ge=0, le=20), _WHOLE] | None = Field(
        None, description="Only n is supported."
    )
    echo: bool = Field(False, description="Put the prompt before the completion.")
    logprobs: Annotated[_Likeliest | None, BeforeValidator(_flag, bool | _Likeliest)] = Field(
        None, description="Log probabilities of the tokens, and of so many of the likeliest."
    )
    suffix: str | None = Field(None, max_length=2**20, description="Not supported.")
    return_tokens_as_token_ids: bool = Field(False, description="Write tokens as `token_id:N`.")
    return_token_ids: bool = Field(
        False, description="Add the ids of the prompt, of the tokens and, with logprobs, of the likeliest."
    )

    @field_validator("prompt", mode="before")
    @classmethod
    def _whole_ids(cls, value: Any) -> Any:
        if isinstance(value, list) and len(value) > MOST_ROWS and not isinstance(value[0], int | float):
            raise invalid(f"there are {len(value):,} prompts; at most {MOST_ROWS} are allowed", "prompt")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.best_of not in (None, 0, 1, self.n):
            raise invalid("best_of is not supported", "best_of", "unsupported_parameter")
        if self.suffix:
            raise invalid("suffix is not supported", "suffix", "unsupported_parameter")
        if len(self.prompts) * self.n > MOST_ROWS:
            raise invalid(
                f"{len(self.prompts)} prompts of {self.n} samples are more than {MOST_ROWS} samples", "n"
            )
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, each a text or token ids."""
        given: Any = self.prompt
        if isinstance(given, str) or (given and isinstance(given[0], int)):
            return [given]
        return list(given) or [""]


class TextPart(Request):
    """A part of a message."""

    type: Literal["text"]
    text: _Text


class Message(Request):
    """One message of a chat."""

    role: str = Field(max_length=64)
    content: _Text | Annotated[list[TextPart], Field(max_length=1000)] = ""

    @property
    def text(self) -> str:
        """The text of all parts."""
        return self.content if isinstance(self.content, str) else "".join(p.text for p in self.content)


class ChatRequest(Sampling):
    """The body of /v1/chat/completions.

    The model continues the contents of the messages, joined by newlines; there are no roles and no template.
    """

    messages: list[Message] = Field(min_length=1, max_length=1000)
    max_tokens: _Size | None = None
    max_completion_tokens: _Size | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=_MOST_LOGPROBS), _WHOLE] = 0
    tools: list[Any] = Field([], max_length=0, description="Not supported.")
    response_format: dict[str, Any] = Field({}, description='Only {"type": "text"} is supported.')

    @model_validator(mode="after")
    def _plain(self) -> Self:
        if self.response_format.get("type", "text") != "text":
            raise invalid("response_format is not supported", "response_format", "unsupported_parameter")
        return self

    @property
    def limit(self) -> int:
        """The most tokens to generate. Programs for chats often give none."""
        for given in (self.max_completion_tokens, self.max_tokens):
            if given is not None:
                return given
        return 256

    @property
    def text(self) -> str:
        """The prompt."""
        return "\n".join(m.text for m in self.messages)


class TokenizeRequest(Request):
    """The body of /tokenize."""

    model: str | None = Field(None, max_length=300)
    prompt: _Text


class DetokenizeRequest(Request):
    """The body of /detokenize."""

    model: str | None = Field(None, max_length=300)
    tokens: _Ids


class ExplainRequest(Drawing):
    """The body of /v1/quill/explain."""

    prompt: _Text = Field("", description="The text, of which the last tokens are explained.")
    last: Annotated[int, Field(ge=1, le=128), _WHOLE] = Field(
        64, description="Most tokens to explain; fewer of a large model."
    )


class GenerateRequest(Request):
    """The parameters of /generate and /generate_stream, in the query or in the body."""

    model: str | None = Field(None, max_length=300)
    prompt: _Text
    max_length: _Size = Field(500, description="Most tokens to generate.")
    temperature: float = Field(0.7, ge=0, le=1000)
    top_k: Annotated[int, Field(ge=1, le=2**31 - 1), _WHOLE] | None = None
    seed: Annotated[int, Field(ge=0, le=2**63 - 1), _WHOLE] | None = None


R = TypeVar("R", bound=Request)


def validate(kind: type[R], document: Any) -> R:
    """Validate a body.

    Raises:
        ApiError: It breaks a rule; the first one is named.
    """
    if not isinstance(document, dict):
        raise invalid("the body is not a JSON object", code="invalid_json")
    try:
        return kind.model_validate(document)
    except ValidationError as e:
        # A union reports each of its arms; the one that came furthest says the most.
        errors = e.errors(include_url=False, include_context=False)
        first = max(errors, key=lambda x: (len(x["loc"]), not x["type"].endswith("_type")))
        name = str(first["loc"][0]) if first["loc"] else None
        given = first["input"]
        shown = f", not {shorten(given, 60)!a}" if isinstance(given, bool | int | float | str) else ""
        message = first["msg"][:1].lower() + first["msg"][1:]
        raise ApiError(400, f"{name or 'the body'}: {message}{shown}", "invalid_value", param=name) from None
