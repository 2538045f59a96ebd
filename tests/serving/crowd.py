"""Many clients at once, each a connection in one thread: what they get, how long it takes, what is lost.

`python tests/serving/crowd.py http://127.0.0.1:8000 --model NAME --clients 200 --seconds 120` prints figures.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit


@dataclass
class Figures:
    """What a load came to.

    Attributes:
        completed: Requests that were answered whole.
        refused: Answers with 429; the client tried again.
        lost: What became of the others.
        tokens: Tokens that were generated.
        first: Seconds from each request to its first token.
        health: Seconds that each answer of /health took.
        seconds: Seconds that it took.
    """

    completed: int = 0
    refused: int = 0
    lost: list[str] = field(default_factory=list)
    tokens: int = 0
    first: list[float] = field(default_factory=list)
    health: list[float] = field(default_factory=list)
    seconds: float = 0.0

    def __str__(self) -> str:
        return (
            f"{self.completed} completed, {self.refused} refused and retried, {len(self.lost)} lost; "
            f"{self.tokens / self.seconds:.0f} tokens/s; first token: median {at(self.first, 0.5):.1f} ms, "
            f"p99 {at(self.first, 0.99):.1f} ms; /health: {len(self.health)} answers, "
            f"median {at(self.health, 0.5):.1f} ms, p99 {at(self.health, 0.99):.1f} ms"
        )


def at(seconds: list[float], part: float) -> float:
    """A quantile, in milliseconds."""
    return 1000 * sorted(seconds)[min(int(part * len(seconds)), len(seconds) - 1)] if seconds else 0.0


def request(method: str, path: str, body: dict[str, Any] | None = None) -> bytes:
    """A request as it is sent."""
    content = b"" if body is None else json.dumps(body).encode()
    head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content


class Connection:
    """A connection that stays open."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._reader: asyncio.StreamReader | None = None

    async def head(self, sent: bytes) -> tuple[int, dict[bytes, bytes]]:
        """Send a request; return the status and the headers of its answer."""
        if self._reader is None or self._reader.at_eof():
            self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port)
        self._writer.write(sent)
        first, *lines = (await self._reader.readuntil(b"\r\n\r\n")).rstrip().split(b"\r\n")
        pairs = (line.split(b": ", 1) for line in lines)
        return int(first.split()[1]), {name.lower(): value for name, value in pairs}

    async def body(self, headers: dict[bytes, bytes]) -> bytes:
        """Read the rest of an answer that has a length."""
        assert self._reader is not None
        return await self._reader.readexactly(int(headers[b"content-length"]))

    async def chunk(self) -> bytes:
        """Read a chunk of a stream; the last is empty."""
        assert self._reader is not None
        size = int(await self._reader.readline(), 16)
        return (await self._reader.readexactly(size + 2))[:-2]

    def close(self) -> None:
        """Close it."""
        if self._reader is not None:
            self._reader = None
            self._writer.close()


async def stream(connection: Connection, body: dict[str, Any], figures: Figures) -> float | None:
    """One request for a stream; return None, or the seconds after which to try again."""
    sent = request(
        "POST", "/v1/completions", {**body, "stream": True, "stream_options": {"include_usage": True}}
    )
    began = time.perf_counter()
    status, headers = await connection.head(sent)
    if status == 429:
        await connection.body(headers)
        figures.refused += 1
        return float(headers[b"retry-after"])
    if status != 200:
        raise ConnectionError(f"{status} {(await connection.body(headers))[:200]!r}")
    tail, has_text = b"", False
    while chunk := await connection.chunk():
        if not has_text and b'"text":' in chunk:
            has_text = True
            figures.first.append(time.perf_counter() - began)
        tail = (tail + chunk)[-2000:]
    *_, last, end, _ = tail.split(b"\n\n")
    if end != b"data: [DONE]" or b'"error"' in last:
        raise ConnectionError(f"the stream ended with {tail[-300:]!r}")
    figures.tokens += json.loads(last.removeprefix(b"data: "))["usage"]["completion_tokens"]
    figures.completed += 1
    return None


async def client(
    port: int,
    body: dict[str, Any],
    figures: Figures,
    number: int,
    *,
    until: float,
    requests: int,
    haste: float,
) -> None:
    """Ask again and again, as long as there is time; then finish what was begun."""
    connection = Connection(port)
    done = 0
    while done < requests and time.perf_counter() < until:
        try:
            while (wait := await stream(connection, {**body, "seed": number}, figures)) is not None:
                # Clients that are refused together must not come back together.
                await asyncio.sleep(wait / haste * (0.5 + number % 100 / 100))
        except (OSError, EOFError, ValueError) as e:
            figures.lost.append(f"{type(e).__name__}: {e}"[:300])
            connection.close()
        done += 1
    connection.close()


async def watch(port: int, figures: Figures) -> None:
    """Ask whether the server lives, all the time."""
    connection = Connection(port)
    while True:
        began = time.perf_counter()
        _, headers = await connection.head(request("GET", "/health"))
        await connection.body(headers)
        figures.health.append(time.perf_counter() - began)
        await asyncio.sleep(0.05)


async def load(
    port: int,
    body: dict[str, Any],
    *,
    clients: int,
    seconds: float = 3600.0,
    requests: int = 10**9,
    haste: float = 1.0,
) -> Figures:
    """Put a load on a server.

    Args:
        port: Its port on this machine.
        body: What each client asks for.
        clients: How many ask at once.
        seconds: No request begins after these.
        requests: The most requests of each client.
        haste: How many times sooner than it was told a refused client tries again.
    """
    figures = Figures()
    began = time.perf_counter()
    watching = asyncio.create_task(watch(port, figures))
    limits = {"until": began + seconds, "requests": requests, "haste": haste}
    await asyncio.gather(*(client(port, body, figures, i, **limits) for i in range(clients)))
    figures.seconds = time.perf_counter() - began
    if watching.done():
        watching.result()
    watching.cancel()
    return figures


def main() -> None:
    """Put a load on a server, and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("address")
    parser.add_argument("--model")
    parser.add_argument("--prompt", default="A")
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=120.0)
    given = parser.parse_args()
    body = {"model": given.model, "prompt": given.prompt, "max_tokens": given.tokens}
    port = urlsplit(given.address).port
    found = asyncio.run(load(port, body, clients=given.clients, seconds=given.seconds))
    print(found)  # noqa: T201
    for lost in found.lost[:5]:
        print(lost)  # noqa: T201


if __name__ == "__main__":
    main()
