"""Who may call, from where and with what: the faults of hosts, by their rows."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time

import pytest
from servers import RUN, rest, running

from quill.registry.store import Registry

POSTS = ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize", "/generate"]
KEY = "correct-horse"


@pytest.fixture(scope="module")
def keyed(tiny_registry, tmp_path_factory):
    """A server that needs a key, with a page that may call it."""
    file = tmp_path_factory.mktemp("keys") / "keys.txt"
    file.write_text(f"another\n{KEY}\n")
    file.chmod(0o600)
    more = [
        "--api-key-file",
        str(file),
        "--allow-host",
        "quill.example",
        "--cors-origin",
        "https://a.example",
    ]
    with running(tiny_registry, *more) as made:
        yield made


def raw(port: int, data: bytes, timeout: float = 20) -> bytes:
    """Send bytes and read until the end."""
    with socket.create_connection(("127.0.0.1", port), timeout=timeout) as s:
        s.sendall(data)
        return rest(s)


BROKEN = {
    "nan": b'{"prompt": "3", "x": NaN}',
    "infinity": b'{"prompt": "3", "x": [-Infinity]}',
    "too large": b'{"prompt": "3", "x": 1e400}',
    "too large a whole number": b'{"prompt": "3", "seed": 1' + b"0" * 400 + b"}",
    "lone surrogate": rb'{"prompt": "\ud800"}',
    "lone surrogate in a key": rb'{"\uDC00": 1}',
    "not UTF-8": b'{"prompt": "\xff"}',
    "UTF-16": '{"prompt": "3"}'.encode("utf-16"),
    "empty": b"",
    "deep": b"[" * 2000,
    "twice": b'{"prompt": "3", "prompt": "4"}',
    "cut off": b'{"prompt": "3',
    "no object": b"[1]",
}


@pytest.mark.parametrize("path", POSTS)
@pytest.mark.parametrize("body", BROKEN.values(), ids=BROKEN)
def test_h1_what_is_not_strict_json_is_refused(server, path, body):
    answer = server.call("POST", path, body)
    assert (answer.status, answer.code) == (400, "invalid_json")


def test_h2_a_body_that_is_too_large_is_not_read(server):
    body = b'{"prompt": "' + b"3" * (2 << 20) + b'"}'
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    declared = raw(server.port, f"{head}Content-Length: {len(body)}\r\n\r\n".encode())
    assert declared.startswith(b"HTTP/1.1 413 ")
    assert b"connection: close" in declared.lower()
    chunked = f"{head}Transfer-Encoding: chunked\r\n\r\n".encode() + b"%x\r\n" % len(body) + body
    assert raw(server.port, chunked).startswith(b"HTTP/1.1 413 ")
    assert server.get("/health").status == 200


def test_h2_headers_that_are_too_large_are_refused(server):
    head = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"
    for more in (
        b"X: " + b"a" * 40_000 + b"\r\n\r\n",
        b"X: " + b"a" * 400_000,
        b"X: y\r\n" * 9_000 + b"\r\n",
    ):
        found = raw(server.port, head + more)
        assert found.startswith(b"HTTP/1.1 431 ")
        assert b'"error"' in found
    assert raw(server.port, b"nonsense\r\n\r\n").startswith(b"HTTP/1.1 400 ")


def test_h3_every_route_but_the_open_ones_needs_a_key(keyed):
    paths = list(keyed.get("/openapi.json", authorization=f"Bearer {KEY}").json["paths"].items())
    assert len(paths) > 15
    for path, methods in paths:
        [method] = methods
        is_open = path in ("/", "/docs", "/health", "/ready", "/static/{name}")
        for headers in (
            {},
            {"authorization": "Bearer wrong"},
            {"authorization": f"Basic {KEY}"},
            {"api-key": ""},
        ):
            answer = keyed.call(method.upper(), path, b"{}" if method == "post" else None, headers)
            assert (answer.status == 401) is not is_open, path
    for path in ("//v1/models", "/v1/%6dodels", "/v1/models/", "/static/../v1/models", "/nothing"):
        assert keyed.get(path).status in (401, 404), path
        assert b"tiny" not in keyed.get(path).body


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": f"Bearer {KEY}"},
        {"authorization": f"bearer {KEY}"},
        {"x-api-key": KEY},
        {"api-key": "another"},
    ],
)
def test_h3_a_right_key_opens(keyed, headers):
    assert keyed.get("/v1/models", **headers).status == 200


def test_h3_a_host_with_a_path_opens_nothing(keyed):
    found = raw(
        keyed.port, b"GET /v1/models HTTP/1.1\r\nHost: localhost/health?\r\nConnection: close\r\n\r\n"
    )
    assert b" 401 " in found[:20] or b" 403 " in found[:20] or b" 400 " in found[:20]


def refused(registry: Registry, *arguments: str) -> tuple[int, str]:
    """The exit code and the message of a server that does not start."""
    environment = {**os.environ, "QUILL_REGISTRY": str(registry.root), "QUILL_DEVICE": "cpu"}
    done = subprocess.run(
        [*RUN, "serve", *arguments], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    return done.returncode, done.stderr


def test_h3_other_machines_need_a_key(tiny_registry, tmp_path):
    code, message = refused(tiny_registry, "--host", "0.0.0.0", "--port", "0")
    assert code == 2
    assert "--api-key-file" in message
    keys = tmp_path / "keys.txt"
    keys.write_text("k\n")
    keys.chmod(0o644)
    assert refused(tiny_registry, "--host", "0.0.0.0", "--api-key-file", str(keys))[0] == 2
    keys.chmod(0o600)
    keys.write_text("\n")
    assert "no key" in refused(tiny_registry, "--api-key-file", str(keys))[1]
    assert refused(tiny_registry, "--api-key-file", str(tmp_path / "none"))[0] == 3


@pytest.mark.parametrize("path", ["/health", "/", "/v1/models", "/static/app.js"])
def test_h4_foreign_hosts_and_pages_are_refused(server, path):
    for headers in (
        {"host": "evil.example"},
        {"host": "127.0.0.1.evil.example"},
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": f"https://127.0.0.1:{server.port}"},
        {"sec-fetch-site": "cross-site"},
    ):
        answer = server.get(path, **headers)
        assert answer.status == 403, headers
        assert "access-control-allow-origin" not in answer.headers
    assert server.get("/health", host=f"LOCALHOST.:{server.port}").status == 200
    own = server.get("/health", origin=f"http://127.0.0.1:{server.port}")
    assert own.status == 200
    assert "access-control-allow-origin" not in own.headers


def test_h4_simple_requests_of_other_pages_are_refused(server):
    answer = server.call("POST", "/generate?prompt=3", headers={"origin": "http://evil.example"})
    assert answer.status == 403
    text = server.call("POST", "/v1/completions", b'{"prompt": "3"}', {"content-type": "text/plain"})
    assert (text.status, text.code) == (415, "unsupported_media_type")


def test_h4_allowed_pages_and_names(keyed):
    key = {"authorization": f"Bearer {KEY}"}
    assert keyed.get("/health", host="quill.example").status == 200
    answer = keyed.get("/v1/models", origin="https://a.example", **key)
    assert answer.headers["access-control-allow-origin"] == "https://a.example"
    assert "access-control-allow-credentials" not in answer.headers
    asked = keyed.call("OPTIONS", "/v1/completions", headers={"origin": "https://a.example"})
    assert asked.status == 204
    assert keyed.call("OPTIONS", "/v1/completions", headers={"origin": "https://b.example"}).status == 403


@pytest.mark.parametrize(
    "name",
    [
        "nope",
        "tiny:v9",
        "tiny:none",
        "../tiny",
        "a/b",
        "./tiny",
        "..",
        "tiny\0",
        "x" * 300,
        "<script>",
        "tiny:v0",
    ],
)
def test_h8_a_model_that_does_not_exist(server, name):
    answer = server.post("/v1/completions", {"model": name, "prompt": "3"})
    assert (answer.status, answer.code) == (404, "model_not_found")
    assert server.get("/health").status == 200


def test_h8_a_name_in_a_path_reads_no_folder(server):
    for name in ("..%2f..%2fetc", "%2e%2e", "tiny%00", "%2Fetc%2Fpasswd"):
        assert server.get(f"/v1/models/{name}").status == 404


def test_h8_a_corrupt_model_hides_no_other(tiny_registry, tmp_path):
    shutil.copytree(tiny_registry.root, tmp_path / "weights")
    bad = tmp_path / "weights" / "bad"
    shutil.copytree(tmp_path / "weights" / "tiny", bad)
    weights = bad / "v1" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(content)
    with running(Registry(tmp_path / "weights")) as server:
        for _ in range(3):
            answer = server.post("/v1/completions", {"model": "bad", "prompt": "3"})
            assert (answer.status, answer.code) == (503, "model_unusable")
            assert answer.headers["x-should-retry"] == "false"
        assert server.complete(prompt="3").status == 200


@pytest.mark.parametrize(
    "path", ["../api.py", "..%2fapi.py", "%2e%2e/api.py", "..\\api.py", "/etc/passwd", "x.js%00"]
)
def test_h9_there_is_no_way_out_of_the_static_files(server, path):
    assert server.get(f"/static/{path}").status == 404


def test_h11_a_port_in_use(tiny_registry, server):
    code, message = refused(tiny_registry, "--port", str(server.port))
    assert code == 7
    assert f"port {server.port}" in message
    assert refused(tiny_registry, "--host", "nowhere.invalid", "--api-key-file", __file__)[0] != 0


def test_a_connection_is_used_again_after_a_refusal(server):
    import http.client

    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    for body, status in ((b"{}", 200), (b"nonsense", 400), (b'{"n": -1}', 400), (b"{}", 200)):
        connection.request("POST", "/v1/completions", body, {"content-type": "application/json"})
        answer = connection.getresponse()
        answer.read()
        assert answer.status == status
        before = connection.sock
        assert before is not None
    connection.close()


def test_http_as_old_clients_speak_it(server):
    assert raw(server.port, b"GET /health HTTP/1.0\r\nHost: localhost\r\n\r\n").endswith(b'{"status":"ok"}')
    two = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    both = raw(server.port, two + two.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
    assert both.count(b'{"status":"ok"}') == 2
    began = time.monotonic()
    body = b'{"prompt": "3", "max_tokens": 1}'
    expecting = (
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nExpect: 100-continue\r\n"
    )
    expecting += b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
    assert b" 200 " in raw(server.port, expecting + body)
    assert time.monotonic() - began < 10
