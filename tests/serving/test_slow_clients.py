"""Clients that send or read slowly, in a server whose deadlines are short."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from contextlib import suppress

import pytest
from servers import Inside, inside, rest, wait_for

from quill.registry.store import Registry
from quill.serving import protocol

HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"


@pytest.fixture(scope="module")
def hurried(tiny_registry: Registry) -> Iterator[Inside]:
    """A server that waits half a second where others wait ten or more."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HEADERS_WITHIN", "BODY_WITHIN", "WRITES_WITHIN"):
            patch.setattr(protocol, name, 0.5)
        # With the system's own buffers megabytes would have to be generated.
        with inside(tiny_registry, send_buffer=4096) as made:
            yield made


STARTS = {
    "nothing": b"",
    "a part of the headers": b"GET /health HTTP/1.1\r\nX: ",
    "headers after a whole request": HEALTH + b"\r\n" + b"GET /health HTTP/1.1\r\nX: ",
    "a part of the body": HEAD + b"Content-Length: 1000\r\n\r\n{",
    "a chunk of the body": HEAD + b"Transfer-Encoding: chunked\r\n\r\n",
}


@pytest.mark.parametrize("start", STARTS.values(), ids=STARTS)
def test_h7_what_comes_slowly_is_cut_off(hurried: Inside, start: bytes):
    more = b"1\r\na\r\n" if start.endswith(b"chunked\r\n\r\n") else b"a" * bool(start)
    closed = False
    # A server that has closed the connection resets it on what comes later.
    with socket.create_connection(("127.0.0.1", hurried.port), timeout=30) as s, suppress(ConnectionError):
        s.sendall(start)
        s.settimeout(0.1)
        end = time.monotonic() + 25
        while not closed and time.monotonic() < end:
            if more:
                s.sendall(more)
            with suppress(TimeoutError):
                closed = s.recv(1000) == b""
        assert closed


def test_h7_a_reader_that_stops_holds_neither_memory_nor_a_slot(hurried: Inside):
    fields = {"prompt": "3", "n": 16, "max_tokens": 1500, "logprobs": 20, "stream": True}
    body = json.dumps(fields).encode()
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        s.connect(("127.0.0.1", hurried.port))
        s.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        engine = hurried.api.engine
        wait_for("it begins", lambda: any(job.started for job in list(engine._jobs)))
        [job] = engine._jobs
        most = 0
        while not job.cancelled and job.open:
            most = max(most, len(job._pieces))
            time.sleep(0.001)
        # Others are served, and its slots are free again.
        wait_for("the job ends", lambda: not engine.unfinished)
        with socket.create_connection(("127.0.0.1", hurried.port), timeout=30) as other:
            other.sendall(HEALTH + b"Connection: close\r\n\r\n")
            assert rest(other).endswith(b'{"status":"ok"}')
        s.settimeout(30)
        found = rest(s)
    assert most <= 16
    assert found.startswith(b"HTTP/1.1 200 ")
    assert b"[DONE]" not in found
    assert job.cancelled == "disconnect"
