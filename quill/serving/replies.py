"""Answers in OpenAI's formats, whole and in chunks."""

from __future__ import annotations

import time
from base64 import b32encode
from collections.abc import Sequence
from secrets import token_bytes
from typing import Any, Protocol

from quill import __version__
from quill.registry.folder import Folder
from quill.serving.jobs import Finish, Piece, TokenInfo
from quill.tokenizers.base import Tokenizer


class Reply(Protocol):
    """How one kind of request is answered."""

    def whole(self, choices: Sequence[Piece], usage: dict[str, int]) -> dict[str, Any]:
        """The answer."""

    def opening(self, index: int) -> dict[str, Any] | None:
        """The chunk before a sample's first text; None: there is none."""

    def chunk(self, index: int, choice: Piece) -> dict[str, Any]:
        """One chunk of a stream."""

    def last(self, usage: dict[str, int]) -> dict[str, Any]:
        """The chunk with the usage."""


class Completion:
    """Answers of /v1/completions.

    Args:
        version: The model.
        tokenizer: Its tokenizer.
        logprobs: Whether log probabilities were asked for.
        echoed: For each sample, the prompt before its text.
        by_id: Whether tokens are written as `token_id:N`.
        prompts: For each sample, the tokens of its prompt, if the ids of all tokens were asked for.
    """

    def __init__(
        self,
        version: Folder,
        tokenizer: Tokenizer,
        *,
        logprobs: int | None = None,
        echoed: Sequence[str] = (),
        by_id: bool = False,
        prompts: Sequence[Sequence[int]] | None = None,
    ) -> None:
        self._head = _head("cmpl", "text_completion", version)
        self._tokenizer, self._logprobs, self._by_id = tokenizer, logprobs, by_id
        self._echoed = dict(enumerate(echoed))
        self._prompts = None if prompts is None else dict(enumerate(prompts))

    def whole(self, choices: Sequence[Piece], usage: dict[str, int]) -> dict[str, Any]:
        """The answer."""
        made = [self._choice(i, c) for i, c in enumerate(choices)]
        return {**self._head, "choices": made, "usage": usage}

    def opening(self, index: int) -> None:
        """There is none: a chunk has the shape of the whole."""

    def chunk(self, index: int, choice: Piece) -> dict[str, Any]:
        """One chunk of a stream; the first one has the prompt, if it is echoed, and its ids."""
        made = self._choice(index, choice)
        self._echoed[index] = ""
        if self._prompts is not None:
            self._prompts.pop(index, None)
        return {**self._head, "choices": [made]}

    def last(self, usage: dict[str, int]) -> dict[str, Any]:
        """The chunk with the usage."""
        return {**self._head, "choices": [], "usage": usage}

    def _choice(self, index: int, choice: Piece) -> dict[str, Any]:
        found = None if self._logprobs is None else self._table(choice.tokens)
        text = self._echoed.get(index, "") + choice.text
        made = {"index": index, "text": text, "logprobs": found, "finish_reason": choice.finish}
        if self._prompts is not None:
            made["token_ids"] = [t.id for t in choice.tokens]
            if index in self._prompts:
                made["prompt_token_ids"] = self._prompts[index]
        return made

    def _table(self, tokens: Sequence[TokenInfo]) -> dict[str, Any]:
        table: dict[str, Any] = {
            "tokens": [self._name(t.id) for t in tokens],
            "token_logprobs": [t.logprob for t in tokens],
            "top_logprobs": [t.top and {self._name(i): p for i, p in t.top} for t in tokens],
            "text_offset": [t.offset for t in tokens],
        }
        if self._prompts is not None:
            table["top_token_ids"] = [t.top and {self._name(i): i for i, _ in t.top} for t in tokens]
        return table

    def _name(self, token: int) -> str:
        return f"token_id:{token}" if self._by_id else self._tokenizer.spelled(token)


class Chat:
    """Answers of /v1/chat/completions.

    Args:
        version: The model.
        tokenizer: Its tokenizer.
        logprobs: How many of the likeliest tokens were asked for; None: no log probabilities.
    """

    def __init__(self, version: Folder, tokenizer: Tokenizer, *, logprobs: int | None) -> None:
        self._head = _head("chatcmpl", "chat.completion", version)
        self._tokenizer, self._logprobs = tokenizer, logprobs

    def whole(self, choices: Sequence[Piece], usage: dict[str, int]) -> dict[str, Any]:
        """The answer."""
        made = [
            {
                "index": i,
                "message": {"role": "assistant", "content": c.text, "refusal": None},
                "logprobs": self._table(c),
                "finish_reason": c.finish,
            }
            for i, c in enumerate(choices)
        ]
        return {**self._head, "choices": made, "usage": usage}

    def opening(self, index: int) -> dict[str, Any]:
        """The chunk that says who speaks."""
        return self._chunk(index, {"role": "assistant", "content": ""}, None, None)

    def chunk(self, index: int, choice: Piece) -> dict[str, Any]:
        """One chunk of a stream."""
        delta = {"content": choice.text} if choice.text else {}
        return self._chunk(index, delta, self._table(choice), choice.finish)

    def last(self, usage: dict[str, int]) -> dict[str, Any]:
        """The chunk with the usage."""
        return {**self._head, "object": "chat.completion.chunk", "choices": [], "usage": usage}

    def _chunk(self, index: int, delta: dict[str, str], table: Any, finish: Finish | None) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": table, "finish_reason": finish}
        return {**self._head, "object": "chat.completion.chunk", "choices": [choice]}

    def _table(self, choice: Piece) -> dict[str, Any] | None:
        if self._logprobs is None:
            return None
        content = []
        for token in choice.tokens:
            likeliest = sorted(token.top or (), key=lambda x: -x[1])[: self._logprobs]
            top = [self._entry(i, p) for i, p in likeliest]
            content.append({**self._entry(token.id, token.logprob), "top_logprobs": top})
        return {"content": content}

    def _entry(self, token: int, logprob: float | None) -> dict[str, Any]:
        raw = list(self._tokenizer.token_bytes(token))
        return {"token": self._tokenizer.spelled(token), "bytes": raw, "logprob": logprob}


def usage(prompt_tokens: int, drawn: int) -> dict[str, int]:
    """How many tokens were read and generated."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": drawn,
        "total_tokens": prompt_tokens + drawn,
    }


def _head(prefix: str, kind: str, version: Folder) -> dict[str, Any]:
    return {
        "id": f"{prefix}-{b32encode(token_bytes(15)).decode().lower()}",
        "object": kind,
        "created": int(time.time()),
        "model": version.reference,
        "system_fingerprint": f"quill-{__version__}-{(version.digest or 'unknown')[:8]}",
    }
