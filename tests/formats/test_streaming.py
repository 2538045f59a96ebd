"""Exports that write one weight at a time: the same bytes as from memory, and no weight is read early."""

from __future__ import annotations

import weakref

import pytest
from shapes import SHAPES

from quill.checkpoint.load import load_checkpoint, open_checkpoint
from quill.checkpoint.weights import StoredWeights
from quill.errors import CorruptError
from quill.formats import base, exporting

STREAMED = [n for n in base.names() if base.load(n).streams]


def content(path):
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    return {str(f.relative_to(path)): f.read_bytes() for f in files}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", STREAMED)
def test_a_stream_writes_what_is_written_from_memory(name, shape, publish, tmp_path):
    version, kind = publish(shape), base.load(name)
    loaded = load_checkpoint(version)
    if kind.refusal(loaded.model.shape, loaded.tokenizer):
        pytest.skip("the format does not support this shape")
    for dtype in kind.dtypes:
        whole, streamed = tmp_path / f"whole-{dtype}", tmp_path / f"streamed-{dtype}"
        kind.write(loaded, whole, dtype)
        with open_checkpoint(version) as opened:
            kind.write(opened, streamed, dtype)
        assert content(streamed) == content(whole)


@pytest.mark.parametrize("shape", ["openai", "modern"])
@pytest.mark.parametrize("name", STREAMED)
def test_a_weight_is_gone_before_the_next_is_read(name, shape, publish, tmp_path, monkeypatch):
    alive: list[weakref.ref] = []
    read = StoredWeights.__getitem__

    def watched(self, key):
        assert not [r for r in alive if r() is not None], key
        found = read(self, key)
        # What is written are views of it, which keep its memory.
        alive.append(weakref.ref(found.untyped_storage()))
        return found

    monkeypatch.setattr(StoredWeights, "__getitem__", watched)
    for dtype in base.load(name).dtypes:
        exporting.export(publish(shape, name=f"m-{dtype}"), name, tmp_path / dtype, dtype=dtype)
    assert alive


def test_damaged_weights_are_refused_before_anything_is_written(publish, tmp_path):
    version = publish("openai")
    with (version.path / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))
    for name in STREAMED:
        with pytest.raises(CorruptError, match="damaged"):
            exporting.export(version, name, tmp_path / name)
        assert not (tmp_path / name).exists()
