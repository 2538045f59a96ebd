"""What stands before every route: who may call, from where, and with what.

Plain ASGI, since Starlette's own base class for middleware hides that a client has left. Decisions look at
`scope["path"]`, never at a URL, which would contain the Host header.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import logging
import secrets
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any

from quill.serving.errors import ApiError, explain

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
# The scope has the code of a refusal under `REFUSED`.
Observe = Callable[[Scope, int], None]

_log = logging.getLogger(__name__)

REFUSED = "quill.refused"
# All else needs a key. These contain no data: whether the server lives, and pages.
OPEN = frozenset({"/", "/docs", "/health", "/ready"})
OPEN_BELOW = "/static/"
MOST_HEADER_BYTES = 16 << 10
_LOCAL = ("localhost", "127.0.0.1", "::1")
_CLOSE = {"connection": "close"}
_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
)


class Keys:
    """The keys that clients may send; none means that no key is needed.

    Args:
        keys: The keys.
    """

    def __init__(self, keys: Iterable[str] = ()) -> None:
        self._digests = [hashlib.sha256(k.encode()).digest() for k in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def accept(self, given: str) -> bool:
        """Whether this is one of the keys; takes the same time for every wrong one."""
        digest = hashlib.sha256(given.encode("utf-8", "surrogatepass")).digest()
        found = False
        for known in self._digests:
            found |= hmac.compare_digest(digest, known)
        return found


class Guard:
    """Checks each request, and turns every failure into an answer.

    Args:
        app: The routes.
        keys: The keys that clients may send.
        host: The address that the server listens on.
        hosts: Further names that clients may call it by.
        origins: Web pages that may call it.
        open_metrics: Whether metrics need no key.
        observe: Called with the scope and the status of each answer.
    """

    def __init__(
        self,
        app: App,
        *,
        keys: Keys,
        host: str,
        hosts: Iterable[str] = (),
        origins: Iterable[str] = (),
        open_metrics: bool = False,
        observe: Observe = lambda scope, status: None,
    ) -> None:
        self._app, self._keys, self._observe = app, keys, observe
        self._hosts = {name.lower().rstrip(".") for name in (*_LOCAL, host, *hosts)}
        self._any_address = is_any(host)
        self._origins = {origin.lower().rstrip("/") for origin in origins}
        self._open = OPEN | {"/metrics"} if open_metrics else OPEN

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id, origin = secrets.token_hex(8), _header(scope, b"origin")
        status = 0

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = [*message.get("headers", ()), *_HEADERS, (b"x-request-id", request_id.encode())]
                if origin.lower() in self._origins:
                    headers += [(b"access-control-allow-origin", origin.encode()), (b"vary", b"Origin")]
                message = {**message, "headers": headers}
            await send(message)

        try:
            self._check(scope, origin)
            if origin and scope["method"] == "OPTIONS":
                await _preflight(answer)
            else:
                await self._app(scope, receive, answer)
        except Exception as e:
            error = explain(e)
            if error.code == "internal_error":
                _log.exception("request %s failed", request_id)
            if not status:
                scope[REFUSED] = error.code
                await respond(error, answer)
        finally:
            self._observe(scope, status)

    def _check(self, scope: Scope, origin: str) -> None:
        # h11 bounds only what has not arrived whole.
        size = len(scope["raw_path"]) + len(scope["query_string"])
        if size + sum(len(k) + len(v) for k, v in scope["headers"]) > MOST_HEADER_BYTES:
            message = f"headers and path have at most {MOST_HEADER_BYTES:,} bytes"
            raise ApiError(431, message, "headers_too_large", headers=_CLOSE)
        self._check_host(scope)
        self._check_origin(scope, origin)
        path = scope["path"]
        is_open = path in self._open or path.startswith(OPEN_BELOW)
        if self._keys and not is_open and not (origin and scope["method"] == "OPTIONS"):
            self._check_key(scope)

    def _check_host(self, scope: Scope) -> None:
        """Refuse names that are not the server's: a page may point its own name at this machine."""
        given = [v.decode("latin-1") for k, v in scope["headers"] if k == b"host"]
        name = hostname(given[0]) if len(given) == 1 else ""
        if name in self._hosts or (self._any_address and _is_address(name)):
            return
        message = f"the host {name[:80]!a} is not allowed" if name else "there is no single Host header"
        raise ApiError(403, message, "host_not_allowed", headers=_CLOSE)

    def _check_origin(self, scope: Scope, origin: str) -> None:
        """Refuse other pages: a browser sends some of their requests without asking anyone."""
        if origin:
            own = f"{scope['scheme']}://{_header(scope, b'host')}".lower()
            if origin.lower() not in (own, *self._origins):
                message = f"the origin {origin[:80]!a} is not allowed"
                raise ApiError(403, message, "origin_not_allowed", headers=_CLOSE)
        elif _header(scope, b"sec-fetch-site") == "cross-site":
            raise ApiError(403, "cross-site requests are not allowed", "origin_not_allowed", headers=_CLOSE)

    def _check_key(self, scope: Scope) -> None:
        given = [_header(scope, name) for name in (b"x-api-key", b"api-key")]
        kind, _, token = _header(scope, b"authorization").partition(" ")
        if kind.lower() == "bearer":
            given.append(token.strip())
        accepted = [self._keys.accept(key) for key in given if key]
        if True not in accepted:
            message = "the API key is missing or wrong"
            raise ApiError(401, message, "invalid_api_key", headers={"www-authenticate": "Bearer"})


async def respond(error: ApiError, send: Send) -> None:
    """Send an error as a whole answer."""
    headers = [(b"content-type", b"application/json")]
    headers += [(k.encode(), v.encode()) for k, v in error.headers.items()]
    body = error.body()
    headers.append((b"content-length", str(len(body)).encode()))
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def hostname(host: str) -> str:
    """The name or address in a Host header, in lower case, without a port."""
    name = host.strip().lower()
    if name.startswith("["):
        return name[1:].partition("]")[0]
    return name.partition(":")[0].rstrip(".")


def is_local(host: str) -> bool:
    """Whether only programs on this machine can reach an address."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def is_any(host: str) -> bool:
    """Whether an address stands for all of the machine's."""
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return host == ""


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _header(scope: Scope, name: bytes) -> str:
    return next((v.decode("latin-1") for k, v in scope["headers"] if k == name), "")


async def _preflight(send: Send) -> None:
    headers = [
        (b"access-control-allow-methods", b"GET, POST"),
        (b"access-control-allow-headers", b"authorization, content-type, x-api-key"),
        (b"access-control-max-age", b"600"),
        (b"content-length", b"0"),
    ]
    await send({"type": "http.response.start", "status": 204, "headers": headers})
    await send({"type": "http.response.body", "body": b""})
