"""Importing, for every format: names, checks, the Hub, repeated imports, and no trace of a failure."""

from __future__ import annotations

import json
import pickle
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from quill.checkpoint.load import read_tokenizer
from quill.errors import CorruptError, InputError, NotFoundError, RefusedError, ResourceError
from quill.formats import base, exporting, importing
from quill.formats.hf import hub as hub_module
from quill.registry.store import Registry
from quill.tokenizers.char import CharTokenizer


@pytest.fixture
def folder(publish, tmp_path: Path) -> Path:
    """A model in the format of transformers."""
    return exporting.export(publish("openai"), "hf", tmp_path / "Tiny_GPT").path


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "other")


@pytest.fixture
def hub(folder, monkeypatch):
    """The Hub with one repository; the list records what was fetched."""
    asked: list[str] = []

    def fetch(repository: str, observer=None) -> Path:
        if repository != "org/Tiny":
            raise NotFoundError(f"no repository '{repository}'")
        asked.append(repository)
        return folder

    monkeypatch.setattr(hub_module, "fetch", fetch)
    return asked


def replaced(monkeypatch, **changes):
    """Make reading the folder return something changed."""
    kind = type(base.load("hf"))
    read = kind.read

    def changed(self, path, supplied):
        found = read(self, path, supplied)
        told = {n: getattr(found, n) for n in ("model", "weights", "tokenizer", "facts", "notes")}
        return base.Incoming(**{**told, **{k: make(found) for k, make in changes.items()}})

    monkeypatch.setattr(kind, "read", changed)


def test_a_model_is_named_after_its_source(folder, hub, registry):
    assert importing.import_model(str(folder), registry).reference == "tiny_gpt:v1"
    assert importing.import_model("hf:org/Tiny", registry).reference == "tiny:v1"
    plain = folder.rename(folder.with_name("model"))
    assert importing.import_model(str(plain), registry).name not in ("model", "")


def test_a_repository_is_fetched_only_once(hub, registry):
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
        (
            {"tokenizer": lambda f: CharTokenizer([chr(300 + i) for i in range(500)])},
            "the tokenizer does not belong",
        ),
        ({"weights": lambda f: {n: t.double() for n, t in f.weights.items()}}, "is torch.float64"),
        (
            {"weights": lambda f: {**f.weights, "h.9.x": torch.zeros(1)}},
            "'h.9.x' does not belong to this model",
        ),
        ({"weights": lambda f: {"wte.weight": torch.zeros(1)}}, "2 layers, but only 1 tensors"),
        (
            {"weights": lambda f: {n: t[1:] if n == "ln_f.bias" else t for n, t in f.weights.items()}},
            "ln_f.bias has shape (31,) instead of (32,)",
        ),
    ],
)
def test_f04_an_inconsistent_model_leaves_nothing_behind(changes, said, folder, registry, monkeypatch):
    replaced(monkeypatch, **changes)
    with pytest.raises((CorruptError, InputError)) as caught:
        importing.import_model(str(folder), registry)
    assert said in str(caught.value)
    assert not registry.entries() and not registry.drafts()


def test_f26_weights_that_cannot_be_written_leave_no_version_and_no_draft(folder, registry):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4_000, hard))
    try:
        with pytest.raises(ResourceError, match="cannot write"):
            importing.import_model(str(folder), registry, name="a")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not registry.entries() and not registry.drafts()
    assert importing.import_model(str(folder), registry, name="a").reference == "a:v2"


def test_importing_from_an_export_only_format_is_refused(folder, registry):
    with pytest.raises(InputError, match="cannot be imported from onnx"):
        importing.import_model(str(folder), registry, format_name="onnx")


def test_an_ambiguous_format_is_refused(folder, registry, monkeypatch):
    monkeypatch.setattr(type(base.load("gguf")), "recognises", lambda self, path: True)
    with pytest.raises(InputError, match="ambiguous") as caught:
        importing.import_model(str(folder), registry)
    assert caught.value.hint == "format=gguf"


@pytest.fixture
def nanogpt(publish, tmp_path: Path) -> Path:
    """A checkpoint of nanoGPT, with its characters in a meta.pkl next to it."""
    return exporting.export(publish("nanogpt"), "nanogpt", tmp_path / "nano").path / "ckpt.pt"


def test_importing_again_with_another_vocabulary_is_refused(nanogpt, registry, tmp_path):
    first = importing.import_model(str(nanogpt), registry, name="a")
    assert importing.import_model(str(nanogpt), registry, name="a") == first
    characters = read_tokenizer(first).to_dict()["vocabulary"]
    given = tmp_path / "other.pkl"
    given.write_bytes(pickle.dumps(meta(characters[::-1])))
    for supplied in ({"tokenizer": str(given)}, {}):
        with pytest.raises(RefusedError, match="a:v1 is a different model") as caught:
            importing.import_model(str(nanogpt), registry, name="a", **supplied)
        assert caught.value.why == "its tokenizer has another vocabulary"
        assert caught.value.hint == "new_version=True"
        # The same vocabulary in the file that was found before, not given.
        shutil.copy(given, nanogpt.with_name("meta.pkl"))
    other = importing.import_model(str(nanogpt), registry, name="a", new_version=True)
    assert other.reference == "a:v2"
    assert importing.import_model(str(nanogpt), registry, name="a", new_version=True) == other
    assert importing.import_model(str(nanogpt), registry, name="b").reference == "b:v1"


def test_importing_again_with_another_config_is_refused(publish, registry, tmp_path):
    folder = exporting.export(publish("quillgpt"), "quillgpt", tmp_path / "their").path
    path = next(folder.glob("*.pt"))
    importing.import_model(str(path), registry, name="a")
    document = json.loads((folder / "config.json").read_text())
    given = tmp_path / "given.json"
    given.write_text(json.dumps(document | {"dropout": 0.5}))
    with pytest.raises(RefusedError, match="different model") as caught:
        importing.import_model(str(path), registry, name="a", config=given)
    assert caught.value.why == f"model.dropout was {document['dropout']}, not 0.5"


def test_importing_over_a_model_that_was_trained_is_refused(nanogpt, publish, tmp_path):
    publish("nanogpt", name="mine")
    with pytest.raises(RefusedError, match="mine:v1 is a different model") as caught:
        importing.import_model(str(nanogpt), Registry(tmp_path / "weights"), name="mine")
    assert "not imported" in caught.value.why


def test_importing_other_files_under_the_name_is_refused(nanogpt, folder, registry):
    importing.import_model(str(nanogpt), registry, name="a")
    with pytest.raises(RefusedError) as caught:
        importing.import_model(str(folder), registry, name="a")
    assert "other files (ckpt.pt)" in caught.value.why
    assert "its format was nanogpt, not hf" in caught.value.why


def meta(characters: list[str]) -> dict[str, Any]:
    ids = {c: i for i, c in enumerate(characters)}
    return {"vocab_size": len(ids), "stoi": ids, "itos": {i: c for c, i in ids.items()}}
