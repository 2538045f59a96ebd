"""Runs the API: the address, the keys, and an orderly end."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import time
from collections.abc import Callable, Sequence
from types import FrameType

import uvicorn

from quill.config.settings import ServeConfig
from quill.errors import InputError, ResourceError
from quill.registry.store import Registry
from quill.serving.app import Api, build
from quill.serving.catalog import Catalog
from quill.serving.guard import MOST_HEADER_BYTES, Guard, Keys, is_any, is_local
from quill.serving.keys import read_keys
from quill.serving.presence import announced
from quill.serving.protocol import Protocol

_BACKLOG = 512
# Longer than the clients of Python keep a connection, so that they never use one that was just closed.
_IDLE_CONNECTION = 30


class Server(uvicorn.Server):
    """A server that lets running requests end before it does.

    The first signal stops new work. When nothing runs any more, or the time is over, the server ends; the
    second signal ends it at once. It ends too when the engine has: a process that starts afresh is in a state
    that is known, and whoever supervises it starts one.

    Args:
        config: uvicorn's settings.
        api: The routes.
    """

    def __init__(self, config: uvicorn.Config, api: Api) -> None:
        super().__init__(config)
        self._api = api
        self._drain: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until a signal comes.

        Raises:
            BaseException: The bug that ended the engine.
        """
        self._loop = asyncio.get_running_loop()
        engine = self._api.engine
        engine.on_failure = self._end_with
        await super().serve(sockets)
        if engine.failure is not None:
            raise engine.failure

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to end."""
        self._captured_signals.append(sig)
        if self._api.draining or self._loop is None:
            self.should_exit = self.force_exit = True
            return
        self._api.draining = True
        self._loop.call_soon_threadsafe(self._begin_to_drain)

    def _end_with(self, failure: BaseException) -> None:
        # Requests that run were answered with errors, which are sent before the server ends.
        self._api.draining = self.should_exit = True

    def _begin_to_drain(self) -> None:
        self._drain = asyncio.create_task(self._end_in_order())

    async def _end_in_order(self) -> None:
        engine = self._api.engine
        end = time.monotonic() + self._api.config.drain
        while engine.unfinished and time.monotonic() < end:
            await asyncio.sleep(0.05)
        engine.cancel_all("shutdown")
        self.should_exit = True


def serve(
    config: ServeConfig,
    registry: Registry,
    references: Sequence[str],
    device: str,
    announce: Callable[[str], None],
) -> None:
    """Serve models until a signal ends it.

    Args:
        config: The limits.
        registry: The registry.
        references: The models to serve; none: all of them.
        device: The device to compute on.
        announce: Called with the address once connections are accepted.

    Raises:
        InputError: The address can be reached by others, and there is no key.
        ResourceError: The address cannot be used.
    """
    keys = read_keys(config.api_key_file)
    if not keys and not is_local(config.host):
        raise InputError(
            f"host={config.host} needs a key",
            why="others reach this address; the key is in QUILL_API_KEY, or in api_key_file=keys.txt",
            hint=f"quill serve --host {config.host} --api-key-file keys.txt",
        )
    for reference in references:
        registry.resolve(reference)
    listening = bind(config.host, config.port)
    with listening, announced(registry.root, _address(_near(config.host), listening)):
        api, server = assemble(config, registry, references, device, Keys(keys))
        announce(_address(config.host, listening))
        asyncio.run(server.serve(sockets=[listening]))
        api.engine.stop()


def bind(host: str, port: int) -> socket.socket:
    """Listen on an address.

    Raises:
        ResourceError: It cannot be used.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        made = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as e:
        raise ResourceError(f"cannot listen on '{host}'", why=str(e)) from None
    try:
        if os.name == "posix":
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        made.bind(address)
        made.listen(_BACKLOG)
    except OSError as e:
        made.close()
        if e.errno == errno.EADDRINUSE:
            hint = "quill serve --port 0"
            raise ResourceError(f"port {port} on {host} is in use", hint=hint) from None
        raise ResourceError(f"cannot listen on {host}:{port}", why=e.strerror or str(e)) from None
    return made


def _address(host: str, listening: socket.socket) -> str:
    port = listening.getsockname()[1]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _near(host: str) -> str:
    """The address by which this computer itself reaches what listens on another."""
    if not is_any(host):
        return host
    return "::1" if ":" in host else "127.0.0.1"


def assemble(
    config: ServeConfig, registry: Registry, references: Sequence[str], device: str, keys: Keys
) -> tuple[Api, Server]:
    api = Api(config, Catalog(registry, references), device)
    app = Guard(
        build(api),
        keys=keys,
        host=config.host,
        hosts=config.allow_host,
        origins=config.cors_origin,
        open_metrics=config.open_metrics,
        observe=api.observe,
    )
    settings = uvicorn.Config(
        app,
        http=Protocol,
        ws="none",
        lifespan="on",
        loop="asyncio",
        log_config=None,
        log_level="error",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=_IDLE_CONNECTION,
        h11_max_incomplete_event_size=MOST_HEADER_BYTES,
        timeout_graceful_shutdown=3,
    )
    return api, Server(settings, api)
