"""Waits for the samples of a job, and writes them to a client that may leave at any time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from quill.serving.errors import ApiError, dump, explain
from quill.serving.jobs import Call, Gone, Job, Piece
from quill.serving.replies import Reply, usage

# A stream that has to wait longer than this for its first token begins without one.
_PATIENCE = 1.0
# Something is written at least so often, so that neither proxies nor clients give up.
_KEEP_ALIVE = 15.0
# Seconds between two writes of a stream: a screen shows no more, and each write costs the time of a token.
# Many streams write less often each, so that writing leaves the processors to the model.
_INTERVAL, _LONGEST_INTERVAL = 0.015, 0.05
_PER_STREAM = 0.002
_EVENTS = {"cache-control": "no-store", "x-accel-buffering": "no"}


@asynccontextmanager
async def watching(receive: Receive, job: Job | Call[Any]) -> AsyncIterator[None]:
    """Cancel a job as soon as its client leaves. The request's body must have been read."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        job.cancel("disconnect")

    task = asyncio.create_task(watch())
    try:
        yield
    finally:
        task.cancel()


async def begin(job: Job, queue_timeout: float, patience: float | None = None) -> list[Piece]:
    """Wait for the first pieces of a job.

    Args:
        job: The job.
        queue_timeout: Seconds that it may wait for a slot.
        patience: Seconds after which nothing is returned; None: wait for the pieces.

    Raises:
        ApiError: It waited too long.
        Gone: It was cancelled.
    """
    began = time.monotonic()
    while True:
        waited = time.monotonic() - began
        if patience is not None and waited >= patience:
            return []
        if not job.started and time.monotonic() - job.submitted >= queue_timeout:
            job.cancel("timeout")
            raise ApiError(429, "the server is busy", "queue_timeout", headers={"retry-after": "5"})
        limit = _PATIENCE if patience is None else patience - waited
        if pieces := await job.news(min(limit, queue_timeout)):
            return pieces


async def collect(job: Job, queue_timeout: float) -> list[Piece]:
    """Wait for all pieces of a job."""
    pieces = await begin(job, queue_timeout)
    async for more in job.pieces():
        pieces += more
    return pieces


def interval(streams: int) -> float:
    """Seconds between two writes of each of some streams."""
    return min(max(_INTERVAL, streams * _PER_STREAM), _LONGEST_INTERVAL)


def gone(error: Gone) -> ApiError:
    """The answer to those who are still there."""
    if str(error) == "shutdown":
        return ApiError(503, "the server is stopping", "server_shutdown", headers={"retry-after": "5"})
    return ApiError(499, "the client left", "client_closed_request")


class Stream(Response):
    """An answer that is written while it is generated.

    Args:
        job: The job.
        first: What is there already.
        queue_timeout: Seconds that it may wait for a slot.
        pace: Returns the seconds between two writes.
        done: Called at the end, with the error that ended it or None.
        headers: Further headers.
    """

    media_type = "text/plain"

    def __init__(
        self,
        job: Job,
        first: list[Piece],
        queue_timeout: float,
        pace: Callable[[], float],
        done: Callable[[Exception | None], None],
        headers: dict[str, str] | None = None,
    ) -> None:
        self._job, self._first, self._done = job, first, done
        self._queue_timeout, self._pace = queue_timeout, pace
        super().__init__(headers={**_EVENTS, **(headers or {})})
        # Starlette counted an empty body.
        del self.headers["content-length"]

    def encode(self, pieces: list[Piece]) -> bytes:
        """What is written for some pieces."""
        return "".join(p.text for p in pieces).encode()

    def beat(self) -> bytes:
        """What is written where there is nothing to say; nothing if that would be text."""
        return b""

    def fail(self, error: ApiError) -> bytes:
        """What is written when the answer cannot be completed."""
        return b""

    def end(self) -> bytes:
        """What is written last."""
        return b""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Write the answer."""
        failure: Exception | None = None
        try:
            start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
            async with watching(receive, self._job):
                await send(start)
                async for chunk in self._chunks():
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
        except asyncio.CancelledError as e:
            failure = Gone(str(e) or "shutdown")
            raise
        except Exception as e:
            failure = e
        finally:
            self._done(failure)
        if failure is not None:
            error = gone(failure) if isinstance(failure, Gone) else explain(failure)
            last = self.fail(error)
        else:
            last = self.end()
        await send({"type": "http.response.body", "body": last, "more_body": False})

    async def _chunks(self) -> AsyncIterator[bytes]:
        new = self._first
        if not new:
            yield self.beat()
            new = await begin(self._job, self._queue_timeout)
        while True:
            if chunk := self.encode(new):
                yield chunk
            if self._job.is_over:
                return
            await asyncio.sleep(self._pace())
            while not (new := await self._job.news(_KEEP_ALIVE)):
                yield self.beat()


class EventStream(Stream):
    """Server-sent events in OpenAI's format.

    Args:
        reply: How the request is answered.
        prompt_tokens: Tokens of the prompts.
        usage_last: Whether the usage comes in a last chunk.
        usage_always: Whether every chunk has it.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        job: Job,
        first: list[Piece],
        queue_timeout: float,
        pace: Callable[[], float],
        done: Callable[[Exception | None], None],
        headers: dict[str, str],
        *,
        reply: Reply,
        prompt_tokens: int,
        usage_last: bool,
        usage_always: bool,
    ) -> None:
        super().__init__(job, first, queue_timeout, pace, done, headers)
        self._reply, self._prompt_tokens = reply, prompt_tokens
        self._last, self._always = usage_last, usage_always
        self._drawn = 0
        self._opened: set[int] = set()

    def encode(self, pieces: list[Piece]) -> bytes:
        """One event for each sample with something new."""
        self._drawn += sum(piece.drawn for piece in pieces)
        events = []
        for piece in pieces:
            if piece.index not in self._opened:
                self._opened.add(piece.index)
                if opening := self._reply.opening(piece.index):
                    events.append(self._event(opening))
            if piece.text or piece.tokens or piece.finish:
                events.append(self._event(self._reply.chunk(piece.index, piece)))
        return b"".join(events)

    def beat(self) -> bytes:
        """A comment."""
        return b": keep-alive\n\n"

    def fail(self, error: ApiError) -> bytes:
        """The error as an event."""
        return b"data: " + error.body() + b"\n\ndata: [DONE]\n\n"

    def end(self) -> bytes:
        """The usage, if it was asked for, and the mark of the end."""
        last = b""
        if self._last:
            last = b"data: " + dump(self._reply.last(usage(self._prompt_tokens, self._drawn))) + b"\n\n"
        return last + b"data: [DONE]\n\n"

    def _event(self, document: dict[str, object]) -> bytes:
        if self._last or self._always:
            now = usage(self._prompt_tokens, self._drawn) if self._always else None
            document = {**document, "usage": now}
        return b"data: " + dump(document) + b"\n\n"
