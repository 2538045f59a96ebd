"""Registries made by hand, so that commands that only read need no training."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import safetensors.numpy

from quill.registry.draft import Draft
from quill.registry.store import Registry
from quill.registry.version import Version

Publish = Callable[..., Version]


@pytest.fixture
def publish(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> Publish:
    """Publish a version of small files: publish("name", best_val_loss=1.5); commands look there too."""
    monkeypatch.setenv("QUILL_REGISTRY", str(registry.root))

    def make(name: str, **facts: object) -> Version:
        draft = registry.begin(name)
        _fill(draft)
        return draft.publish(**({"parameters": 10_788_929, "best_val_loss": 1.4697} | facts))

    return make


def _fill(draft: Draft) -> None:
    weights = safetensors.numpy.save({"wte.weight": np.zeros(64, dtype=np.uint8)})
    draft.write_bytes("model.safetensors", weights)
    draft.write_json("config.json", {"schema_version": 1, "name": "x", "model": {"n_layer": 2}})
    draft.write_json("tokenizer.json", {"schema": 1, "kind": "char", "vocabulary": "ab"})
