"""Text from a running server, for a process that loads no torch.

http.client goes through no proxy, whatever the environment says, and follows no redirect, so a prompt and a
key reach the address that was given or none.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from http.client import HTTPConnection, HTTPException, HTTPResponse
from typing import Any, Literal
from urllib.parse import quote, urlsplit

from quill.config.settings import SampleConfig
from quill.errors import (
    DivergedError,
    InputError,
    LockedError,
    NotFoundError,
    QuillError,
    RefusedError,
    ResourceError,
    shorten,
)
from quill.registry.folder import Folder

# Seconds to connect, and to wait for the next byte: a model may have to load before the first.
_CONNECT = 5.0
_READ = 600.0
_MOST_BYTES = 1 << 24
_PORTS = {"http": 80, "https": 443}
# Of what a server says, so much is repeated.
_LONGEST_REMARK = 200
# What is over after a while, by its code.
_LATER = {"draining", "engine_down", "loading", "not_ready", "queue_full", "queue_timeout", "server_shutdown"}
# The API's names of settings that quill calls otherwise.
_SETTINGS = {"max_tokens": "max_new_tokens", "n": "num_samples"}


class Client:
    """Asks a server.

    Args:
        address: Its URL, such as "http://127.0.0.1:8000"; a "/v1" at its end is left out.
        key: The key that it wants, if it wants one.

    Raises:
        InputError: It is not the URL of a server, or no key can be like this.
    """

    def __init__(self, address: str, key: str = "") -> None:
        self.address = address if "://" in address else f"http://{address}"
        try:
            parts = urlsplit(self.address)
            # Without a port HTTPConnection takes the end of an IPv6 address for one.
            self._host, self._port = parts.hostname or "", parts.port or _PORTS.get(parts.scheme)
            self._host.encode("idna")
            parts.path.encode("ascii")
        except ValueError:
            parts, self._host = urlsplit(""), ""
        if parts.scheme not in ("http", "https") or not self._host or parts.query or parts.username:
            raise InputError(
                f"{shorten(address)} is not the URL of a server", why="one is like http://127.0.0.1:8000"
            )
        if not (key.isascii() and key.isprintable()):
            raise InputError("the API key has characters that no key has", why="HTTP allows plain ASCII")
        self._is_secret = parts.scheme == "https"
        self._prefix = parts.path.rstrip("/").removesuffix("/v1")
        self._headers = {"authorization": f"Bearer {key}"} if key else {}

    def require_ready(self) -> None:
        """Raise QuillError unless the server takes requests."""
        with self._ask("GET", "/ready"):
            pass

    def describe(self, reference: str) -> dict[str, Any]:
        """What the server knows of a model.

        Raises:
            NotFoundError: It has none of that name.
            QuillError: It does not answer, or refuses to.
        """
        with self._ask("GET", f"/v1/models/{quote(reference)}") as answer:
            found = self._object(answer.read(_MOST_BYTES)).get("quill")
        if not isinstance(found, dict):
            raise self._stranger()
        return found

    def complete(
        self, body: Mapping[str, Any], notice: Callable[[str], object] = lambda message: None
    ) -> Generator[tuple[int, str], None, None]:
        """Generate samples; closing the iterator stops them on the server.

        Args:
            body: The request to /v1/completions, a stream.
            notice: Called with what the server remarks about the prompt.

        Yields:
            The number of a sample, and its next text.

        Raises:
            QuillError: The server does not answer, refuses, or stops before the samples end.
        """
        with self._ask("POST", "/v1/completions", json.dumps(body).encode()) as answer:
            if remark := answer.getheader("x-quill-notice"):
                notice(remark[:_LONGEST_REMARK])
            while line := answer.readline(_MOST_BYTES):
                kind, _, data = line.partition(b":")
                if kind != b"data":
                    continue
                if data.strip() == b"[DONE]":
                    return
                event = self._object(data)
                if "error" in event:
                    raise self._explain(event, 500)
                yield from self._texts(event, body["n"])
            raise HTTPException("the text is incomplete")

    @contextmanager
    def _ask(self, method: str, path: str, body: bytes | None = None) -> Iterator[HTTPResponse]:
        """Send a request on its own connection; an answer that is not 200 is raised as an error."""
        connection = self._connection()
        headers = {"content-type": "application/json", **self._headers}
        try:
            connection.connect()
            if connection.sock is not None:
                connection.sock.settimeout(_READ)
            # A server that refuses a long body answers before it has read it.
            with suppress(BrokenPipeError, ConnectionResetError):
                connection.request(method, self._prefix + path, body=body, headers=headers)
            answer = connection.getresponse()
            if answer.status != 200:
                raise self._explain(self._object(answer.read(_MOST_BYTES)), answer.status)
            yield answer
        except (OSError, HTTPException) as e:
            why = (e.strerror if isinstance(e, OSError) else None) or str(e) or type(e).__name__
            raise ResourceError(
                f"no answer from the server at {self.address}", why=why.lower(), hint="quill serve"
            ) from None
        finally:
            connection.close()

    def _connection(self) -> HTTPConnection:
        if not self._is_secret:
            return HTTPConnection(self._host, self._port, timeout=_CONNECT)
        from http.client import HTTPSConnection

        return HTTPSConnection(self._host, self._port, timeout=_CONNECT)

    def _texts(self, event: Mapping[str, Any], n: int) -> Iterator[tuple[int, str]]:
        choices = event.get("choices")
        for choice in choices if isinstance(choices, list) else ():
            index, text = (choice.get("index"), choice.get("text")) if isinstance(choice, dict) else (-1, "")
            if not isinstance(index, int) or not 0 <= index < n or not isinstance(text, str):
                raise self._stranger()
            yield index, text

    def _object(self, raw: bytes) -> dict[str, Any]:
        """A JSON object that the server sent."""
        with suppress(ValueError, RecursionError):
            found = json.loads(raw)
            if isinstance(found, dict):
                return found
        raise self._stranger()

    def _stranger(self) -> InputError:
        return InputError(f"what answers at {self.address} is not quill serve", why="its answers are others")

    def _explain(self, answer: Mapping[str, Any], status: int) -> QuillError:
        """The error that an answer stands for."""
        error = answer.get("error")
        if not isinstance(error, dict):
            return self._stranger()
        code, param = str(error.get("code")), str(error.get("param"))
        message = str(error.get("message"))[:_LONGEST_REMARK]
        server = f"the server at {self.address}"
        if status == 401:
            hint = "give the key in QUILL_API_KEY, or set api_key_file=keys.txt"
            return ResourceError(f"{server} refuses this", why=message, hint=hint)
        if code == "diverged":
            return DivergedError(message)
        if code == "model_not_found":
            return NotFoundError(message, why=f"{server} serves some models only, or another registry")
        if code == "unknown_character":
            return InputError(message)
        if status == 429 or code in _LATER:
            return LockedError(f"{server} is not ready", why=message, hint="try again later")
        if status in (400, 413):
            name = _SETTINGS.get(param, param)
            setting = f"sample.{name}" if name in SampleConfig.model_fields else "the request"
            return InputError(f"{server} refuses {setting}", why=message)
        return ResourceError(f"{server} failed", why=message)


class RemoteGenerator:
    """Generates text as a Generator does, on a server that has the same model.

    Args:
        client: The server.
        version: The model, as the own registry has it.
        notice: Called with what a user should know, such as that the prompt was cut.

    Raises:
        InputError: A server cannot be asked for this model.
        NotFoundError: The server does not have it.
        RefusedError: The server's model of that name is another.
        QuillError: The server does not answer, or refuses to.
    """

    def __init__(
        self, client: Client, version: Folder, notice: Callable[[str], object] = lambda message: None
    ) -> None:
        self._client, self._reference, self._notice = client, version.reference, notice
        if version.label or not version.is_published or version.digest is None:
            why = "a server knows the published versions of a registry by name, and their digests"
            raise InputError(f"no server can sample '{version.label or version.reference}'", why=why)
        theirs = client.describe(version.reference).get("digest")
        if theirs != version.digest:
            raise RefusedError(
                f"the server at {client.address} has another '{version.reference}'",
                why=f"the sha256 of its weights is {str(theirs)[:12]}..., not {version.digest[:12]}...",
                hint="quill serve --port 0",
            )

    def stream(
        self, prompt: str, config: SampleConfig, unknown: Literal["error", "skip"] = "error"
    ) -> Generator[str, None, None]:
        """Generate one sample, chunk by chunk; raises and yields as `Generator.stream` does."""
        body = self._body(prompt, config, 1, unknown)
        with closing(self._client.complete(body, self._notice)) as samples:
            for _, text in samples:
                if text:
                    yield text

    def generate(
        self, prompt: str, config: SampleConfig, unknown: Literal["error", "skip"] = "error"
    ) -> list[str]:
        """Generate num_samples samples; raises as `Generator.generate` does."""
        texts = [""] * config.num_samples
        body = self._body(prompt, config, config.num_samples, unknown)
        for index, text in self._client.complete(body, self._notice):
            texts[index] += text
        return texts

    def _body(self, prompt: str, config: SampleConfig, n: int, unknown: str) -> dict[str, Any]:
        if unknown != "error":
            raise InputError(
                f"a server cannot apply unknown={unknown}", why="it refuses characters that have no token"
            )
        settings = config.model_dump()
        return {
            **{k: v for k, v in settings.items() if k not in _SETTINGS.values()},
            **{theirs: settings[ours] for theirs, ours in _SETTINGS.items()},
            "n": n,
            "model": self._reference,
            "prompt": prompt,
            "stream": True,
        }
