"""Clients that leave, that are slow, and a server that is told to stop."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import struct
import time

import pytest
from servers import Running, rest, running

from quill.registry.store import Registry

LONG = {"model": "tiny", "prompt": "3", "max_tokens": 4096}


def ask(port: int, **fields: object) -> socket.socket:
    """Send a request for a completion, and read nothing."""
    body = json.dumps({**LONG, **fields}).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    s = socket.create_connection(("127.0.0.1", port), timeout=30)
    s.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    return s


def gauge(server: Running, name: str) -> float:
    """A metric, summed over its labels."""
    lines = server.get("/metrics").body.decode().splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith((f"{name} ", f"{name}{{")))


def until(server: Running, name: str, value: float, seconds: float) -> None:
    """Wait until a metric has a value."""
    end = time.monotonic() + seconds
    while (found := gauge(server, name)) != value:
        assert time.monotonic() < end, f"{name} is {found}"
        time.sleep(0.02)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("way", ["close", "reset"])
def test_h6_generation_stops_when_the_client_leaves(server, stream, way):
    s = ask(server.port, stream=stream, n=16)
    until(server, "quill_num_requests_running", 16, 10)
    if stream:
        assert s.recv(10).startswith(b"HTTP/1.1 2")
    if way == "reset":
        s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    s.close()
    until(server, "quill_num_requests_running", 0, 2)


def test_h6_a_client_that_waits_in_the_queue_and_leaves_is_forgotten(server):
    first = [ask(server.port, n=16) for _ in range(3)]
    until(server, "quill_num_requests_running", 32, 10)
    waiting = [ask(server.port) for _ in range(3)]
    time.sleep(0.3)
    for s in waiting + first:
        s.close()
    until(server, "quill_num_requests_running", 0, 2)
    until(server, "quill_num_requests_waiting", 0, 2)


def end(server: Running, limit: float) -> float:
    """Wait for the end of a server that was told to stop; return how long it took."""
    began = time.monotonic()
    assert server.process.wait(timeout=limit) == 143
    return time.monotonic() - began


def test_h5_h10_a_server_that_is_told_to_stop_drains(tiny_registry):
    with running(tiny_registry, "--drain", "2", "--max-tokens", "1000000") as server:
        server.complete(prompt="3")
        stream, whole = ask(server.port, stream=True, max_tokens=10**6), ask(server.port, max_tokens=10**6)
        until(server, "quill_num_requests_running", 2, 10)
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        late = server.complete(prompt="3")
        assert (late.status, late.code) == (503, "draining")
        assert late.headers["connection"] == "close"
        assert server.get("/ready").status == 503
        assert server.get("/health").status == 200
        assert end(server, 10) < 6
        found = rest(stream)
        assert b'"code":"server_shutdown"' in found
        assert b"data: [DONE]\n\n" in found
        assert rest(whole).startswith(b"HTTP/1.1 503 ")


def test_h10_what_ends_in_time_is_answered_whole(tiny_registry):
    with running(tiny_registry, "--drain", "30") as server:
        server.complete(prompt="3")
        s = ask(server.port, max_tokens=300)
        until(server, "quill_num_requests_running", 1, 10)
        server.process.send_signal(signal.SIGTERM)
        assert end(server, 30) < 20
        assert rest(s).startswith(b"HTTP/1.1 200 ")


def test_h10_a_second_signal_ends_it_at_once(tiny_registry):
    with running(tiny_registry, "--drain", "600", "--max-tokens", "1000000") as server:
        server.complete(prompt="3")
        with ask(server.port, stream=True, max_tokens=10**6):
            until(server, "quill_num_requests_running", 1, 10)
            server.process.send_signal(signal.SIGTERM)
            time.sleep(0.5)
            server.process.send_signal(signal.SIGTERM)
            assert end(server, 20) < 8


def test_a_new_version_is_picked_up_and_running_requests_keep_theirs(tiny_registry, tmp_path):
    shutil.copytree(tiny_registry.root, tmp_path / "weights")
    registry = Registry(tmp_path / "weights")
    with running(registry) as server:
        assert server.complete(prompt="3").json["model"] == "tiny:v1"
        with ask(server.port, stream=True, stream_options={"include_usage": True}) as s:
            until(server, "quill_num_requests_running", 1, 10)
            old = registry.resolve("tiny")
            draft = registry.begin("tiny")
            for name in ("model.safetensors", "config.json", "tokenizer.json"):
                draft.write_bytes(name, old.read_file(name))
            draft.publish(parameters=old.facts["parameters"])
            time.sleep(1.2)
            assert server.complete(prompt="3").json["model"] == "tiny:v2"
            s.settimeout(60)
            found = b""
            while b"[DONE]" not in found:
                found += s.recv(65536)
        assert b'"model":"tiny:v1"' in found
        assert b'"model":"tiny:v2"' not in found
        assert b'"completion_tokens":4096' in found
