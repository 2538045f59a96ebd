"""Hundreds of clients, and an engine that dies under them."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from pathlib import Path

import pytest
from crowd import load, request
from servers import Running, inside, rest, running, wait_for

from quill.cli.app import main
from quill.serving.residents import Residents

BODY = {"model": "tiny", "prompt": "3", "max_tokens": 12}


def open_files(server: Running) -> int:
    """How many files and connections a server has."""
    return len(os.listdir(f"/proc/{server.process.pid}/fd"))


def memory(server: Running) -> int:
    """Bytes of memory that a server occupies."""
    pages = Path(f"/proc/{server.process.pid}/statm").read_text(encoding="utf-8").split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells of memory and connections")
def test_h13_of_200_clients_none_is_lost_and_nothing_is_left(tiny_registry):
    """Seconds of what `crowd.py` does for minutes."""
    with running(tiny_registry) as server:
        assert server.complete(prompt="3", max_tokens=12).status == 200
        files = open_files(server)
        first = asyncio.run(load(server.port, BODY, clients=200, requests=1, haste=20))
        held = memory(server)
        second = asyncio.run(load(server.port, BODY, clients=200, requests=1, haste=20))
        for found in (first, second):
            assert found.lost == []
            assert found.completed == 200
            assert found.tokens == 200 * 12
            assert found.health
        wait_for("the connections are closed", lambda: open_files(server) <= files)
        assert memory(server) - held < 32 << 20
        metrics = server.get("/metrics").body.decode()
        assert 'quill_num_requests_running{model_name="tiny:v1"} 0.0' in metrics
        assert "quill_num_requests_waiting 0.0" in metrics
        assert f'quill_generation_tokens_total{{model_name="tiny:v1"}} {401 * 12:.1f}' in metrics


def broken(self: Residents) -> None:
    """A bug."""
    raise SystemError("killed")


def test_h13_when_the_engine_dies_requests_end_with_errors_and_so_does_the_server(tiny_registry, monkeypatch):
    with inside(tiny_registry) as server:
        with socket.create_connection(("127.0.0.1", server.port), timeout=60) as s:
            s.sendall(request("POST", "/v1/completions", {"prompt": "3", "max_tokens": 4096, "stream": True}))
            found = s.recv(65536)
            assert found.startswith(b"HTTP/1.1 200 ")
            monkeypatch.setattr(Residents, "load_next", broken)
            found += rest(s)
        server.thread.join(30)
        assert b'"code":"engine_down"' in found
        assert b"data: [DONE]" in found
        assert isinstance(server.failure, SystemError)
        assert server.api.engine.trouble


def test_h13_a_server_whose_engine_died_says_so_and_fails(tiny_registry, monkeypatch, capsys):
    monkeypatch.setenv("QUILL_REGISTRY", str(tiny_registry.root))
    monkeypatch.setattr(Residents, "load_next", broken)
    assert main(["serve", "tiny", "--port", "0", "--device", "cpu"]) == 1
    message = capsys.readouterr().err
    assert "SystemError: killed" in message
    assert "Traceback" not in message
