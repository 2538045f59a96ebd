"""The files of the playground, as the server sends them: from the package, and no others."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import lru_cache
from importlib.resources import files

from starlette.responses import Response

from quill.explanation import page
from quill.serving.errors import ApiError

_TYPES = {
    "html": "text/html",
    "js": "text/javascript",
    "css": "text/css",
    "svg": "image/svg+xml",
}
# A page loads what this server sends it and nothing else, and its scripts cannot turn text into markup.
HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    ),
    "cross-origin-opener-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
}


@lru_cache
def assets() -> dict[str, bytes]:
    """Every file by its name; those that show an explanation are shared with `quill explain --html`."""
    own = files("quill").joinpath("serving", "assets")
    found = {f.name: f.read_bytes() for f in own.iterdir() if f.name.rpartition(".")[2] in _TYPES}
    return found | {name: page.asset(name).encode() for name in page.ASSETS}


def respond(name: str, headers: Mapping[str, str]) -> Response:
    """Send a file, or say that the client has it.

    Args:
        name: The file.
        headers: Those of the request.

    Raises:
        ApiError: There is no such file.
    """
    content = assets().get(name)
    if content is None:
        raise ApiError(404, f"no file {name[:80]!a}", "not_found")
    tag = f'"{hashlib.sha256(content).hexdigest()[:16]}"'
    kept = {"cache-control": "no-cache", "etag": tag}
    if headers.get("if-none-match") == tag:
        return Response(status_code=304, headers=kept)
    kind = name.rpartition(".")[2]
    return Response(content, headers=kept | HEADERS, media_type=_TYPES[kind])
