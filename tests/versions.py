"""Registries to test with: small versions made without torch, and real models where one is needed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from quill import fsio
from quill.registry.draft import Draft
from quill.registry.store import Registry
from quill.registry.version import Version

TINY = {"block": "modern", "n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 8, "vocab_size": 7}


@pytest.fixture
def registry(tmp_path) -> Registry:
    """A registry that does not exist yet."""
    return Registry(tmp_path / "weights")


def _fill(place: Draft | Path, payload: bytes = bytes(range(64)), durable: bool = True) -> None:
    """Write the small files of a version into a draft, or past any draft into a folder."""
    weights = safetensors.numpy.save({"wte.weight": np.frombuffer(payload, dtype=np.uint8)})
    config = {"schema_version": 1, "name": "x"}
    tokenizer = {"schema": 1, "kind": "char", "vocabulary": "ab"}
    if isinstance(place, Draft):
        place.write_bytes("model.safetensors", weights)
        place.write_json("config.json", config)
        place.write_json("tokenizer.json", tokenizer)
        return
    fsio.write_bytes(place / "model.safetensors", weights, durable=durable)
    fsio.write_json(place / "config.json", config, durable=durable)
    fsio.write_json(place / "tokenizer.json", tokenizer, durable=durable)


def _finish(draft: Draft, **fields) -> Version:
    """Fill and publish a draft."""
    _fill(draft, bytes([draft.number % 256]) * 64)
    return draft.publish(**({"parameters": 64, "best_val_loss": 1.5} | fields))


@pytest.fixture
def fill():
    """Write the files of a version: fill(draft), or fill(folder)."""
    return _fill


@pytest.fixture
def finish():
    """Fill and publish a draft: finish(draft)."""
    return _finish


@pytest.fixture
def publish(registry):
    """Publish the next version of a name."""
    return lambda name, **fields: _finish(registry.begin(name), **fields)


@pytest.fixture(scope="session")
def model():
    """A tiny GPT with a char tokenizer's vocabulary of 7."""
    from quill.config.settings import ModelConfig
    from quill.model.gpt import GPT

    return GPT(ModelConfig.model_validate(TINY).shape()).eval()


@pytest.fixture
def trained(registry, model):
    """Publish a version that loads: ready(name="tiny", dtype="float32") -> Version."""
    from quill.checkpoint.weights import save_weights
    from quill.config.settings import RunConfig
    from quill.tokenizers import base

    def ready(name: str = "tiny", dtype: str = "float32") -> Version:
        draft = registry.begin(name)
        config = RunConfig.model_validate({"name": name, "model": TINY})
        tokenizer = base.load("char").train([], vocabulary=list("abcdefg"))
        draft.write_json("config.json", config.to_dict())
        draft.write_json("tokenizer.json", tokenizer.to_dict())
        draft.write_file("model.safetensors", lambda path: save_weights(path, model, dtype))
        return draft.publish(parameters=sum(p.numel() for p in model.parameters()))

    return ready
