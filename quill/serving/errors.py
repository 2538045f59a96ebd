"""What goes wrong with a request, as a status and the body that OpenAI's clients expect."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from quill.errors import (
    CorruptError,
    DivergedError,
    InputError,
    LockedError,
    NotFoundError,
    QuillError,
    ResourceError,
)

# A retry cannot help.
_FINAL = {"x-should-retry": "false"}
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
}


class ApiError(Exception):
    """A request that is answered with an error.

    Args:
        status: The HTTP status.
        message: What is wrong, for people.
        code: What is wrong, for programs.
        param: The field of the request that is wrong.
        headers: Further headers of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        *,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = dict(headers or {})

    def document(self) -> dict[str, Any]:
        """The body."""
        kind = _TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def body(self) -> bytes:
        """The body as JSON."""
        return dump(self.document())


def dump(document: Any) -> bytes:
    """Write an answer; it cannot fail on lone surrogates."""
    return json.dumps(document, separators=(",", ":"), allow_nan=False).encode()


def invalid(message: str, param: str | None = None, code: str = "invalid_value") -> ApiError:
    """A request that breaks a rule."""
    return ApiError(400, message, code, param=param)


def explain(error: Exception, param: str | None = None) -> ApiError:
    """The answer to an error of the library; anything else is a bug and tells nothing of its insides."""
    if isinstance(error, ApiError):
        return error
    message = str(error)
    if isinstance(error, QuillError) and error.hint and isinstance(error, InputError):
        message = f"{message}; try: {error.hint}"
    if isinstance(error, NotFoundError):
        if error.close:
            message = f"{message}; did you mean {', '.join(error.close[:3])}?"
        return ApiError(404, message, "model_not_found", param="model")
    if isinstance(error, InputError):
        return ApiError(400, message, "invalid_value", param=param)
    if isinstance(error, CorruptError | ResourceError):
        return ApiError(503, message, "model_unusable", param="model", headers=_FINAL)
    if isinstance(error, LockedError):
        return ApiError(503, message, "loading", headers={"retry-after": "1"})
    if isinstance(error, DivergedError):
        return ApiError(500, message, "diverged", headers=_FINAL)
    if isinstance(error, MemoryError):
        return ApiError(503, "out of memory", "model_unusable", headers=_FINAL)
    return ApiError(500, "this is a bug in quill", "internal_error", headers=_FINAL)
