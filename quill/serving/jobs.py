"""A request as the engine sees it, and what the engine sends back.

A Job is shared by two threads: the event loop sets `cancelled`, the engine sets `started`, and everything
else is handed over whole through `deliver`, which runs on the loop.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, Literal, TypeVar

from quill.config.settings import SampleConfig

Finish = Literal["stop", "length"]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class TokenInfo:
    """One token with its log probability.

    Attributes:
        id: The token.
        offset: Where its text begins in the text of its sample.
        logprob: Its log probability; None for the first token of a prompt.
        top: The likeliest tokens and their log probabilities, this one among them; None as above.
    """

    id: int
    offset: int
    logprob: float | None
    top: tuple[tuple[int, float], ...] | None


@dataclass(slots=True)
class Piece:
    """What is new in one sample.

    Attributes:
        index: Number of the sample: that of its prompt times n, plus its own.
        text: New text.
        tokens: The tokens of that text, if log probabilities were asked for.
        finish: Why the sample ended; None if it goes on.
        drawn: How many tokens were drawn for it.
    """

    index: int
    text: str = ""
    tokens: list[TokenInfo] = field(default_factory=list)
    finish: Finish | None = None
    drawn: int = 0

    def add(self, more: Piece) -> None:
        """Add what came later in the same sample."""
        self.text += more.text
        self.tokens += more.tokens
        self.finish = more.finish or self.finish
        self.drawn += more.drawn


class Gone(Exception):
    """The job was cancelled: the client left, waited too long, or the server stops."""


class Job:
    """The samples of one request.

    Args:
        prompts: Token ids of each prompt, none empty.
        config: How to sample.
        n: Samples for each prompt.
        logprobs: How many of the likeliest tokens to report with each token; None: no log probabilities.
        score: Whether the tokens of the prompts are reported too.
        ends: Whether the end-of-text token ends a sample.

    Attributes:
        cancelled: Why the job ended early; empty if it did not.
        started: Whether a sample has begun.
        open: Samples that have not ended.
        ended: Why the others ended.
        drawn: Tokens drawn for all of them.
    """

    def __init__(
        self,
        prompts: Sequence[list[int]],
        config: SampleConfig,
        *,
        n: int = 1,
        logprobs: int | None = None,
        score: bool = False,
        ends: bool = True,
    ) -> None:
        self.prompts, self.config, self.n = prompts, config, n
        self.logprobs, self.score, self.ends = logprobs, score, ends
        self.cancelled = ""
        self.started = False
        self.submitted = time.monotonic()
        self.first_token: float | None = None
        self.open, self.drawn = len(prompts) * n, 0
        self.ended: list[Finish] = []
        # Characters of each scored prompt, after which the text of its samples begins; the engine's.
        self.offsets: dict[int, int] = {}
        # One for each sample, however late they are taken.
        self._pieces: dict[int, Piece] = {}
        self._error: Exception | None = None
        self._news = asyncio.Event()

    @property
    def is_over(self) -> bool:
        """Whether every sample has ended, and all of it was taken."""
        return not self.open and not self._pieces

    def deliver(self, pieces: Sequence[Piece], error: Exception | None = None) -> None:
        """Hand over what is new; called on the loop."""
        if self.first_token is None and pieces:
            self.first_token = time.monotonic()
        for piece in pieces:
            if piece.index in self._pieces:
                self._pieces[piece.index].add(piece)
            else:
                self._pieces[piece.index] = piece
            self.drawn += piece.drawn
            if piece.finish is not None:
                self.open -= 1
                self.ended.append(piece.finish)
        self._error = self._error or error
        self._news.set()

    def cancel(self, why: str) -> None:
        """End the job; called on the loop. The engine notices before its next token."""
        self.cancelled = self.cancelled or why
        self._news.set()

    async def news(self, timeout: float | None = None) -> list[Piece]:
        """Wait for what is new, and take it.

        Args:
            timeout: Seconds to wait; the list is empty afterwards.

        Raises:
            Gone: The job was cancelled.
            Exception: What went wrong in the engine.
        """
        if not self._news.is_set():
            try:
                await asyncio.wait_for(self._news.wait(), timeout)
            except TimeoutError:
                return []
        self._news.clear()
        if self.cancelled:
            raise Gone(self.cancelled)
        pieces, self._pieces = list(self._pieces.values()), {}
        if not pieces and self._error is not None:
            raise self._error
        if self._error is not None:
            self._news.set()
        return pieces

    async def pieces(self) -> AsyncIterator[list[Piece]]:
        """Everything until the last sample has ended."""
        while not self.is_over:
            yield await self.news()


class Call(Generic[T]):
    """Work for the engine's thread other than samples. Made, cancelled and awaited on the loop.

    Args:
        work: What to do there.

    Attributes:
        cancelled: Why nobody waits for it; empty if someone does.
    """

    def __init__(self, work: Callable[[], T]) -> None:
        self.work, self.cancelled = work, ""
        self._result: asyncio.Future[T] = asyncio.get_running_loop().create_future()

    def cancel(self, why: str) -> None:
        """Give up waiting; the work is not begun any more."""
        self.cancelled = self.cancelled or why
        self._result.cancel()

    def deliver(self, result: T) -> None:
        """Hand over what came of it."""
        if not self._result.done():
            self._result.set_result(result)

    def fail(self, error: Exception) -> None:
        """Hand over what went wrong."""
        if not self._result.done():
            self._result.set_exception(error)

    async def result(self) -> T:
        """Wait for what comes of it.

        Raises:
            Gone: It was cancelled.
            Exception: What went wrong.
        """
        try:
            return await self._result
        except asyncio.CancelledError:
            if self.cancelled:
                raise Gone(self.cancelled) from None
            raise
