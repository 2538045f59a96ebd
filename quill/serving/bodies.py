"""Reads the body of a request within its bounds."""

from __future__ import annotations

import asyncio
from typing import Any
from urllib.parse import parse_qsl

from starlette.requests import ClientDisconnect, Request

from quill import strictjson
from quill.errors import InputError
from quill.serving.errors import ApiError, invalid

# Larger documents are parsed off the event loop.
_LARGE = 1 << 14
_CLOSE = {"connection": "close"}
_JSON, _FORM = "application/json", "application/x-www-form-urlencoded"
_MOST_FIELDS = 100


async def read(request: Request, limit: int) -> bytes:
    """Read a body whole.

    Raises:
        ApiError: It is too large, or its length is not a number.
    """
    declared = request.headers.get("content-length", "0")
    # The rest of a body that is too large would be taken for the next request.
    too_large = ApiError(413, f"a body has at most {limit:,} bytes", "body_too_large", headers=_CLOSE)
    if not declared.isdecimal() or len(declared) > 18 or int(declared) > limit:
        raise too_large
    chunks, size = [], 0
    try:
        async for chunk in request.stream():
            size += len(chunk)
            if size > limit:
                raise too_large
            chunks.append(chunk)
    except ClientDisconnect:
        raise ApiError(400, "the body ends early", "incomplete_body", headers=_CLOSE) from None
    return b"".join(chunks)


async def read_json(request: Request, limit: int) -> Any:
    """Read a JSON body.

    Raises:
        ApiError: It is not declared as JSON, is too large, or is not strict JSON.
    """
    if _kind(request) != _JSON:
        raise ApiError(415, f"the content type must be {_JSON}", "unsupported_media_type", headers=_CLOSE)
    raw = await read(request, limit)
    return await asyncio.to_thread(_parse, raw) if len(raw) > _LARGE else _parse(raw)


async def read_parameters(request: Request, limit: int) -> dict[str, Any]:
    """Read parameters from the query, and from a body of JSON or of form fields, which wins."""
    fields = _fields(request.scope["query_string"].decode("latin-1"))
    kind = _kind(request)
    if kind == _JSON:
        document = await read_json(request, limit)
        if not isinstance(document, dict):
            raise invalid("the body is not a JSON object", code="invalid_json")
        return {**fields, **document}
    raw = await read(request, limit)
    if not raw:
        return fields
    if kind != _FORM:
        raise ApiError(415, f"the content type must be {_JSON} or {_FORM}", "unsupported_media_type")
    return {**fields, **_fields(raw.decode("latin-1"))}


def _kind(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def _fields(text: str) -> dict[str, Any]:
    """Form fields; those that look like numbers are numbers."""
    try:
        pairs = parse_qsl(text, keep_blank_values=True, errors="strict", max_num_fields=_MOST_FIELDS)
    except ValueError:
        raise invalid("the parameters are not UTF-8, or too many") from None
    return {name: value if name in ("prompt", "model") else _number(value) for name, value in pairs}


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text) if len(text) < 40 else text
        except ValueError:
            continue
    return text


def _parse(raw: bytes) -> Any:
    try:
        document = strictjson.parse(raw, origin="the body", finite=True)
    except InputError as e:
        raise invalid(str(e), code="invalid_json") from None
    if b"\\ud" in raw.lower():
        _refuse_surrogates(document)
    return document


def _refuse_surrogates(document: Any) -> None:
    try:
        strictjson.dumps(document).encode()
    except UnicodeEncodeError:
        raise invalid(
            "the body contains a lone surrogate, which is not a character", code="invalid_json"
        ) from None
