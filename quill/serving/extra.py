"""The packages that only the server needs."""

from __future__ import annotations

from importlib.util import find_spec

from quill.errors import InputError

_PACKAGES = ("starlette", "uvicorn", "h11", "prometheus_client")


def require_extra() -> None:
    """Refuse to start without the packages of the extra.

    Raises:
        InputError: One is missing.
    """
    for package in _PACKAGES:
        if find_spec(package) is None:
            raise InputError(
                f"the package {package} is not installed",
                why="only the server needs it, so quill does not install it by default",
                hint="pip install 'quill-gpt[serve]'",
            )
