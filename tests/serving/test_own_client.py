"""`quill sample --server`: the same text through a running server, without torch, or a plain refusal."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from servers import cache_of

from quill.cli.app import main
from quill.config.settings import SampleConfig
from quill.errors import InputError, RefusedError, ResourceError
from quill.serving import presence, requests
from quill.serving.client import Client, RemoteGenerator

WITH_TORCH = "import sys\nfrom quill.cli.app import main\ncode = main(sys.argv[1:])\nsys.stdout.flush()\n"


@pytest.fixture(autouse=True)
def _there(tiny_registry, monkeypatch):
    monkeypatch.setenv("QUILL_REGISTRY", str(tiny_registry.root))
    monkeypatch.setenv("QUILL_DEVICE", "cpu")
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache_of(tiny_registry)))


@pytest.fixture
def address(server) -> str:
    """Where the server of `tiny` is."""
    return f"http://127.0.0.1:{server.port}"


def sample(capsys, *arguments: str) -> tuple[int, str, str]:
    code = main(["sample", "tiny", *arguments])
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.parametrize(
    "arguments",
    [
        ["3 bells", "--seed=1"],
        ["", "--seed=2", "--temperature=0"],
        ["3 bells", "--seed=3", "--temperature=1.5", "--top-k=5"],
        ["3 bells", "--seed=4", "--top-p=0.9", "--min-p=0.01", "--repetition-penalty=1.3"],
        ["the tide is " * 9, "--seed=5", "--repetition-penalty=1.3"],
        ["3 bells", "--seed=6", "--top-p=1", "--stop=e", "--stop=bells,"],
        ["3 bells", "--max-new-tokens=0"],
        ["3 bells", "--seed=9223372036854775807", "--no-echo", "--no-stream"],
        ["3 bells", "--seed=7", "-n3"],
        ["3 bells", "--seed=8", "-n2", "--json"],
    ],
    ids=lambda arguments: " ".join(arguments)[-40:],
)
def test_the_text_is_that_of_this_process(arguments, address, capsys):
    here = sample(capsys, "--max-new-tokens=60", *arguments)
    there = sample(capsys, "--max-new-tokens=60", *arguments, "--server", address)
    assert here[0] == there[0] == 0
    assert there[1] == here[1]
    # A prompt that is cut is remarked on in both.
    assert there[2].startswith("warning: using") == here[2].startswith("warning: using")


def test_a_chat_continues_the_same_text(address, capsys, monkeypatch):
    def chat(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"3 bells\n\nbells\n")))
        code = main(["chat", "tiny", "--seed=1", "--max-new-tokens=12", *arguments])
        return code, *capsys.readouterr()

    here, there = chat(), chat("--server", address)
    assert here[0] == there[0] == 0
    assert there[1] == here[1]
    assert there[2].count("warning: using") == here[2].count("warning: using") == 1


def test_no_torch_is_loaded_and_no_proxy_is_asked(address):
    script = WITH_TORCH + "sys.exit(100 if 'torch' in sys.modules else code)"
    arguments = ["sample", "tiny", "3 bells", "--server", address, "--max-new-tokens=5"]
    proxies = dict.fromkeys(("http_proxy", "HTTP_PROXY", "all_proxy"), "http://127.0.0.1:9")
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, env={**os.environ, **proxies}
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.startswith(b"3 bells")


def test_every_setting_reaches_the_server_under_its_name(server, tiny, address):
    config = SampleConfig(
        max_new_tokens=7, temperature=0.3, top_k=3, top_p=0.5, min_p=0.1, repetition_penalty=1.2,
        num_samples=5, seed=9, stop=["a", "b"],
    )  # fmt: skip
    assert all(getattr(config, n) != f.default for n, f in SampleConfig.model_fields.items())
    body = RemoteGenerator(Client(address), tiny)._body("x", config, config.num_samples, "error")
    read = requests.CompletionRequest.model_validate(body)
    assert read.config(read.max_tokens).model_copy(update={"num_samples": read.n}) == config


def test_auto_uses_the_server_of_this_registry(server, address, tiny_registry, capsys, monkeypatch):
    assert presence.addresses(tiny_registry.root) == [address]
    code, _, err = sample(capsys, "3 bells", "--server=auto", "--max-new-tokens=3", "-v")
    assert code == 0
    assert f"server: {address}\n" in err
    monkeypatch.setenv("QUILL_SERVER", "auto")
    assert f"server: {address}\n" in sample(capsys, "3", "--max-new-tokens=3", "-v")[2]
    assert "server:" not in sample(capsys, "3", "--max-new-tokens=3", "-v", "--server=off")[2]
    # What a server cannot do, this process does.
    code, _, err = sample(capsys, "é", "--unknown=skip", "--max-new-tokens=3")
    assert code == 0
    assert err.startswith("no server to use: a server cannot apply --unknown skip")


def test_auto_samples_in_this_process_if_there_is_no_server(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    arguments = ["3 bells", "--seed=1", "--max-new-tokens=9"]
    code, out, err = sample(capsys, *arguments, "--server=auto")
    assert (code, err) == (
        0,
        "no server to use: you started no server for this registry here; sampling in this process\n",
    )
    assert out == sample(capsys, *arguments)[1]
    assert sample(capsys, *arguments, "--server=auto", "-q")[2] == ""


def test_what_a_server_cannot_do_is_refused_by_name(address, tiny, capsys):
    for arguments, words in (
        (["--device=cpu"], "a server cannot apply --device cpu"),
        (["--unknown=skip"], "a server cannot apply --unknown skip"),
        (["--num-samples=17"], "refuses --num-samples"),
        (["--max-new-tokens=5000"], "refuses --max-new-tokens"),
        (["--stop", "x" * 300], "refuses --stop"),
    ):
        code, out, err = sample(capsys, "3 bells", "--server", address, *arguments)
        assert (code, out) == (2, "")
        assert words in err
    err = sample(capsys, "3 bells", "--server", address, "--device", "cpu")[2]
    assert "try: quill sample tiny '3 bells' --device cpu --server off" in err
    assert main(["sample", str(tiny.path), "--server", address]) == 2
    assert f"no server can sample '{tiny.path}'" in capsys.readouterr().err
    code, out, err = sample(capsys, "3 bellsé", "--server", address)
    assert (code, out) == (2, "")
    assert "'é' (U+00E9)" in err


@pytest.mark.parametrize("url", ["ftp://x", "http://", "http://x:y", "http://a@b", "http://x/?q", "[", ""])
def test_what_is_not_a_url_is_refused(url):
    with pytest.raises(InputError, match="is not the URL of a server"):
        Client(url)


def test_the_urls_of_other_programs_are_understood(address, tiny):
    for url in (address, f"{address}/", f"{address}/v1", address.removeprefix("http://")):
        assert "".join(RemoteGenerator(Client(url), tiny).stream("3", SampleConfig(max_new_tokens=2)))


def test_another_model_of_that_name_is_refused(address, tiny, monkeypatch):
    monkeypatch.setattr(type(tiny), "digest", "0" * 64)
    with pytest.raises(RefusedError, match="has another 'tiny:v1'"):
        RemoteGenerator(Client(address), tiny)


def test_a_key_is_sent_from_a_file_or_the_environment(answering, tiny, capsys, monkeypatch, tmp_path):
    stub = answering({"": (401, error("the API key is missing or wrong", "invalid_api_key"))})
    code, out, err = sample(capsys, "x", "--server", stub.address)
    assert (code, out) == (7, "")
    assert "the API key is missing or wrong" in err
    assert "QUILL_API_KEY, or set --api-key-file keys.txt" in err
    assert stub.sent == [None]
    monkeypatch.setenv("QUILL_API_KEY", "one")
    sample(capsys, "x", "--server", stub.address)
    file = tmp_path / "keys.txt"
    file.write_text("two\nthree\n")
    file.chmod(0o600)
    sample(capsys, "x", "--server", stub.address, "--api-key-file", str(file))
    assert stub.sent[1:] == ["Bearer one", "Bearer two"]
    file.write_text("tw\x00o\n")
    assert sample(capsys, "x", "--server", stub.address, "--api-key-file", str(file))[0] == 2
    assert sample(capsys, "x", "--server", stub.address, "--api-key-file", str(tmp_path / "none"))[0] == 3
    assert len(stub.sent) == 3


@pytest.mark.parametrize(
    ("status", "code", "exit_code"),
    [
        (429, "queue_full", 75),
        (503, "draining", 75),
        (503, "loading", 75),
        (503, "model_unusable", 7),
        (500, "internal_error", 7),
        (500, "diverged", 6),
        (404, "model_not_found", 3),
        (403, "host_not_allowed", 7),
        (413, "body_too_large", 2),
    ],
)
def test_each_refusal_has_its_exit_code(status, code, exit_code, answering, tiny, capsys):
    described = {"quill": {"digest": tiny.digest}}
    refusal = error("so it is", code)
    stub = answering({"/v1/models/": (200, described), "/v1/completions": (status, refusal)})
    assert sample(capsys, "x", "--server", stub.address)[:2] == (exit_code, "")
    # Once the stream has begun, the same comes as an event.
    stub = answering({"/v1/models/": (200, described), "/v1/completions": (200, events("ab", refusal))})
    found, out, err = sample(capsys, "x", "--server", stub.address)
    if status in (429, 500, 503):
        assert (found, out) == (exit_code, "xab")
    assert "so it is" in err


def test_a_server_that_is_gone_or_something_else_is_named(answering, tiny, capsys):
    described = {"/v1/models/": (200, {"quill": {"digest": tiny.digest}})}
    stub = answering({**described, "/v1/completions": (200, events("ab"))})
    code, out, err = sample(capsys, "x", "--server", stub.address)
    assert (code, out) == (7, "xab")
    assert f"no answer from the server at {stub.address}\n  why: the text is incomplete" in err
    for answers in (
        {"": (200, {"object": "model"})},
        {"": (200, b"<html>")},
        {"": (302, {})},
        {**described, "/v1/completions": (200, events({"choices": [{"index": 4, "text": "x"}]}))},
        {**described, "/v1/completions": (200, events({"choices": [7]}))},
    ):
        stub = answering(answers)
        code, out, err = sample(capsys, "x", "--server", stub.address)
        assert (code, out) == (2, "")
        assert f"what answers at {stub.address} is not quill serve" in err
    with pytest.raises(ResourceError, match="no answer"):
        Client(stub.address.replace("http:", "https:")).describe("tiny")
    stub.close()
    code, _, err = sample(capsys, "x", "--server", stub.address)
    assert code == 7
    assert "connection refused" in err
    with pytest.raises(ResourceError):
        Client("http://no.such.host.invalid").describe("tiny")


class TestPresence:
    @pytest.fixture(autouse=True)
    def _cache(self, tmp_path, monkeypatch):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        self.folder = tmp_path / "cache" / "quill" / "servers"

    def test_a_note_is_there_while_the_server_runs(self, tmp_path):
        with presence.announced(tmp_path / "weights", "http://127.0.0.1:8000"):
            assert presence.addresses(tmp_path / "weights") == ["http://127.0.0.1:8000"]
            assert presence.addresses(tmp_path) == []
        assert list(self.folder.iterdir()) == []

    @pytest.mark.parametrize(
        "change",
        [
            {"pid": 2**22 - 1},
            {"process": "another boot/1"},
            {"host": "another"},
            {"address": "http://10.0.0.1:80"},
            {"address": "http://127.0.0.1.example.org:80"},
            {"address": None},
            {"pid": "1"},
        ],
        ids=str,
    )
    def test_a_note_is_only_a_claim(self, change, tmp_path):
        with presence.announced(tmp_path, "http://127.0.0.1:8000"):
            [place] = self.folder.iterdir()
            note = json.loads(place.read_text())
            place.write_text(json.dumps({**note, **change}))
            (self.folder / "x.json").write_text("[")
            (self.folder / "y.json").mkdir()
            assert presence.addresses(tmp_path) == []

    def test_another_users_note_does_not_count(self, tmp_path, monkeypatch):
        with presence.announced(tmp_path, "http://127.0.0.1:8000"):
            monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
            assert presence.addresses(tmp_path) == []

    def test_notes_of_killed_servers_are_removed_by_the_next(self, tmp_path):
        with presence.announced(tmp_path, "http://127.0.0.1:1"):
            [place] = self.folder.iterdir()
            note = json.loads(place.read_text())
            (self.folder / "dead.json").write_text(json.dumps({**note, "process": "another boot/1"}))
            (self.folder / "far.json").write_text(json.dumps({**note, "host": "another"}))
            with presence.announced(tmp_path, "http://127.0.0.1:2"):
                assert set(presence.addresses(tmp_path)) == {"http://127.0.0.1:1", "http://127.0.0.1:2"}
                assert not (self.folder / "dead.json").exists()
            assert {p.name for p in self.folder.iterdir()} == {place.name, "far.json"}

    def test_a_server_runs_where_no_note_can_be_left(self, tmp_path):
        self.folder.parent.parent.mkdir()
        self.folder.parent.write_text("a file")
        with presence.announced(tmp_path, "http://127.0.0.1:1"):
            assert presence.addresses(tmp_path) == []


def error(message: str, code: str) -> dict:
    return {"error": {"message": message, "type": "x", "param": None, "code": code}}


def events(*parts: str | dict) -> bytes:
    """A stream that lacks its end."""
    documents = [{"choices": [{"index": 0, "text": p}]} if isinstance(p, str) else p for p in parts]
    return b": keep-alive\n\n" + b"".join(b"data: " + json.dumps(d).encode() + b"\n\n" for d in documents)


class Stub:
    """A server that gives the answers of the first path that fits, and records the keys it was sent."""

    def __init__(self, answers: dict[str, tuple[int, dict | bytes]]) -> None:
        stub = self
        self.sent: list[str | None] = []

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                stub.sent.append(self.headers["authorization"])
                self.rfile.read(int(self.headers["content-length"] or 0))
                status, body = next(a for path, a in answers.items() if self.path.startswith(path))
                self.send_response(status)
                self.end_headers()
                self.wfile.write(body if isinstance(body, bytes) else json.dumps(body).encode())

            do_POST = do_GET

            def log_message(self, *_: object) -> None:
                pass

        self._server = HTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture
def answering() -> Iterator[Callable[..., Stub]]:
    """Start a server with fixed answers."""
    started: list[Stub] = []

    def start(answers: dict[str, tuple[int, dict | bytes]]) -> Stub:
        started.append(Stub(answers))
        return started[-1]

    yield start
    for stub in started:
        stub.close()
