"""What all formats have in common on their way in: names, checks, the Hub, and nothing kept of a failure."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch

from quill import fsio
from quill.errors import CorruptError, InputError, NotFoundError, ResourceError
from quill.formats import base, exporting, importing
from quill.formats.hf import hub as _hub
from quill.registry.store import Registry
from quill.tokenizers.char import CharTokenizer


@pytest.fixture
def folder(publish, tmp_path: Path) -> Path:
    """A model as transformers has it."""
    return exporting.export(publish("openai"), "hf", tmp_path / "Tiny_GPT").path


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "other")


@pytest.fixture
def hub(folder, monkeypatch):
    """The Hub with one repository; the list tells what was asked for."""
    asked: list[str] = []

    def fetch(repository: str, observer=None) -> Path:
        if repository != "org/Tiny":
            raise NotFoundError(f"no repository '{repository}'")
        asked.append(repository)
        return folder

    monkeypatch.setattr(_hub, "fetch", fetch)
    return asked


def replaced(monkeypatch, **changes):
    """Have the folder read with something changed."""
    kind = type(base.load("hf"))
    read = kind.read

    def changed(self, path, beside):
        found = read(self, path, beside)
        told = {n: getattr(found, n) for n in ("model", "weights", "tokenizer", "facts", "notes")}
        return base.Incoming(**{**told, **{k: make(found) for k, make in changes.items()}})

    monkeypatch.setattr(kind, "read", changed)


def test_a_model_is_called_after_its_source(folder, hub, registry):
    assert importing.import_model(str(folder), registry).reference == "tiny_gpt:v1"
    assert importing.import_model("hf:org/Tiny", registry).reference == "tiny:v1"
    plain = folder.rename(folder.with_name("model"))
    assert importing.import_model(str(plain), registry).name not in ("model", "")


def test_a_repository_is_fetched_once_and_found_afterwards(hub, registry):
    first = importing.ensure("hf:org/Tiny", registry)
    assert first.manifest is not None
    assert first.manifest["parent"]["reference"] == "hf:org/Tiny"
    assert importing.ensure("hf:org/Tiny", registry) == first
    assert importing.ensure("tiny", registry) == first
    assert hub == ["org/Tiny"]
    with pytest.raises(NotFoundError, match="org/none"):
        importing.ensure("hf:org/none", registry)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tokenizer": lambda f: CharTokenizer([chr(300 + i) for i in range(500)])}, "the tokenizer is not"),
        ({"weights": lambda f: {n: t.double() for n, t in f.weights.items()}}, "is torch.float64"),
        ({"weights": lambda f: {**f.weights, "h.9.x": torch.zeros(1)}}, "h.9.x is in no such model"),
        ({"weights": lambda f: {"wte.weight": torch.zeros(1)}}, "2 layers, and 1 tensors"),
        (
            {"weights": lambda f: {n: t[1:] if n == "ln_f.bias" else t for n, t in f.weights.items()}},
            "ln_f.bias is (31,), its shape makes it (32,)",
        ),
    ],
)
def test_f04_what_does_not_fit_itself_leaves_nothing(changes, said, folder, registry, monkeypatch):
    replaced(monkeypatch, **changes)
    with pytest.raises((CorruptError, InputError)) as caught:
        importing.import_model(str(folder), registry)
    assert said in str(caught.value)
    assert not registry.entries() and not registry.drafts()


def test_f26_a_disk_that_fills_up_leaves_no_version_and_no_draft(folder, registry, monkeypatch):
    real = fsio._write

    def full(fd: int, data: memoryview) -> None:
        if len(data) > 4_000:
            raise OSError(errno.ENOSPC, "full")
        real(fd, data)

    monkeypatch.setattr(fsio, "_write", full)
    with pytest.raises(ResourceError, match="cannot write"):
        importing.import_model(str(folder), registry, name="a")
    assert not registry.entries() and not registry.drafts()
    monkeypatch.setattr(fsio, "_write", real)
    assert importing.import_model(str(folder), registry, name="a").reference == "a:v2"


def test_a_format_that_is_only_written_is_refused(folder, registry):
    with pytest.raises(InputError, match="cannot be imported from onnx"):
        importing.import_model(str(folder), registry, format_name="onnx")


def test_what_could_be_several_formats_is_asked_for(folder, registry, monkeypatch):
    monkeypatch.setattr(type(base.load("gguf")), "recognises", lambda self, path: True)
    with pytest.raises(InputError, match="several formats") as caught:
        importing.import_model(str(folder), registry)
    assert "--format" in caught.value.hint
