"""A data root and a text to prepare."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from quill.config.settings import DataConfig

TEXT = "".join(f"{i} bells, and the tide is {i * 7 % 12} feet.\n" for i in range(200))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data root with nothing in it, not yet on disk."""
    return tmp_path / "data"


@pytest.fixture
def text() -> str:
    """Some lines of text."""
    return TEXT


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Write a file as if long ago, so that its times can be trusted: `write("a.txt", "text")`."""

    def write(name: str, content: str | bytes = TEXT) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take files just written for files written long ago."""
    now = time.time
    monkeypatch.setattr("quill.data.sources.time.time", lambda: now() + 3600)


@pytest.fixture
def config() -> Callable[..., DataConfig]:
    """Data settings by source: `config(path, tokenizer="gpt2")`."""

    def config(source: str | Path | list[str], **settings: object) -> DataConfig:
        plain = os.fspath(source) if isinstance(source, Path) else source
        return DataConfig.model_validate({"source": plain, **settings})

    return config
