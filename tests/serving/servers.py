"""Servers on free ports, in processes of their own, and small ways to talk to them."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from quill.config.settings import ServeConfig
from quill.registry.store import Registry
from quill.serving import server
from quill.serving.guard import Keys

RUN = [sys.executable, "-c", "from quill.cli.app import run; run()"]


class Answer(NamedTuple):
    """An answer, read whole."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        """The body as JSON."""
        return json.loads(self.body)

    @property
    def events(self) -> list[str]:
        """The data of each event."""
        parts = self.body.decode().split("\n\n")
        return [p.removeprefix("data: ") for p in parts if p.startswith("data: ")]

    @property
    def chunks(self) -> list[dict[str, Any]]:
        """The events before the last as JSON."""
        assert self.events[-1] == "[DONE]"
        return [json.loads(e) for e in self.events[:-1]]

    @property
    def code(self) -> str:
        """The code of an error, whose body must be whole."""
        [(key, error)] = self.json.items()
        assert key == "error"
        assert set(error) == {"message", "type", "param", "code"}
        return error["code"]


def rest(s: socket.socket) -> bytes:
    """Read everything until the end of a connection."""
    found = b""
    with suppress(ConnectionResetError):
        while chunk := s.recv(65536):
            found += chunk
    return found


def wait_for(what: str, condition: Callable[[], bool], seconds: float = 30) -> None:
    """Wait until something is true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.01)


class Running:
    """A server."""

    def __init__(self, process: subprocess.Popen[str], port: int) -> None:
        self.process, self.port = process, port

    def call(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Answer:
        """Send one request on a connection of its own."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        sent = dict(headers or {})
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
        if body is not None:
            sent.setdefault("content-type", "application/json")
        try:
            connection.request(method, path, body=body, headers=sent)
            answer = connection.getresponse()
            return Answer(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read())
        finally:
            connection.close()

    def get(self, path: str, **headers: str) -> Answer:
        """GET."""
        return self.call("GET", path, headers=headers)

    def post(self, path: str, body: Any = None, **headers: str) -> Answer:
        """POST."""
        return self.call("POST", path, {} if body is None else body, headers)

    def complete(self, **fields: Any) -> Answer:
        """POST to /v1/completions."""
        return self.post("/v1/completions", {"model": "tiny", **fields})


def cache_of(registry: Registry) -> Path:
    """The cache folder of the servers of a registry, where they leave their notes."""
    return registry.root.parent / "cache"


class Inside:
    """A server on a thread of this process.

    Attributes:
        failure: What ended it, other than its end.
    """

    def __init__(self, registry: Registry, send_buffer: int | None, **settings: Any) -> None:
        self._socket = server.bind("127.0.0.1", 0)
        if send_buffer is not None:
            # Connections inherit it.
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
        self.port = self._socket.getsockname()[1]
        self.api, self.server = server.assemble(ServeConfig(**settings), registry, (), "cpu", Keys())
        self.failure: BaseException | None = None
        self.thread = threading.Thread(target=self._serve)

    def _serve(self) -> None:
        try:
            asyncio.run(self.server.serve(sockets=[self._socket]))
        except BaseException as e:
            self.failure = e
        finally:
            self._socket.close()


@contextmanager
def inside(registry: Registry, send_buffer: int | None = None, **settings: Any) -> Iterator[Inside]:
    """Start a server on a thread of this process, and end it."""
    made = Inside(registry, send_buffer, **settings)
    made.thread.start()
    try:
        yield made
    finally:
        made.server.should_exit = True
        made.thread.join(30)
        assert not made.thread.is_alive()


@contextmanager
def running(registry: Registry, *arguments: str) -> Iterator[Running]:
    """Start a server, and end it."""
    environment = {**os.environ, "QUILL_REGISTRY": str(registry.root), "QUILL_DEVICE": "cpu"}
    environment["XDG_CACHE_HOME"] = str(cache_of(registry))
    process = subprocess.Popen(
        [*RUN, "serve", "--port", "0", *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line.startswith("http://"):
        raise AssertionError(f"{line}{process.communicate()[1]}")
    try:
        yield Running(process, int(line.rpartition(":")[2]))
    finally:
        process.terminate()
        try:
            process.communicate(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
