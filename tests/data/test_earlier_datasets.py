"""Datasets that earlier releases prepared: they list, verify and train, and are not prepared again."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quill.config import reading
from quill.data import prepare, resolve, shards, store
from quill.data.dataset import Dataset
from quill.registry.store import Registry
from quill.training import run

FIXTURES = Path(__file__).resolve().parent / "fixtures"
TEXT = FIXTURES / "sea.txt"
RELEASES = sorted(p.name for p in FIXTURES.glob("v*"))
# Settings that each was prepared with.
NAMES: dict[str, dict[str, Any]] = {
    "chars": {},
    "words": {"tokenizer": "word", "vocab_size": 60, "val_fraction": 0.2},
    "pairs": {"tokenizer": "bpe", "vocab_size": 270},
}


@pytest.fixture(params=RELEASES)
def earlier(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A data root as that release left it."""
    return Path(shutil.copytree(FIXTURES / request.param, tmp_path / "data"))


@pytest.fixture
def unwritten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail on any attempt to write tokens."""
    monkeypatch.setattr(shards, "write", lambda *a: pytest.fail("it was prepared again"))


def test_they_are_listed_and_verified(earlier: Path) -> None:
    assert [(e.name, e.damage) for e in store.entries(earlier)] == [(name, "") for name in sorted(NAMES)]
    text = TEXT.read_text()
    for dataset in store.datasets(earlier):
        dataset.verify()
        ids = [*dataset.train[:].tolist(), *dataset.val[:].tolist()]
        assert dataset.tokenizer.decode(ids) == text


@pytest.mark.parametrize("name", NAMES)
def test_they_are_found_by_name_and_by_text(
    earlier: Path, name: str, unwritten: None, config: Callable[..., Any]
) -> None:
    for settings in ({}, NAMES[name]):
        assert resolve.ensure(config(name, **settings), earlier).path == earlier / name
    if name != "pairs" or pytest.importorskip("rustbpe"):
        assert prepare.prepare(config(TEXT, **NAMES[name]), earlier).path == earlier / name


@pytest.mark.parametrize("name", NAMES)
def test_they_train_without_being_prepared_again(earlier: Path, name: str, unwritten: None) -> None:
    files = {p: (p.stat().st_ino, p.read_bytes()) for p in (earlier / name).iterdir()}
    settings = {
        "name": "sea",
        "data": {"source": name},
        "model": {"n_layer": 1, "n_head": 1, "n_embd": 4, "block_size": 16},
        "train": {"batch_size": 2, "max_iters": 2, "eval_interval": 2, "device": "cpu", "compile": "off"},
    }
    config = reading.parse(settings, origin="a test")
    version = run.train(config, Registry(earlier.parent / "weights"), earlier).version
    assert version is not None
    manifest = version.manifest
    assert manifest is not None
    assert manifest["data"]["key"] == Dataset.open(earlier / name).key
    assert {p: (p.stat().st_ino, p.read_bytes()) for p in files} == files
