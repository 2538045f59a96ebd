"""A server of the smallest model, shared by all tests that do not change it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from servers import Running, running

from quill.registry.store import Registry

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")


@pytest.fixture(scope="session")
def server(tiny_registry: Registry) -> Iterator[Running]:
    """A server of the model `tiny`."""
    with running(tiny_registry, "--drain", "1") as made:
        yield made
