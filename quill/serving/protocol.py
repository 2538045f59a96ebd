"""HTTP/1.1 with deadlines: slow headers, slow bodies and readers that stop are cut off.

uvicorn waits for a connection's next byte for ever, and for a reader that has stopped as well.
"""

from __future__ import annotations

import asyncio
import sys
from http import HTTPStatus
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from quill.serving.errors import ApiError

# Seconds from a connection, or the end of an answer, to the end of the next request's headers and body.
HEADERS_WITHIN = 10.0
BODY_WITHIN = 30.0
# Seconds that a write may be stuck.
WRITES_WITHIN = 20.0


class Protocol(H11Protocol):
    """One connection."""

    _reading: asyncio.TimerHandle | None = None
    _writing: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for the first request."""
        super().connection_made(transport)
        self._expect(HEADERS_WITHIN)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop all waiting."""
        self._expect(None)
        self.resume_writing()
        super().connection_lost(exc)

    def handle_events(self) -> None:
        """Read what has come; its body may follow within a time of its own."""
        before = self.cycle
        was_whole = before is not None and not before.more_body
        super().handle_events()
        if self.cycle is None or self.transport.is_closing():
            return
        is_new = self.cycle is not before
        if not self.cycle.more_body and (is_new or not was_whole):
            self._expect(None)
        elif is_new:
            self._expect(BODY_WITHIN)

    def data_received(self, data: bytes) -> None:
        """Read a chunk; the first of another request starts the time of its headers."""
        if self._reading is None and (self.cycle is None or self.cycle.response_complete):
            self._expect(HEADERS_WITHIN)
        super().data_received(data)

    def pause_writing(self) -> None:
        """The client does not read: give it some time."""
        super().pause_writing()
        if self._writing is None:
            self._writing = self.loop.call_later(WRITES_WITHIN, self.transport.abort)

    def resume_writing(self) -> None:
        """The client reads again."""
        super().resume_writing()
        if self._writing is not None:
            self._writing.cancel()
            self._writing = None

    def send_400_response(self, msg: str) -> None:
        """Refuse what is not HTTP, or has too large headers, in the form of all errors."""
        status = getattr(sys.exception(), "error_status_hint", 400)
        error = ApiError(status, msg.rstrip(".").lower(), "invalid_http")
        body = error.body()
        headers = [("content-type", "application/json"), ("connection", "close")]
        headers.append(("content-length", str(len(body))))
        events: list[Any] = [
            h11.Response(status_code=status, headers=headers, reason=HTTPStatus(status).phrase.encode()),
            h11.Data(data=body),
            h11.EndOfMessage(),
        ]
        if self.conn.our_state is h11.IDLE or self.conn.our_state is h11.SEND_RESPONSE:
            for event in events:
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _expect(self, seconds: float | None) -> None:
        """Close the connection unless a request is complete in time."""
        if self._reading is not None:
            self._reading.cancel()
            self._reading = None
        if seconds is not None:
            self._reading = self.loop.call_later(seconds, self.transport.abort)
