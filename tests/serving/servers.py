"""Servers on free ports, in processes of their own, and small ways to talk to them."""

from __future__ import annotations

import http.client
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from quill.registry.store import Registry

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
