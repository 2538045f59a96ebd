"""`quill sample --server` before a server that answers anything: a few plain lines, never a bug."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from socket import SHUT_WR, socket

import pytest

from quill.cli.app import main
from quill.registry.version import Version

EVIL = "\x1b[2J\x9b31m\u202e\r\x00\ud800"
LONG = "no " * 300_000


def plain(document: object, status: int = 200) -> bytes:
    """A whole answer."""
    body = document if isinstance(document, bytes) else json.dumps(document).encode()
    return b"HTTP/1.1 %d x\r\ncontent-length: %d\r\n\r\n%b" % (status, len(body), body)


def refused(status: int, **error: object) -> bytes:
    """An answer that is an error."""
    return plain({"error": error}, status)


def events(*documents: object, headers: bytes = b"") -> bytes:
    """A stream of events."""
    lines = [b"data: %b\n\n" % (d if isinstance(d, bytes) else json.dumps(d).encode()) for d in documents]
    return b"HTTP/1.1 200 x\r\nconnection: close\r\n%b\r\n%b" % (headers, b"".join(lines))


def choice(**fields: object) -> dict[str, object]:
    return {"choices": [{"index": 0, "text": "a"} | fields]}


# Answers about the model, which end the command, and the codes of its end.
DESCRIPTIONS = {
    "nothing": (b"", 7),
    "zeros": (b"\0" * 1000, 7),
    "many headers": (b"HTTP/1.1 200 x\r\n" + b"a: b\r\n" * 1000 + b"\r\n", 7),
    "a long header": (b"HTTP/1.1 200 x\r\na: " + b"b" * 200_000 + b"\r\n\r\n", 7),
    "a status that is none": (b"HTTP/1.1 99999 \x1b[2J\r\n\r\n", 7),
    "a redirect": (b"HTTP/1.1 302 x\r\nlocation: http://192.0.2.1/\r\ncontent-length: 0\r\n\r\n", 2),
    "chunks that are none": (b"HTTP/1.1 200 x\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n", 7),
    "more than it sends": (b"HTTP/1.1 200 x\r\ncontent-length: 99999999999\r\n\r\n{", 2),
    "nested": (plain(b'{"quill":' * 100_000), 2),
    "a huge number": (plain(b'{"quill": {"digest": ' + b"9" * 100_000 + b"}}"), 2),
    "another digest": (plain({"quill": {"digest": EVIL * 1000}}), 4),
    "a digest that is none": (plain({"quill": {"digest": [1] * 10_000}}), 4),
    "a long error": (refused(404, code="model_not_found", message=LONG), 3),
    "an evil error": (refused(500, code=EVIL, message=EVIL * 1000, param=EVIL), 7),
    "a refused key": (refused(401, message=LONG), 7),
    "a busy server": (refused(429, message=EVIL * 1000), 75),
    "a refused setting": (refused(400, message=LONG, param=EVIL * 1000), 2),
    "an error of no text": (refused(413, message=[1] * 100_000, param=[1] * 10_000, code={}), 2),
}  # fmt: skip
# Answers to the prompt.
COMPLETIONS = {
    "a surrogate": (events(choice(text="\ud800"), b"[DONE]"), 0),
    "an index that is none": (events(choice(index=-1)), 2),
    "a huge index": (events(choice(index=10**30)), 2),
    "choices that are none": (events({"choices": ["a"] * 10_000}), 2),
    "an event that is none": (events(b"[1]"), 2),
    "bytes": (events(b"\xff\xfe\0"), 2),
    "no end": (events(choice()), 7),
    "an error": (events({"error": {"code": "diverged", "message": EVIL * 1000}}), 6),
    "an error that is none": (events({"error": LONG}), 2),
    "a remark": (events(choice(), b"[DONE]", headers=b"x-quill-notice: %b\r\n" % (b"\x9b31m " * 9000)), 0),
    "a line without an end": (events(b"a" * (20 << 20)), 2),
}  # fmt: skip
# Those that have no such host need no network to say so.
ADDRESSES = [
    "http://..", f"http://{'x' * 70}.example", "http://\udcff", "\udcff", "x" * 70_000, "http://[::1", "//",
    "http://[::1]:99999", "http://127.0.0.1:-1", "http://127.0.0.1:1/é", "http://127.0.0.1:1/\x1b[2J",
    "http://127.0.0.1:1/a b", "http://127.0.0.1:1/\r\nX: y", "ftp://127.0.0.1", "http://u:p@127.0.0.1:1",
    "http://[::1%25x]", "http://[v1.x]/", "http://127.0.0.1:1",
]  # fmt: skip


@pytest.fixture
def answering() -> Iterator[Callable[[bytes, bytes], str]]:
    """Start a server that sends these bytes about the model, and these for a prompt; returns its address."""
    listening = []

    def start(description: bytes, completion: bytes) -> str:
        listener = socket()
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        listening.append(listener)
        threading.Thread(target=serve, args=(listener, description, completion), daemon=True).start()
        return f"http://127.0.0.1:{listener.getsockname()[1]}"

    def serve(listener: socket, description: bytes, completion: bytes) -> None:
        # Closing the listener ends it.
        with suppress(OSError):
            while True:
                connection, _ = listener.accept()
                with connection, suppress(OSError):
                    asked = connection.recv(1 << 16)
                    connection.sendall(completion if asked.startswith(b"POST") else description)
                    # What is closed before all was read of it is reset, and loses the answer.
                    connection.shutdown(SHUT_WR)
                    while connection.recv(1 << 16):
                        pass

    yield start
    for listener in listening:
        listener.close()


@pytest.fixture
def sample(tiny_registry, monkeypatch, capsys) -> Callable[..., tuple[int, str, str]]:
    """Sample from a server: its code and what it printed, which has no more than a few lines on stderr."""
    monkeypatch.setenv("QUILL_REGISTRY", str(tiny_registry.root))

    def run(address: str, *more: str) -> tuple[int, str, str]:
        code = main(["sample", "tiny", "3 bells", f"--server={address}", "--max-new-tokens=4", *more])
        out, err = capsys.readouterr()
        assert len(err.encode()) < 2048
        assert not {"\x1b", "\x9b", "\u202e"} & set(err)
        return code, out, err

    return run


@pytest.mark.parametrize("what", DESCRIPTIONS)
def test_f70_what_a_server_says_of_a_model(answering, sample, what):
    answer, expected = DESCRIPTIONS[what]
    code, out, err = sample(answering(answer, b""))
    assert (code, out) == (expected, "")
    assert err.startswith("error: ")


@pytest.mark.parametrize("what", COMPLETIONS)
def test_f70_what_a_server_makes_of_a_prompt(answering, sample, tiny: Version, what):
    answer, expected = COMPLETIONS[what]
    address = answering(plain({"quill": {"digest": tiny.digest}}), answer)
    for more in ([], ["--json"]):
        assert sample(address, *more)[0] == expected


@pytest.mark.parametrize("address", ADDRESSES, ids=lambda address: ascii(address)[:30])
def test_f70_addresses_that_are_none(sample, address):
    code, out, err = sample(address)
    assert code in (2, 7)
    assert out == ""
    assert err.startswith("error: ")
